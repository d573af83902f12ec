"""Features of the train and the val images in one file, bound to what they were made of.

The file holds its key: checkpoint, encoder, network, view, and a digest of each split's image files
and labels. Features are handed out only if the whole key is the same, so a stale file cannot be
used.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import checked, checkpoint, distributed, torch_file
from utils.bad_images import BadImages
from utils.checked import Kind
from utils.data import ImageSet, PixelSet
from utils.errors import InputError
from utils.features import extract_features
from utils.loaders import EvalLoader

FORMAT = "cmsf-features-1"
NAME = "features.pth"

# By split, "train" and "val": features (N, F) float32, not normalized, and labels (N,) int64.
Features = dict[str, tuple[Tensor, Tensor]]


def image_digest(images: ImageSet, *, missing_ok: bool = False) -> str:
    """A digest (hexadecimal) of the images' names, sizes, times of change and labels, in order.

    The pictures themselves are not read, but for images in memory, of which the pixels count.
    Raises InputError for a file that is gone, unless
    missing_ok: then its size and time are None.
    """
    if isinstance(images, PixelSet):
        return images.digest()
    digest = hashlib.sha256(repr(images.classes).encode())
    for index, label in enumerate(images.labels.tolist()):
        size = time = None
        try:
            status = os.stat(images.path(index))
            size, time = status.st_size, status.st_mtime_ns
        except OSError as error:
            if not missing_ok:
                raise InputError(f"data {images.path(index)}: {error.strerror}") from error
        entry = (images.name(index), size, time, label)
        digest.update(repr(entry).encode())
    return digest.hexdigest()


def extract(backbone: nn.Module, train: EvalLoader, val: EvalLoader) -> Features | None:
    """Pass both splits through a backbone: what `features.extract_features` gives for each.

    Of several processes only the main one has features, the others None.
    """
    features = {}
    for split, loader in {"train": train, "val": val}.items():
        hidden = not distributed.shows_bars()
        bar = tqdm(loader, f"features of {split}", leave=False, disable=hidden)
        features[split] = extract_features(
            backbone, bar, num_images=len(loader.images), left_out=loader.left_out
        )
    return features if distributed.is_main() else None


def save(path: Path, key: dict[str, str], features: Features, *, bad_images: list[str]) -> None:
    """Write the features of both splits with their key, atomically; RunError if that fails.

    bad_images: the files that have no row in them.
    """
    state = {"format": FORMAT, "key": key, "features": features, "bad_images": bad_images}
    checkpoint.save(path, state)


def load(
    path: Path,
    key: dict[str, str],
    *,
    flag: str,
    bad_images: BadImages,
    feature_dim: int,
    num_classes: int,
) -> Features:
    """Read the features of a file whose key is this one.

    flag: the user's flag that named the file, for the message. bad_images: is told which images
    could not be read when the features were made. feature_dim, num_classes: what there is to be.
    Raises InputError for a file that is missing, unreadable (a truncated one is) or no feature
    cache, for one of another key, with the names of the parts that differ, for one with more images
    left out than may be, and for features that are not finite or not of these sizes.
    """
    what = f"{flag} {path}"
    state = checkpoint.load(path, flag=flag)
    if state.get("format") != FORMAT:
        raise InputError(f"{what}: no feature cache of this version")
    saved_key = checked.take(state, "key", checked.table_of(checked.TEXT), what=what)
    differing = [name for name in key if saved_key.get(name) != key[name]]
    if differing:
        raise InputError(f"{what}: features of another {', '.join(differing)}")
    names = checked.take(state, "bad_images", checked.list_of(checked.TEXT), what=what, default=[])
    features = checked.take(state, "features", _pairs(feature_dim, num_classes), what=what)
    for name in names:
        bad_images.add(name, f"there are no features of it in {path}")
    return features


def _pairs(feature_dim: int, num_classes: int) -> Kind:
    """`Features` of this size, finite, and labels of so many classes."""
    rows = torch_file.tensor("", torch_file.is_finite, dims=2, dtype=torch.float32)
    in_range = torch_file.between(0, num_classes - 1)
    labels = torch_file.tensor("", in_range, dims=1, dtype=torch.int64)

    def is_pair(value: Any) -> bool:
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            return False
        fits = rows.holds(value[0]) and labels.holds(value[1])
        return fits and value[0].shape == (len(value[1]), feature_dim) and len(value[1]) > 0

    words = f"finite features (N, {feature_dim}) and labels below {num_classes} of train and val"
    return Kind(
        words,
        lambda value: (
            isinstance(value, dict)
            and value.keys() == {"train", "val"}
            and all(map(is_pair, value.values()))
        ),
    )
