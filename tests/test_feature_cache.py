"""Digests of image files, and features that are used again only for the same of everything."""

import importlib
import os

import pytest
import torch
from conftest import write_image
from linear_runs import assert_same_bits, write_checkpoint

from utils.data.datasets import ImageSet
from utils.evaluation import feature_cache
from utils.runtime import files
from utils.runtime.errors import InputError

LINEAR = importlib.import_module("eval.eval_linear")


def test_digest_knows_names_labels_classes_and_every_byte(tmp_path):
    def write(name, data=b"12345", time=10**9):
        (tmp_path / name).write_bytes(data)
        os.utime(tmp_path / name, ns=(time, time))

    def digest(names=("1.png",), labels=(0,), classes=("a", "b"), **options):
        images = ImageSet(tmp_path, list(names), list(labels), list(classes))
        return feature_cache.image_digest(images, **options)

    write("1.png")
    write("2.png")
    digests = [digest(), digest(["2.png"]), digest(labels=[1]), digest(classes=["a", "c"])]
    digests.append(digest(["1.png", "2.png"], [0, 0]))
    digests.append(digest(["2.png", "1.png"], [0, 0]))
    write("1.png", time=10**9 + 1)
    assert digest() == digests[0]
    write("1.png", b"12354")
    digests.append(digest())
    write("1.png", b"123456")
    digests.append(digest())
    (tmp_path / "1.png").unlink()
    digests.append(digest(missing_ok=True))
    assert len(set(digests)) == len(digests)
    with pytest.raises(InputError, match=r"1\.png: No such file"):
        digest()


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_digest_is_the_same_by_any_number_of_processes(tmp_path, monkeypatch, processes):
    """Each reads its part; here one after the other, in threads that wait for each other."""
    names = [f"{number}.png" for number in range(40)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 1000)
    images = ImageSet(tmp_path, names, [0] * 40, ["a"])
    monkeypatch.setattr(feature_cache, "_AT_ONCE", 7)
    alone = feature_cache.image_digest(images)
    shares = []
    for rank in range(processes):
        share = range(6 * rank // processes, 6 * (rank + 1) // processes)
        monkeypatch.setattr(feature_cache.distributed, "own_share", lambda count, s=share: s)
        monkeypatch.setattr(
            feature_cache.distributed, "gather_objects", lambda own: shares.append(own) or [own]
        )
        feature_cache.image_digest(images)
    monkeypatch.setattr(feature_cache.distributed, "gather_objects", lambda own: shares)
    assert feature_cache.image_digest(images) == alone


def change_pixels(path):
    """As a copy of another picture that keeps size and time."""
    before = path.stat()
    write_image(path, seed=99)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_cache_is_used_when_nothing_has_changed(run_linear, extractions, tmp_path):
    _, _, first = run_linear(tmp_path, "--cached")
    assert (tmp_path / "features.pth").is_file()
    _, _, second = run_linear(tmp_path, "--cached", "-b", 9)
    assert len(extractions) == 1
    assert_same_bits(first, second)
    flags = ("--cached", "--cache_dir", tmp_path, "--lr", "0.3")
    run_linear(tmp_path / "elsewhere", *flags)
    assert len(extractions) == 1
    assert not (tmp_path / "elsewhere" / "features.pth").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("checkpoint", "features of another checkpoint:"),
        ("image", "features of another train images:"),
        ("val image", "features of another val images:"),
        ("labels", "features of another train images:"),
        ("size", "features of another image size:"),
        ("encoder", "features of another encoder, backbone:"),
        ("truncated", "not a readable checkpoint"),
        ("other file", "no feature cache of this version"),
        ("not finite", "features of val are not finite features (N, 128)"),
        ("a number", "features of val are not finite features (N, 128)"),
        ("without end", "features of val are not finite features (N, 128)"),
    ],
)
def test_stale_cache_is_not_used(run_linear, extractions, tmp_path, change, reason):
    data, ours, flags = tmp_path / "data", tmp_path / "ckpt.pth", []
    for split, count in (("train", 4), ("val", 2)):
        for number, name in enumerate("ab"):
            for i in range(count):
                write_image(data / split / name / f"{i}.bmp", seed=10 * number + i)
    write_checkpoint(ours)
    common = ("--weights", ours, "--cached")
    run_linear(tmp_path, *common, data=data)
    cache = tmp_path / "features.pth"
    if change == "checkpoint":
        write_checkpoint(ours, seed=1)
    elif change in ("image", "val image"):
        path = data / ("val" if "val" in change else "train") / "a" / "0.bmp"
        change_pixels(path)
    elif change == "labels":
        flags = ["--label_fraction", 0.5]
    elif change == "size":
        flags = ["--image_size", 24]
    elif change == "encoder":
        flags = ["--use-target"]
    elif change == "truncated":
        cache.write_bytes(cache.read_bytes()[:-1000])
    elif change in ("not finite", "a number", "without end"):
        state = torch.load(cache, weights_only=True)
        features, labels = state["features"]["val"]
        features[3, 1] = float("nan") if change == "not finite" else 0
        if change == "a number":
            labels = labels[0]
        elif change == "without end":  # views that repeat one row
            features, labels = features[:1].expand(10**12, -1), labels[:1].expand(10**12)
        state["features"]["val"] = (features, labels)
        files.save(cache, state)
    else:
        torch.save({"features": {}}, cache)
    _, console, stale = run_linear(tmp_path, *common, *flags, data=data)
    assert len(extractions) == 2
    assert reason in console and "extracted anew" in console
    _, _, fresh = run_linear(tmp_path / "fresh", *common, *flags, data=data)
    assert_same_bits(stale, fresh)
    run_linear(tmp_path, *common, *flags, data=data)
    assert len(extractions) == 3  # the new cache is used
