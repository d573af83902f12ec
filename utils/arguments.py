"""A parser whose errors are one line, and the types of flags' values."""

import argparse
import os
import re
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from utils.cropping import CropGroup
from utils.errors import printable


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        """Print `script: error: message` and exit with code 2.

        Of several processes, which all get the same flags, one prints.
        """
        first = os.environ.get("RANK", "0") == "0"
        self.exit(2, printable(f"{self.prog}: error: {message}") + "\n" if first else None)


def number(kind: type, *, low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """An argparse type: int or float from `low` to `high`; the message names flag and value."""

    def parse(text: str) -> Any:
        """The number, or an error that says what is wrong with it."""
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is no {kind.__name__}") from None
        if not low <= value <= high or value == float("inf"):
            limits = f"{low} or more" if high == float("inf") else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range ({limits})")
        return value

    return parse


def int_list(text: str) -> list[int]:
    """An argparse type: "90,120" -> [90, 120]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no list of integers like 90,120") from None


def rate_list(text: str) -> list[float]:
    """An argparse type: "0.01,0.03" -> [0.01, 0.03]; above 0, each once."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(f"{text} is no list of learning rates like 0.01,0.03")
    if len(set(rates)) < len(rates):
        raise argparse.ArgumentTypeError(f"{text} names a learning rate twice")
    return rates


def device(text: str) -> torch.device:
    """An argparse type: a device that is there."""
    try:
        chosen = torch.device(text)
        if chosen.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{text}: no such device here") from None
    return chosen


def positive_or_all(text: str) -> int | str:
    """An argparse type: a positive integer or "all"."""
    return text if text == "all" else positive(text)


def crop_groups(text: str) -> list[CropGroup]:
    """An argparse type: "2x224:0.2-1,6x96:0.05-0.2" -> groups of crops; the first has two."""
    groups = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+):([\d.]+)-([\d.]+)", part.strip())
        try:
            count, size, low, high = (float(value) for value in match.groups())
        except (AttributeError, ValueError):
            raise argparse.ArgumentTypeError(
                f"{part} is no group of crops like 6x96:0.05-0.2 (count x size : share of the area)"
            ) from None
        if not (count and size and 0 < low <= high <= 1):
            raise argparse.ArgumentTypeError(
                f"{part}: counts and sizes from 1, shares 0 < a <= b <= 1"
            )
        groups.append(CropGroup(int(count), int(size), (low, high)))
    if groups[0].count != 2:
        raise argparse.ArgumentTypeError(
            f"{text}: the first group is the query's and the target's crop"
        )
    return groups


positive = number(int, low=1)
seed = number(int, low=0, high=2**63 - 1)
not_negative = number(float, low=0)
