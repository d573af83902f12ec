"""Files of torch.save: read without running code that may be in them, and tensors out of them.

A file that looks right can hold tensors that no network takes: sparse ones, ones without data. Here
is said what a tensor out of a file must be, as `checked` says it of other values.
"""

import argparse
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.runtime import checked
from utils.runtime.checked import Kind
from utils.runtime.errors import InputError, printable

_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
# How torch names what it refuses to make, behind advice to load the file all the same.
_REFUSED = (
    r"GLOBAL (\S+) was not an allowed",
    r"unsupported GLOBAL (\S+) whose module",
    r"Unsupported class (\S+)",
    r"add_safe_globals`,? but got <class '([^']+)'>",
    r"unrecognized function (.+)",
    r"be imported to load (nested jagged tensors|DTensors)",
    r"with (TorchScript) archives",
)
_REASON = 120  # characters of torch's own words
_NAME = 80  # characters of a name out of a file


class NotAllowedError(ValueError):
    """A whole file that holds more than tensors and plain values; says what, in one line."""


def read(path: str | Path) -> Any:
    """What torch.save has put into a file, on the CPU.

    argparse.Namespace, of published checkpoints, is the one class let in beside tensors and
    builtins. NotAllowedError for a file with another; about any error for one that is damaged.
    """
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            found = [match for p in _REFUSED if (match := re.search(p, str(error)))]
            if not found:
                raise
            raise NotAllowedError(
                f"holds {one_line(found[0][1].rstrip('.'))}, a pickled object; only tensors and "
                "plain values are read (save its state_dict())"
            ) from error


def reason(error: Exception) -> str:
    """An error of torch's in few words of one line, without its advice and escape codes."""
    if isinstance(error, LookupError):  # its text is a number
        return "no file of torch.save"
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error)).rpartition("WeightsUnpickler error:")[2]
    return one_line(next(iter(text.strip().splitlines()), type(error).__name__), most=_REASON)


def one_line(text: str, *, most: int = _NAME) -> str:
    """A text out of a file as an error can show it: printable, no longer than `most`."""
    text = printable(text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def unfit(tensor: Tensor) -> str | None:
    """Why a tensor cannot be used as an array of numbers ("sparse"), None if it can."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    for name in ("quantized", "nested"):
        if getattr(tensor, f"is_{name}"):
            return name
    if tensor.is_meta:
        return "without data (meta)"
    if tensor.layout != torch.strided:
        return "sparse"
    return None if tensor.dtype in _DTYPES else str(tensor.dtype).removeprefix("torch.")


def check_weights(weights: dict, *, what: str) -> None:
    """InputError that begins with `what` unless these are dense tensors of numbers by name."""
    for name, value in weights.items():
        if not isinstance(name, str):
            raise InputError(f"{what}: a weight's name is {checked.shown(name)}, not text")
        found = unfit(value) if isinstance(value, Tensor) else checked.shown(value)
        if found:
            raise InputError(f"{what}: weight {one_line(name)} is {found}")


def tensor(
    shape: str, holds: Callable[[Tensor], bool], *, dims: int, dtype: torch.dtype | None = None
) -> Kind:
    """A dense tensor, of floating dtype or the one given, for which `holds` is true.

    shape: its shape, and what else it must be, in words. dims: the number of its dimensions.
    """

    def fits(value: Any) -> bool:
        """Whether a value is such a tensor."""
        if not isinstance(value, Tensor) or unfit(value) or value.ndim != dims:
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
