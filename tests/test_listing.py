"""Which files are images, and what lies among them: counted, named, or refused."""

import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_image
from PIL import Image
from torchvision.datasets import ImageFolder

from utils.data import cropping
from utils.data.datasets import read_any_folder, read_image_folder, read_split
from utils.data.listing import LeftOut, endings
from utils.runtime.errors import InputError


def names(images):
    return [images.name(number) for number in range(len(images))]


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_every_kind_that_pillow_writes_and_reads_is_an_image(tmp_path):
    Image.init()
    picture = Image.fromarray(np.full((16, 16, 3), (200, 60, 10), dtype=np.uint8))
    read = set()
    for ending, kind in Image.registered_extensions().items():
        if ending not in endings() or kind not in Image.SAVE:
            continue
        path = tmp_path / f"a{ending}"
        for mode in ("RGB", "P", "L", "1"):
            try:
                picture.convert(mode).save(path)
                break
            except (OSError, ValueError, KeyError, RuntimeError):
                path.unlink(missing_ok=True)  # a kind for other modes, or without its library
        if path.exists():
            assert cropping.decode(path).shape[0] == 3, ending
            read.add(ending)
    assert read >= {".jpg", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".ppm", ".tga"}
    assert not endings() & {".pdf", ".txt", ".h5", ".eps", ".mpg", ".npy", ".db"}


def test_what_is_no_image_is_counted_and_named(tmp_path):
    for name in ("a/1.jpg", "a/deep/2.GIF", "b/3.jfif", "beside.png"):
        write_image(tmp_path / "train" / name, seed=1)
    for name in ("a/notes.txt", "a/x.TXT", "a/.hidden.jpg", "README", "b/Thumbs.db"):
        (tmp_path / "train" / name).write_text("no image")
    brought = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
    for folder in (".thumbnails", *brought, "a/.ipynb_checkpoints"):
        write_image(tmp_path / "train" / folder / "1.jpg", seed=3)
    os.mkfifo(tmp_path / "train" / "a" / "pipe.jpg")
    images = read_split(tmp_path, "train")
    assert names(images) == ["a/1.jpg", "a/deep/2.GIF", "b/3.jfif"]
    assert images.classes == ["a", "b"]
    assert images.left_out.record() == {
        "hidden": {"count": 8, "first": ["$RECYCLE.BIN", ".thumbnails", "@eaDir"]},
        ".txt": {"count": 2, "first": ["a/notes.txt", "a/x.TXT"]},
        ".db": {"count": 1, "first": ["b/Thumbs.db"]},
        "images beside the class folders": {"count": 1, "first": ["beside.png"]},
        "no regular file": {"count": 1, "first": ["a/pipe.jpg"]},
        "without an ending": {"count": 1, "first": ["README"]},
    }
    assert str(images).startswith(f"data {tmp_path / 'train'}: 3 images in 2 classes; left out: ")
    hidden = "8 hidden ($RECYCLE.BIN, .thumbnails, @eaDir, ...)"
    assert f"{hidden}, 2 .txt (a/notes.txt, a/x.TXT), 1 .db (b/Thumbs.db)" in str(images)


def test_many_endings_are_counted_together(tmp_path):
    left_out = LeftOut()
    for number in range(2000):
        left_out.count(f".{number:04}", f"1.2.840.{number:04}")
    for number in range(2):
        left_out.count(".txt", f"{number}.txt")
    left_out.count("no regular file", "pipe.jpg")
    record = left_out.record()
    named = [".txt", *(f".{number:04}" for number in range(9))]
    assert list(record) == [*named, "no regular file", "other endings"]
    rest = {"count": 1991, "first": ["1.2.840.0009", "1.2.840.0010", "1.2.840.0011"]}
    assert record["other endings"] == rest
    assert str(left_out).endswith(
        ", 1991 other endings (1.2.840.0009, 1.2.840.0010, 1.2.840.0011, ...)"
    )


def test_nothing_left_out_is_said_by_nothing(image_tree, capsys):
    assert str(LeftOut()) == "" and LeftOut().record() == {}
    read_split(image_tree, "train")
    assert capsys.readouterr().out == f"data {image_tree / 'train'}: 30 images in 3 classes\n"


def test_the_order_is_that_of_torchvision(tmp_path):
    for name in ("b/2.jpg", "b/10.png", "a/x/deep.jpg", "a/x.jpg", "a/x-y/1.jpg", "a/é/1.jpg"):
        write_image(tmp_path / name, seed=1)
    theirs = [os.path.relpath(path, tmp_path) for path, _ in ImageFolder(str(tmp_path)).samples]
    images = read_image_folder(tmp_path)
    assert names(images) == theirs
    assert images.labels.tolist() == [label for _, label in ImageFolder(str(tmp_path)).samples]


@pytest.mark.parametrize("link", ["train/train", "train/a/up", "train/a/b/data"])
def test_a_link_that_leads_back_up_is_refused_by_name(tmp_path, link):
    for name in ("train/a/b/1.jpg", "train/c/1.jpg"):
        write_image(tmp_path / name, seed=1)
    target = tmp_path if link.endswith("data") else (tmp_path / link).parent
    (tmp_path / link).symlink_to(target)
    with pytest.raises(InputError, match=f"data .*{link}.*: leads back up to .*{target.name}"):
        read_split(tmp_path, "train")


def test_two_folders_that_link_to_each_other_end(tmp_path):
    for name in "ab":
        write_image(tmp_path / name / "1.jpg", seed=1)
    (tmp_path / "a" / "x").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "y").symlink_to(tmp_path / "a")
    with pytest.raises(InputError, match="leads back up"):
        read_image_folder(tmp_path)


def test_links_to_what_is_there_are_followed(tmp_path):
    write_image(tmp_path / "far" / "deep" / "1.jpg", seed=1)
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "train" / "a" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "train" / "b" / "one.jpg").symlink_to(tmp_path / "far" / "deep" / "1.jpg")
    write_image(tmp_path / "other" / "2.jpg", seed=1)
    (tmp_path / "train" / "c").symlink_to(tmp_path / "other")
    images = read_split(tmp_path, "train")
    assert names(images) == ["a/link/deep/1.jpg", "b/one.jpg", "c/2.jpg"]


@pytest.mark.parametrize(
    ("link", "target", "words"),
    [
        ("kitty", "cat", "/kitty: is the same folder as .*/cat, so its images come twice"),
        ("cat/more", "dog", "/dog: is the same folder as .*/cat/more, so its images come twice"),
        ("cat/more", "dog/deep", "/dog/deep: is the same folder as .*/cat/more,"),
    ],
)
def test_a_folder_that_is_there_twice_is_refused_by_name(tmp_path, link, target, words):
    for name in ("cat/1.jpg", "dog/deep/1.jpg"):
        write_image(tmp_path / "train" / name, seed=1)
    (tmp_path / "train" / link).symlink_to(tmp_path / "train" / target)
    with pytest.raises(InputError, match=words):
        read_split(tmp_path, "train")


@pytest.mark.parametrize("place", ["train/c", "train/a/x.jpg", "train/a/more"])
def test_a_link_to_what_is_not_there_is_refused_by_name(tmp_path, place):
    for name in ("a", "b"):
        write_image(tmp_path / "train" / name / "1.jpg", seed=1)
    (tmp_path / place).symlink_to(tmp_path / "not_mounted")
    with pytest.raises(InputError, match=f"1 links to what is not there .* {place[6:]}"):
        read_split(tmp_path, "train")
    write_image(tmp_path / "flat" / "1.jpg", seed=1)
    (tmp_path / "flat" / "2.jpg").symlink_to(tmp_path / "not_mounted")
    for read in (lambda: read_split(tmp_path / "flat", "train"), lambda: read_any_folder(tmp_path)):
        with pytest.raises(InputError, match="links to what is not there"):
            read()


def test_a_link_to_itself_leads_nowhere(tmp_path):
    for name in ("train/a/1.jpg", "train/b/1.jpg"):
        write_image(tmp_path / name, seed=1)
    (tmp_path / "train" / "a" / "2.jpg").symlink_to("2.jpg")
    with pytest.raises(InputError, match="1 links to what is not there .* a/2.jpg"):
        read_split(tmp_path, "train")
    (tmp_path / "train" / "a" / "2.jpg").rename(tmp_path / "train" / "a" / "2.txt")
    left_out = read_split(tmp_path, "train").left_out.record()
    assert left_out == {"links to nowhere": {"count": 1, "first": ["a/2.txt"]}}


@pytest.mark.parametrize("target", ["nowhere", "val"])
def test_a_split_that_is_a_link_to_nowhere_is_named(tmp_path, target):
    (tmp_path / "val").symlink_to(tmp_path / target)
    with pytest.raises(InputError, match=f"data .*/val: a link to what is not there, .*/{target}"):
        read_split(tmp_path, "val")


def test_folders_nested_very_deep(tmp_path):
    write_image(tmp_path / "b" / "1.jpg", seed=1)
    folder = tmp_path / "a"
    folder.mkdir()
    for _ in range(1100):
        folder /= "x"
        folder.mkdir()
    try:
        write_image(folder / "1.jpg", seed=1)
        assert names(read_image_folder(tmp_path)) == [f"a/{'x/' * 1100}1.jpg", "b/1.jpg"]
    finally:  # what Python removes trees with calls itself for each level
        subprocess.run(["rm", "-r", tmp_path / "a"], check=True)


def test_a_path_longer_than_the_system_takes_is_named(tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        for name in ["a"] + ["x" * 250] * 17:
            os.mkdir(name, dir_fd=folder)
            deeper = os.open(name, os.O_RDONLY, dir_fd=folder)
            os.close(folder)
            folder = deeper
        with pytest.raises(InputError, match="data .*/a/xxx.*: File name too long"):
            read_image_folder(tmp_path)
    finally:
        os.close(folder)
        subprocess.run(["rm", "-r", tmp_path / "a"], check=True)


@pytest.mark.parametrize(
    ("closed", "named"),
    [
        ("data", "data/train"),
        ("data/train", "data/train"),
        ("data/train/b", "data/train/b"),
        ("far", "data/train/a/2.jpg"),
    ],
)
def test_what_may_not_be_entered_is_named(closed, named):
    """Not below tmp_path, which another user may not enter: root may enter every folder."""
    endings()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        for name in ("data/train/a/1.jpg", "data/train/b/1.jpg", "far/2.jpg"):
            write_image(root / name, seed=1)
        (root / "data" / "train" / "a" / "2.jpg").symlink_to(root / "far" / "2.jpg")
        (root / closed).chmod(0)
        user = os.geteuid()
        os.seteuid(user or 65534)
        try:
            with pytest.raises(InputError, match=f"data {root / named}: Permission denied"):
                read_split(root / "data", "train")
        finally:
            os.seteuid(user)
            (root / closed).chmod(0o755)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    for name in "ab":
        write_image(tmp_path / name / "1.jpg", seed=1)
    real = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="data .*/b: Permission denied"):
        read_image_folder(tmp_path)


def test_common_formats_are_tried_first():
    """Pillow asks its formats one after the other; in a process where nothing has begun it."""
    code = "from PIL import Image; from utils.data.listing import endings\n"
    code += "endings(); print(Image.ID[:6])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert sorted(ast.literal_eval(done.stdout)) == ["BMP", "DIB", "GIF", "JPEG", "PNG", "PPM"], (
        done
    )
