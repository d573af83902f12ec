"""Broken image files: found whatever is wrong with them, and skipped without a trace elsewhere."""

import io
import random
import warnings

import numpy as np
import pytest
import tiny
import torch
from conftest import write_image
from PIL import Image
from torch import nn

from utils.data import augment, cropping, random_draws
from utils.data.bad_images import BadImages
from utils.data.datasets import ImageSet, read_image_folder, read_split
from utils.data.eval_loader import EvalLoader, LabeledLoader
from utils.data.train_loader import TwoViewLoader
from utils.evaluation.features import extract_features
from utils.runtime.errors import InputError


def skip(most=100):
    return BadImages(skip=True, most=most)


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
        with pytest.raises(InputError, match="of 6 (training )?images only 0 can be read"):
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
