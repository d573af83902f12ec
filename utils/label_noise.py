"""Labels to train with that are not those of the class folders: drawn noise, or a file.

A study of noise changes the labels that a method sees; what is measured, k-NN in particular, keeps
those of the folders.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.data import ImageSet
from utils.errors import InputError
from utils.loaders import Batch
from utils.splits import read_entries, refuse
from utils.streams import upload


def noisy_labels(images: ImageSet, rate: float, *, seed: int) -> np.ndarray:
    """The labels (N,) int64 after round(rate N) images, drawn, have got another class.

    rate: 0 to 1. The images are drawn without replacement, the class of each evenly from all but
    its own. The draw depends on the seed, the rate and the labels alone. InputError for a single
    class.
    """
    if len(images.classes) < 2:
        raise InputError(f"--label_noise {rate}: {images.root} has no second class")
    random = np.random.default_rng(seed)
    changed = random.permutation(len(images))[: round(rate * len(images))]
    shift = random.integers(1, len(images.classes), size=len(changed))
    labels = images.labels.copy()
    labels[changed] = (labels[changed] + shift) % len(images.classes)
    return labels


def read_label_file(path: Path, images: ImageSet, *, flag: str) -> np.ndarray:
    """The labels (N,) int64 that a file gives: each line an image's path below train/, its class.

    Path and class are parted by a tab, or else by the last blank, so that a class with a blank in
    its name needs a tab. Strict: every image must come once, and each class be one of the folders'.
    Otherwise an InputError counts the faults and names the first five, as for a missing, empty or
    unreadable file. flag: the flag that named it.
    """
    what = f"{flag} {path}"
    pairs = [_parted(entry) for entry in read_entries(path, what=what)]
    numbers = {images.name(number): number for number in range(len(images))}
    classes = {name: label for label, name in enumerate(images.classes)}
    times = Counter(name for name, _ in pairs)
    refuse(
        {
            "entries have no class": [n for n, given in pairs if not given],
            "entries name no image": [n for n in times if n not in numbers],
            "entries name no class": [f"{n} {c}" for n, c in pairs if c and c not in classes],
            "images come twice": [n for n, count in times.items() if count > 1],
            "images have no entry": [n for n in numbers if n not in times],
        },
        what=what,
    )
    labels = np.empty(len(images), dtype=np.int64)
    for name, given in pairs:
        labels[numbers[name]] = classes[given]
    return labels


def _parted(entry: str) -> tuple[str, str]:
    """Path and class of an entry, "" for what is not there."""
    name, tab, given = entry.rpartition("\t")
    if not tab:
        name, blank, given = entry.rpartition(" ")
        name, given = (name, given) if blank else (given, "")
    return name.strip(), given.strip()


def write_changes(path: Path, images: ImageSet, given: np.ndarray | None) -> None:
    """Write each image whose given label is not its own: path, true class, given class; by tabs.

    given: (N,); None: the images' own, and a file that an earlier run has left goes.
    """
    if given is None:
        path.unlink(missing_ok=True)
        return
    changed = np.flatnonzero(given != images.labels)
    lines = (
        "\t".join((images.name(n), images.classes[images.labels[n]], images.classes[given[n]]))
        for n in changed
    )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def labels_to_use(batch: Batch, given: Tensor | None) -> Tensor:
    """The labels (B,) to train a batch with, on its device.

    given: (N,) int64, on the host, of all images; None: the batch's own.
    """
    if given is None:
        return batch.label
    return upload(given[batch.index], batch.label.device)


def as_tensor(given: np.ndarray | None) -> Tensor | None:
    """Labels as `labels_to_use` takes them."""
    return None if given is None else torch.from_numpy(given)
