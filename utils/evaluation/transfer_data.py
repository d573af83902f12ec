"""The ten data sets of the transfer table (CMSF, supervised section), read through torchvision.

Each is a train, a val and a test set of images; where the data set has no such split, it is drawn
here, and its `protocol` says how.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision import datasets

from utils.data.datasets import ImageSet, PixelSet
from utils.data.splits import draw_per_class
from utils.runtime.errors import Interrupted

VAL_FRACTION = 0.2  # of the training images, where the data set has no val images
_TWO, _THREE = ("train", "test"), ("train", "val", "test")


class Unavailable(Exception):
    """A data set that is not there or cannot be read: one line on why."""


class Splits(NamedTuple):
    """The images to fit on, to choose the regularization on, and to report on; same classes."""

    train: ImageSet
    val: ImageSet
    test: ImageSet


class TransferSet(NamedTuple):
    """A data set. folder: what torchvision's class reads below the root.

    parts: the class's names of train, val and test, of train and test, or of all there is. drawn:
    train and test images of every class to draw then; 0: the rest. per_class: the field reports the
    mean accuracy of the classes (Kornblith et al. 2019). origin: where train and test come from.
    """

    title: str
    folder: str = ""
    kind: type | None = None
    parts: tuple[str, ...] = _TWO
    drawn: tuple[int, int] = (0, 0)
    per_class: bool = False
    origin: str = "train and test as torchvision has them"

    @property
    def metric(self) -> str:
        """What it is reported by."""
        return "mean_per_class" if self.per_class else "top1"

    @property
    def protocol(self) -> str:
        """Where its splits come from, for the result file."""
        if self.parts == _THREE:
            return "train, val and test as torchvision has them"
        return f"{self.origin}; val: {VAL_FRACTION:.0%} of the train images, drawn in every class"


SETS = {
    "food101": TransferSet("Food101", "food-101", datasets.Food101),
    "cifar10": TransferSet("CIFAR-10", "cifar-10-batches-py", datasets.CIFAR10),
    "cifar100": TransferSet("CIFAR-100", "cifar-100-python", datasets.CIFAR100),
    "sun397": TransferSet(
        *("SUN397", "SUN397", datasets.SUN397, ("",), (50, 50)),
        origin="50 train and 50 test images drawn in every class, since torchvision has no split "
        "of it",
    ),
    "cars": TransferSet("Cars196", "stanford_cars", datasets.StanfordCars),
    "aircraft": TransferSet(
        "Aircraft", "fgvc-aircraft-2013b", datasets.FGVCAircraft, _THREE, per_class=True
    ),
    "dtd": TransferSet("DTD", "dtd", datasets.DTD, _THREE),
    "pets": TransferSet(
        "Pets", "oxford-iiit-pet", datasets.OxfordIIITPet, ("trainval", "test"), per_class=True
    ),
    "caltech101": TransferSet(
        *("Caltech101", "caltech101", datasets.Caltech101, ("",), (30, 0), True),
        origin="30 train images drawn in every class, the rest is test; 101 classes, as "
        "torchvision leaves the background out (Kornblith et al. count it)",
    ),
    "flowers102": TransferSet(
        "Flowers102", "flowers-102", datasets.Flowers102, _THREE, per_class=True
    ),
}


def open_set(name: str, root: Path, *, seed: int, download: bool = False) -> Splits:
    """List the images of one of SETS below root; what is drawn is drawn by the seed.

    download: fetch it if it is not there. Raises Unavailable with the reason if it cannot be had.
    """
    entry = SETS[name]
    folder = root / entry.folder
    hint = "" if download else " (--download fetches it)"
    if name == "cars":
        hint, download = ", and its publisher no longer offers it for download", False
    if not folder.is_dir() and not download:  # which torchvision's Caltech101 would make
        raise Unavailable(f"{folder}: not there{hint}")
    try:
        parts = [_read(entry, root, part, download=download) for part in entry.parts]
    except (MemoryError, Interrupted):
        raise
    except Exception as error:  # damaged or not to be fetched: about anything is raised
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        text = text.splitlines()[0]
        if "scipy" in text.lower():
            raise Unavailable("needs scipy (pip install scipy)") from error
        if text.startswith("Dataset not found"):
            text = f"not there as torchvision expects it{hint}"
        raise Unavailable(f"{folder}: {text}") from error
    if any(part.classes != parts[0].classes or not len(part) for part in parts):
        raise Unavailable(f"{folder}: its parts differ in their classes, or are empty")
    if len(parts) == 3:
        return Splits(*parts)
    if len(parts) == 1:
        parts = _drawn_parts(entry, parts[0], seed=seed)
    return hold_out(*parts, seed=seed)


def _read(entry: TransferSet, root: Path, part: str, *, download: bool) -> ImageSet:
    """The images of a part; files in the order of their paths, which no file system changes."""
    options = {"download": True} if download else {}
    if issubclass(entry.kind, datasets.CIFAR10):
        found = entry.kind(root, train=part == "train", **options)
        pixels = torch.from_numpy(found.data).permute(0, 3, 1, 2)
        names = [str(number) for number in range(len(pixels))]
        return PixelSet(root / entry.folder / part, names, found.targets, found.classes, pixels)
    if part:
        options["split"] = part
    if entry.kind is datasets.Caltech101:  # it takes no loader
        found = entry.kind(root, **options)
        classes, images = found.categories, Path(found.root) / "101_ObjectCategories"
        samples = [
            (images / classes[label] / f"image_{number:04d}.jpg", label)
            for number, label in zip(found.index, found.y, strict=True)
        ]
    elif entry.kind is datasets.OxfordIIITPet:  # nor does this
        found = entry.kind(root, **options)
        classes, samples = found.classes, zip(found._images, found._labels, strict=True)
    else:
        found = entry.kind(root, loader=str, **options)  # a loader that gives the path back
        classes, samples = found.classes, [found[i] for i in range(len(found))]
    samples = sorted((os.path.relpath(path, root), int(label)) for path, label in samples)
    paths, labels = zip(*samples, strict=True) if samples else ((), ())
    return ImageSet(root, list(paths), labels, list(classes))


def _drawn_parts(entry: TransferSet, images: ImageSet, *, seed: int) -> tuple[ImageSet, ImageSet]:
    """Train and test images of a data set without a split; Unavailable if a class is too small.

    The draw must not be that of `hold_out`, hence a seed of two numbers.
    """
    train, test = entry.drawn
    sizes = np.bincount(images.labels, minlength=len(images.classes))
    if sizes.min() < train + max(1, test):
        label = int(sizes.argmin())
        raise Unavailable(
            f"{images.root / entry.folder}: {sizes[label]} images of the class "
            f"{images.classes[label]}, the draw of a split needs {train + max(1, test)}"
        )
    index = draw_per_class(images.labels, [train] * len(sizes), seed=[seed, 1])
    drawn, rest = _apart(images, index)
    if test:
        index = draw_per_class(rest.labels, [test] * len(sizes), seed=[seed, 2])
        rest, _ = _apart(rest, index)
    return drawn, rest


def hold_out(train: ImageSet, test: ImageSet, *, seed: int) -> Splits:
    """The splits where VAL_FRACTION of train, in every class, is drawn to be val.

    At least one image of a class, but not its only one.
    """
    sizes = np.bincount(train.labels, minlength=len(train.classes)).tolist()
    counts = [min(max(1, round(VAL_FRACTION * size)), max(0, size - 1)) for size in sizes]
    val, rest = _apart(train, draw_per_class(train.labels, counts, seed=seed))
    return Splits(rest, val, test)


def _apart(images: ImageSet, index: np.ndarray) -> tuple[ImageSet, ImageSet]:
    """The images of these numbers, and the others."""
    return images.take(index), images.take(np.setdiff1d(np.arange(len(images)), index))
