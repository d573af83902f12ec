"""Features of the train and the val images in one file, bound to what they were made of.

The file holds its key: checkpoint, encoder, network, view, and a digest of each split's image files
and labels. Features are handed out only if the whole key is the same, so a stale file cannot be
used.
"""

import hashlib
import os
import sys
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from utils import checkpoint
from utils.data import ImageSet
from utils.errors import InputError, RunError
from utils.features import extract_features
from utils.loaders import EvalLoader

FORMAT = "cmsf-features-1"
NAME = "features.pth"

# By split, "train" and "val": features (N, F) float32, not normalized, and labels (N,) int64.
Features = dict[str, tuple[Tensor, Tensor]]


def image_digest(images: ImageSet) -> str:
    """A digest (hexadecimal) of the images' names, sizes, times of change and labels, in order.

    The pictures themselves are not read. Raises InputError for a file that is gone.
    """
    digest = hashlib.sha256(repr(images.classes).encode())
    for index, label in enumerate(images.labels.tolist()):
        try:
            status = os.stat(images.path(index))
        except OSError as error:
            raise InputError(f"data {images.path(index)}: {error.strerror}") from error
        entry = (images.name(index), status.st_size, status.st_mtime_ns, label)
        digest.update(repr(entry).encode())
    return digest.hexdigest()


def extract(backbone: nn.Module, train: EvalLoader, val: EvalLoader) -> Features:
    """Pass both splits through a backbone: what `features.extract_features` gives for each."""
    features = {}
    for split, loader in {"train": train, "val": val}.items():
        bar = tqdm(loader, f"features of {split}", leave=False, disable=not sys.stderr.isatty())
        features[split] = extract_features(backbone, bar, num_images=len(loader.images))
    return features


def save(path: Path, key: dict[str, str], features: Features) -> None:
    """Write the features of both splits with their key, atomically; RunError if that fails."""
    try:
        checkpoint.save(path, {"format": FORMAT, "key": key, "features": features})
    except (OSError, RuntimeError) as error:
        raise RunError(f"{path} could not be written: {error}") from error


def load(path: Path, key: dict[str, str], *, flag: str) -> Features:
    """Read the features of a file whose key is this one.

    flag: the user's flag that named the file, for the message. Raises InputError for a file that is
    missing, unreadable (a truncated one is) or no feature cache, and for one of another key, with
    the names of the parts that differ.
    """
    state = checkpoint.load(path, flag=flag)
    if state.get("format") != FORMAT:
        raise InputError(f"{flag} {path}: no feature cache of this version")
    differing = [name for name in key if state["key"].get(name) != key[name]]
    if differing:
        raise InputError(f"{flag} {path}: features of another {', '.join(differing)}")
    return state["features"]
