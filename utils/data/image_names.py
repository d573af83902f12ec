"""Names of images in text files: written so that they are read back, and found again.

A file system allows every character but "/" in a name, and bytes that are no text. So one line
holds one entry, "\\n" alone ends a line, and a name that a reader or an editor could take for
another stands as a JSON string.
"""

import json
import os
import stat
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from utils.data.datasets import ImageSet
from utils.runtime import plain_json
from utils.runtime.errors import InputError

_SHOWN = 300  # characters of an entry in a message


def quoted(name: str) -> str:
    """A name as it stands in a file: itself, or a JSON string in plain ASCII.

    Itself is what is printable, has no blank at an end and no quote in front. A byte that is no
    UTF-8 is an escape from \\\\udc80 to \\\\udcff, as Python reads it.
    """
    return name if _is_visible(name) and not name.startswith('"') else plain_json.dumps(name)


def _is_visible(text: str) -> bool:
    return text.isprintable() and text == text.strip()


def unquoted(field: str) -> str | None:
    """The name that a JSON string stands for, None for anything else."""
    if not field.startswith('"'):
        return None
    try:
        return json.loads(field)
    except ValueError:
        return None


def read_lines(path: Path, *, what: str) -> list[str]:
    """The lines of a text file in UTF-8 that are not blank, without "\\r" at their ends.

    InputError that begins with `what` for a file that is missing, empty, unreadable or no text, and
    for what is no regular file: a FIFO would be waited for.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{what}: no regular file")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{what}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what}: no text in UTF-8") from error
    if "\0" in text:  # UTF-16 without a mark
        raise InputError(f"{what}: no text in UTF-8")
    lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise InputError(f"{what}: names no image")
    return lines


class ImageNames:
    """Finds the images of a set by what a file calls them.

    An entry that is an image's path below train/, character by character, is that image, and so is
    a JSON string of it. Any other is read without blanks around it and without "./" and "train/" in
    front, or as the path of a file below the folder of the images.
    """

    def __init__(self, images: ImageSet) -> None:
        self._numbers = {images.name(number): number for number in range(len(images))}
        self._here = os.getcwd()
        root = os.path.join(self._here, images.root)
        self._folders = [os.path.join(f(root), "") for f in (os.path.normpath, os.path.realpath)]

    def number(self, entry: str) -> int | None:
        """The image that an entry is the path of, None if there is none."""
        if (name := unquoted(entry)) is not None:
            return self._numbers.get(name)
        if entry in self._numbers:
            return self._numbers[entry]
        path = os.path.normpath(entry.strip())
        file = os.path.normpath(os.path.join(self._here, path))
        below = [file.removeprefix(top) for top in self._folders if file.startswith(top)]
        for name in (path, path.removeprefix("train/"), *below):
            if name in self._numbers:
                return self._numbers[name]
        return None

    def numbers(self, entry: str) -> list[int]:
        """The images that an entry can mean: the one of this path, or all of this base name."""
        number = self.number(entry)
        if number is not None or unquoted(entry) is not None:
            return [] if number is None else [number]
        base = os.path.normpath(entry.strip()).removeprefix("train/")
        return self._by_base_name.get(base, [])

    @cached_property
    def _by_base_name(self) -> dict[str, list[int]]:
        found = defaultdict(list)
        for name, number in self._numbers.items():
            found[os.path.basename(name)].append(number)
        return found


def refuse(faults: dict[str, list[str]], *, what: str, hint: str = "") -> None:
    """InputError that counts what has each fault and names the first five, if there are any.

    faults: entries or names by what is wrong with them. hint: what may have been meant.
    """
    problems = [
        f"{len(names)} {fault} (first: {', '.join(map(_shown, names[:5]))})"
        for fault, names in faults.items()
        if names
    ]
    if problems:
        raise InputError(f"{what}: {'; '.join(problems)}{hint}")


def _shown(entry: str) -> str:
    """An entry so that blanks at its ends and what is not printable can be seen."""
    text = entry if _is_visible(entry) else plain_json.dumps(entry)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
