"""Values out of files that anybody may have written: each is checked where it is read.

Without that a wrong one fails far from where it was read, in words that name no file.
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from utils.runtime.errors import InputError, printable

MOST = 2**63 - 1  # what an int64 tensor holds
_SHOWN = 40  # characters of a wrong value in a message


class Kind(NamedTuple):
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def whole(low: int = -MOST, high: int = MOST) -> Kind:
    """An int from low to high; True and False are none."""
    words = _limited("a whole number", low, high)
    return Kind(words, lambda value: type(value) is int and low <= value <= high)


def real(low: float = -math.inf, high: float = math.inf) -> Kind:
    """A finite int or float from low to high."""
    return Kind(
        _limited("a finite number", low, high),
        lambda v: type(v) in (int, float) and abs(v) <= sys.float_info.max and low <= v <= high,
    )


TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
ANY = Kind("anything", lambda value: True)
TABLE = Kind("a table", lambda value: isinstance(value, dict))
PLAIN = Kind("plain values", lambda value: _is_plain(value, deep=4))


def list_of(kind: Kind) -> Kind:
    """A list or tuple of values of a kind."""
    return Kind(
        f"a list of {kind.words}",
        lambda value: isinstance(value, (list, tuple)) and all(map(kind.holds, value)),
    )


def table_of(kind: Kind) -> Kind:
    """A dict of text to values of a kind."""

    def holds(value: Any) -> bool:
        """Whether a value is such a dict."""
        is_table = isinstance(value, dict) and all(map(TEXT.holds, value))
        return is_table and all(map(kind.holds, value.values()))

    return Kind(f"a table of {kind.words}", holds)


def or_none(kind: Kind) -> Kind:
    """A value of a kind, or None."""
    return Kind(f"{kind.words} or nothing", lambda value: value is None or kind.holds(value))


def take(record: Mapping, name: Any, kind: Kind, *, what: str, **default: Any) -> Any:
    """record[name], which must be of this kind; InputError that begins with `what` otherwise.

    what: names the file, with its flag. default=: stands for a value that is not there.
    """
    if name not in record and default:
        return default["default"]
    if name in record and kind.holds(record[name]):
        return record[name]
    found = shown(record[name]) if name in record else "missing"
    raise InputError(f"{what}: {printable(str(name))} is {found}, not {kind.words}")


def shown(value: Any) -> str:
    """A wrong value, or what it is, in few characters of one line."""
    if type(value) is int and abs(value) > MOST:
        return "a very large number"
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else ""
    return text if 0 < len(text) <= _SHOWN else f"a {type(value).__name__}"


def _is_plain(value: Any, *, deep: int) -> bool:
    """Whether JSON can say a value: None, text, flag, finite number, or few levels of those."""
    inner = Kind("", lambda part: _is_plain(part, deep=deep - 1))
    if isinstance(value, (dict, list, tuple)):
        return deep > 0 and (table_of(inner).holds(value) or list_of(inner).holds(value))
    return value is None or isinstance(value, (str, bool)) or real().holds(value)


def _limited(words: str, low: float, high: float) -> str:
    if abs(low) >= MOST and abs(high) >= MOST:
        return words
    return f"{words} of {low} or more" if high >= MOST else f"{words} from {low} to {high}"
