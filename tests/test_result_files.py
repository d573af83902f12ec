"""Result files: written whole or not at all, read back, refused in one line; whose they are."""

import contextlib
import errno
import json
import math
import os
import resource
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.evaluation import result_files
from utils.evaluation.result_files import Encoder
from utils.runtime.errors import InputError, RunError


def test_write_json(tmp_path):
    path = result_files.write_json(tmp_path / "deep", "x.json", {"k": {1: 2.5, 2: math.nan}})
    assert path.read_text() == '{\n  "k": {\n    "1": 2.5,\n    "2": null\n  }\n}\n'
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--save"):
        result_files.write_json(tmp_path / "file", "x.json", {})


def test_a_folder_is_tried(tmp_path, monkeypatch):
    result_files.make_folder(tmp_path / "a" / "b", flag="--save")
    assert os.listdir(tmp_path / "a" / "b") == []

    def refuse(**_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(InputError, match=f"^--save {tmp_path}: Permission denied$"):
        result_files.make_folder(tmp_path, flag="--save")


def test_read_json(tmp_path):
    path = result_files.write_json(tmp_path, "x.json", {"a": [1, 2]})
    assert result_files.read_json(path) == {"a": [1, 2]}
    assert result_files.read_json(tmp_path / "none.json") == {}
    for text in ("[1]", '{"a"', "", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(InputError, match="x.json: no result file"):
            result_files.read_json(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: not a regular file"):
        result_files.read_json(tmp_path / "pipe")


@contextlib.contextmanager
def most_bytes(count):
    """No file of this process can get longer, as on a disk that is full after so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_files_as_they_were(tmp_path):
    path, lines = tmp_path / "x.json", tmp_path / "x.csv"
    path.write_text('{"old": 1}')
    lines.write_text("0,50\n" * 190)  # 950 of 1000 bytes
    with most_bytes(1000):
        with pytest.raises(RunError) as of_json:
            result_files.write_json(tmp_path, "x.json", {"a": "b" * 2000})
        with pytest.raises(InputError) as of_line:
            result_files.append_line(lines, "1," * 100, flag="--save_acc")
    assert str(of_json.value) == f"--save {path} could not be written: File too large"
    assert str(of_line.value) == f"--save_acc {lines}: No space left on device"
    assert path.read_text() == '{"old": 1}' and lines.read_text() == "0,50\n" * 190
    assert sorted(os.listdir(tmp_path)) == ["x.csv", "x.json"]


def test_lines_are_appended_whole(tmp_path):
    path = tmp_path / "acc.csv"
    result_files.append_line(path, "", flag="--save_acc")  # a try
    assert path.read_text() == ""
    lines = [f"{number},{'5' * number}" for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda line: result_files.append_line(path, line, flag="--save_acc"), lines))
    assert sorted(path.read_text().splitlines()) == sorted(lines)
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("pipe", "Illegal seek"), ("acc.csv/x", "Not a directory")):
        with pytest.raises(InputError, match=f"--save_acc .*{name}: {reason}"):
            result_files.append_line(tmp_path / name, "1", flag="--save_acc")


def test_a_line_goes_on_no_other(tmp_path):
    (tmp_path / "acc.csv").write_text("1,50.5")
    result_files.append_line(tmp_path / "acc.csv", "2,60", flag="--save_acc")
    assert (tmp_path / "acc.csv").read_text() == "1,50.5\n2,60\n"


def test_only_files_of_its_kind_are_to_be_replaced(tmp_path):
    path = tmp_path / "x"
    check = partial(result_files.check_own, path, flag="--output", kind="page")
    check(is_own=lambda path: False)  # there is none
    path.touch()
    check(is_own=lambda path: False)  # empty
    path.write_text("x")
    check(is_own=lambda path: path.read_text() == "x")
    for is_own in (lambda path: False, lambda path: 1 / 0):
        with pytest.raises(InputError, match=f"^--output {path}: is there already and no page$"):
            check(is_own=is_own)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=f"^--output {path}: not a regular file$"):
        check(is_own=lambda path: True)


def test_lists_of_figures(tmp_path):
    path = tmp_path / "acc.csv"
    for text in ("1,50.5,3e-1\n2,nan,0\n", "3\n", "4,5"):
        path.write_text(text)
        assert result_files.has_figures(path)
    for data in (b"epoch,1\n1,5\n", b"1;2\n", b"1,\n", b"\x89PNG\r\n\x1a\n", b'{"a": 1}\n'):
        path.write_bytes(data)
        with pytest.raises(ValueError):
            result_files.has_figures(path)


def test_who_wrote_a_png(tmp_path):
    about = PngInfo()
    about.add_text("Software", "painter 3")
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=about)
    assert result_files.is_png_of(tmp_path / "a.png", "painter")
    assert not result_files.is_png_of(tmp_path / "a.png", "printer")
    assert result_files.picture_format(tmp_path / "a.png") == "png"
    (tmp_path / "b.png").write_bytes(b"x" + (tmp_path / "a.png").read_bytes())
    assert not result_files.is_png_of(tmp_path / "b.png", "painter")
    assert result_files.picture_format(tmp_path / "b.png") is None


def test_what_begins_as_an_svg_file(tmp_path):
    path = tmp_path / "a.svg"
    for begin, kind in (
        *(("<svg>", "svg"), ('\n<?xml version="1.0"?><svg>', "svg"), ("<!-- a --><svg>", "svg")),
        *(("<?xml?><a>", None), ("<!doctype html><svg>", None), ("a <svg>", None), ("", None)),
    ):
        path.write_text(begin)
        assert result_files.picture_format(path) == kind


KNOWN = Encoder("a/x.pth", "a" * 64, 3, "query", "conv4", 16, False, 0)
RANDOM = Encoder("random", None, None, "query", "conv4", 16, False, 0)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (KNOWN, KNOWN._replace(checkpoint="b/y.pth", seed=5, epoch=None), True),  # moved
        (KNOWN, Encoder("x.pth", "a" * 64), True),  # of an early version, which said less
        (KNOWN, KNOWN._replace(sha256="b" * 64), False),
        (KNOWN, KNOWN._replace(encoder="target"), False),
        (KNOWN._replace(backbone="a"), KNOWN._replace(backbone="b"), False),
        (KNOWN, KNOWN._replace(arch="resnet18"), False),
        (KNOWN, KNOWN._replace(image_size=32), False),
        (KNOWN, KNOWN._replace(small_stem=True), False),
        (KNOWN, RANDOM, False),
        (KNOWN, Encoder("a/x.pth"), False),
        (RANDOM, RANDOM._replace(epoch=1), True),
        (RANDOM, RANDOM._replace(seed=1), False),
        (RANDOM, RANDOM._replace(checkpoint="pixels"), False),
        (Encoder(), Encoder(), True),
        (Encoder("a.pth"), Encoder("b.pth"), False),
    ],
)
def test_which_results_are_of_one_encoder(one, other, same):
    assert one.is_same(other) is other.is_same(one) is same


def test_an_encoder_in_words_and_out_of_a_file():
    rest = "arch conv4, encoder query, image size 16"
    assert str(KNOWN) == f"x.pth (sha256 {'a' * 12}, epoch 3, {rest})"
    assert str(RANDOM) == f"random (seed 0, {rest})"
    assert str(Encoder()) == "an encoder that it does not name"
    record = json.loads(json.dumps(KNOWN._asdict()))
    assert result_files.encoder_of(record, what="x") == KNOWN
    assert result_files.encoder_of({}, what="x") == Encoder()
    with pytest.raises(InputError, match="^x: epoch is 'a', not a whole number"):
        result_files.encoder_of({"epoch": "a"}, what="x")


def test_rows_as_text():
    rows = {"1": {"accuracy": 61.25, "top5": None}, "20\n": {"accuracy": 7}}
    expected = "       1: accuracy 61.25, top5 -\n     20\\n: accuracy 7"
    assert result_files.format_rows(rows) == expected


def test_a_write_that_fails_is_a_run_error(tmp_path):
    (tmp_path / "x.json").mkdir()
    with pytest.raises(RunError, match="--save .*x.json could not be written: not a regular file"):
        result_files.write_json(tmp_path, "x.json", {})
    assert os.listdir(tmp_path) == ["x.json"]
