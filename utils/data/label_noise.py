"""Labels to train with that are not those of the class folders: drawn noise, or a file.

A study of noise changes the labels that a method sees; what is measured, k-NN in particular, keeps
those of the folders.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.data.batches import Batch
from utils.data.datasets import ImageSet
from utils.data.splits import (
    ImageNames,
    absent_classes,
    quoted,
    read_lines,
    refuse,
    unquoted,
)
from utils.runtime.errors import InputError, printable
from utils.runtime.files import replace_text
from utils.runtime.streams import upload


def noisy_labels(images: ImageSet, rate: float, *, seed: int) -> np.ndarray:
    """The labels (N,) int64 after round(rate N) images have got another class; rate: 0 to 1.

    The images are drawn without replacement, the class of each evenly from all but its own, by the
    seed, the rate and the labels alone. InputError for a single class.
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

    Path and class are parted by a tab, or else by the last blank; either can be a JSON string, see
    `splits`. Strict: InputError, which begins with the flag, unless every image comes once and each
    class is one of the folders'.
    """
    what = f"{flag} {path}"
    names, classes = ImageNames(images), {name: n for n, name in enumerate(images.classes)}
    rows = []  # entry, class as given, number of the image, label
    for entry, given in map(_parted, read_lines(path, what=what)):
        name = unquoted(given)
        if name is None:
            name = given if given in classes else given.strip()
        rows.append((entry, given, names.number(entry), classes.get(name)))
    times = Counter(number for _, _, number, _ in rows if number is not None)
    refuse(
        {
            "entries have no class": [e for e, given, _, _ in rows if not given],
            "entries name no image": [e for e, _, number, _ in rows if number is None],
            "entries name no class": [f"{e} {g}" for e, g, _, label in rows if g and label is None],
            "images come twice": [images.name(n) for n, count in times.items() if count > 1],
            "images have no entry": [images.name(n) for n in range(len(images)) if n not in times],
        },
        what=what,
    )
    labels = np.empty(len(images), dtype=np.int64)
    for _, _, number, label in rows:
        labels[number] = label
    return labels


def _parted(line: str) -> tuple[str, str]:
    """Path and class of a line, as they stand there; "" for a class that is not there."""
    entry, tab, given = line.rstrip("\t").rpartition("\t")
    if not tab:
        entry, blank, given = line.rstrip().rpartition(" ")
        if not blank:
            entry, given = given, ""
    return entry, given if given.strip() else ""


def write_changes(path: Path, images: ImageSet, given: np.ndarray | None) -> None:
    """Write each image whose given label is not its own: path, true class, given class; by tabs.

    given: (N,); None: the images' own, and a file that an earlier run has left goes. RunError as of
    `files.replace_text`.
    """
    if given is None:
        path.unlink(missing_ok=True)
        return
    changed = np.flatnonzero(given != images.labels)
    fields = (
        (images.name(n), images.classes[images.labels[n]], images.classes[given[n]])
        for n in changed
    )
    replace_text(path, "".join("\t".join(map(quoted, row)) + "\n" for row in fields))


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


def given_labels(
    images: ImageSet, *, file: Path | None, noise: float | None, seed: int
) -> np.ndarray | None:
    """Labels (N,) to train with by --label_file or --label_noise; None: those of the images.

    A class that no image has then is named in a warning.
    """
    if file is not None:
        what, given = f"--label_file {file}", read_label_file(file, images, flag="--label_file")
    elif noise is not None:
        what, given = f"--label_noise {noise}", noisy_labels(images, noise, seed=seed)
    else:
        return None
    if absent := absent_classes(given, images.classes):
        print(printable(f"WARNING {what}: no image has the label of {absent}"), flush=True)
    return given
