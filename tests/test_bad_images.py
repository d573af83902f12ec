"""Broken image files: found whatever is wrong with them, and skipped without a trace elsewhere."""

import importlib
import io
import json
import random
import shutil
import warnings

import numpy as np
import pytest
import tiny
import torch
from conftest import write_image
from PIL import Image
from test_bad_input import assert_refused
from tiny import FLAGS
from torch import nn

from utils.data import augment, cropping, random_draws
from utils.data.bad_images import BadImages
from utils.data.batches import EvalLoader, LabeledLoader, TwoViewLoader
from utils.data.datasets import ImageSet, read_image_folder, read_split
from utils.evaluation import feature_cache
from utils.evaluation.features import extract_features
from utils.runtime.errors import InputError

TRAIN = importlib.import_module("self_supervised.train_msf_2q")
KNN = importlib.import_module("eval.eval_knn")
LINEAR = importlib.import_module("eval.eval_linear")
UNTRAINED = ("--weights", "random", "--arch", "conv4", "--image_size", 16, "-j", 0, "-b", 7)
SKIP = ("--bad_images", "skip")
BROKEN = ("train/a/3.jpg", "train/b/0.jpg", "train/b/1.jpg", "train/c/9.jpg", "val/b/2.jpg")


def skip(most=100):
    return BadImages(skip=True, most=most)


@pytest.fixture(scope="session")
def broken_tree(image_tree, tmp_path_factory):
    """The image tree with the files of BROKEN broken. Not to be changed by a test."""
    root = shutil.copytree(image_tree, tmp_path_factory.mktemp("broken") / "tree")
    for name in BROKEN:
        (root / name).write_bytes((root / name).read_bytes()[:200])
    return root


@pytest.fixture(scope="session")
def tree_without(image_tree, tmp_path_factory):
    """The image tree without the files of BROKEN."""
    root = shutil.copytree(image_tree, tmp_path_factory.mktemp("without") / "tree")
    for name in BROKEN:
        (root / name).unlink()
    return root


# What is kept of them.


def test_the_first_bad_file_is_an_error_that_names_the_way_out():
    with pytest.raises(InputError, match=r"data x/1\.jpg: .* \(empty\) \(--bad_images skip"):
        BadImages().add("x/1.jpg", "empty")


def test_skipped_files_are_announced_once_and_kept(capsys):
    bad = skip(most=3)
    for name in ("b", "a", "b"):
        bad.add(name, "empty")
    assert capsys.readouterr().out.count("\n") == 2
    assert bad.names == ["a", "b"]
    again = BadImages(skip=True, most=3, names=bad.names)
    again.restore(["a", "c"])
    again.add("c", "empty")
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match=r"--max_bad_images 3: 4 files .* the last is d \(empty\)"):
        again.add("d", "empty")


def test_names_that_are_no_utf8_can_be_printed(capsys):
    bad = skip()
    bad.add("x/\udcff.jpg", "empty")
    assert "x/\\xff.jpg" in capsys.readouterr().out
    assert bad.names == ["x/\udcff.jpg"]


# What counts as broken.


def encoded(form, mode="RGB", **options):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, form, **options)
    return file.getvalue()


def huge_bmp():
    """A header that promises 60000 x 60000 pixels."""
    content = bytearray(encoded("BMP"))
    content[18:26] = np.array([60000, 60000], dtype="<i4").tobytes()
    return bytes(content)


CONTENTS = {
    "empty": b"",
    "text": b"no picture at all",
    "page": b"<!DOCTYPE html><html><body>404</body></html>",
    "zeros": bytes(1000),
    "half a JPEG": encoded("JPEG")[:400],
    "half a PNG": encoded("PNG")[:400],
    "half a GIF": encoded("GIF")[:600],
    "half a WEBP": encoded("WEBP")[:100],
    "half a BMP": encoded("BMP")[:400],
    "half a TIFF": encoded("TIFF")[:400],
    "head of a JPEG": encoded("JPEG")[:30],
    "bomb": huge_bmp(),
}


def assert_left_out(images, number):
    loader = EvalLoader(images, batch_size=2, image_size=16, bad_images=skip())
    index = torch.cat([batch.index for batch in loader])
    assert index.tolist() == [i for i in range(len(images)) if i != number]
    assert loader.bad_images.names == [images.path(number)]
    with pytest.raises(InputError, match="cannot be read as an image") as error:
        list(EvalLoader(images, batch_size=2, image_size=16))
    assert str(error.value).count(images.path(number)) == 1
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [*CONTENTS, "missing", "folder"])
def test_broken_files_are_found(tmp_path, kind):
    for number in range(3):
        write_image(tmp_path / f"{number}.jpg", seed=number)
    images = ImageSet(tmp_path, ["0.jpg", "1.jpg", "2.jpg"], [-1] * 3, [])
    path = tmp_path / "1.jpg"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(CONTENTS[kind])
    assert_left_out(images, 1)


def test_random_damage_is_read_or_reported(tmp_path):
    """Bytes changed, taken out and cut off in every format: never any other error."""
    draw = random.Random(0)
    originals = [encoded(form) for form in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")]
    originals += [encoded("PNG", "P"), encoded("TIFF", compression="tiff_lzw")]
    names = [f"{number}.jpg" for number in range(270)]
    for number, name in enumerate(names):
        content = bytearray(originals[number % len(originals)])
        for _ in range(draw.choice([1, 2, 8])):
            place = draw.randrange(draw.choice([40, len(content)]))
            content[place : place + draw.choice([0, 1, 1, 1, 4])] = bytes([draw.randrange(256)])
        (tmp_path / name).write_bytes(content[: draw.choice([len(content), draw.randrange(2000)])])
    loader = EvalLoader(
        ImageSet(tmp_path, names, [-1] * len(names), []),
        batch_size=30,
        image_size=8,
        bad_images=skip(most=len(names)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = sum(len(batch.index) for batch in loader)
    assert read == loader.num_readable
    assert 20 < read < 250  # the damage is neither nothing nor everything


def test_a_strip_out_of_a_damaged_header_takes_no_gigabytes():
    strip = torch.arange(200_000, dtype=torch.int32).div(1000).byte().expand(3, 1, -1)
    crop = cropping.center_crop(strip, 16)  # resized whole it would have 200 MB at this size
    assert crop.shape == (3, 16, 16) and (crop.int() - 100).abs().max() <= 1
    assert cropping.center_crop(strip.mT, 16).shape == (3, 16, 16)


FORMATS = {
    "animated.gif": ("RGB", ("save_all", True), ("append_images", [Image.new("RGB", (24, 20))])),
    "transparent.gif": ("P", ("transparency", 0)),
    "cmyk.jpg": ("CMYK",),
    "gray.jpg": ("L",),
    "progressive.jpg": ("RGB", ("progressive", True)),
    "gray-alpha.png": ("LA",),
    "palette.png": ("P",),
    "bit.png": ("1",),
    "alpha.png": ("RGBA",),
    "plain.webp": ("RGB",),
    "plain.bmp": ("RGB",),
    "plain.ppm": ("RGB",),
}


@pytest.mark.parametrize("workers", [0, 1])
def test_unusual_formats_are_no_broken_files(tmp_path, workers):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    for name, settings in FORMATS.items():
        mode, *options = settings
        picture = Image.fromarray(pixels).convert(mode)
        picture.save(tmp_path / name, **dict(options))
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / name)
    Image.fromarray(pixels[..., 0].astype(np.float32) / 255).save(tmp_path / "float.tif")
    names = sorted(path.name for path in tmp_path.iterdir())
    images = ImageSet(tmp_path, names, [-1] * len(names), [])
    options = {"batch_size": len(names), "image_size": 16, "num_workers": workers}
    assert len(next(iter(EvalLoader(images, **options))).index) == len(names)
    assert len(next(TwoViewLoader(images, **options).epoch(1)).index) == len(names)


# Training goes on with the next image.


def two_view(images, **options):
    settings = {"batch_size": 7, "image_size": 16, "weak_strong": True, **options}
    return TwoViewLoader(images, **settings)


def labeled(images, **options):
    return LabeledLoader(images, **{"batch_size": 7, "image_size": 16, **options})


def replaced_by_hand(index, broken, count):
    """Each broken number of a batch, in order, by the next one that is whole and not in it."""
    batch = list(index)
    for place, number in enumerate(batch):
        if number in broken:
            other = (number + 1) % count
            while other in broken or other in batch or other in index:
                other = (other + 1) % count
            batch[place] = other
    return batch


@pytest.mark.parametrize("build", [two_view, labeled])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_replaced_and_nothing_else_changes(
    image_tree, broken_tree, build, workers
):
    whole, images = read_split(image_tree, "train"), read_split(broken_tree, "train")
    broken = {3, 10, 11, 29}  # BROKEN, of 10 images a class
    loader, seen = build(images, num_workers=workers, bad_images=skip()), set()
    for epoch in (1, 2, 3):
        batches = list(loader.epoch(epoch))
        before = list(build(whole).epoch(epoch))
        assert len(batches) == len(before)
        for batch, undisturbed in zip(batches, before, strict=True):
            index = undisturbed.index.tolist()
            assert batch.index.tolist() == replaced_by_hand(index, broken, 30)
            assert len(set(batch.index.tolist())) == len(index)
            assert batch.label.tolist() == images.labels[batch.index].tolist()
            kept = [i for i, number in enumerate(index) if number not in broken]
            assert torch.equal(batch[0][kept], undisturbed[0][kept])
            seen |= set(index)
    assert seen >= broken  # or the test would have no object
    assert loader.bad_images.names == sorted(images.path(number) for number in broken)


def test_neighboring_broken_images_have_different_replacements(tmp_path):
    for number in range(12):
        write_image(tmp_path / f"{number:02}.jpg", seed=number)
    before = two_view(read_image_folder(tmp_path), batch_size=4)
    orders = [batch.index.tolist() for epoch in range(1, 16) for batch in before.epoch(epoch)]
    for number in (4, 5):
        (tmp_path / f"{number:02}.jpg").write_bytes(b"")
    loader = two_view(read_image_folder(tmp_path), batch_size=4, bad_images=skip())
    batches = [batch.index.tolist() for epoch in range(1, 16) for batch in loader.epoch(epoch)]
    assert batches == [replaced_by_hand(order, {4, 5}, 12) for order in orders]
    assert any({4, 5} <= set(order) for order in orders)


def test_a_replacement_has_its_own_views(broken_tree):
    images = read_split(broken_tree, "train")
    for batch in two_view(images, seed=5, bad_images=skip()).epoch(2):
        for row, number in enumerate(batch.index.tolist()):
            draws = random_draws.uniforms(5, 2, np.array([number]))
            crops = tiny.two_crops(cropping.decode(images.path(number)), draws[0], 16)
            query = augment.strong_view(crops[:1], draws[:, 0])
            torch.testing.assert_close(batch.query_view[row], query[0])


def test_nothing_left_to_replace_with(tmp_path):
    for number in range(6):
        write_image(tmp_path / f"{number}.jpg", seed=number)
    (tmp_path / "5.jpg").write_bytes(b"")
    images = read_image_folder(tmp_path)
    with pytest.raises(InputError, match="--batch_size 6: of 6 training images only 5 can be read"):
        list(two_view(images, batch_size=6, bad_images=skip()).epoch(1))
    (batch,) = labeled(images, batch_size=6, bad_images=skip()).epoch(1)
    assert sorted(batch.index.tolist()) == [0, 1, 2, 3, 4]
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    for build in (two_view, labeled):
        with pytest.raises(InputError, match="of 6 training images only 0 can be read"):
            list(build(images, batch_size=2, bad_images=skip()).epoch(1))
    with pytest.raises(InputError, match="none of the 6 images can be read"):
        list(EvalLoader(images, batch_size=4, image_size=16, bad_images=skip()))


@pytest.mark.parametrize("most", [0, 3])
def test_no_more_files_are_tried_than_may_be_bad(tmp_path, monkeypatch, most):
    tried = []

    def decode(path):
        tried.append(path)
        raise OSError("broken")

    monkeypatch.setattr(cropping, "decode", decode)
    images = ImageSet(tmp_path, [f"{number}.jpg" for number in range(50)], [0] * 50, ["a"])
    for build in (two_view, labeled):
        with pytest.raises(InputError, match=f"--max_bad_images {most}: {most + 1} files"):
            list(build(images, bad_images=skip(most=most)).epoch(1))
        assert len(tried) == most + 1
        tried.clear()


# Evaluation goes on without them.


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_those_of_the_images_that_are_left(broken_tree, tree_without, workers):
    features = []
    for root in (broken_tree, tree_without):
        images = read_split(root, "train")
        loader = EvalLoader(
            images, batch_size=4, image_size=8, num_workers=workers, bad_images=skip()
        )
        features.append(extract_features(nn.Flatten(), loader))
    for one, two in zip(*features, strict=True):
        assert torch.equal(one, two)
    assert len(features[0][1]) == 26


def test_a_batch_without_images_is_not_yielded(tmp_path):
    for number in range(6):
        write_image(tmp_path / f"{number}.png", seed=number)
    for number in (2, 3):
        (tmp_path / f"{number}.png").write_bytes(b"")
    loader = EvalLoader(read_image_folder(tmp_path), batch_size=2, image_size=16, bad_images=skip())
    assert [batch.index.tolist() for batch in loader] == [[0, 1], [4, 5]]
    assert (loader.left_out, loader.num_readable) == ({2, 3}, 4)
    write_image(tmp_path / "2.png", seed=2)  # mended: the next pass finds it
    assert [batch.index.tolist() for batch in loader] == [[0, 1], [2], [4, 5]]
    assert loader.left_out == {3}


def run_json(call_script, module, folder, name, *flags):
    code, stdout, stderr = call_script(module, *flags)
    assert code == 0, stderr
    return json.loads((folder / name).read_text()), stdout


def test_knn_without_the_broken_images(call_script, broken_tree, tree_without, tmp_path):
    """The figures of the tree from which they were removed; and out of the cache the same."""
    run = (call_script, KNN, tmp_path, "knn.json", *UNTRAINED, "--save", tmp_path)
    expected, _ = run_json(*run, tree_without)
    record, stdout = run_json(*run, *SKIP, "--save_features", broken_tree)
    assert record["k"] == expected["k"]
    assert record["counts"] == expected["counts"] == {"train": 26, "val": 11, "classes": 3}
    assert record["bad_images"] == [str(broken_tree / name) for name in BROKEN]
    assert expected["bad_images"] == []
    assert stdout.count("WARNING") == len(BROKEN)

    load = ("--load_cache", tmp_path / "features.pth")
    cached, _ = run_json(*run, *SKIP, *load, broken_tree)
    for name in ("k", "counts", "bad_images"):
        assert cached[name] == record[name]
    refused = call_script(KNN, *UNTRAINED, *load, broken_tree)
    assert_refused(refused, BROKEN[0], "no features", "--bad_images skip")
    few = call_script(KNN, *UNTRAINED, *SKIP, "--max_bad_images", 4, *load, broken_tree)
    assert_refused(few, "--max_bad_images 4", "5 files")
    assert_refused(call_script(KNN, *UNTRAINED, *SKIP, "-k", 27, broken_tree), "-k 27", "only 26")


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (KNN, ()),
        (LINEAR, ("--cached", "--epochs", 1)),
        (LINEAR, ("--epochs", 1)),
        (importlib.import_module("eval.eval_transfer"), ("--l2", 1)),
    ],
)
def test_a_class_of_which_nothing_can_be_read_is_refused(call_script, tmp_path, module, flags):
    for split in ("train", "val"):
        for seed, name in enumerate(("a/1.png", "a/2.png", "b/1.png", "b/2.png", "c/1.png")):
            write_image(tmp_path / split / name, seed=seed)
    (tmp_path / "train/c/1.png").write_bytes(b"")
    refused = call_script(module, *UNTRAINED, *SKIP, *flags, tmp_path)
    assert_refused(refused, "can be read: no labeled image of 1 of 3 classes: c")


def test_knn_of_fewer_images_than_its_k(call_script, tmp_path):
    for number in range(20):
        write_image(tmp_path / "train" / "ab"[number % 2] / f"{number}.jpg", seed=number)
    for name in "ab":
        write_image(tmp_path / "val" / name / "0.jpg", seed=0)
    (tmp_path / "train" / "a" / "0.jpg").write_bytes(b"")
    record, _ = run_json(
        *(call_script, KNN, tmp_path, "knn.json", *UNTRAINED, *SKIP, "--save", tmp_path),
        tmp_path,
    )
    assert list(record["k"]) == ["1", "5", "10"]


@pytest.mark.parametrize("flags", [("--cached",), ()])
def test_linear_evaluation_without_the_broken_images(
    call_script, broken_tree, tree_without, tmp_path, flags
):
    """Cached features: the figures of the tree without them. Crops: the counts."""
    flags = (*UNTRAINED, *flags, "--epochs", 2, "--lr", 0.1, "--save", tmp_path)
    run = (call_script, LINEAR, tmp_path, "linear.json", *flags)
    record, _ = run_json(*run, *SKIP, broken_tree)
    assert record["counts"] == {"train": 26, "val": 11, "classes": 3}
    assert record["bad_images"] == [str(broken_tree / name) for name in BROKEN]

    resume = ("--resume", tmp_path / "linear.pth")
    resumed, stdout = run_json(*run, *SKIP, "--epochs", 3, *resume, broken_tree)
    assert resumed["counts"] == record["counts"]
    assert resumed["bad_images"] == record["bad_images"]
    measured, _ = run_json(*run, *SKIP, "--evaluate", *resume, broken_tree)
    assert measured["counts"] == record["counts"] and measured["top1"] == resumed["top1"]
    if "--cached" in flags:
        (tmp_path / "features.pth").unlink()
        expected, _ = run_json(*run, tree_without)
        one, two = record["lr"]["0.1"], expected["lr"]["0.1"]
        # The features were extracted in other batches, which round otherwise.
        assert one.pop("loss") == pytest.approx(two.pop("loss"), rel=1e-4)
        assert one == two


def test_a_cache_with_images_left_out_is_not_used_without_skip(
    call_script, broken_tree, tmp_path, monkeypatch
):
    flags = (*UNTRAINED, "--cached", "--epochs", 1, "--save", tmp_path)
    assert call_script(LINEAR, *flags, *SKIP, broken_tree)[0] == 0
    code, stdout, stderr = call_script(LINEAR, *flags, broken_tree)
    assert "extracted anew" in stdout
    assert_refused((code, stdout, stderr), BROKEN[0], "--bad_images skip")
    monkeypatch.setattr(feature_cache, "extract", None)
    assert call_script(LINEAR, *flags, *SKIP, broken_tree)[0] == 0


def test_digest_of_a_missing_file(tmp_path):
    write_image(tmp_path / "0.jpg", seed=0)
    images = ImageSet(tmp_path, ["0.jpg", "1.jpg"], [0, 0], ["a"])
    without = feature_cache.image_digest(images, missing_ok=True)
    write_image(tmp_path / "1.jpg", seed=1)
    assert without != feature_cache.image_digest(images, missing_ok=True)


# Whole runs.


def test_training_with_broken_files_ends_with_figures(run_script, broken_tree, tmp_path):
    flags = (*FLAGS, "--epochs", 2, "--num_workers", 1, "--checkpoint_path", tmp_path)
    done = run_script("self_supervised/train_msf_2q.py", *flags, *SKIP, broken_tree)
    assert done.returncode == 0, done.stderr
    assert "20-NN" in done.stdout and "Traceback" not in done.stderr
    for name in BROKEN:
        assert f"WARNING data {broken_tree / name}: cannot be read" in done.stdout


def test_too_many_broken_files(call_script, broken_tree, tmp_path):
    flags = (*FLAGS, *SKIP, "--max_bad_images", 3, "--checkpoint_path", tmp_path, broken_tree)
    assert_refused(call_script(TRAIN, *flags), "--max_bad_images 3: 4 files")


@pytest.mark.parametrize("flags", [("--bad_images", "drop"), ("--max_bad_images", -1)])
def test_flags(call_script, image_tree, flags):
    assert_refused(call_script(TRAIN, *FLAGS, *flags, image_tree), *map(str, flags))


@pytest.fixture(scope="module")
def without_a_class(image_tree, tmp_path_factory):
    """Tells a copy of the image tree in which no image of class b of a split can be read."""

    def make(split):
        root = shutil.copytree(image_tree, tmp_path_factory.mktemp("classes") / "tree")
        for path in (root / split / "b").iterdir():
            path.write_bytes(b"")
        return root

    return {split: make(split) for split in ("train", "val")}


@pytest.mark.parametrize(
    ("script", "extra", "name", "find"),
    [
        ("eval_knn", (), "knn.json", lambda found: found),
        ("eval_linear", ("--epochs", 1), "linear.json", lambda found: found),
        ("eval_linear", ("--epochs", 1, "--cached"), "linear.json", lambda found: found),
        ("eval_transfer", ("--l2", 1), "transfer.json", lambda found: found["sets"]["folder"]),
    ],
)
def test_a_val_class_that_cannot_be_read_is_named(
    call_script, without_a_class, tmp_path, script, extra, name, find
):
    flags = ("--weights", "random", "--arch", "conv4", "--image_size", 16, "--num_workers", 0)
    flags = (*flags, "--bad_images", "skip", "--save", tmp_path, *extra, without_a_class["val"])
    code, stdout, stderr = call_script(importlib.import_module(f"eval.{script}"), *flags)
    assert code == 0, stderr
    said = "no readable image of 1 of 3 classes: b; figures are over the others"
    assert stdout.count(said) == 1
    absent = find(json.loads((tmp_path / name).read_text()))["classes_without_images"]
    assert absent["test" if script == "eval_transfer" else "val"] == ["b"]


@pytest.mark.parametrize(
    ("split", "so"),
    [("train", "its images count as wrong"), ("val", "figures are over the others")],
)
@pytest.mark.parametrize("cache", [(), ("--cache_sup",)])
def test_training_warns_of_a_class_that_cannot_be_read(
    call_script, without_a_class, tmp_path, split, so, cache
):
    script = importlib.import_module("semi_supervised.train_pseudo_cmsf")
    flags = (*tiny.FLAGS, "--bad_images", "skip", "--epochs", 1, "--pseudo_lbl_epochs", 1, *cache)
    root = without_a_class[split]
    code, stdout, stderr = call_script(script, *flags, "--checkpoint_path", tmp_path, root)
    assert code == 0, stderr
    found = "no readable image of 1 of 3 classes: b;"
    assert f"WARNING data {root / split}: {found} {so}" in stdout
    head = f"WARNING labeled images: {found} the classifier head does not learn it"
    assert (head in stdout) == (split == "train")
