"""The ten data sets of the transfer table (CMSF, supervised section), read through torchvision.

Each is a train, a val and a test set of images; where the data set has no such split, it is drawn
here, and `protocol` says how.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision import datasets

from utils.data.datasets import ImageSet, PixelSet
from utils.data.splits import draw_per_class
from utils.runtime.errors import Interrupted

VAL_FRACTION = 0.2  # of the training images, where the data set has no val images
SUN397_PER_CLASS = 50  # train images of a class, and as many test images
CALTECH101_TRAIN_PER_CLASS = 30


class Unavailable(Exception):
    """A data set that is not there or cannot be read: one line on why."""


class Splits(NamedTuple):
    """The images to fit on, to choose the regularization on, and to report on; same classes."""

    train: ImageSet
    val: ImageSet
    test: ImageSet


class _Set(NamedTuple):
    """A data set: read(root, part, download=) gives the images of a part of it.

    folder: what torchvision reads below root. parts: its names of train, val and test, of train and
    test, or one of all there is. per_class: the field reports the mean accuracy of the classes.
    """

    title: str
    folder: str
    read: Callable[..., ImageSet]
    parts: tuple[str, ...] = ("train", "test")
    per_class: bool = False


def _image_set(root: Path, samples: list[tuple[str | Path, int]], classes: list[str]) -> ImageSet:
    """The files (path, label), in the order of their paths, which no file system changes."""
    samples = sorted((os.path.relpath(path, root), int(label)) for path, label in samples)
    paths, labels = ([sample[i] for sample in samples] for i in (0, 1))
    return ImageSet(root, paths, labels, list(classes))


def _read_files(kind: type, root: Path, part: str, *, download: bool) -> ImageSet:
    """A data set of files whose class takes a loader: one that gives the path back."""
    options = {"split": part} if part else {}
    if kind is not datasets.StanfordCars:  # which raises when asked to, also if it is there
        options["download"] = download
    found = kind(root, loader=str, **options)
    return _image_set(root, [found[i] for i in range(len(found))], found.classes)


def _read_pets(root: Path, part: str, *, download: bool) -> ImageSet:
    """OxfordIIITPet takes no loader; its public access decodes every image."""
    found = datasets.OxfordIIITPet(root, split=part, download=download)
    samples = list(zip(found._images, found._labels, strict=True))
    return _image_set(root, samples, found.classes)


def _read_caltech(root: Path, part: str, *, download: bool) -> ImageSet:
    folder = root / "caltech101"
    if not folder.is_dir() and not download:  # torchvision would make it
        raise RuntimeError("Dataset not found")
    found = datasets.Caltech101(root, download=download)
    images = folder / "101_ObjectCategories"
    samples = [
        (images / found.categories[label] / f"image_{number:04d}.jpg", label)
        for number, label in zip(found.index, found.y, strict=True)
    ]
    return _image_set(root, samples, found.categories)


def _read_cifar(kind: type, root: Path, part: str, *, download: bool) -> PixelSet:
    found = kind(root, train=part == "train", download=download)
    pixels = torch.from_numpy(found.data).permute(0, 3, 1, 2)
    names = [str(number) for number in range(len(pixels))]
    where = root / found.base_folder / part
    return PixelSet(where, names, found.targets, found.classes, pixels)


_SETS = {
    "food101": _Set("Food101", "food-101", partial(_read_files, datasets.Food101)),
    "cifar10": _Set("CIFAR-10", "cifar-10-batches-py", partial(_read_cifar, datasets.CIFAR10)),
    "cifar100": _Set("CIFAR-100", "cifar-100-python", partial(_read_cifar, datasets.CIFAR100)),
    "sun397": _Set("SUN397", "SUN397", partial(_read_files, datasets.SUN397), parts=("",)),
    "cars": _Set("Cars196", "stanford_cars", partial(_read_files, datasets.StanfordCars)),
    "aircraft": _Set(
        "Aircraft",
        "fgvc-aircraft-2013b",
        partial(_read_files, datasets.FGVCAircraft),
        parts=("train", "val", "test"),
        per_class=True,
    ),
    "dtd": _Set("DTD", "dtd", partial(_read_files, datasets.DTD), parts=("train", "val", "test")),
    "pets": _Set("Pets", "oxford-iiit-pet", _read_pets, parts=("trainval", "test"), per_class=True),
    "caltech101": _Set("Caltech101", "caltech101", _read_caltech, parts=("",), per_class=True),
    "flowers102": _Set(
        "Flowers102",
        "flowers-102",
        partial(_read_files, datasets.Flowers102),
        parts=("train", "val", "test"),
        per_class=True,
    ),
}
NAMES = tuple(_SETS)
TITLES = {name: entry.title for name, entry in _SETS.items()}
FOLDERS = {name: entry.folder for name, entry in _SETS.items()}  # what torchvision reads below root
HELD_OUT = f"val: {VAL_FRACTION:.0%} of the train images, drawn in every class"
_DRAWN = {
    "sun397": f"{SUN397_PER_CLASS} train and {SUN397_PER_CLASS} test images drawn in every class, "
    "since torchvision has no split of it",
    "caltech101": f"{CALTECH101_TRAIN_PER_CLASS} train images drawn in every class, the rest is "
    "test; 101 classes, as torchvision leaves the background out (Kornblith et al. count it)",
}


def protocol(name: str) -> str:
    """Where the splits of a data set come from, for the result file."""
    if len(_SETS[name].parts) == 3:
        return "train, val and test as torchvision has them"
    origin = _DRAWN.get(name, "train and test as torchvision has them")
    return f"{origin}; {HELD_OUT}"


def metric(name: str) -> str:
    """What the field reports of a data set (Kornblith et al. 2019): "mean_per_class" or "top1"."""
    return "mean_per_class" if _SETS[name].per_class else "top1"


def open_set(name: str, root: Path, *, seed: int, download: bool = False) -> Splits:
    """List the images of a data set of NAMES below root; what is drawn is drawn by the seed.

    download: fetch it if it is not there. Raises Unavailable with the reason if it cannot be had.
    """
    entry = _SETS[name]
    try:
        parts = [entry.read(root, part, download=download) for part in entry.parts]
    except (MemoryError, Interrupted):
        raise
    except Exception as error:  # missing, damaged or not to be fetched: about anything is raised
        raise Unavailable(_reason(name, root, error, download=download)) from error
    first = parts[0]
    if any(part.classes != first.classes or not len(part) for part in parts):
        raise Unavailable(f"{root / entry.folder}: its parts differ in their classes, or are empty")
    if len(parts) == 3:
        return Splits(*parts)
    if len(parts) == 1:
        parts = _drawn_parts(name, first, seed=seed)
    return hold_out(*parts, seed=seed)


def hold_out(train: ImageSet, test: ImageSet, *, seed: int) -> Splits:
    """The splits where VAL_FRACTION of train, in every class, is drawn to be val.

    At least one image of a class, but not its only one.
    """
    sizes = np.bincount(train.labels, minlength=len(train.classes)).tolist()
    counts = [min(max(1, round(VAL_FRACTION * size)), max(0, size - 1)) for size in sizes]
    val = draw_per_class(train.labels, counts, seed=seed)
    rest = np.setdiff1d(np.arange(len(train)), val)
    return Splits(train.take(rest), train.take(val), test)


def _drawn_parts(name: str, images: ImageSet, *, seed: int) -> tuple[ImageSet, ImageSet]:
    """Train and test images of a data set that has no split; Unavailable if a class is too small.

    The draw must not be that of `hold_out`, hence a seed of two numbers.
    """
    sun = name == "sun397"
    count = SUN397_PER_CLASS if sun else CALTECH101_TRAIN_PER_CLASS
    least = 2 * SUN397_PER_CLASS if sun else count + 1
    sizes = np.bincount(images.labels, minlength=len(images.classes))
    if sizes.min() < least:
        label = int(sizes.argmin())
        raise Unavailable(
            f"{images.root / FOLDERS[name]}: {sizes[label]} images of the class "
            f"{images.classes[label]}, the draw of a split needs {least}"
        )
    train = draw_per_class(images.labels, [count] * len(sizes), seed=[seed, 1])
    rest = images.take(np.setdiff1d(np.arange(len(images)), train))
    if sun:
        test = draw_per_class(rest.labels, [count] * len(sizes), seed=[seed, 2])
        rest = rest.take(test)
    return images.take(train), rest


def _reason(name: str, root: Path, error: Exception, *, download: bool) -> str:
    """One line on why a data set cannot be had."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = text.splitlines()[0]
    where = root / FOLDERS[name]
    if "scipy" in text.lower():
        return "needs scipy (pip install scipy)"
    if not text.startswith("Dataset not found"):
        return f"{where}: {text}"
    if name == "cars":
        return f"{where}: not there, and its publisher no longer offers it for download"
    missing = "not there" if not where.exists() else "not there as torchvision expects it"
    return f"{where}: {missing}" + ("" if download else " (--download fetches it)")
