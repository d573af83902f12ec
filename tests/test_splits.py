"""Split files, strict and by name; class-balanced draws."""

import numpy as np
import pytest
from conftest import write_image

from utils.data import ImageSet, read_split
from utils.errors import InputError
from utils.splits import class_balanced_split, read_split_file, write_split_file


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
    ("content", "words"),
    [
        ("a/9.jpg\nx.jpg\n2.jpg", "2 entries name no image (first: a/9.jpg, x.jpg)"),
        ("1.jpg", "1 entries name several images (first: 1.jpg)"),
        ("2.jpg\na/2.jpg\n4.jpg", "1 entries come twice (first: a/2.jpg)"),
        ("\n  \n", "names no image"),
        (b"\xff\xfe2\x00", "no text in UTF-8"),
        ("\n".join(f"{n}.png" for n in range(7)), "7 entries name no image (first: 0.png, 1.png"),
    ],
)
def test_faulty_files_are_refused_by_name(tmp_path, images, content, words):
    with pytest.raises(InputError) as error:
        read(tmp_path, images, content)
    assert words in str(error.value)
    assert str(error.value).startswith("--sup_split_file ")
    assert "6.png" not in str(error.value)  # five are named at most


def test_missing_file(tmp_path, images):
    with pytest.raises(InputError, match="--train_file .*none.txt: No such file"):
        read_split_file(tmp_path / "none.txt", images, flag="--train_file")


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
