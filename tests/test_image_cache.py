"""Images in memory: the same batches as from files, what does not fit, what is said of it."""

import importlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import write_image
from PIL import Image
from test_device_crops import assert_same_batches
from torch.nn import functional as F

from utils.data import cropping, image_cache, random_draws
from utils.data.bad_images import BadImages
from utils.data.datasets import CachedSet, PixelSet, read_image_folder
from utils.data.eval_loader import EvalLoader, LabeledLoader
from utils.data.train_loader import TwoViewLoader
from utils.evaluation import feature_cache
from utils.runtime.errors import InputError

TRAIN = importlib.import_module("self_supervised.train_msf_2q")
PSEUDO = importlib.import_module("semi_supervised.train_pseudo_cmsf")
CPU = torch.device("cpu")


def cached(images, where="ram", *, bad_images=None, **options):
    bad_images = bad_images or BadImages()
    return image_cache.cache_images(images, where, device=CPU, bad_images=bad_images, **options)


def skip(most=100):
    return BadImages(skip=True, most=most)


@pytest.fixture
def broken_tree(image_tree, tmp_path):
    """The images of one size, five of them broken."""
    shutil.copytree(image_tree, tmp_path / "images")
    for name in ("a/0.jpg", "a/3.jpg", "b/0.jpg", "b/1.jpg", "c/9.jpg"):
        (tmp_path / "images" / "train" / name).write_bytes(b"no image")
    return tmp_path / "images"


@pytest.fixture
def several_sizes(tmp_path):
    """12 images of 12 sizes; as big as the last is, from it on."""
    for number in range(12):
        size = (20 + 4 * number, 50 - 3 * number)
        write_image(tmp_path / "several" / "ab"[number % 2] / f"{number}.png", seed=1, size=size)
    return tmp_path / "several"


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_memory_are_those_from_files(image_tree, workers, capsys):
    images = read_image_folder(image_tree / "train")
    kept = cached(images, num_workers=workers)
    out = capsys.readouterr().out
    assert f"--cache_images ram: 30 images of 24x20 pixels, {30 * 24 * 20 * 3} bytes" in out
    assert "decoded 30 of 30 images" in out
    for number in range(30):
        assert torch.equal(kept.image(number), images.image(number))
        assert kept.image(number).stride() == images.image(number).stride()
        assert (kept.name(number), kept.path(number)) == (images.name(number), images.path(number))
    settings = {"batch_size": 7, "image_size": 16, "num_workers": workers}
    one, two = (TwoViewLoader(part, **settings) for part in (images, kept))
    assert_same_batches(one.epoch(2), two.epoch(2), exactly=True)
    for build in (EvalLoader, LabeledLoader):
        one, two = (build(part, **settings) for part in (images, kept))
        if build is LabeledLoader:
            one, two = one.epoch(1), two.epoch(1)
        for here, there in zip(one, two, strict=True):
            assert all(torch.equal(*pair) for pair in zip(here, there, strict=True))


def test_nothing_is_decoded_again(image_tree, monkeypatch):
    kept = cached(read_image_folder(image_tree / "train"))
    monkeypatch.setattr(cropping, "decode", None)
    assert len(list(TwoViewLoader(kept, batch_size=7, image_size=16).epoch(1))) == 4
    assert cached(kept) is kept


@pytest.mark.parametrize("size", [None, 12])
def test_broken_images_are_replaced_as_those_of_files(broken_tree, size):
    images = read_image_folder(broken_tree / "train")
    bad_images = skip()
    kept = cached(images, bad_images=bad_images, size=size)
    assert len(bad_images.names) == 5
    settings = {"batch_size": 6, "image_size": 16}
    files = TwoViewLoader(images, bad_images=skip(), **settings)
    memory = TwoViewLoader(kept, bad_images=bad_images, **settings)
    device = TwoViewLoader(kept, bad_images=bad_images, cut_on_device=True, **settings)
    if size is None:
        assert_same_batches(files.epoch(1), memory.epoch(1), exactly=True)
    assert_same_batches(memory.epoch(1), device.epoch(1))
    for here, there in zip(files.epoch(2), device.epoch(2), strict=True):
        assert torch.equal(here.index, there.index)
    assert len(bad_images.names) == 5
    evaluation = EvalLoader(kept, batch_size=8, image_size=16, bad_images=bad_images)
    assert sum(len(batch.index) for batch in evaluation) == 25


def test_a_broken_image_ends_the_run_unless_it_is_skipped(broken_tree):
    images = read_image_folder(broken_tree / "train")
    with pytest.raises(InputError, match=r"a/0\.jpg: cannot be read"):
        cached(images)
    with pytest.raises(InputError, match="--max_bad_images 4: 5 files"):
        cached(images, bad_images=skip(4))


def test_no_image_that_can_be_read(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"")
    kept = cached(read_image_folder(tmp_path), bad_images=skip())
    for cut in (False, True):
        loader = TwoViewLoader(kept, batch_size=2, bad_images=skip(), cut_on_device=cut)
        with pytest.raises(InputError, match="only 0 can be read"):
            list(loader.epoch(1))


def test_images_of_several_sizes_need_one_to_be_kept_in(several_sizes):
    images = read_image_folder(several_sizes)
    with pytest.raises(InputError, match=r"--cache_images ram: .*pixels, others .*--cache_size S"):
        cached(images)
    kept = cached(images, size=16)
    for number in range(12):
        whole = images.image(number)
        expected = F.interpolate(whole[None].float(), (16, 16), mode="bilinear", antialias=True)[0]
        assert (kept.image(number) - expected).abs().max() <= 1
        assert kept.original_size(number) == tuple(whole.shape[1:])


def test_crops_of_resized_images_are_those_of_the_originals(tmp_path):
    """On a picture of 90x30 pixels whose gray is its place: each crop shows the place it had."""
    place = np.linspace(0, 255, 90).astype(np.uint8)
    picture = np.broadcast_to(place[None, :, None], (30, 90, 3))
    for number in range(40):
        Image.fromarray(picture).save(tmp_path / f"{number:02}.png")
    images = read_image_folder(tmp_path)
    kept = cached(images, size=64)
    for number in range(40):
        draws = random_draws.uniforms(0, 1, np.array([number]))[0]
        whole = tiny.two_crops(images.image(number), draws, 24)
        original = kept.original_size(number)
        crops = tiny.two_crops(kept.image(number), draws, 24, original=original)
        # Half a pixel of the picture is 2 levels; the box is moved by up to that much.
        assert (whole.int() - crops.int()).abs().max() <= 6


def test_evaluation_reads_the_files_of_resized_images(several_sizes):
    images = read_image_folder(several_sizes)
    kept = cached(images, size=16)
    index = np.array([3, 0, 7])
    for one, two in ((images, kept), (images.take(index), kept.take(index))):
        one, two = (EvalLoader(part, batch_size=12, image_size=16) for part in (one, two))
        assert torch.equal(next(iter(one)).images, next(iter(two)).images)


def test_parts_of_a_cache(image_tree):
    images = read_image_folder(image_tree / "train")
    kept = cached(images)
    index = np.array([29, 3, 11])
    for one, two in (
        (images.take(index), kept.take(index)),
        (images.subset(["c", "a"]), kept.subset(["c", "a"])),
    ):
        assert two.classes == one.classes and np.array_equal(two.labels, one.labels)
        assert one.digest() == two.digest()
        for number in range(len(one)):
            assert one.name(number) == two.name(number)
            assert torch.equal(one.image(number), two.image(number))
        assert two.pixels is kept.pixels  # no copy


def test_digest_of_pixels():
    def pixel_set(value=0, name="a/0.png", label=0):
        pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
        pixels[1, 2, 3, 3] = value
        return PixelSet("", [name, "a/1.png"], [label, 0], ["a", "b"], pixels)

    digests = [
        part.digest()
        for part in (pixel_set(), pixel_set(1), pixel_set(name="a/2.png"), pixel_set(label=1))
    ]
    assert len(set(digests)) == 4 and pixel_set().digest() == digests[0]
    assert feature_cache.image_digest(pixel_set(1)) == digests[1]
    whole = pixel_set(1)
    assert whole.take(np.array([0])).digest() == pixel_set(0).take(np.array([0])).digest()
    assert whole.take(np.array([1])).digest() != pixel_set(0).take(np.array([1])).digest()


# What does not fit.


@pytest.mark.parametrize("where", ["ram", "device"])
def test_too_little_memory_is_said_before_anything_is_decoded(image_tree, monkeypatch, where):
    images = read_image_folder(image_tree / "train")
    monkeypatch.setattr(image_cache, "available_memory", lambda: 30 * 16 * 16 * 3 - 1)
    decoded = []
    monkeypatch.setattr(cropping, "decode", decoded.append)
    with pytest.raises(
        InputError, match=f"--cache_images {where}: .* 23040 bytes .*, 23039 are free"
    ):
        cached(images, where, size=16)
    assert not decoded
    monkeypatch.undo()
    monkeypatch.setattr(image_cache, "available_memory", lambda: 30 * 16 * 16 * 3)
    assert isinstance(cached(images, where, size=16), CachedSet)


def test_too_little_memory_on_a_gpu(image_tree, monkeypatch):
    images = read_image_folder(image_tree / "train")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    with pytest.raises(
        InputError, match="--cache_images device: .*memory of cuda:0, 1000 are free"
    ):
        image_cache.cache_images(
            images, "device", size=16, device=torch.device("cuda:0"), bad_images=BadImages()
        )


def test_available_memory(tmp_path, monkeypatch):
    total = int(re.search(r"MemTotal: *(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    alone = image_cache.available_memory()
    assert 0 < alone <= total
    monkeypatch.setattr(image_cache, "_CGROUP", tmp_path)
    kinds = "anon 7\ninactive_file 15\nactive_file 5"
    for name, text in (("max", "9000"), ("current", "5000"), ("stat", kinds)):
        (tmp_path / f"memory.{name}").write_text(text)
    assert image_cache.available_memory() == 4020
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert image_cache.available_memory() == 1005
    (tmp_path / "memory.max").write_text("max\n")
    assert 4020 < image_cache.available_memory() <= total


# Whole runs.


@pytest.mark.parametrize("flags", [("--cache_images", "disk"), ("--cache_size", 0)])
def test_flags_that_cannot_be(call_script, image_tree, flags):
    code, _, stderr = call_script(TRAIN, *tiny.FLAGS, *flags, image_tree)
    assert code == 2 and flags[0] in stderr


def test_a_size_without_a_cache(call_script, image_tree, tmp_path):
    flags = ("--cache_size", 16, "--checkpoint_path", tmp_path)
    code, _, stderr = call_script(TRAIN, *tiny.FLAGS, *flags, image_tree)
    assert code == 2 and "--cache_size 16: only with --cache_images" in stderr


def run(call_script, module, folder, data, *flags):
    flags = (*tiny.FLAGS, *flags, "--epochs", 2, "--save_freq", 1, "--checkpoint_path", folder)
    code, out, err = call_script(module, *flags, data)
    assert code == 0, err
    return out


def test_training_from_memory_is_training_from_files(call_script, image_tree, tmp_path):
    """Bit for bit, and one goes on where the other stopped."""
    for where in ("none", "ram", "device"):
        out = run(call_script, TRAIN, tmp_path / where, image_tree, "--cache_images", where)
        assert "20-NN" in out
    last = [tmp_path / where / "ckpt_epoch_2.pth" for where in ("none", "ram")]
    tiny.assert_same_checkpoint(*last)
    first = tmp_path / "none" / "ckpt_epoch_1.pth"
    flags = ("--cache_images", "ram", "--resume", first)
    run(call_script, TRAIN, tmp_path / "resumed", image_tree, *flags)
    tiny.assert_same_checkpoint(last[0], tmp_path / "resumed" / "ckpt_epoch_2.pth")
    flags = (*tiny.FLAGS, *flags, "--cache_size", 16, "--epochs", 2)
    refused = call_script(TRAIN, *flags, "--checkpoint_path", tmp_path / "other", image_tree)
    assert refused[0] == 2 and "--cache_size None, not 16" in refused[2]


def test_semi_supervised_training_from_memory(call_script, image_tree, tmp_path):
    flags = ("--cache_sup", "--label_fraction", 0.5, "--pseudo_lbl_epochs", 1)
    for where in ("none", "ram"):
        folder = tmp_path / where
        run(call_script, PSEUDO, folder, image_tree, *flags, "--cache_images", where)
    one, two = (tmp_path / where / "ckpt_epoch_2.pth" for where in ("none", "ram"))
    tiny.assert_same_checkpoint(one, two)
