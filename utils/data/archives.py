"""Small data sets that come as archives of arrays: CIFAR-10, CIFAR-100, STL-10, Fashion-MNIST.

torchvision reads them, and checks by MD5 that the files are those of their authors: CIFAR's are
pickles, which could do anything otherwise. Fashion-MNIST's are plain arrays, of which it checks no
more than the format; what does not fit together is refused here.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.runtime.errors import InputError

# By name: torchvision's class, and what train, val, and train with the images without labels are
# there.
_SETS: dict[str, tuple[str, dict[str, bool | str]]] = {
    "cifar10": ("CIFAR10", {"train": True, "val": False}),
    "cifar100": ("CIFAR100", {"train": True, "val": False}),
    "stl10": ("STL10", {"train": "train", "val": "test", "all": "train+unlabeled"}),
    "fashion_mnist": ("FashionMNIST", {"train": True, "val": False}),
}
NAMES = tuple(_SETS)
# What torchvision raises for files of another format, and the network as an OSError.
_UNREADABLE = (RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AssertionError)


def read(
    data: Path, name: str, split: str, *, unlabeled: bool = False
) -> tuple[list[str], np.ndarray, list[str], Tensor]:
    """The split "train" or "val" (the published test set) of a data set in a folder.

    The folder is as torchvision lays it out. unlabeled: with the training images those that have
    no labels, label -1, if the set has any. Returns names, such as airplane/00012.png for image 12
    of the split; labels (N,) int64; the class names; pixels (N, 3, H, W) uint8, in memory as
    (N, H, W, 3). InputError for a set that is not there or not whole.
    """
    where = f"--dataset {name}: not, or not whole, in {data}"
    splits = _SETS[name][1]
    which = splits.get("all", splits["train"]) if unlabeled and split == "train" else splits[split]
    try:
        found = _open(data, name, which, download=False)
        labels = np.asarray(found.targets if hasattr(found, "targets") else found.labels)
        labels, images = labels.astype(np.int64), np.asarray(found.data)
    except _UNREADABLE as error:
        advice = "--download fetches it there, if no broken files are in the way"
        raise InputError(f"{where} ({advice})") from error
    are_labels = labels.ndim == 1 and np.isin(labels, range(-1, len(found.classes))).all()
    are_images = images.dtype == np.uint8 and images.ndim in (3, 4)
    if not (are_labels and are_images and len(images) == len(labels)):
        raise InputError(f"{where}: no images with as many labels of {len(found.classes)} classes")
    if images.ndim == 3:  # Fashion-MNIST, gray as (N, H, W)
        images = images[..., None].repeat(3, axis=3)
    elif images.shape[1] == 3:  # STL-10, as (N, 3, H, W)
        images = images.transpose(0, 2, 3, 1)
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    classes = [kind.replace("/", "-") for kind in found.classes]  # such as T-shirt/top
    folders = [*classes, "unlabeled"]  # label -1 is the last
    names = [f"{folders[label]}/{number:05}.png" for number, label in enumerate(labels)]
    return names, labels, classes, pixels


def download(data: Path, name: str) -> None:
    """Fetch a data set into a folder, unless it is there; InputError if that fails."""
    if name not in _SETS:
        raise InputError(f"--download: only with --dataset {', '.join(NAMES)}, not {name}")
    try:
        data.mkdir(parents=True, exist_ok=True)
        _open(data, name, _SETS[name][1]["val"], download=True)
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--download: {name} cannot be fetched to {data} ({reason})") from error


def _open(data: Path, name: str, which: bool | str, *, download: bool) -> Any:
    from torchvision import datasets  # here, as it takes as long to import as torch itself

    return getattr(datasets, _SETS[name][0])(data, which, download=download)
