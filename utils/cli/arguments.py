"""A parser whose errors are one line, and the types of flags' values."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from utils.data.cropping import CropGroup
from utils.runtime.errors import printable

# What float32 can hold, in which networks and their learning rates compute.
_LARGEST = torch.finfo(torch.float32).max
_MOST = 10**9  # of anything that is counted; sizes have limits of their own
_MOST_CROPS = 100  # of an image
_SHOWN = 60  # characters of a wrong value in a message


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage in front."""

    def parse_known_args(self, args=None, namespace=None):
        """As argparse, but that a folder behind several values of a flag is the data."""
        words = list(sys.argv[1:] if args is None else args)
        if any(action.dest == "data" for action in self._actions):
            words = self._with_data_last(words)
        return super().parse_known_args(words, namespace)

    def _with_data_last(self, words: list[str]) -> list[str]:
        """The words, with the folder that a flag of several values would take at their end.

        Not the only value of a flag that must have one.
        """
        action, flag = None, -1
        for place, word in enumerate(words):
            if word.startswith("-"):
                action, flag = self._option_string_actions.get(word), place
            elif action and action.nargs in (["*", "+"] if place - flag > 1 else ["*"]):
                is_last = place + 1 == len(words) or words[place + 1].startswith("-")
                path, named = map(os.path.expanduser, (word, word.partition("=")[2]))
                if is_last and os.path.isdir(path) and not (named and os.path.exists(named)):
                    return [*words[:place], *words[place + 1 :], "--", word]
        return words

    def error(self, message: str) -> NoReturn:
        """Print `script: error: message` and exit with code 2.

        Of several processes, which all get the same flags, one prints.
        """
        first = os.environ.get("RANK", "0") == "0"
        self.exit(2, printable(f"{self.prog}: error: {message}") + "\n" if first else None)


def wrong(text: str, what: str) -> argparse.ArgumentTypeError:
    """The error of a type for a flag's value; argparse puts the flag's name before it."""
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return argparse.ArgumentTypeError(f"{shown or repr(text)} {what}")


def number(kind: type, *, low: float, high: float | None = None) -> Callable[[str], Any]:
    """A type: int or float from `low` to `high`, by default a billion or what float32 can hold."""
    most = high if high is not None else (_MOST if kind is int else _LARGEST)

    def parse(text: str) -> Any:
        """The number, or an error that says what is wrong with it."""
        try:
            value = kind(text) + 0  # -0.0 becomes 0.0
        except ValueError:  # also for more digits than Python reads
            raise wrong(text, f"is no {kind.__name__}") from None
        if not low <= value <= most:
            shown = most if kind is int else f"{most:.3g}"
            raise wrong(text, f"is out of range ({low} to {shown})")
        return value

    return parse


positive = number(int, low=1)
seed = number(int, low=0, high=2**63 - 1)
not_negative = number(float, low=0)
share = number(float, low=0, high=1)
side = number(int, low=1, high=8192)  # of an image, in pixels
width = number(int, low=1, high=2**20)  # of a layer, in features


def positive_or_all(text: str) -> int | str:
    """A type: a positive integer or "all"."""
    return text if text == "all" else positive(text)


def _list_of(
    parse: Callable[[str], Any], what: str, will_do: Callable[[list], bool]
) -> Callable[[str], list]:
    """A type: a list between commas that will do, or an error that says what it is no list of."""

    def parse_all(text: str) -> list:
        """The parts."""
        with suppress(argparse.ArgumentTypeError):
            if will_do(values := [parse(part) for part in text.split(",")]):
                return values
        raise wrong(text, f"is no list of {what}")

    return parse_all


int_list = _list_of(number(int, low=-_MOST), "integers like 7,0,12", bool)
epoch_list = _list_of(
    positive, "epochs like 90,120, each above the one before", lambda v: v == sorted(set(v))
)
rate_list = _list_of(
    not_negative,
    "learning rates like 0.01,0.03, above 0, each once",
    lambda v: all(v) and len(set(v)) == len(v),
)


def path_text(text: str) -> str:
    """A type: a path as it stands, but `~`, which bash leaves alone in --flag=~/x, is the home."""
    if not text:
        raise argparse.ArgumentTypeError("an empty text is no path")
    try:
        Path(text).expanduser()  # unlike that of os.path it tells
    except RuntimeError:
        raise wrong(text, "begins with a home folder that is not known") from None
    return os.path.expanduser(text)


def path(text: str) -> Path:
    """A type: a path, as `path_text`."""
    return Path(path_text(text))


def path_or(*words: str) -> Callable[[str], str]:
    """A type: one of a few words, or a path, as `path_text`."""
    return lambda text: text if text in words else path_text(text)


def named_path(text: str) -> str:
    """A type: NAME=PATH or PATH, the path as `path_text`."""
    name, equals, rest = text.partition("=")
    if not equals or os.path.exists(path_text(text)):
        return path_text(text)
    if not rest:
        raise wrong(text, "has no path behind =")
    return f"{name}={path_text(rest)}"


def device(text: str) -> torch.device:
    """A type: a device that is there."""
    try:
        chosen = torch.device(text)
        if chosen.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        raise wrong(text, "is no device that is here") from None
    return chosen


def crop_groups(text: str) -> list[CropGroup]:
    """A type: "2x224:0.2-1,6x96:0.05-0.2" -> groups of crops; the first has two."""
    groups = [_crop_group(part.strip()) for part in text.split(",")]
    if groups[0].count != 2:
        raise wrong(text, "has another first group than the query's and the target's crop, 2x...")
    if sum(group.count for group in groups) > _MOST_CROPS:
        raise wrong(text, f"asks for more than {_MOST_CROPS} crops of an image")
    return groups


def _crop_group(text: str) -> CropGroup:
    match = re.fullmatch(r"(\d+)x(\d+):([\d.]+)-([\d.]+)", text)
    try:
        count, size, low, high = match.groups()
        scale = share(low), share(high)
        group = CropGroup(number(int, low=1, high=_MOST_CROPS)(count), side(size), scale)
        if not 0 < scale[0] <= scale[1]:
            raise wrong(f"{low}-{high}", "is no range of shares 0 < a <= b <= 1")
    except (AttributeError, argparse.ArgumentTypeError) as error:
        reason = error if match else "count x size : share of the area"
        raise wrong(text, f"is no group of crops like 6x96:0.05-0.2: {reason}") from None
    return group
