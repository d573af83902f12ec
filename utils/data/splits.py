"""Which training images count as labeled: a split file, or a class-balanced draw.

A split file names one image a line, by its path below train/ or by its base name. For ImageNet
these are the public 1% and 10% lists published with SimCLR.

A file system allows every character but "/" in a name, and bytes that are no text. So in a file one
line holds one entry, "\\n" alone ends a line, and a name that a reader or an editor could take for
another stands as a JSON string.
"""

import json
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from utils.data.datasets import ImageSet
from utils.runtime import plain_json
from utils.runtime.errors import InputError, printable
from utils.runtime.files import replace_text

_SHOWN = 300  # characters of an entry in a message


def quoted(name: str) -> str:
    """A name as it stands in a file: itself, or a JSON string in plain ASCII.

    Itself is what is printable, has no blank at an end and no quote in front. A byte that is no
    UTF-8 is an escape from \\\\udc80 to \\\\udcff, as Python reads it.
    """
    return plain_json.dumps(name) if name.startswith('"') else _visible(name)


def _visible(text: str) -> str:
    """Itself, unless blanks at its ends or what is not printable would not be seen."""
    return text if text.isprintable() and text == text.strip() else plain_json.dumps(text)


def unquoted(field: str) -> str | None:
    """The name that a JSON string stands for, None for anything else."""
    try:
        return json.loads(field) if field.startswith('"') else None
    except ValueError:
        return None


def read_lines(path: Path, *, what: str) -> list[str]:
    """The lines of a text file in UTF-8 that are not blank, without "\\r" at their ends.

    InputError that begins with `what` if there are none, and for no regular file: a FIFO waits.
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
        readings = (path, path.removeprefix("train/"), *below)
        return next((self._numbers[name] for name in readings if name in self._numbers), None)

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
    """InputError that counts what has each fault and names the first five, if anything has one."""
    problems = []
    for fault, names in faults.items():
        if names:
            first = [n[:_SHOWN] + "..." * (len(n) > _SHOWN) for n in map(_visible, names[:5])]
            problems.append(f"{len(names)} {fault} (first: {', '.join(first)})")
    if problems:
        raise InputError(f"{what}: {'; '.join(problems)}{hint}")


def read_split_file(path: Path, images: ImageSet, *, flag: str) -> np.ndarray:
    """Numbers (n,) int64 of the images that a split file names, ascending.

    Strict: InputError, which begins with the flag, for entries that name no image, several images,
    or one twice. (The published code ignored entries without an image.)
    """
    what = f"{flag} {path}"
    names = ImageNames(images)
    found = [(entry, names.numbers(entry)) for entry in read_lines(path, what=what)]
    times = Counter(numbers[0] for _, numbers in found if len(numbers) == 1)
    missing = [entry for entry, numbers in found if not numbers]
    hint = ""
    for entry in missing[:5]:
        if names.numbers(entry.rsplit(maxsplit=1)[0]) or names.numbers(entry.rpartition(",")[0]):
            hint = "; lines seem to end in a label, and only the path is wanted"
    refuse(
        {
            "entries name no image": missing,
            "entries name several images": [e for e, numbers in found if len(numbers) > 1],
            "entries come twice": [images.name(n) for n, count in times.items() if count > 1],
        },
        what=what,
        hint=hint,
    )
    return np.array(sorted(times), dtype=np.int64)


def write_split_file(path: Path, images: ImageSet, index: np.ndarray) -> None:
    """Write the images' paths, one a line, for `read_split_file`; RunError as `replace_text`."""
    replace_text(path, "".join(f"{quoted(images.name(number))}\n" for number in index))


def check_every_class(labels: np.ndarray | Tensor, classes: Sequence[str], *, what: str) -> None:
    """InputError that begins with `what` unless labels (n,) are 0 to C - 1 and every class has one.

    A class without a labeled image is never predicted: each of its images counts as wrong.
    """
    labels = np.asarray(labels)
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if len(outside):
        raise InputError(f"{what}: label {outside.min()} is none of 0 to {len(classes) - 1}")
    if absent := absent_classes(labels, classes):
        raise InputError(f"{what}: no labeled image of {absent}")


def absent_classes(labels: np.ndarray, classes: Sequence[str]) -> str:
    """In words how many classes have none of the labels, and the first five; "" if all have one."""
    absent = _absent(labels, classes)
    named = ", ".join(map(quoted, absent[:5]))
    return f"{len(absent)} of {len(classes)} classes: {named}" if absent else ""


def _absent(labels: np.ndarray | Tensor, classes: Sequence[str]) -> list[str]:
    return [classes[label] for label in np.setdiff1d(np.arange(len(classes)), labels)]


def unreadable_classes(
    labels: np.ndarray | Tensor,
    classes: Sequence[str],
    *,
    what: str,
    so: str = "figures are over the others",
) -> list[str]:
    """Names of the classes without a label of readable images (n,); warns if there are any.

    The warning begins with `what` and ends in `so`, what follows from it.
    """
    if absent := absent_classes(labels, classes):
        print(printable(f"WARNING {what}: no readable image of {absent}; {so}"), flush=True)
    return _absent(labels, classes)


def class_balanced_split(images: ImageSet, fraction: float, *, seed: int) -> np.ndarray:
    """Numbers (n,) int64 of a drawn share of every class, ascending; at least one image of each.

    fraction: above 0, at most 1. The draw of a class depends on the seed and the class alone.
    """
    sizes = np.bincount(images.labels, minlength=len(images.classes))
    counts = [max(1, round(fraction * size)) for size in sizes.tolist()]
    return draw_per_class(images.labels, counts, seed=seed)


def draw_per_class(
    labels: np.ndarray, counts: Sequence[int], *, seed: int | Sequence[int]
) -> np.ndarray:
    """Numbers (n,) int64 of counts[c] images drawn from each class c, ascending.

    labels: (N,) int64 in 0 to C - 1. counts: (C,), above no class' number of images. The draw of a
    class depends on the seed (one or several integers), the class and its images' order alone.
    """
    seeds = np.atleast_1d(seed).tolist()
    chosen = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(labels == label)
        assert count <= len(members), f"{count} of {len(members)} images of class {label}"
        chosen.append(np.random.default_rng([*seeds, label]).permutation(members)[:count])
    return np.sort(np.concatenate(chosen))


def labeled_index(
    images: ImageSet, *, file: Path | None, flag: str, fraction: float | None, seed: int
) -> np.ndarray:
    """Numbers (n,) int64 of the labeled images by a split file or a drawn share; all without both.

    flag: the flag that named the file. InputError if there is none of a class.
    """
    data = f"data {images.root}"
    if not images.classes:
        raise InputError(f"{data}: labels need class folders in train/")
    check_every_class(images.labels, images.classes, what=data)
    if fraction is not None:
        return class_balanced_split(images, fraction, seed=seed)
    if file is None:
        return np.arange(len(images))
    index = read_split_file(file, images, flag=flag)
    check_every_class(images.labels[index], images.classes, what=f"{flag} {file}")
    return index
