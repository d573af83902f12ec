"""Files of the safetensors library: weights by name, and text about them in the header.

The format has no checksum, so a file of ours carries a digest of all that is in it. The library is
optional and imported only where such a file is read or written.
"""

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from utils.runtime import plain_json
from utils.runtime.errors import InputError

ENDING = ".safetensors"
_FORMAT, _DIGEST = "cmsf", "digest"


def has_ending(path: str | Path) -> bool:
    """Whether a path is one of a safetensors file by its ending."""
    return Path(path).suffix.lower() == ENDING


def check_library(what: str) -> None:
    """InputError that begins with `what` if the library is not installed."""
    try:
        _library()
    except ImportError as error:
        raise InputError(f"{what}: needs the package safetensors (pip install it)") from error


def encode(weights: dict[str, Tensor], metadata: dict[str, Any], *, format: str) -> bytes:
    """The bytes of a file with these weights (contiguous, on the CPU, none a view of another).

    metadata: values that JSON knows; in the header they are text as it is, or JSON. format: the
    version of the layout, by which `decode` knows the file as one of ours.
    """
    header = {name: _as_text(value) for name, value in metadata.items()}
    header |= {_FORMAT: format, "format": "pt"}  # "pt" for PyTorch: other libraries ask for it
    header[_DIGEST] = _digest(weights, header)
    return _library().torch.save(weights, header)


def decode(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """Weights, metadata and format of a file; of a file of others {} and None.

    ValueError for a file of ours that has changed since; the library's errors for what is no such
    file.
    """
    with _library().safe_open(path, framework="pt", device="cpu") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        header = dict(file.metadata() or {})
    if not header.keys() & {_FORMAT, _DIGEST}:
        return weights, {}, None
    if header.pop(_DIGEST, None) != _digest(weights, header):
        raise ValueError("damaged: its content is not what was written")
    format = header.pop(_FORMAT)
    del header["format"]
    return weights, {name: _from_text(text) for name, text in header.items()}, format


def _library() -> ModuleType:
    import safetensors.torch

    return safetensors


def _digest(weights: dict[str, Tensor], header: dict[str, str]) -> str:
    """SHA-256 (hexadecimal) of everything in a file, whatever the order."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _as_text(value: Any) -> str:
    """Text as it is unless it could be taken for JSON; anything else as JSON."""
    if isinstance(value, str) and _from_text(value) == value:
        return value
    return plain_json.dumps(value)


def _from_text(text: str) -> Any:
    """What `_as_text` has been given."""
    try:
        return plain_json.loads(text)
    except ValueError:
        return text
