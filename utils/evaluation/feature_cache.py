"""Features of the train and the val images in one file, bound to what they were made of.

The file holds its key: checkpoint, encoder, network, view, and a digest of each split's labels and
of every byte of its image files. Features are handed out only if the whole key is the same, so a
stale file cannot be used. The images are read for that before the features are made, in 4% of the
time of decoding and cropping them (11% for files of 2 kB: tests/benchmarks/feature_key.py).
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.data.bad_images import BadImages
from utils.data.datasets import ImageSet, PixelSet
from utils.data.eval_loader import EvalLoader
from utils.evaluation.features import extract_features, finite_rows
from utils.method import checkpoint
from utils.method.encoders import Backbone
from utils.runtime import checked, distributed, files, torch_file
from utils.runtime.errors import InputError, printable

FORMAT = "cmsf-features-2"  # 1 had a key of sizes and times
NAME = "features.pth"
_THREADS, _AT_ONCE = 8, 256  # that read files, and files that one takes at a time

# By split, "train" and "val": features (N, F) float32, not normalized, and labels (N,) int64.
Features = dict[str, tuple[Tensor, Tensor]]


def image_digest(images: ImageSet, *, missing_ok: bool = False, text: str = "images") -> str:
    """A digest (hexadecimal) of the images' names, labels and every byte of their files, in order.

    Of images in memory the pixels count. All processes call it; each reads its part of the files.
    Raises InputError for a file that is gone, unless missing_ok: then it counts as that. text: what
    a progress bar says.
    """
    if isinstance(images, PixelSet):
        return images.digest()
    count = len(images)
    parts = [range(start, min(start + _AT_ONCE, count)) for start in range(0, count, _AT_ONCE)]
    own = distributed.own_share(len(parts))

    def digest_of(numbers: range) -> bytes:
        entries = (_entry(images, number, missing_ok=missing_ok) for number in numbers)
        return hashlib.sha256(b"".join(entries)).digest()

    found = []
    bar = tqdm(desc=text, total=count, leave=False, disable=not distributed.shows_bars())
    with bar, ThreadPoolExecutor(_THREADS) as threads:  # they wait for files, and hash side by side
        for digest in threads.map(digest_of, parts[own.start : own.stop]):
            found.append(digest)
            bar.update(_AT_ONCE * distributed.world_size())
    of_all = b"".join(part for some in distributed.gather_objects(found) for part in some)
    return hashlib.sha256(repr(images.classes).encode() + of_all).hexdigest()


def _entry(images: ImageSet, number: int, *, missing_ok: bool) -> bytes:
    """What a digest takes of one image; see `image_digest`."""
    path, seen = images.path(number), None
    try:
        with open(path, "rb", buffering=0) as file:
            seen = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        if not missing_ok:
            raise InputError(f"data {path}: {error.strerror}") from error
    return repr((images.name(number), seen, int(images.labels[number]))).encode()


def extract(backbone: nn.Module, train: EvalLoader, val: EvalLoader) -> Features | None:
    """`features.extract_features` of both splits; None but on the main process."""
    features = {
        split: extract_features(backbone, loader, f"features of {split}")
        for split, loader in (("train", train), ("val", val))
    }
    return features if distributed.is_main() else None


def load_or_extract(
    path: Path | None, key: dict[str, str], backbone: Backbone, train: EvalLoader, val: EvalLoader
) -> Features | None:
    """`extract`, kept by `load_or_make`."""
    return load_or_make(
        *(path, key, lambda: extract(backbone.module, train, val)),
        flag="--cached",
        bad_images=train.bad_images,
        feature_dim=backbone.feature_dim,
        num_classes=len(train.images.classes),
    )


def load_or_make(
    path: Path | None, key: dict[str, str], make: Callable[[], Features | None], **expected: Any
) -> Features | None:
    """The features of a file that has this key; made, and kept there, where it has not.

    make: gives them on the main process, None on others; all call it. expected: as of `load`. None
    but on the main process, which alone has the file.
    """
    features = None
    if distributed.is_main() and path and path.exists():
        try:
            features = load(path, key, **expected)
        except InputError as error:
            print(printable(f"{error}: extracted anew"), flush=True)
    if distributed.any_true(features is not None):
        return features
    features = make()
    if features and path:
        save(path, key, features, bad_images=expected["bad_images"].names)
    return features


def save(path: Path, key: dict[str, str], features: Features, *, bad_images: list[str]) -> None:
    """Write features with their key, and the files that have no row; RunError if that fails."""
    state = {"format": FORMAT, "key": key, "features": features, "bad_images": bad_images}
    files.save(path, state)


def load(
    path: Path,
    key: dict[str, str],
    *,
    flag: str,
    bad_images: BadImages,
    feature_dim: int,
    num_classes: int,
    splits: Sequence[str] = ("train", "val"),
) -> Features:
    """Read the features of a file whose key is this one; flag: what the user named it by.

    bad_images: is told which images could not be read when the features were made. InputError for
    a file that cannot be read or is no feature cache, for one of another key, with the names of the
    parts that differ, for more images left out than may be, and for features that are not finite or
    not of these sizes.
    """
    what = f"{flag} {path}"
    state = checkpoint.load(path, flag=flag)
    if state.get("format") != FORMAT:
        raise InputError(f"{what}: no feature cache of this version")
    saved_key = checked.take(state, "key", checked.table_of(checked.TEXT), what=what)
    if differing := [name for name in key if saved_key.get(name) != key[name]]:
        raise InputError(f"{what}: features of another {', '.join(differing)}")
    names = checked.take(state, "bad_images", checked.list_of(checked.TEXT), what=what, default=[])
    features = checked.take(state, "features", checked.TABLE, what=what)
    for split in splits:
        if not _is_pair(features.get(split), feature_dim, num_classes):
            sizes = f"finite features (N, {feature_dim}) and labels below {num_classes}"
            raise InputError(f"{what}: features of {split} are not {sizes}")
    for name in names:
        bad_images.add(name, f"there are no features of it in {path}")
    return {split: features[split] for split in splits}


def _is_pair(value: Any, feature_dim: int, num_classes: int) -> bool:
    """Whether these are features (N, F), finite, and labels (N,) of so many classes."""
    rows = torch_file.tensor(
        "", lambda part: bool(finite_rows(part).all()), dims=2, dtype=torch.float32
    )
    labels = torch_file.tensor(
        "", torch_file.between(0, num_classes - 1), dims=1, dtype=torch.int64
    )
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    fits = rows.holds(value[0]) and labels.holds(value[1])
    return fits and value[0].shape == (len(value[1]), feature_dim) and len(value[1]) > 0
