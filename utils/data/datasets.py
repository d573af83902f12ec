"""Sets of images with labels, as files or in memory, and reading them from folders and archives."""

import copy
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from utils.data import archives, cropping, listing
from utils.runtime.errors import InputError, printable

_DIGESTED_AT_ONCE = 1024  # images


class ImageSet:
    """Image files with labels; image i is the same file in every process.

    paths: relative to root, in the order of torchvision's ImageFolder. labels: (N,) int64, -1
    for an image without one, so throughout where there are no classes. classes: the sorted class
    names, empty where there are none. found: the listing of the files, from which `left_out` and
    `folders` come, what lies among them and the identities of their folders.
    """

    def __init__(
        self,
        root: Path,
        paths: list[str],
        labels: Sequence[int],
        classes: list[str],
        found: listing.Folder | None = None,
    ) -> None:
        self.root, self.classes = root, classes
        # One array of bytes instead of a million Python objects: workers share its pages.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels, dtype=np.int64)
        self.left_out = found.left_out if found else listing.LeftOut()
        self.folders = found.identities if found else {}

    def __str__(self) -> str:
        """How many images of how many classes there are, and what is left out."""
        count = len(self.classes)
        classes = f"in {count} class{'es' * (count > 1)}" if count else "without classes"
        others = f"; left out: {self.left_out}" if str(self.left_out) else ""
        return f"data {self.root}: {len(self)} images {classes}{others}"

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The path of image `index` below the root."""
        return os.fsdecode(self._paths[index].item())

    def path(self, index: int) -> str:
        """The file of image `index`."""
        return os.path.join(self.root, self.name(index))

    def image(self, index: int) -> Tensor:
        """The picture of image `index`, (3, H, W) uint8; a broken file can raise anything."""
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

    pixels: (M, 3, H, W) uint8, in memory as (M, H, W, 3), shared with parts of the set and workers.
    rows: (N,) int64, the row of each image. broken: by row, why it could not be read. originals:
    (M, 2) int64, heights and widths before the pictures were resized; None: they were not.
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
        self.pixels, self.rows = pixels, np.arange(len(paths))
        self.broken: dict[int, str] = {}
        self.originals: np.ndarray | None = None

    def image(self, index: int) -> Tensor:
        """The picture of image `index`, (3, H, W) uint8, not to be changed; OSError if broken."""
        if self.broken and (reason := self.broken.get(int(self.rows[index]))):
            raise OSError(reason)
        return self.pixels[self.rows[index]]

    def original_size(self, index: int) -> tuple[int, int] | None:
        return None if self.originals is None else tuple(self.originals[self.rows[index]])

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of names, labels, classes and pixels, in order."""
        digest = hashlib.sha256(super().digest().encode())
        digest.update(repr(tuple(self.pixels.shape[1:])).encode())
        for start in range(0, len(self.rows), _DIGESTED_AT_ONCE):
            rows = self.rows[start : start + _DIGESTED_AT_ONCE]
            digest.update(self.pixels[rows].contiguous().numpy())
        return digest.hexdigest()

    def _part(self, index: np.ndarray, labels: np.ndarray, classes: list[str]) -> "PixelSet":
        part = super()._part(index, labels, classes)
        part.rows = self.rows[index]
        return part


class CachedSet(PixelSet):
    """The pictures of another set in memory, image i in row i: it stands for that set."""

    def __init__(
        self,
        images: ImageSet,
        pixels: Tensor,
        *,
        broken: dict[int, str],
        originals: np.ndarray | None = None,
    ) -> None:
        vars(self).update(vars(images))
        self._images, self.pixels, self.rows = images, pixels, np.arange(len(images))
        self.broken, self.originals = broken, originals

    def as_stored(self) -> ImageSet:
        """Itself, or the other set if pictures were resized."""
        return self if self.originals is None else self._images

    def digest(self) -> str:
        """That of the other set: a run goes on with a cache or without one."""
        return self._images.digest()

    def _part(self, index: np.ndarray, labels: np.ndarray, classes: list[str]) -> "CachedSet":
        part = super()._part(index, labels, classes)
        part._images = self._images._part(index, labels, classes)
        return part


def read_image_folder(root: Path) -> ImageSet:
    """List the images of `root/<class>/**`, or of a flat folder `root/*` without classes.

    Images beside class folders are no part of the set but of its `left_out`; beside folders without
    any image they are a flat folder. InputError for a missing folder, one without images, a class
    without images, and where either could be meant: images beside a single folder with images, or
    more of them than in all folders.
    """
    found = listing.Folder(root)
    by_class = found.images_by_folder()
    inside = {name: len(paths) for name, paths in by_class.items() if paths}
    beside, below = len(found.images), sum(inside.values())
    if not inside and (beside or not by_class):
        return _flat_set(found)
    if beside and (len(inside) == 1 or beside > below):
        first = ", ".join([*inside][:5])
        raise InputError(
            f"data {root}: {beside} images directly in it and {below} in {len(inside)} of its "
            f"folders ({first}): as a set without classes, move the folders away; as classes, move "
            "the images beside them away"
        )
    if empty := [name for name in by_class if name not in inside]:
        first = ", ".join(empty[:5]) + _instead(found)
        raise InputError(f"data {root}: {len(empty)} classes without an image: {first}")
    for name in found.images:
        found.left_out.count("images beside the class folders", name)
    return _set_of(found, by_class)


def _flat_set(found: listing.Folder) -> ImageSet:
    """The images directly in a folder, without labels; its folders are left out."""
    if not found.images:
        what = "neither class folders nor images in it"
        raise InputError(f"data {found.root}: {what}{_instead(found)}")
    found.check_links()
    for name in found.folders:
        found.left_out.count("folders", name)
    return _set_of(found, {}, found.images)


def _set_of(
    found: listing.Folder, by_class: dict[str, list[str]], beside: Sequence[str] = ()
) -> ImageSet:
    """The images beside the folders of the classes, without a label, and those in them."""
    parts = [beside, *by_class.values()]
    labels = np.repeat(np.arange(-1, len(by_class)), [len(part) for part in parts])
    paths = [path for part in parts for path in part]
    return ImageSet(found.root, paths, labels, list(by_class), found)


def _instead(found: listing.Folder) -> str:
    """What a folder without images holds instead."""
    return f" (but {found.left_out})" if str(found.left_out) else ""


def read_any_folder(root: Path) -> ImageSet:
    """List all images below a folder: those directly in it, then those of its folders.

    The classes are the folders directly in it that hold images; without a class is what lies beside
    them. Prints how many there are. InputError for a missing folder and one without images.
    """
    found = listing.Folder(root)
    by_class = {name: paths for name, paths in found.images_by_folder().items() if paths}
    if not found.images and not by_class:
        raise InputError(f"data {root}: no images in it{_instead(found)}")
    images = _set_of(found, by_class, found.images)
    print(printable(str(images)), flush=True)
    return images


def read_split(
    data: Path, split: str, *, dataset: str = "imagenet", unlabeled: bool = False
) -> ImageSet:
    """The images of `data/<split>`, split "train" or "val".

    dataset: "imagenet" for any folder tree; "imagenet100" for the first 100 classes of numpy's
    seeded (1234) permutation of ImageNet's 1000, which must all be there; or one of
    `archives.NAMES`, unlabeled: with its images without labels (label -1), if there are any. A
    folder with images directly in it and without a "train" folder is a training set without labels.
    Prints how many images in how many classes there are, and what is left out. Raises InputError.
    """
    root = data / split
    if dataset in archives.NAMES:
        images = PixelSet(root, *archives.read(data, dataset, split, unlabeled=unlabeled))
    elif not listing.is_folder(root):
        images = _without_split_folder(data, split)
    else:
        images = read_image_folder(root)
    if dataset == "imagenet100":
        if len(images.classes) != 1000:
            raise InputError(
                f"--dataset imagenet100: {root} has {len(images.classes)} classes, not the 1000 it "
                "is chosen from (a folder of its 100: --dataset imagenet)"
            )
        chosen = np.random.RandomState(1234).permutation(1000)[:100]
        images = images.subset([images.classes[position] for position in sorted(chosen)])
    warning = f"; WARNING: {_one_class(images)}" if len(images.classes) == 1 else ""
    print(printable(f"{images}{warning}"), flush=True)
    return images


def _without_split_folder(data: Path, split: str) -> ImageSet:
    """A flat folder as training images; InputError, with what may be meant, for any other."""
    found = listing.Folder(data)
    if split == "train" and found.images:
        return _flat_set(found)
    nearby = [name for name in found.folders if os.path.isdir(data / name / split)]
    hint = ""
    if len(nearby) == 1:
        hint = f"; did you mean {data / nearby[0]}?"
    elif data.resolve().name in ("train", "val"):
        hint = f"; did you mean {data.resolve().parent}, the folder that holds train/ and val/?"
    raise InputError(f"data {data}: no folder {split}/ in it{hint}")


def _one_class(images: ImageSet) -> str:
    """What is said of a set of a single class: perhaps its folders lie one level too deep."""
    (name,) = images.classes
    parts = (images.name(number).split("/") for number in range(len(images)))
    inside = {below[1] for below in parts if len(below) > 2}
    if not inside:
        return f"one class only, {name}"
    return (
        f"one class only, {name}, with {len(inside)} folders in it: did you mean "
        f"{images.root / name}? The folders of the classes belong directly into {images.root}"
    )


def check_classes(train: ImageSet, val: ImageSet) -> None:
    """InputError unless both splits have the same classes, two or more, and no folder in common.

    Labels are positions among their names. Of a single class any network is right, and images that
    it has in its base are each their own nearest neighbor.
    """
    data = train.root.parent
    if differing := sorted(set(train.classes) ^ set(val.classes)):
        forms = Counter(unicodedata.normalize("NFC", name) for name in differing)
        twins = ", ".join([name for name, count in forms.items() if count > 1][:5])
        hint = f"; in both, but in two Unicode normal forms (NFC and NFD): {twins}" if twins else ""
        raise InputError(
            f"data {data}: train/ and val/ differ in {len(differing)} classes, first "
            f"{', '.join(differing[:5])}{hint}"
        )
    if len(train.classes) < 2:
        found = _one_class(train) if train.classes else "no class folders in train/ and val/"
        raise InputError(f"data {data}: {found}; an evaluation needs two classes")
    for folder, path in val.folders.items():
        if folder in train.folders:
            raise InputError(
                f"data {path}: is the same folder as {train.folders[folder]}, so training images "
                "would be the val images"
            )
