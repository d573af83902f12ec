"""Split files, strict and by name, for every name there can be; class-balanced draws."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_image
from hypothesis import given, settings
from nasty_names import image_sets

from utils.data.datasets import ImageSet, read_split
from utils.data.splits import (
    check_every_class,
    class_balanced_split,
    read_split_file,
    write_split_file,
)
from utils.runtime.errors import InputError


@pytest.fixture
def images(tmp_path):
    names = ["a/1.jpg", "a/2.jpg", "a/deep/3.jpg", "b/1.jpg", "b/4.jpg"]
    return ImageSet(tmp_path / "train", names, [0, 0, 0, 1, 1], ["a", "b"])


def read(tmp_path, images, content):
    path = tmp_path / "split.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_split_file(path, images, flag="--sup_split_file")


def test_paths_and_base_names(tmp_path, images):
    content = "b/4.jpg\n2.jpg\r\n\n  train/a/1.jpg \n3.jpg"
    assert read(tmp_path, images, content).tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize(
    ("content", "numbers"),
    [
        (b"\xef\xbb\xbfa/1.jpg\r\nb/4.jpg\r\n", [0, 4]),  # as Windows saves it
        ("./a/1.jpg\n./train/b/4.jpg\n./3.jpg\n", [0, 2, 4]),
        ("{root}/train/a/1.jpg\n{root}/train/a/deep/../2.jpg\n", [0, 1]),
        ("data/train/a/1.jpg\ndata/train/b/1.jpg", [0, 3]),  # from the folder that it is read in
        ("link/train/a/1.jpg", []),
        ('"b/1.jpg"\n"a\\/1.jpg" \r\n', [0, 3]),
    ],
)
def test_ways_to_write_a_path(tmp_path, monkeypatch, content, numbers):
    root = tmp_path / "data"
    names = ["a/1.jpg", "a/2.jpg", "a/deep/3.jpg", "b/1.jpg", "b/4.jpg"]
    images = ImageSet(Path("data/train"), names, [0, 0, 0, 1, 1], ["a", "b"])
    monkeypatch.chdir(tmp_path)
    if not isinstance(content, bytes):
        content = content.replace("{root}", str(root))
    if numbers:
        assert read(tmp_path, images, content).tolist() == numbers
    else:
        with pytest.raises(InputError, match="1 entries name no image"):
            read(tmp_path, images, content)


def test_what_is_exactly_a_path_is_that_image(tmp_path):
    """Whatever its beginning could mean otherwise; a line ends at a line feed only."""
    names = [
        *("a/1.jpg", "train/1.jpg", "train/2.jpg", " b/3.jpg", "b/3.jpg", "b/x\u2028y.jpg"),
        *("b/x\x85y.jpg", "b/x\fy.jpg", "b/'\".jpg"),
    ]
    images = ImageSet(tmp_path, names, [0] * len(names), ["a", "b"])
    for number, name in enumerate(names):
        assert read(tmp_path, images, name).tolist() == [number]
    content = "train/a/1.jpg\ntrain/train/2.jpg\n\tb/3.jpg\n2.jpg"
    with pytest.raises(InputError, match=r"1 entries come twice \(first: train/2.jpg\)"):
        read(tmp_path, images, content)
    assert read(tmp_path, images, content.removesuffix("2.jpg")).tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a/9.jpg\nx.jpg\n2.jpg", "2 entries name no image (first: a/9.jpg, x.jpg)"),
        ("1.jpg", "1 entries name several images (first: 1.jpg)"),
        ("2.jpg\na/2.jpg\n4.jpg", "1 entries come twice (first: a/2.jpg)"),
        ("\n  \n", "names no image"),
        (b"\xff\xfe2\x00", "no text in UTF-8"),
        ("2.jpg\n".encode("utf-16-le"), "no text in UTF-8"),
        ("a/caf\xe9.jpg".encode("latin-1"), "no text in UTF-8"),
        (
            "a/1.jpg 0\nb/4.jpg 1\n",
            "2 entries name no image (first: a/1.jpg 0, b/4.jpg 1); lines seem to",
        ),
        ("2.jpg\t0", r'(first: "2.jpg\t0"); lines seem to end in a label, and only the path'),
        ("a/1.jpg,17", "(first: a/1.jpg,17); lines seem to end in a label"),
        ("a/9.jpg 0", "1 entries name no image (first: a/9.jpg 0)"),
        ("a/1\u200b.jpg\n a/9.jpg", r'(first: "a/1\u200b.jpg", " a/9.jpg")'),
        (r'"a/\udcff.jpg"', r'1 entries name no image (first: "a/\udcff.jpg")'),
        ('"2.jpg"', 'entries name no image (first: "2.jpg")'),  # a JSON string is the whole path
        ("x" * 999, "x...)"),
        ("\n".join(f"{n}.png" for n in range(7)), "7 entries name no image (first: 0.png, 1.png"),
    ],
)
def test_faulty_files_are_refused_by_name(tmp_path, images, content, words):
    with pytest.raises(InputError) as error:
        read(tmp_path, images, content)
    assert words in str(error.value)
    assert str(error.value).startswith("--sup_split_file ")
    assert "6.png" not in str(error.value)  # five are named at most
    assert len(str(error.value)) < 600


def test_missing_file(tmp_path, images):
    with pytest.raises(InputError, match="--train_file .*none.txt: No such file"):
        read_split_file(tmp_path / "none.txt", images, flag="--train_file")


def test_what_is_no_file_is_refused_at_once(tmp_path, images):
    os.mkfifo(tmp_path / "fifo")
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for the FIFO"))
    signal.setitimer(signal.ITIMER_REAL, 20)
    for name in ("fifo", "."):
        with pytest.raises(InputError, match="--train_file .*: no regular file"):
            read_split_file(tmp_path / name, images, flag="--train_file")


@settings(max_examples=60)
@given(image_sets())
def test_every_name_comes_back(tmp_path_factory, images_and_some):
    """Also with the line ends and the mark that an editor on Windows leaves."""
    images, index = images_and_some
    path = tmp_path_factory.getbasetemp() / "labeled.txt"
    write_split_file(path, images, index)
    written = path.read_bytes()
    for content in (written, written.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + written):
        path.write_bytes(content)
        again = read_split_file(path, images, flag="--train_file")
        assert again.tolist() == index.tolist()


def test_a_plain_name_is_written_as_it_is(tmp_path):
    names = ["a/é 1.jpg", "a/b\n.jpg", "train/x.jpg", "a/\udcff.jpg"]
    images = ImageSet(tmp_path, names, [0, 0, 1, 0], ["a", "train"])
    write_split_file(tmp_path / "labeled.txt", images, np.arange(4))
    expected = 'a/é 1.jpg\n"a/b\\n.jpg"\ntrain/x.jpg\n"a/\\udcff.jpg"\n'
    assert (tmp_path / "labeled.txt").read_text(encoding="utf-8") == expected
    assert os.listdir(tmp_path) == ["labeled.txt"]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, 3, 0], "here: no labeled image of 1 of 4 classes: c"),
        ([0], 'here: no labeled image of 3 of 4 classes: b, c, " d"'),
        ([], "4 of 4 classes"),
        ([0, 1, 2, 3, 4], "here: label 4 is none of 0 to 3"),
        ([0, 1, 2, 3, -1], "here: label -1 is none of 0 to 3"),
    ],
)
def test_every_class_has_a_label(labels, words):
    classes = ["a", "b", "c", " d"]
    check_every_class(np.array([3, 2, 1, 0, 0]), classes, what="here")
    for values in (np.array(labels, dtype=np.int64), torch.tensor(labels, dtype=torch.int64)):
        with pytest.raises(InputError) as error:
            check_every_class(values, classes, what="here")
        assert words in str(error.value)


def test_balanced_draw():
    labels = [0] * 20 + [1] * 50 + [2] * 3
    images = ImageSet(None, [f"{i}.jpg" for i in range(73)], labels, ["a", "b", "c"])
    chosen = class_balanced_split(images, 0.1, seed=0)
    counts = np.bincount(images.labels[chosen])
    assert counts.tolist() == [2, 5, 1]
    assert sorted(set(chosen.tolist())) == chosen.tolist()
    assert np.array_equal(chosen, class_balanced_split(images, 0.1, seed=0))
    assert not np.array_equal(chosen, class_balanced_split(images, 0.1, seed=1))
    assert len(class_balanced_split(images, 1.0, seed=0)) == 73


def test_written_file_gives_the_same_images(tmp_path):
    for name in ("a/1.jpg", "a/é.jpg", "b/1.jpg"):
        write_image(tmp_path / "train" / name, seed=1)
    images = read_split(tmp_path, "train")
    write_split_file(tmp_path / "labeled.txt", images, np.array([1, 2]))
    again = read_split_file(tmp_path / "labeled.txt", images, flag="--train_file")
    assert again.tolist() == [1, 2]
    taken = images.take(again)
    assert [taken.name(i) for i in range(2)] == ["a/é.jpg", "b/1.jpg"]
    assert taken.labels.tolist() == [0, 1]
