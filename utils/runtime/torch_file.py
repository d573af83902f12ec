"""Files of torch.save: read without running code that may be in them, and tensors out of them.

What a tensor out of a file must be is said here, as `checked` says it of other values.
"""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.runtime import checked
from utils.runtime.checked import Kind
from utils.runtime.errors import DamagedError, InputError, printable

_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
_NAME = 80  # characters of a name out of a file
_FOLDER = 0x10  # in the attributes of an entry of a zip archive


def read(path: str | Path, *, what: str) -> Any:
    """What torch.save has put into a file, on the CPU; no code in it is run.

    argparse.Namespace, of published checkpoints, is the one class let in beside tensors and
    builtins. Raises, begun by `what`, InputError for a whole file with another, DamagedError for
    one that is damaged or of another kind. torch.load itself ignores the archive's checksums, and
    takes an entry for a folder, whose tensor is whatever lay in memory, by a bit that none covers.
    """
    whole = False
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path, what=what)
            whole = True
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except PermissionError as error:
        raise DamagedError(f"{what}: {error.strerror}") from error
    except Exception as error:  # a damaged file can raise about anything
        refused = re.search(r"(?:GLOBAL|class) '?(\w+(?:\.\w+)+)", str(error))
        if not (isinstance(error, pickle.UnpicklingError) and (whole or refused)):
            raise DamagedError(unreadable(what)) from error
        name = f"{one_line(refused[1])}, " if refused else ""
        reason = (
            "a pickled object; only tensors and plain values are read. If you trust it, save its "
            "weights: torch.save(torch.load(FILE, weights_only=False).state_dict(), NEW), of a "
            'dict of several things ["state_dict"] or whatever they are called'
        )
        raise InputError(f"{what}: holds {name}{reason}") from error


def _check_archive(path: str | Path, *, what: str) -> None:
    """InputError, begun by `what`, for an archive that is damaged or a TorchScript program's."""
    with zipfile.ZipFile(path) as archive:
        folders = any(entry.external_attr & _FOLDER for entry in archive.infolist())
        if folders or archive.testzip() is not None:
            raise DamagedError(unreadable(what))
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            advice = "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
            raise InputError(f"{what}: a TorchScript program; save its weights: {advice}")


def unreadable(what: str) -> str:
    """What is said of a file that is damaged, or none."""
    return f"{what}: not a readable checkpoint (damaged, or a file of another kind)"


def one_line(text: str) -> str:
    """A text out of a file as an error can show it: printable and short."""
    text = printable(text)
    return text if len(text) <= _NAME else f"{text[: _NAME - 3]}..."


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is an array of numbers: not sparse, nested, quantized or without data."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and tensor.dtype in _DTYPES and not (tensor.is_nested or tensor.is_meta)


def check_weights(weights: dict, *, what: str) -> None:
    """InputError that begins with `what` unless these are dense tensors of numbers by name."""
    for name, value in weights.items():
        if not isinstance(name, str):
            raise InputError(f"{what}: a weight's name is {checked.shown(name)}, not text")
        if not (isinstance(value, Tensor) and is_dense(value)):
            found = f"weight {one_line(name)} is {checked.shown(value)}"
            raise InputError(f"{what}: {found}, not a dense tensor of numbers")


def tensor(
    shape: str, holds: Callable[[Tensor], bool], *, dims: int, dtype: torch.dtype | None = None
) -> Kind:
    """A dense tensor, of floating dtype or the one given, for which `holds` is true.

    shape: its shape, and what else it must be, in words. dims: the number of its dimensions.
    """

    def fits(value: Any) -> bool:
        """Whether a value is such a tensor."""
        if not isinstance(value, Tensor) or not is_dense(value) or value.ndim != dims:
            return False
        if not (value.is_floating_point() if dtype is None else value.dtype == dtype):
            return False
        # A view can repeat few bytes to more rows than memory has room for.
        return value.untyped_storage().nbytes() >= value.nbytes and holds(value)

    return Kind(f"{str(dtype or 'floating').removeprefix('torch.')} {shape}", fits)


def between(low: int, high: int) -> Callable[[Tensor], bool]:
    """Whether all of a tensor's numbers are from low to high."""
    return lambda value: not value.numel() or low <= int(value.min()) <= int(value.max()) <= high


def is_finite(value: Tensor) -> bool:
    """Whether all of a tensor's numbers are finite; costs about what it takes to read them once."""
    if not value.is_floating_point():
        return True
    # A sum is finite only if every number is; it can also be beyond the range of those that are.
    wide = torch.promote_types(value.dtype, torch.float32)
    return bool(value.sum(dtype=wide).isfinite()) or bool(value.isfinite().all())
