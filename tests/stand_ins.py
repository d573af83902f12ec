"""The transfer data sets in small, in the layouts that torchvision reads."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
from conftest import write_image

COUNTS = {"train": 6, "val": 3, "test": 4}  # images of a class
CLASSES = ["banded", "dotted", "woven"]


def _images(folder: Path, split: str, *, pattern: str = "{name}/{split}_{i}.jpg") -> list[tuple]:
    """Write the images of a split; (class, path below folder), both as text."""
    written = []
    for number, name in enumerate(CLASSES):
        for i in range(COUNTS[split]):
            path = pattern.format(name=name, split=split, i=i)
            seed = 10_000 * list(COUNTS).index(split) + 100 * number + i
            write_image(folder / path, seed=seed)
            written.append((name, path))
    return written


def write_dtd(root: Path) -> None:
    """Three published parts."""
    for split in COUNTS:
        lines = [path for _, path in _images(root / "dtd/dtd/images", split)]
        (root / "dtd/dtd/labels").mkdir(exist_ok=True)
        (root / "dtd/dtd/labels" / f"{split}1.txt").write_text("\n".join(lines) + "\n")


def write_aircraft(root: Path) -> None:
    """Three published parts; class names with blanks."""
    data = root / "fgvc-aircraft-2013b/data"
    for split in COUNTS:
        written = _images(data / "images", split, pattern="{split}{name}{i}.jpg")
        lines = [f"{path[:-4]} {name} 7" for name, path in written]
        (data / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")
    (data / "variants.txt").write_text("".join(f"{name} 7\n" for name in CLASSES))


def write_food(root: Path) -> None:
    """Two parts."""
    for split in ("train", "test"):
        parts = {name: [] for name in CLASSES}
        for name, path in _images(root / "food-101/images", split):
            parts[name].append(path[:-4])
        (root / "food-101/meta").mkdir(exist_ok=True)
        (root / "food-101/meta" / f"{split}.json").write_text(json.dumps(parts))


def write_pets(root: Path) -> None:
    """Two parts, one of them called trainval."""
    base = root / "oxford-iiit-pet"
    for part, split in (("trainval", "train"), ("test", "test")):
        written = _images(base / "images", split, pattern="{name}_{split}{i}.jpg")
        (base / "annotations").mkdir(exist_ok=True)
        lines = [f"{path[:-4]} {CLASSES.index(name) + 1} 1 1" for name, path in written]
        (base / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")


def write_cars(root: Path) -> None:
    """Two parts; needs scipy."""
    from scipy.io import savemat

    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit/cars_meta.mat", {"class_names": np.array(CLASSES, dtype=object)})
    kind = [("fname", object), ("class", np.uint8)]
    for split, file in (
        ("train", "devkit/cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ):
        written = _images(base / f"cars_{split}", split, pattern="{name}{i}.jpg")
        rows = [(path, CLASSES.index(name) + 1) for name, path in written]
        savemat(base / file, {"annotations": np.array(rows, dtype=kind)})


def write_flowers(root: Path) -> None:
    """Three parts, all of 102 classes' names though only three have images; needs scipy."""
    from scipy.io import savemat

    base, ids, labels = root / "flowers-102", {}, []
    for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        ids[key] = []
        for name, path in _images(base / "jpg", split, pattern="{name}{split}{i}.jpg"):
            labels.append(CLASSES.index(name) + 1)
            ids[key].append(len(labels))
            (base / "jpg" / path).rename(base / "jpg" / f"image_{len(labels):05d}.jpg")
    savemat(base / "setid.mat", ids)
    savemat(base / "imagelabels.mat", {"labels": labels})


def write_sun(root: Path, *, per_class: int = 104) -> None:
    """One part; class names hold a slash, and the last class is a little larger."""
    names = ["a/abbey", "b/barn/inside"]
    for number, name in enumerate(names):
        for i in range(per_class + number):
            write_image(root / "SUN397" / name / f"sun_{i:03d}.jpg", seed=i, size=(6, 6))
    (root / "SUN397/ClassName.txt").write_text("".join(f"/{name}\n" for name in names))


def write_caltech(root: Path, *, per_class: int = 33) -> None:
    """One part, with the background images that are no class."""
    for number, name in enumerate(["BACKGROUND_Google", "ant", "beaver"]):
        for i in range(per_class + number):
            path = root / "caltech101/101_ObjectCategories" / name / f"image_{i + 1:04d}.jpg"
            write_image(path, seed=100 * number + i, size=(6, 6))


def write_cifar(root: Path, *, fine: bool = False) -> np.ndarray:
    """CIFAR-10 or, fine, CIFAR-100, 3 classes; the train pixels (N, 3, 32, 32). No checksums."""
    folder = root / ("cifar-100-python" if fine else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    files = ["train"] if fine else [f"data_batch_{i}" for i in range(1, 6)]
    pixels = []
    for number, file in enumerate([*files, "test" if fine else "test_batch"]):
        rng = np.random.default_rng(number)
        labels = [i % 3 for i in range(9)]
        data = rng.integers(0, 256, (9, 3072), dtype=np.uint8)
        key = "fine_labels" if fine else "labels"
        (folder / file).write_bytes(pickle.dumps({"data": data, key: labels}))
        pixels.append(data.reshape(-1, 3, 32, 32))
    meta = {"fine_label_names" if fine else "label_names": CLASSES}
    (folder / ("meta" if fine else "batches.meta")).write_bytes(pickle.dumps(meta))
    return np.concatenate(pixels[:-1])


WRITERS: dict[str, Callable[[Path], object]] = {
    "food101": write_food,
    "cifar10": write_cifar,
    "cifar100": lambda root: write_cifar(root, fine=True),
    "sun397": write_sun,
    "cars": write_cars,
    "aircraft": write_aircraft,
    "dtd": write_dtd,
    "pets": write_pets,
    "caltech101": write_caltech,
    "flowers102": write_flowers,
}


def without_checksums(monkeypatch) -> None:
    """Let torchvision take stand-ins for the real files where it would compare checksums."""

    def exists(path: str, md5: str | None = None) -> bool:
        return Path(path).is_file()

    for module in ("cifar", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", exists)
