"""Files of the safetensors library, which is optional: weights by name, and text about them."""

import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.runtime import plain_json
from utils.runtime.errors import InputError

ENDING = ".safetensors"


def has_ending(path: str | Path) -> bool:
    """Whether a path is one of a safetensors file by its ending."""
    return Path(path).suffix.lower() == ENDING


def check_library(what: str) -> None:
    """InputError that begins with `what` if the library is not installed."""
    if not importlib.util.find_spec("safetensors"):
        raise InputError(f"{what}: needs the package safetensors (pip install it)")


def encode(weights: dict[str, Tensor], metadata: dict[str, Any], *, format: str) -> bytes:
    """A file's bytes. metadata: in its header, text as it is, anything else as JSON."""
    from safetensors.torch import save

    header = {n: v if isinstance(v, str) else plain_json.dumps(v) for n, v in metadata.items()}
    return save(weights, header | {"cmsf": format, "format": "pt"})


def decode(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """Weights, metadata and format of a file; of a file of others {} and None."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        header = dict(file.metadata() or {})
    if "cmsf" not in header:
        return weights, {}, None
    format = header.pop("cmsf")
    # Early versions added a digest.
    about = {n: _value(v) for n, v in header.items() if n not in ("format", "digest")}
    return weights, about, format


def _value(text: str) -> Any:
    try:
        return plain_json.loads(text)
    except ValueError:
        return text
