"""Image folders: which files there are, with which labels, and what cannot be used.

Also sets of images in memory. The views and batches made of them are in `loaders`.
"""

import copy
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torchvision.datasets import folder

from utils import archives, cropping
from utils.errors import InputError

IMAGENET_CLASSES = 1000
_DIGESTED_AT_ONCE = 1024  # images


class ImageSet:
    """Image files with labels; image i is the same file in every process.

    paths: relative to root, in the order of torchvision's ImageFolder. labels: (N,) int64, -1
    for an image without one, so throughout where there are no classes. classes: the sorted class
    names, empty where there are none.
    """

    def __init__(
        self, root: Path, paths: list[str], labels: Sequence[int], classes: list[str]
    ) -> None:
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
        """The picture of image `index`, (3, H, W) uint8; the file is decoded.

        Raises what decoding a damaged or missing file raises, which can be about anything.
        """
        return cropping.decode(self.path(index))

    def original_size(self, index: int) -> tuple[int, int] | None:
        """Height and width of image `index` before it was resized; None: it was not."""
        return None

    def as_stored(self) -> "ImageSet":
        """The set whose pictures are as they are stored: itself, unless they were resized."""
        return self

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of names, labels and classes, in order; no file is touched."""
        digest = hashlib.sha256(repr((self.classes, self._paths.dtype.str)).encode())
        digest.update(self._paths.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def take(self, index: np.ndarray) -> "ImageSet":
        """Only the images of these numbers (n,), in this order, with their labels and classes."""
        return self._part(index, self.labels[index], self.classes)

    def subset(self, classes: list[str]) -> "ImageSet":
        """Only the images of these classes, relabeled 0, 1, ... in the order given."""
        new_label = np.full(len(self.classes), -1)
        new_label[[self.classes.index(name) for name in classes]] = np.arange(len(classes))
        kept = np.flatnonzero((self.labels >= 0) & (new_label[self.labels] >= 0))
        return self._part(kept, new_label[self.labels[kept]], list(classes))

    def _part(self, index: np.ndarray, labels: np.ndarray, classes: list[str]) -> "ImageSet":
        part = copy.copy(self)
        part._paths, part.labels, part.classes = self._paths[index], labels, classes
        return part


class PixelSet(ImageSet):
    """An `ImageSet` whose pictures of one size are in memory; their paths are names only.

    pixels: (M, 3, H, W) uint8, in memory as (M, H, W, 3), the layout that resizing is fast in.
    rows: (N,) int64, the row of each image. Parts of the set share the pixels, and so do workers.
    """

    def __init__(
        self,
        root: Path,
        paths: list[str],
        labels: Sequence[int],
        classes: list[str],
        pixels: Tensor,
    ) -> None:
        super().__init__(root, paths, labels, classes)
        self.pixels = pixels
        self.rows = np.arange(len(paths))

    @property
    def broken(self) -> dict[int, str]:
        """Images that could not be read, by row, and why."""
        return {}

    def image(self, index: int) -> Tensor:
        """The picture of image `index`, (3, H, W) uint8; not to be changed."""
        return self.pixels[self.rows[index]]

    def original_sizes(self, index: np.ndarray) -> np.ndarray:
        """Heights and widths of some images before they were resized, (n, 2) int64."""
        return np.broadcast_to(np.array(self.pixels.shape[-2:]), (len(index), 2))

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of names, labels, classes and pixels, in order."""
        digest = hashlib.sha256(super().digest().encode())
        digest.update(repr(tuple(self.pixels.shape[1:])).encode())
        for rows in np.split(
            self.rows, range(_DIGESTED_AT_ONCE, len(self.rows), _DIGESTED_AT_ONCE)
        ):
            digest.update(self.pixels[rows].contiguous().numpy())
        return digest.hexdigest()

    def _part(self, index: np.ndarray, labels: np.ndarray, classes: list[str]) -> "PixelSet":
        part = super()._part(index, labels, classes)
        part.rows = self.rows[index]
        return part


class CachedSet(PixelSet):
    """The pictures of another set in memory: it stands for that set, broken images and all.

    images: the other set. pixels: as for `PixelSet`, those of image i in row i; what the rows of
    broken images hold does not matter. broken: number of an image -> why it cannot be read.
    originals: (N, 2) int64, heights and widths before the images were resized; None: they were not.
    """

    def __init__(
        self,
        images: ImageSet,
        pixels: Tensor,
        *,
        broken: dict[int, str],
        originals: np.ndarray | None = None,
    ) -> None:
        self.root, self.classes = images.root, images.classes
        self._paths, self.labels = images._paths, images.labels
        self._images, self._broken, self._originals = images, broken, originals
        self.pixels, self.rows = pixels, np.arange(len(images))

    @property
    def broken(self) -> dict[int, str]:
        """Images that could not be read, by row, and why."""
        return self._broken

    def image(self, index: int) -> Tensor:
        """The picture of image `index`, (3, H, W) uint8; OSError if it could not be read."""
        if reason := self._broken.get(int(self.rows[index])):
            raise OSError(reason)
        return super().image(index)

    def original_size(self, index: int) -> tuple[int, int] | None:
        """Height and width of image `index` before it was resized; None: it was not."""
        return None if self._originals is None else tuple(self._originals[self.rows[index]])

    def original_sizes(self, index: np.ndarray) -> np.ndarray:
        """Heights and widths of some images before they were resized, (n, 2) int64."""
        if self._originals is None:
            return super().original_sizes(index)
        return self._originals[self.rows[index]]

    def as_stored(self) -> ImageSet:
        """Itself, or the other set if pictures were resized."""
        return self if self._originals is None else self._images

    def digest(self) -> str:
        """That of the other set: a run goes on with a cache or without one."""
        return self._images.digest()

    def _part(self, index: np.ndarray, labels: np.ndarray, classes: list[str]) -> "CachedSet":
        part = super()._part(index, labels, classes)
        part._images = self._images._part(index, labels, classes)
        return part


def read_image_folder(root: Path) -> ImageSet:
    """List the images of `root/<class>/**`, or of a flat folder `root/*` without classes.

    Raises InputError for a missing folder, one without images, and a class without images.
    """
    if not root.is_dir():
        raise InputError(f"data {root}: no such folder")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        flat = _images_directly_in(root)
        if not flat:
            raise InputError(f"data {root}: neither class folders nor images in it")
        return ImageSet(root, flat, [-1] * len(flat), [])
    paths, labels = _images_of(classes, root)
    empty = sorted(set(range(len(classes))) - set(labels))
    if empty:
        first = ", ".join(classes[label] for label in empty[:5])
        raise InputError(f"data {root}: {len(empty)} classes without an image: {first}")
    return ImageSet(root, paths, labels, classes)


def read_any_folder(root: Path) -> ImageSet:
    """List all images below a folder: those directly in it, then those of its folders.

    The classes are the folders directly in it that hold images, at any depth; without a class is
    what lies beside them. Raises InputError for a missing folder and one without images.
    """
    if not root.is_dir():
        raise InputError(f"data {root}: no such folder")
    flat = _images_directly_in(root)
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    paths, found = _images_of(folders, root)
    if not flat and not paths:
        raise InputError(f"data {root}: no images in it")
    used = sorted(set(found))
    labels = np.searchsorted(used, found).tolist()
    classes = [folders[number] for number in used]
    return ImageSet(root, flat + paths, [-1] * len(flat) + labels, classes)


def _images_directly_in(root: Path) -> list[str]:
    """The names of a folder's image files, sorted."""
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_file())
    return [name for name in names if name.lower().endswith(folder.IMG_EXTENSIONS)]


def _images_of(classes: list[str], root: Path) -> tuple[list[str], list[int]]:
    """Paths below root of the images of these folders in it, and the numbers of the folders."""
    if not classes:
        return [], []
    numbers = {name: number for number, name in enumerate(classes)}
    samples = folder.make_dataset(
        str(root), numbers, extensions=folder.IMG_EXTENSIONS, allow_empty=True
    )
    return [os.path.relpath(path, root) for path, _ in samples], [label for _, label in samples]


def read_split(
    data: Path, split: str, *, dataset: str = "imagenet", unlabeled: bool = False
) -> ImageSet:
    """The images of `data/<split>`, split "train" or "val".

    dataset: "imagenet" for any folder tree; "imagenet100" for the first 100 classes of numpy's
    seeded (1234) permutation of ImageNet's 1000, which must all be there; or one of
    `archives.NAMES`, unlabeled: with its images without labels (label -1), if there are any. A flat
    folder of images without a "train" folder is a training set without labels. Raises InputError.
    """
    if dataset in archives.NAMES:
        pixels, labels, names, classes = archives.read(data, dataset, split, unlabeled=unlabeled)
        return PixelSet(data / split, names, labels, classes, pixels)
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
