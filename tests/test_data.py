"""Image folders: order, labels, and what is refused."""

import numpy as np
import pytest
from conftest import write_image

from utils.data import cropping
from utils.data.datasets import (
    ImageSet,
    check_classes,
    read_any_folder,
    read_image_folder,
    read_split,
)
from utils.runtime.errors import InputError


def test_classes_are_sorted_folders_and_paths_are_in_order(tmp_path):
    for name in ("b/2.jpg", "b/10.png", "a/x/deep.jpg", "a/1.JPEG"):
        write_image(tmp_path / name, seed=1)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    images = read_image_folder(tmp_path)
    assert images.classes == ["a", "b"]
    paths = [images.path(i)[len(str(tmp_path)) + 1 :] for i in range(len(images))]
    assert paths == ["a/1.JPEG", "a/x/deep.jpg", "b/10.png", "b/2.jpg"]
    assert images.labels.tolist() == [0, 0, 1, 1]


def test_flat_folder_has_no_labels(tmp_path):
    for name in ("2.jpg", "1.jpg"):
        write_image(tmp_path / name, seed=1)
    images = read_split(tmp_path, "train")
    assert (images.classes, images.labels.tolist()) == ([], [-1, -1])
    assert images.path(0).endswith("/1.jpg")
    write_image(tmp_path / "deeper" / "train" / "1.jpg", seed=1)
    assert len(read_split(tmp_path / "deeper", "train")) == 1


def test_names_that_are_no_ascii(tmp_path):
    write_image(tmp_path / "ä b" / "日本.jpg", seed=1)
    images = read_image_folder(tmp_path)
    assert cropping.decode(images.path(0)).shape == (3, 20, 24)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "nothing: no such folder"),
        (lambda root: root.mkdir(), "no folder train/"),
        (lambda root: (root / "train").mkdir(parents=True), "neither class folders nor images"),
        (lambda root: (root / "train" / "dogs").mkdir(parents=True), "1 classes .*: dogs"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, make, message):
    root = tmp_path / "nothing"
    make(root)
    with pytest.raises(InputError, match=f"data .*{message}"):
        read_split(root, "train")


def test_one_class_that_is_empty(tmp_path):
    write_image(tmp_path / "train" / "cats" / "1.jpg", seed=1)
    (tmp_path / "train" / "dogs").mkdir()
    with pytest.raises(InputError, match="1 classes without an image: dogs"):
        read_split(tmp_path, "train")


def test_imagenet100_is_numpys_seeded_choice(tmp_path):
    for number in range(1000):
        folder = tmp_path / "train" / f"n{number:04}"
        folder.mkdir(parents=True)
        (folder / "1.jpg").touch()
    images = read_split(tmp_path, "train", dataset="imagenet100")
    np.random.seed(1234)
    chosen = sorted(np.random.permutation(1000)[:100].tolist())
    assert images.classes == [f"n{number:04}" for number in chosen]
    assert images.labels.tolist() == list(range(100))
    for i in (0, 57, 99):
        assert images.path(i).endswith(f"/n{chosen[i]:04}/1.jpg")
    (tmp_path / "train" / "n1000").mkdir()
    (tmp_path / "train" / "n1000" / "1.jpg").touch()
    with pytest.raises(InputError, match="--dataset imagenet100: .* has 1001 classes"):
        read_split(tmp_path, "train", dataset="imagenet100")


def test_splits_must_have_the_same_classes(tmp_path):
    train = ImageSet(tmp_path / "train", ["a/1.jpg", "c/1.jpg"], [0, 1], ["a", "c"])
    val = ImageSet(tmp_path / "val", ["b/1.jpg", "c/1.jpg"], [0, 1], ["b", "c"])
    check_classes(train, train)
    with pytest.raises(InputError, match="differ in 2 classes, first a, b$"):
        check_classes(train, val)


def test_the_same_name_in_two_unicode_forms_is_said_to_be_that(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    train, val = (
        ImageSet(tmp_path / split, ["a/1.jpg", f"{name}/1.jpg"], [0, 1], ["a", name])
        for split, name in (("train", composed), ("val", decomposed))
    )
    with pytest.raises(InputError, match=f"in two Unicode normal forms .*: {composed}"):
        check_classes(train, val)


def test_class_folders_one_level_too_deep_are_found_out(tmp_path, capsys):
    for name in "abc":
        write_image(tmp_path / "train" / "imagenet" / name / "1.jpg", seed=1)
        write_image(tmp_path / "val" / "imagenet" / name / "1.jpg", seed=1)
    train, val = (read_split(tmp_path, split) for split in ("train", "val"))
    where = tmp_path / "train" / "imagenet"
    assert f"WARNING: one class only, imagenet, with 3 folders in it: did you mean {where}?" in (
        capsys.readouterr().out
    )
    with pytest.raises(InputError, match="one class only, imagenet, .* an evaluation needs two"):
        check_classes(train, val)


def test_one_class_and_no_class_are_no_evaluation(tmp_path):
    one = ImageSet(tmp_path / "train", ["a/1.jpg"], [0], ["a"])
    flat = ImageSet(tmp_path / "train", ["1.jpg"], [-1], [])
    for images, words in ((one, "one class only, a;"), (flat, "no class folders in train/")):
        with pytest.raises(InputError, match=words):
            check_classes(images, images)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("", r"no folder train/ in it; did you mean .*/imagenet\?"),
        ("imagenet/train", "no folder train/ in it; did you mean .*/imagenet, the folder that"),
        ("imagenet/train/a/b", "no folder train/ in it$"),
    ],
)
def test_what_may_be_meant_by_another_folder_is_said(tmp_path, data, words):
    write_image(tmp_path / "imagenet" / "train" / "a" / "1.jpg", seed=1)
    (tmp_path / "imagenet" / "train" / "a" / "b").mkdir()
    with pytest.raises(InputError, match=words):
        read_split(tmp_path / data, "train")


@pytest.mark.parametrize("train", ["", "train"])
def test_images_beside_folders_without_any_are_a_flat_set(tmp_path, train, capsys):
    folder = tmp_path / train
    for name in ("1.jpg", "2.jpg"):
        write_image(folder / name, seed=1)
    (folder / "run").mkdir()
    (folder / "run" / "log.jsonl").touch()
    images = read_split(tmp_path, "train")
    assert (len(images), images.classes) == (2, [])
    assert "2 images without classes; left out: " in capsys.readouterr().out
    assert images.left_out.record()["folders"] == {"count": 1, "first": ["run"]}


def test_what_a_folder_without_images_holds_is_said(tmp_path):
    for name in ("1.dcm", "2.dcm"):
        (tmp_path / name).touch()
    for read in (read_image_folder, read_any_folder):
        with pytest.raises(InputError, match=r"images in it \(but 2 .dcm \(1.dcm, 2.dcm\)\)"):
            read(tmp_path)


def test_what_an_empty_class_holds_is_said(tmp_path):
    write_image(tmp_path / "dog" / "1.jpg", seed=1)
    (tmp_path / "cat").mkdir()
    for name in ("x", "y"):
        (tmp_path / "cat" / name).touch()
    with pytest.raises(
        InputError, match=r"image: cat \(but 2 without an ending \(cat/x, cat/y\)\)$"
    ):
        read_image_folder(tmp_path)


@pytest.mark.parametrize(
    ("beside", "inside", "refused"),
    [(1, [10], True), (3, [1, 1], True), (2, [1, 1], False), (1, [10, 1], False)],
)
def test_images_beside_folders_have_one_reading_or_none(tmp_path, beside, inside, refused):
    for number in range(beside):
        write_image(tmp_path / "train" / f"{number}.jpg", seed=1)
    for name, count in zip("ab"[: len(inside)], inside, strict=True):
        for number in range(count):
            write_image(tmp_path / "train" / name / f"{number}.jpg", seed=1)
    if refused:
        words = f"{beside} images directly in it and {sum(inside)} in {len(inside)} of its folders"
        with pytest.raises(InputError, match=rf"data .*/train: {words} \(a"):
            read_split(tmp_path, "train")
    else:
        images = read_split(tmp_path, "train")
        assert np.bincount(images.labels).tolist() == inside
        found = images.left_out.record()["images beside the class folders"]
        assert found["count"] == beside


@pytest.mark.parametrize(
    ("link", "target", "named"),
    [
        ("val", "train", "val"),
        ("val/cat", "train/cat", "val/cat"),
        ("val/x/y", "train/x", "val/x/y"),
    ],
)
def test_val_images_that_are_training_images_are_refused(tmp_path, link, target, named):
    for name in ("cat", "dog", "x"):
        write_image(tmp_path / "train" / name / "1.jpg", seed=1)
        if link not in ("val", f"val/{name}"):
            write_image(tmp_path / "val" / name / "2.jpg", seed=1)
    (tmp_path / link).symlink_to(tmp_path / target)
    train, val = (read_split(tmp_path, split) for split in ("train", "val"))
    with pytest.raises(InputError, match=f"data {tmp_path / named}: is the same folder as "):
        check_classes(train, val)
