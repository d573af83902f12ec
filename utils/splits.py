"""Which training images count as labeled: a split file, or a class-balanced draw.

A split file names one image a line, by its path below train/ or by its base name. For ImageNet
these are the public 1% and 10% lists published with SimCLR.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.data import ImageSet
from utils.errors import InputError


def read_split_file(path: Path, images: ImageSet, *, flag: str) -> np.ndarray:
    """Numbers (n,) int64 of the images that a split file names, ascending.

    Strict: entries that name no image, name one twice, or are a base name of several images are
    counted and the first five named in an InputError, as are a missing, empty or unreadable file.
    (The published code ignored entries without an image.) flag: the flag that named the file.
    """
    what = f"{flag} {path}"
    entries = read_entries(path, what=what)
    by_name: dict[str, list[int]] = defaultdict(list)
    for number in range(len(images)):
        name = images.name(number)
        by_name[name].append(number)
        if "/" in name:
            by_name[name.rsplit("/", 1)[1]].append(number)
    found = [by_name.get(entry, []) for entry in entries]
    counts = [(entry, len(rows)) for entry, rows in zip(entries, found, strict=True)]
    times = Counter(rows[0] for rows in found if len(rows) == 1)
    refuse(
        {
            "entries name no image": [e for e, count in counts if count == 0],
            "entries name several images": [e for e, count in counts if count > 1],
            "entries come twice": [images.name(n) for n, count in times.items() if count > 1],
        },
        what=what,
    )
    return np.array(sorted(times), dtype=np.int64)


def read_entries(path: Path, *, what: str) -> list[str]:
    """The lines of a text file that are not blank, without "train/" before them.

    InputError that begins with `what` for a missing, empty or unreadable file.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "no text in UTF-8" if isinstance(error, ValueError) else error.strerror
        raise InputError(f"{what}: {reason}") from error
    entries = [line.strip().removeprefix("train/") for line in lines if line.strip()]
    if not entries:
        raise InputError(f"{what}: names no image")
    return entries


def refuse(faults: dict[str, list[str]], *, what: str) -> None:
    """InputError that counts what has each fault and names the first five, if there are any."""
    problems = [
        f"{len(names)} {fault} (first: {', '.join(names[:5])})"
        for fault, names in faults.items()
        if names
    ]
    if problems:
        raise InputError(f"{what}: {'; '.join(problems)}")


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
    """Write the images' paths below train/, one a line; `read_split_file` gives the same images."""
    path.write_text("".join(f"{images.name(number)}\n" for number in index), encoding="utf-8")
