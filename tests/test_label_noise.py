"""Labels that are not the folders': the draw of noise, and strict label files."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nasty_names import image_sets

from utils.data.batches import Batch
from utils.data.datasets import ImageSet
from utils.data.label_noise import (
    as_tensor,
    labels_to_use,
    noisy_labels,
    read_label_file,
    write_changes,
)
from utils.data.splits import quoted
from utils.runtime.errors import InputError


def image_set(count=1000, classes=5, root="train"):
    labels = [number % classes for number in range(count)]
    names = [f"class{label}/{number}.jpg" for number, label in enumerate(labels)]
    return ImageSet(root, names, labels, [f"class{label}" for label in range(classes)])


@pytest.mark.parametrize("rate", [0, 0.05, 0.1, 0.25, 0.5, 0.3337, 1])
@pytest.mark.parametrize("classes", [2, 5])
def test_exactly_the_rate_and_never_the_true_class(rate, classes):
    images = image_set(1001, classes)
    before = images.labels.copy()
    labels = noisy_labels(images, rate, seed=3)
    assert (labels != images.labels).sum() == round(rate * 1001)
    assert labels.dtype == np.int64 and labels.min() >= 0 and labels.max() < classes
    assert np.array_equal(images.labels, before)


def test_the_seed_decides():
    images = image_set()
    one, same, other = (noisy_labels(images, 0.25, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_images_and_classes_are_drawn_evenly():
    """Chi-square of changed images over the set, and of given classes over all but the true."""
    images = image_set(20000, 5)
    changed = noisy_labels(images, 0.5, seed=1) != images.labels
    parts = changed.reshape(20, 1000).sum(axis=1)
    assert ((parts - 500) ** 2 / 250).sum() < 43.8  # 19 degrees of freedom, p 0.001
    labels = noisy_labels(images, 1, seed=1)
    for label in range(5):
        counts = np.bincount(labels[images.labels == label], minlength=5)
        assert counts[label] == 0
        others = np.delete(counts, label)
        assert ((others - 1000) ** 2 / 1000).sum() < 16.3  # 3 degrees of freedom, p 0.001


def test_a_single_class_has_no_noise():
    with pytest.raises(InputError, match="--label_noise 0.1: .* has no second class"):
        noisy_labels(image_set(10, 1), 0.1, seed=0)


def test_what_changed_is_written(tmp_path):
    images = image_set(8, 3)
    given = images.labels.copy()
    given[[2, 7]] = [0, 2]
    path = tmp_path / "label_noise.txt"
    write_changes(path, images, given)
    assert path.read_text() == "class2/2.jpg\tclass2\tclass0\nclass1/7.jpg\tclass1\tclass2\n"
    write_changes(path, images, None)  # a run without has no list, nor that of an earlier one
    write_changes(path, images, None)
    assert not path.exists()


def read(tmp_path, images, content):
    path = tmp_path / "labels.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_label_file(path, images, flag="--label_file")


def test_a_file_gives_back_drawn_labels(tmp_path):
    images = image_set(50, 4)
    drawn = noisy_labels(images, 0.4, seed=2)
    for blank, start in (("\t", ""), (" ", "train/")):
        order = np.random.default_rng(0).permutation(50)
        lines = [f"{start}{images.name(n)}{blank}{images.classes[drawn[n]]}" for n in order]
        assert np.array_equal(read(tmp_path, images, "\n".join(lines) + "\n\n"), drawn)


def test_names_with_blanks(tmp_path):
    images = ImageSet("train", ["a b/1 2.jpg", "c/3 4.jpg"], [0, 1], ["a b", "c"])
    content = "a b/1 2.jpg c\r\nc/3 4.jpg\ta b\n"
    assert read(tmp_path, images, content).tolist() == [1, 0]


@settings(max_examples=50)
@given(image_sets(), st.data())
def test_every_name_comes_back(tmp_path_factory, images_and_some, data):
    """From a label file, and from what is written of changed labels."""
    images, _ = images_and_some
    path = tmp_path_factory.getbasetemp() / "labels.txt"
    some_class = st.integers(0, len(images.classes) - 1)
    drawn = np.array(data.draw(st.lists(some_class, min_size=len(images), max_size=len(images))))
    fields = [(images.name(n), images.classes[drawn[n]]) for n in range(len(images))]
    lines = ["\t".join(map(quoted, row)) for row in data.draw(st.permutations(fields))]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")
    assert read_label_file(path, images, flag="--label_file").tolist() == drawn.tolist()

    write_changes(path, images, drawn)
    written = path.read_bytes().decode().split("\n")
    assert written.pop() == ""
    found = [
        [json.loads(field) if field.startswith('"') else field for field in line.split("\t")]
        for line in written
    ]
    own = [images.classes[label] for label in images.labels]
    rows = [[name, old, new] for (name, new), old in zip(fields, own, strict=True)]
    assert found == [row for row in rows if row[1] != row[2]]


def test_ways_to_write_a_line(tmp_path):
    names = ["a/1 .jpg", "train/2.jpg", " a/3.jpg", "a/4.jpg"]
    images = ImageSet(tmp_path / "train", names, [0, 1, 2, 0], ["a", "train", " a", 'b"'])
    lines = [
        *("\ufeff./a/1 .jpg\ttrain\r", "train/2.jpg  a", '" a/3.jpg"\t" a"'),
        f'{tmp_path}/train/a/4.jpg\tb"\t',
    ]
    assert read(tmp_path, images, "\n".join(lines)).tolist() == [1, 0, 2, 3]
    lines[1:3] = ["train/train/2.jpg\t a", ' a/3.jpg "b\\""']
    assert read(tmp_path, images, "\n".join(lines)).tolist() == [1, 2, 3, 3]


GOOD = [f"class{n % 2}/{n}.jpg class0" for n in range(8)]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (GOOD[1:], "1 images have no entry (first: class0/0.jpg)"),
        (GOOD[:1], "7 images have no entry (first: class1/1.jpg, class0/2.jpg, class1/3.jpg"),
        ([*GOOD, GOOD[3]], "1 images come twice (first: class1/3.jpg)"),
        ([*GOOD, "train/class1/3.jpg class1"], "1 images come twice (first: class1/3.jpg)"),
        ([*GOOD, "class9/3.jpg class1"], "1 entries name no image (first: class9/3.jpg)"),
        ([*GOOD[:7], "7.jpg class1"], "1 entries name no image (first: 7.jpg); 1 images have no"),
        ([*GOOD[:7], "class1/7.jpg cats"], "1 entries name no class (first: class1/7.jpg cats)"),
        ([*GOOD[:7], "class1/7.jpg"], "1 entries have no class (first: class1/7.jpg)"),
        ([*GOOD[:7], "class1/7.jpg\t "], r"1 entries have no class (first: class1/7.jpg)"),
        ([*GOOD[:7], "class1/7.jpg cats\x1b"], r'no class (first: "class1/7.jpg cats\u001b")'),
        (["", " "], "names no image"),
    ],
)
def test_faulty_files_are_refused_by_name(tmp_path, lines, words):
    with pytest.raises(InputError) as error:
        read(tmp_path, image_set(8, 2), "\n".join(lines))
    assert words in str(error.value) and str(error.value).startswith("--label_file ")
    assert "class1/7.jpg, " not in str(error.value)  # five are named at most


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="no text in UTF-8"):
        read(tmp_path, image_set(8, 2), b"\xff\xfe2\x00")
    with pytest.raises(InputError, match="--label_file .*none: No such file"):
        read_label_file(tmp_path / "none", image_set(8, 2), flag="--label_file")


def test_labels_of_a_batch():
    view = torch.zeros(2, 3, 1, 1)
    batch = Batch(view, view, torch.tensor([4, 1]), torch.tensor([1, 0]))
    assert labels_to_use(batch, as_tensor(None)) is batch.label
    given = as_tensor(np.array([9, 8, 7, 6, 5]))
    assert labels_to_use(batch, given).tolist() == [5, 8]
