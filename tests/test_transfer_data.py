"""The transfer data sets' images, labels and splits, on stand-ins in torchvision's layouts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import CLASSES, COUNTS, WRITERS, without_checksums, write_cifar, write_sun
from torchvision import datasets

from utils.data.datasets import PixelSet, read_split
from utils.data.eval_loader import EvalLoader
from utils.evaluation.transfer_data import SETS, Unavailable, hold_out, open_set


@pytest.fixture(autouse=True)
def no_checksums(monkeypatch):
    """Stand-ins have none."""
    without_checksums(monkeypatch)


def draw(name: str, root: Path) -> Path:
    if name in ("cars", "flowers102"):
        pytest.importorskip("scipy")
    WRITERS[name](root)
    return root


def sizes(splits) -> list[list[int]]:
    """Images of each class in train, val and test."""
    count = len(splits.train.classes)
    return [np.bincount(part.labels, minlength=count).tolist() for part in splits]


def files(images) -> list[str]:
    return [images.path(i) for i in range(len(images))]


@pytest.mark.parametrize("name", ["dtd", "aircraft", "flowers102"])
def test_published_parts_are_kept(tmp_path, name):
    splits = open_set(name, draw(name, tmp_path), seed=0)
    expected = [[COUNTS[split]] * 3 for split in ("train", "val", "test")]
    assert [found[:3] for found in sizes(splits)] == expected
    if name == "flowers102":
        assert len(splits.train.classes) == 102
    else:
        suffix = " 7" if name == "aircraft" else ""
        assert splits.test.classes == [name + suffix for name in CLASSES]


@pytest.mark.parametrize("name", ["food101", "cars", "pets"])
def test_val_is_held_out_where_there_is_none(tmp_path, name):
    """A fifth of 6 images of each class: one."""
    splits = open_set(name, draw(name, tmp_path), seed=0)
    assert sizes(splits) == [[5] * 3, [1] * 3, [4] * 3]
    assert not set(files(splits.train)) & set(files(splits.val))
    again, other = (open_set(name, tmp_path, seed=seed) for seed in (0, 1))
    assert files(again.val) == files(splits.val) != files(other.val)


@pytest.mark.parametrize(
    "name", ["food101", "cars", "aircraft", "dtd", "pets", "flowers102", "caltech101", "sun397"]
)
def test_images_and_labels_are_torchvisions(tmp_path, name):
    """Each image once, with the pixels and the label that torchvision itself gives it."""
    splits = open_set(name, draw(name, tmp_path), seed=0)
    kinds = {
        "food101": (datasets.Food101, ("train", "test")),
        "cars": (datasets.StanfordCars, ("train", "test")),
        "aircraft": (datasets.FGVCAircraft, ("train", "val", "test")),
        "dtd": (datasets.DTD, ("train", "val", "test")),
        "pets": (datasets.OxfordIIITPet, ("trainval", "test")),
        "flowers102": (datasets.Flowers102, ("train", "val", "test")),
        "caltech101": (datasets.Caltech101, ()),
        "sun397": (datasets.SUN397, ()),
    }
    kind, parts = kinds[name]
    found = [kind(tmp_path, split=part) for part in parts] or [kind(tmp_path)]
    if len(found) == 1:
        pytest.importorskip("scipy")  # Caltech101's access
    theirs = {
        (np.asarray(image.convert("RGB")).tobytes(), int(label))
        for part in found
        for image, label in part
    }
    ours = [
        (part.image(i).permute(1, 2, 0).numpy().tobytes(), int(part.labels[i]))
        for part in splits
        for i in range(len(part))
    ]
    if name != "sun397":  # of which 50 + 50 are taken, and its stand-in's classes share pictures
        assert len(ours) == sum(map(len, found)) and len(set(ours)) == len(ours)
    assert set(ours) <= theirs
    for part in splits:
        for i in (0, len(part) - 1):
            with Image.open(part.path(i)) as image:
                assert np.array_equal(part.image(i).permute(1, 2, 0), np.asarray(image))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_lies_in_memory(tmp_path, name):
    pixels = write_cifar(tmp_path, fine=name == "cifar100")
    splits = open_set(name, tmp_path, seed=0)
    count = len(pixels) // 3
    held = round(0.2 * count)
    assert sizes(splits) == [[count - held] * 3, [held] * 3, [3] * 3]
    rows = [int(part.name(i)) for part in splits[:2] for i in range(len(part))]
    assert sorted(rows) == list(range(len(pixels)))
    for part in splits[:2]:
        for i in range(len(part)):
            number = int(part.name(i))
            assert np.array_equal(part.image(i).numpy(), pixels[number])
            assert part.labels[i] == number % 3
    batch = next(iter(EvalLoader(splits.val, batch_size=2, image_size=16)))
    assert batch.images.shape == (2, 3, 16, 16) and batch.label.tolist() == [
        int(label) for label in splits.val.labels[:2]
    ]


def test_sun397_draws_fifty_and_fifty_of_every_class(tmp_path):
    splits = open_set("sun397", draw("sun397", tmp_path), seed=0)
    assert splits.train.classes == ["abbey", "barn/inside"]
    assert sizes(splits) == [[40, 40], [10, 10], [50, 50]]
    assert len(set(sum(map(files, splits), []))) == 200
    again, other = (open_set("sun397", tmp_path, seed=seed) for seed in (0, 1))
    assert [*map(files, again)] == [*map(files, splits)]
    assert files(other.test) != files(splits.test)


def test_the_draw_does_not_depend_on_the_order_of_the_file_system(tmp_path, monkeypatch):
    """In which torchvision lists SUN397."""
    draw("sun397", tmp_path)
    expected = [*map(files, open_set("sun397", tmp_path, seed=0))]
    listed = Path.rglob
    for turn in (1, -1):
        monkeypatch.setattr(Path, "rglob", lambda *args, t=turn: sorted(listed(*args))[::t])
        assert [*map(files, open_set("sun397", tmp_path, seed=0))] == expected


def test_caltech101_draws_thirty_of_every_class(tmp_path):
    """The rest is test; the background is no class."""
    splits = open_set("caltech101", draw("caltech101", tmp_path), seed=0)
    assert splits.test.classes == ["ant", "beaver"]
    assert sizes(splits) == [[24, 24], [6, 6], [4, 5]]
    assert len(set(sum(map(files, splits), []))) == 34 + 35


def test_metrics_and_protocols():
    per_class = {name for name, entry in SETS.items() if entry.metric == "mean_per_class"}
    assert per_class == {"aircraft", "pets", "caltech101", "flowers102"}
    assert len(SETS) == 10
    assert "50 train and 50 test" in SETS["sun397"].protocol
    assert "30 train" in SETS["caltech101"].protocol
    assert "val: 20%" in SETS["food101"].protocol
    assert "drawn" not in SETS["dtd"].protocol


@pytest.mark.parametrize("name", SETS)
def test_what_is_not_there_is_said_in_one_line(tmp_path, name):
    with pytest.raises(Unavailable, match="not there") as error:
        open_set(name, tmp_path, seed=0)
    text = str(error.value)
    assert str(tmp_path / SETS[name].folder) in text and "\n" not in text
    assert ("--download" in text) == (name != "cars")
    assert not list(tmp_path.iterdir())  # Caltech101 of torchvision would make its folder


def test_damaged_sets_are_named(tmp_path):
    WRITERS["dtd"](tmp_path)
    (tmp_path / "dtd/dtd/labels/val1.txt").unlink()
    with pytest.raises(Unavailable, match="No such file"):
        open_set("dtd", tmp_path, seed=0)
    (tmp_path / "dtd/dtd/labels/val1.txt").write_text("banded/train_0.jpg\n")
    with pytest.raises(Unavailable, match="differ in their classes"):
        open_set("dtd", tmp_path, seed=0)
    WRITERS["food101"](tmp_path)
    (tmp_path / "food-101/meta/test.json").write_text("{")
    with pytest.raises(Unavailable, match="food-101"):
        open_set("food101", tmp_path, seed=0)


@pytest.mark.parametrize("name", ["sun397", "caltech101"])
def test_classes_too_small_for_the_draw_are_named(tmp_path, name):
    WRITERS[name](tmp_path, per_class=29)
    with pytest.raises(Unavailable, match="images of the class (abbey|ant)"):
        open_set(name, tmp_path, seed=0)


@pytest.mark.parametrize("name", ["dtd", "cifar10"])
def test_download_is_asked_for_only_when_told(tmp_path, monkeypatch, name):
    """With a stand-in for the network that writes the set, then none at all."""
    calls = []

    def fetch(*args, **kwargs):
        calls.append(args)
        WRITERS[name](tmp_path)

    module = "dtd" if name == "dtd" else "cifar"
    monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", fetch)
    with pytest.raises(Unavailable):
        open_set(name, tmp_path, seed=0)
    assert not calls
    assert len(open_set(name, tmp_path, seed=0, download=True).test)
    assert len(calls) == 1
    open_set(name, tmp_path, seed=0, download=True)
    assert len(calls) == 1


def test_a_download_that_fails_is_a_reason(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.dtd.download_and_extract_archive", fail)
    with pytest.raises(Unavailable, match="no route to host"):
        open_set("dtd", tmp_path, seed=0, download=True)


def test_cars_that_are_there_need_no_download(tmp_path):
    """torchvision's class raises when it is asked to."""
    draw("cars", tmp_path)
    assert len(open_set("cars", tmp_path, seed=0, download=True).test) == 12


def test_the_only_image_of_a_class_is_not_held_out(image_tree):
    train, test = (read_split(image_tree, split) for split in ("train", "val"))
    few = train.take(np.flatnonzero((train.labels != 1) | (np.arange(30) == 10)))
    assert sizes(hold_out(few, test, seed=0)) == [[8, 1, 8], [2, 0, 2], [4, 4, 4]]


def test_a_loader_gives_the_same_batches_as_from_files(tmp_path):
    """A folder's pictures in memory: what is loaded is equal."""
    write_sun(tmp_path, per_class=100)
    part = open_set("sun397", tmp_path, seed=0).val
    pixels = torch.stack([part.image(i) for i in range(len(part))])
    names = [str(number) for number in range(len(part))]
    memory = PixelSet(part.root, names, part.labels.tolist(), part.classes, pixels)
    for workers in (0, 1):
        loaders = [
            EvalLoader(images, batch_size=7, image_size=16, num_workers=workers)
            for images in (part, memory)
        ]
        for one, two in zip(*loaders, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
