"""JSON that every reader takes: written without nan and infinity, read without trusting the file.

JSON has neither: null stands for them, in what is written here and, where another program has
written them, in what is read.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from utils.runtime.errors import InputError


def dumps(value: Any, *, indent: int | None = None) -> str:
    """The text of builtins (dicts, lists, tuples, ...); what is not finite becomes null."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def loads(text: str) -> Any:
    """The value of a text; ValueError for what is no JSON, nested beyond reason included."""
    try:
        return json.loads(text, parse_constant=lambda name: None, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_text(path: Path) -> str:
    """The text of a file, what is no UTF-8 replaced; InputError that names it if there is none.

    A pipe or a device, from which reading might never end, is refused.
    """
    if os.path.lexists(path) and not path.is_file():
        raise InputError(f"{path}: not a regular file")
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite(text: str) -> float | None:
    """A number of a text; 1e999 has no value of its own either."""
    value = float(text)
    return value if math.isfinite(value) else None
