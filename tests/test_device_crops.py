"""Crops that a device cuts for a whole batch, against those of one image at a time."""

import numpy as np
import pytest
import tiny
import torch
from conftest import write_image
from test_streams import NeverWaits, pinned  # noqa: F401 (a fixture)
from torch._subclasses.fake_tensor import FakeTensorMode

from utils.data import cropping, random_draws
from utils.data.bad_images import BadImages
from utils.data.batches import EpochSampler
from utils.data.cropping import crop_boxes, cut_crops
from utils.data.datasets import PixelSet, read_image_folder
from utils.data.image_cache import cache_images
from utils.data.train_loader import DeviceCrops, RandomCrops, TwoViewLoader


def noise(count, height, width):
    """Pictures in which every rounding shows, in memory as decoded ones are."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_boxes_are_those_of_one_image_at_a_time():
    draws = random_draws.uniforms(3, 1, np.arange(4000))
    sizes = np.random.default_rng(0).integers(1, 300, (4000, 1, 2))
    sizes[:500, :, 0] = 3  # no box fits into many of these strips
    boxes = crop_boxes(draws, sizes)
    assert boxes.shape == (4000, 2, 4)
    for row in range(4000):
        for view in (0, 1):
            height, width = map(int, sizes[row, 0])
            expected = cropping.crop_box(draws[row, view], height, width)
            assert tuple(boxes[row, view].tolist()) == expected


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(32, 32, 32), (48, 48, 32), (37, 61, 24), (20, 24, 64), (96, 96, 96), (300, 260, 16)],
)
def test_crops_are_within_a_gray_level(height, width, size):
    """Of noise, and equal all but everywhere. 20 images: more than are cut at a time."""
    images = noise(20, height, width)
    draws = random_draws.uniforms(0, 1, np.arange(20))
    boxes = crop_boxes(draws, np.broadcast_to(np.array([height, width]), (20, 1, 2)))
    crops = cut_crops(images, boxes, size)
    for image, own, crop in zip(images, draws, crops, strict=True):
        expected = tiny.two_crops(image, own, size)
        apart = (crop.int() - expected.int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (5, 7, 1, 9), (19, 0, 1, 24), (0, 0, 20, 24)])
def test_extreme_boxes(box):
    image = noise(1, 20, 24)
    crop = cut_crops(image, np.array(box)[None, None], 16)[0, 0]
    apart = crop.int() - cropping.resized_crop(image[0], box, 16).int()
    assert apart.abs().max() <= 1


def test_a_box_of_the_output_size_is_copied():
    image = noise(1, 20, 24)
    crop = cut_crops(image, np.array([[[3, 5, 16, 16]]]), 16)
    assert torch.equal(crop[0, 0], image[0, :, 3:19, 5:21])


def test_no_box_makes_the_host_wait(pinned):  # noqa: F811
    boxes = np.tile(np.array([1, 2, 9, 8]), (6, 2, 1))
    with FakeTensorMode(), NeverWaits():
        images = torch.empty(6, 3, 20, 24, dtype=torch.uint8, device="cuda")
        crops = cut_crops(images, boxes, 16)
    assert crops.shape == (6, 2, 3, 16, 16) and crops.device.type == "cuda" and pinned


def test_no_batch_makes_the_host_wait(pinned):  # noqa: F811
    """The whole way from a sampler to crops."""
    sampler = EpochSampler(24, 6, 0)
    names = [f"{number}.png" for number in range(24)]
    with FakeTensorMode():
        pixels = torch.empty(24, 20, 20, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        images = PixelSet("", names, [0] * 24, ["a"], pixels)
        groups = [cropping.CropGroup(2, 16), cropping.CropGroup(3, 8, (0.05, 0.2))]
        crops = RandomCrops(images, groups, seed=0, tolerated=0)
        crops = DeviceCrops(crops, sampler, torch.device("cuda"))
        with NeverWaits() as mode:
            batches = list(crops)
    assert [batch.crops.shape for batch in batches] == [(6, 2 * 3 * 16**2 + 3 * 3 * 8**2)] * 4
    assert mode.uploads == len(pinned) == 12  # rows, and the boxes of either size


def test_scaled_boxes():
    boxes = np.array([[0, 0, 100, 200], [50, 20, 25, 60], [99, 199, 1, 1], [40, 90, 1, 1]])
    scaled = cropping.scaled_boxes(boxes, np.array([100, 200]), (20, 20))
    assert scaled.tolist() == [[0, 0, 20, 20], [10, 2, 5, 6], [19, 19, 1, 1], [8, 9, 1, 1]]


@pytest.fixture
def square_images(tmp_path):
    """24 images of 20x20 pixels in two classes."""
    for number in range(24):
        write_image(tmp_path / "ab"[number % 2] / f"{number:02}.png", seed=number, size=(20, 20))
    return tmp_path


def loaders(images, *, most=100, size=None, batch_size=5, skip=False, **options):
    """The same loader from files or a cache in memory, and cutting on the device."""
    settings = {"batch_size": batch_size, "image_size": 16, "seed": 3, **options}
    for where in ("ram", "device"):
        bad_images = BadImages(skip=skip, most=most)
        cached = cache_images(
            images, where, size=size, device=torch.device("cpu"), bad_images=bad_images
        )
        cut = where == "device"
        yield TwoViewLoader(cached, bad_images=bad_images, cut_on_device=cut, **settings)


def assert_same_batches(one, two, *, exactly=False):
    one, two = list(one), list(two)
    assert len(one) == len(two) > 0
    for here, there in zip(one, two, strict=True):
        assert torch.equal(here.index, there.index) and torch.equal(here.label, there.label)
        views, others = ((*b[:2], *b.small_views) for b in (here, there))
        for view, other in zip(views, others, strict=True):
            if exactly:
                assert torch.equal(view, other)
            else:  # a gray level is 0.018 after the normalization, up to 1.4 of it after the color
                assert (view - other).abs().max() < 0.05
                assert (view != other).float().mean() < 0.01


def test_device_loader_yields_the_batches_of_the_workers(square_images):
    images = read_image_folder(square_images)
    files = TwoViewLoader(images, batch_size=5, image_size=16, seed=3)
    _, device = loaders(images)
    for epoch in (1, 2):
        assert_same_batches(files.epoch(epoch), device.epoch(epoch))
    assert_same_batches(files.epoch(2, start=3), device.epoch(2, start=3))
    assert len(device) == len(files) == 4


@pytest.mark.parametrize("resized", [None, 12, 30])
def test_ram_and_device_agree(image_tree, resized):
    images = read_image_folder(image_tree / "train")
    ram, device = loaders(images, size=resized)
    assert_same_batches(ram.epoch(1), device.epoch(1))


def test_device_loader_yields_the_small_crops_of_the_workers(square_images):
    groups = [cropping.CropGroup(2, 12, (0.05, 0.3)), cropping.CropGroup(1, 8, (0.1, 0.2))]
    one, two = loaders(read_image_folder(square_images), small=groups)
    assert_same_batches(one.epoch(2), two.epoch(2))


def test_device_loader_of_several_processes(square_images, monkeypatch):
    """The parts of two processes make up the batch, also around broken images."""
    for number in (3, 4, 11):
        (square_images / "ab"[number % 2] / f"{number:02}.png").write_bytes(b"no image")
    images = read_image_folder(square_images)
    ram, device = loaders(images, skip=True, batch_size=6)
    whole = list(ram.epoch(1))
    parts = []
    for part in (0, 1):

        def own_share(count, part=part):
            return range(count * part // 2, count * (part + 1) // 2)

        monkeypatch.setattr("utils.data.batches.distributed.own_share", own_share)
        monkeypatch.setattr("utils.data.train_loader.distributed.world_size", lambda: 2)
        parts.append(list(device.epoch(1)))
    for batch, one, two in zip(whole, *parts, strict=True):
        assert torch.equal(batch.index, torch.cat((one.index, two.index)))
        apart = batch.query_view - torch.cat((one.query_view, two.query_view))
        assert apart.abs().max() < 0.05
