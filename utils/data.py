"""Image folders: which files there are, with which labels, and what cannot be used.

The views and batches made of them are in `loaders`.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
from torch import Tensor
from torchvision.datasets import folder

from utils import augment
from utils.errors import InputError

IMAGENET_CLASSES = 1000


class ImageSet:
    """Image files with labels; image i is the same file in every process.

    paths: relative to root, in the order of torchvision's ImageFolder. labels: (N,) int64, -1
    throughout where there are no classes. classes: the sorted class names, empty where there are
    none.
    """

    def __init__(self, root: Path, paths: list[str], labels: list[int], classes: list[str]) -> None:
        self.root = root
        # One array of bytes instead of a million Python objects: workers share its pages.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels, dtype=np.int64)
        self.classes = classes

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The path of image `index` below the root."""
        return os.fsdecode(self._paths[index].item())

    def path(self, index: int) -> str:
        """The file of image `index`."""
        return os.path.join(self.root, self.name(index))

    def image(self, index: int) -> Tensor:
        """Image `index`, decoded: (3, H, W) uint8. Errors: as `augment.decode`."""
        return augment.decode(self.path(index))

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of names, labels and classes, in order; no file is touched."""
        digest = hashlib.sha256(repr((self.classes, self._paths.dtype.str)).encode())
        digest.update(self._paths.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def take(self, index: np.ndarray) -> "ImageSet":
        """Only the images of these numbers (n,), in this order, with their labels and classes."""
        names = [self.name(number) for number in index]
        return ImageSet(self.root, names, self.labels[index].tolist(), self.classes)

    def subset(self, classes: list[str]) -> "ImageSet":
        """Only the images of these classes, relabeled 0, 1, ... in the order given."""
        new_label = np.full(len(self.classes), -1)
        new_label[[self.classes.index(name) for name in classes]] = np.arange(len(classes))
        kept = np.flatnonzero(new_label[self.labels] >= 0)
        names = [self.name(number) for number in kept]
        return ImageSet(self.root, names, new_label[self.labels[kept]].tolist(), list(classes))


def read_image_folder(root: Path) -> ImageSet:
    """List the images of `root/<class>/**`, or of a flat folder `root/*` without classes.

    Raises InputError for a missing folder, one without images, and a class without images.
    """
    if not root.is_dir():
        raise InputError(f"data {root}: no such folder")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_file())
        flat = [name for name in names if name.lower().endswith(folder.IMG_EXTENSIONS)]
        if not flat:
            raise InputError(f"data {root}: neither class folders nor images in it")
        return ImageSet(root, flat, [-1] * len(flat), [])
    numbers = {name: number for number, name in enumerate(classes)}
    samples = folder.make_dataset(
        str(root), numbers, extensions=folder.IMG_EXTENSIONS, allow_empty=True
    )
    empty = sorted(set(range(len(classes))) - {label for _, label in samples})
    if empty:
        first = ", ".join(classes[label] for label in empty[:5])
        raise InputError(f"data {root}: {len(empty)} classes without an image: {first}")
    paths = [os.path.relpath(path, root) for path, _ in samples]
    return ImageSet(root, paths, [label for _, label in samples], classes)


def read_split(data: Path, split: str, *, dataset: str = "imagenet") -> ImageSet:
    """The images of `data/<split>`, split "train" or "val".

    dataset: "imagenet" for any folder tree; "imagenet100" for the first 100 classes of numpy's
    seeded (1234) permutation of ImageNet's 1000, which must all be there. A flat folder of images
    without a "train" folder is a training set without labels. Raises InputError.
    """
    if not data.is_dir():
        raise InputError(f"data {data}: no such folder")
    root = data / split
    if not root.is_dir():
        if split == "train" and _is_flat(data):
            root = data
        else:
            raise InputError(f"data {data}: no folder {split}/ in it")
    images = read_image_folder(root)
    if dataset == "imagenet100":
        if len(images.classes) != IMAGENET_CLASSES:
            raise InputError(
                f"--dataset imagenet100: {root} has {len(images.classes)} classes, not the "
                f"{IMAGENET_CLASSES} it is chosen from (a folder of its 100: --dataset imagenet)"
            )
        chosen = np.random.RandomState(1234).permutation(IMAGENET_CLASSES)[:100]
        images = images.subset([images.classes[position] for position in sorted(chosen)])
    return images


def _is_flat(data: Path) -> bool:
    """Whether a folder holds images and no folders."""
    entries = list(os.scandir(data))
    return any(entry.name.lower().endswith(folder.IMG_EXTENSIONS) for entry in entries) and not any(
        entry.is_dir() for entry in entries
    )


def check_same_classes(train: ImageSet, val: ImageSet) -> None:
    """InputError unless both splits have the same class names, since labels are their positions."""
    differing = sorted(set(train.classes) ^ set(val.classes))
    if differing:
        raise InputError(
            f"data {train.root.parent}: train/ and val/ differ in {len(differing)} classes, "
            f"first {', '.join(differing[:5])}"
        )
