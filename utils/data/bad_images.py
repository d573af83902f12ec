"""Broken image files: what takes the place of one, whether one ends the run, which were found.

Workers meet them in `read_images`, and tell the main process; there `BadImages.add` decides.
"""

import sys
from collections.abc import Callable, Iterable
from itertools import chain
from typing import TypeVar

from torch import Tensor
from tqdm import tqdm

from utils.data.datasets import ImageSet
from utils.runtime.errors import InputError, printable

Made = TypeVar("Made")


class BadImages:
    """Image files that could not be read, and what is done about one; loaders can share it.

    skip: they are left out, each with a line of warning, up to `most` files; otherwise the first
    one ends the run. names: files that are known already, from a checkpoint.
    """

    def __init__(self, *, skip: bool = False, most: int = 100, names: Iterable[str] = ()) -> None:
        self.skip, self.most = skip, most
        self._names = set(names)

    @property
    def names(self) -> list[str]:
        """The files found so far, sorted."""
        return sorted(self._names)

    @property
    def tolerated(self) -> int:
        """The number of files that can be bad without an error from `add`."""
        return self.most if self.skip else 0

    def restore(self, names: Iterable[str]) -> None:
        """Add files found before: they count, and are not announced again."""
        self._names.update(names)

    def merge(self, names: Iterable[str]) -> None:
        """Take over what other processes have found; InputError as from `add`."""
        for path in sorted(set(names) - self._names):
            self.add(path, "as another process found")

    def add(self, path: str, reason: str) -> None:
        """Note a file. InputError if files are not skipped, or too many are bad."""
        what = f"data {path}: cannot be read as an image ({reason})"
        if not self.skip:
            raise InputError(f"{what} (--bad_images skip leaves such files out)")
        if path not in self._names:
            self._names.add(path)
            # Above the progress bar, if there is one.
            say = tqdm.write if sys.stderr.isatty() else lambda line: print(line, flush=True)
            say(printable(f"WARNING {what}: left out"))
        if len(self._names) > self.most:
            raise InputError(
                f"--max_bad_images {self.most}: {len(self._names)} files cannot be read as images, "
                f"the last is {path} ({reason})"
            )


def reason_of(error: Exception, path: str) -> str:
    """One line on why a file cannot be read, without its path."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].replace(f" {path!r}", "")


def read_images(
    images: ImageSet,
    numbers: list[int],
    make: Callable[[int, Tensor], Made],
    *,
    tolerated: int,
    own: range | None = None,
) -> tuple[dict[int, Made], dict[int, str]]:
    """make(number, picture) of a batch of images, by number, in order; and why others are broken.

    A broken image is left out. With `own`, the places in the batch that are asked for, the first
    after it in the order of the set (behind the last comes the first) that can be read and is not
    in the batch takes its place: so what a batch holds depends on the images alone. tolerated: with
    more broken images, which end the run, no further ones are looked at.
    """
    whole = range(len(numbers))
    asked, choices = (whole, 1) if own is None else (own, len(images))
    for places in (asked, whole):
        made, broken, taken = {}, {}, set(numbers)
        for place in places:
            number = numbers[place]
            later = ((number + offset) % choices for offset in range(1, choices))
            candidates = chain([number], (other for other in later if other not in taken))
            if found := _first_readable(images, candidates, broken, tolerated):
                made[place] = found[0], make(*found)
                taken.add(found[0])
        if not broken or len(places) == len(whole):
            break  # otherwise replacements depend on the broken images in the places before
    return dict(made[place] for place in asked if place in made), broken


def _first_readable(
    images: ImageSet, candidates: Iterable[int], broken: dict[int, str], tolerated: int
) -> tuple[int, Tensor] | None:
    """The first image that can be read, and its picture; those that cannot go into `broken`."""
    for number in candidates:
        if len(broken) > tolerated:
            break
        if number not in broken:
            try:
                return number, images.image(number)
            except MemoryError:
                raise
            except Exception as error:  # a damaged file can raise about anything
                broken[number] = reason_of(error, images.path(number))
    return None
