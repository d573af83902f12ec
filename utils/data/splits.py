"""Which training images count as labeled: a split file, or a class-balanced draw.

A split file names one image a line, by its path below train/ or by its base name. For ImageNet
these are the public 1% and 10% lists published with SimCLR. `image_names` tells how names that are
no plain text are written.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from utils.data.datasets import ImageSet
from utils.data.image_names import ImageNames, quoted, read_lines, refuse
from utils.runtime.errors import InputError, printable
from utils.runtime.files import replace_text


def read_split_file(path: Path, images: ImageSet, *, flag: str) -> np.ndarray:
    """Numbers (n,) int64 of the images that a split file names, ascending.

    Strict: entries that name no image, name one twice, or are a base name of several images are
    counted and the first five named in an InputError, as are a missing, empty or unreadable file.
    (The published code ignored entries without an image.) flag: the flag that named the file.
    """
    what = f"{flag} {path}"
    entries = read_lines(path, what=what)
    names = ImageNames(images)
    found = [names.numbers(entry) for entry in entries]
    counts = [(entry, len(numbers)) for entry, numbers in zip(entries, found, strict=True)]
    times = Counter(numbers[0] for numbers in found if len(numbers) == 1)
    missing = [entry for entry, count in counts if count == 0]
    refuse(
        {
            "entries name no image": missing,
            "entries name several images": [e for e, count in counts if count > 1],
            "entries come twice": [images.name(n) for n, count in times.items() if count > 1],
        },
        what=what,
        hint=_hint(missing, names),
    )
    return np.array(sorted(times), dtype=np.int64)


def _hint(missing: list[str], names: ImageNames) -> str:
    """What may be wrong with entries that name no image, "" if nothing is known of it."""
    for entry in missing[:5]:
        for before in (entry.rsplit(maxsplit=1)[0], entry.rpartition(",")[0]):
            if names.numbers(before):
                return "; lines seem to end in a label, and only the path is wanted"
    return ""


def check_every_class(labels: np.ndarray | Tensor, classes: Sequence[str], *, what: str) -> None:
    """InputError that begins with `what` unless labels (n,) are 0 to C - 1 and every class has one.

    A class without a labeled image is never predicted: each of its images counts as wrong.
    """
    labels = np.asarray(labels)
    outside = np.unique(labels[(labels < 0) | (labels >= len(classes))])
    if len(outside):
        raise InputError(f"{what}: label {outside[0]} is none of 0 to {len(classes) - 1}")
    absent = absent_classes(labels, classes)
    if absent:
        raise InputError(f"{what}: no labeled image of {absent}")


def absent_classes(labels: np.ndarray, classes: Sequence[str]) -> str:
    """In words how many classes have none of the labels, and the first five; "" if all have one."""
    absent = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    named = ", ".join(quoted(classes[label]) for label in absent[:5])
    return f"{len(absent)} of {len(classes)} classes: {named}" if named else ""


def unreadable_classes(
    labels: np.ndarray | Tensor,
    classes: Sequence[str],
    *,
    what: str,
    so: str = "figures are over the others",
) -> list[str]:
    """Names of the classes that no label of readable images (n,) is of; warns if there are any.

    The warning is one line that begins with `what` and ends in `so`, what follows from it.
    """
    labels = np.asarray(labels)
    if absent := absent_classes(labels, classes):
        print(printable(f"WARNING {what}: no readable image of {absent}; {so}"), flush=True)
    return [classes[label] for label in np.setdiff1d(np.arange(len(classes)), labels)]


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


def write_split_file(path: Path, images: ImageSet, index: np.ndarray) -> None:
    """Write the images' paths below train/, one a line; `read_split_file` gives the same images.

    RunError if that fails, as of `checkpoint.replace_text`.
    """
    replace_text(path, "".join(f"{quoted(images.name(number))}\n" for number in index))


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
