"""Stateless order and views, the same bits with any number of workers, evaluation in order."""

import numpy as np
import pytest
import tiny
import torch
from conftest import write_image
from PIL import Image

from utils.data import augment, cropping, random_draws
from utils.data.bad_images import BadImages
from utils.data.batches import read_crops
from utils.data.datasets import read_image_folder, read_split
from utils.data.eval_loader import EvalLoader
from utils.data.image_cache import cache_images
from utils.data.train_loader import TwoViewLoader
from utils.runtime.errors import InputError


def loader(images, **options):
    settings = {"batch_size": 7, "image_size": 16, "weak_strong": True, **options}
    return TwoViewLoader(images, **settings)


def test_workers_change_no_bit(image_tree):
    images = read_split(image_tree, "train")
    runs = [list(loader(images, num_workers=workers).epoch(3)) for workers in (0, 2)]
    assert len(runs[0]) == len(runs[1]) == 4
    for one, two in zip(*runs, strict=True):
        for here, there in zip(one[:4], two[:4], strict=True):
            assert torch.equal(here, there)


def test_epochs_are_permutations_that_differ(image_tree):
    images = read_split(image_tree, "train")
    two_view = loader(images, batch_size=5)
    orders = [torch.cat([batch.index for batch in two_view.epoch(epoch)]) for epoch in (1, 2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(30))
    assert not torch.equal(*orders)
    other = torch.cat([batch.index for batch in loader(images, batch_size=5, seed=1).epoch(1)])
    assert not torch.equal(orders[0], other)


def test_any_step_can_be_produced_on_its_own(image_tree):
    images = read_split(image_tree, "train")
    two_view = loader(images)
    whole = list(two_view.epoch(2))
    rest = list(two_view.epoch(2, start=2))
    assert len(rest) == 2
    assert torch.equal(whole[2].query_view, rest[0].query_view)


def test_a_batch_is_the_views_of_its_images(image_tree):
    """Batches against one image at a time: decode, crop by its own draws, finish the view."""
    images = read_split(image_tree, "train")
    batch = next(iter(loader(images, seed=5).epoch(4)))
    assert batch.query_view.shape == batch.target_view.shape == (7, 3, 16, 16)
    assert torch.equal(batch.label, torch.from_numpy(images.labels)[batch.index])
    for row in (0, 6):
        index = batch.index[row : row + 1].numpy()
        draws = random_draws.uniforms(5, 4, index)
        crops = tiny.two_crops(cropping.decode(images.path(int(index[0]))), draws[0], 16)
        query = augment.strong_view(crops[:1], draws[:, 0])
        target = augment.weak_view(crops[1:], draws[:, 1])
        torch.testing.assert_close(batch.query_view[row], query[0])
        torch.testing.assert_close(batch.target_view[row], target[0])


SMALL = [cropping.CropGroup(3, 8, (0.05, 0.2)), cropping.CropGroup(1, 12, (0.1, 0.3))]


@pytest.mark.parametrize("cut_on_device", [False, True])
def test_small_crops_are_strong_views_of_boxes_of_their_own(image_tree, cut_on_device):
    """Against one crop at a time; the two views are those of a run without small crops."""
    images = read_split(image_tree, "train")
    if cut_on_device:
        images = cache_images(images, "ram", device=torch.device("cpu"), bad_images=BadImages())
    plain = next(iter(loader(images, seed=5).epoch(2)))
    two_view = loader(images, seed=5, small=SMALL, cut_on_device=cut_on_device)
    batch = next(iter(two_view.epoch(2)))
    near = {"rtol": 0, "atol": 0.1 if cut_on_device else 1e-6}  # a gray level here and there
    torch.testing.assert_close(batch.query_view, plain.query_view, **near)
    torch.testing.assert_close(batch.target_view, plain.target_view, **near)
    assert [tuple(views.shape) for views in batch.small_views] == [
        (3, 7, 3, 8, 8),
        (1, 7, 3, 12, 12),
    ]
    views = [view for group in batch.small_views for view in group]
    groups = [group for group in SMALL for _ in range(group.count)]
    for row, index in enumerate(batch.index.tolist()):
        image = cropping.decode(images.path(index))
        draws = random_draws.uniforms(5, 2, np.array([index]), views=6)[0]
        for view, group, numbers in zip(views, groups, draws[2:], strict=True):
            box = cropping.crop_box(numbers, *image.shape[1:], scale=group.scale)
            crop = cropping.resized_crop(image, box, group.size)
            expected = augment.strong_view(crop[None], numbers[None])[0]
            torch.testing.assert_close(view[row], expected, **near)


@pytest.mark.parametrize("weak_strong", [True, False])
def test_symmetric_batches_hold_each_image_twice(image_tree, weak_strong):
    images = read_split(image_tree, "train")
    plain = next(iter(loader(images, weak_strong=weak_strong).epoch(1)))
    batch = next(iter(loader(images, weak_strong=weak_strong, symmetric=True).epoch(1)))
    assert torch.equal(batch.index, plain.index.repeat_interleave(2))
    assert torch.equal(batch.label, plain.label.repeat_interleave(2))
    assert torch.equal(batch.query_view[::2], plain.query_view)
    assert torch.equal(batch.target_view[::2], plain.target_view)
    if not weak_strong:
        assert torch.equal(batch.query_view[1::2], plain.target_view)
        assert torch.equal(batch.target_view[1::2], plain.query_view)
    for row, index in enumerate(plain.index.tolist()):
        draws = random_draws.uniforms(0, 1, np.array([index]))
        crops = tiny.two_crops(cropping.decode(images.path(index)), draws[0], 16)
        render = augment.weak_view if weak_strong else augment.strong_view
        second = augment.strong_view(crops[1:], draws[:, 1])[0], render(crops[:1], draws[:, 0])[0]
        torch.testing.assert_close(batch.query_view[2 * row + 1], second[0])
        torch.testing.assert_close(batch.target_view[2 * row + 1], second[1])


@pytest.mark.parametrize("kind", ["strong", "weak"])
def test_a_single_view_is_the_first_of_two(image_tree, kind):
    images = read_split(image_tree, "train")
    batch = next(iter(loader(images, single=kind).epoch(1)))
    assert batch.query_view is batch.target_view
    two = next(iter(loader(images, weak_strong=False).epoch(1)))
    if kind == "strong":
        assert torch.equal(batch.query_view, two.query_view)
    else:
        index = batch.index[:1].numpy()
        draws = random_draws.uniforms(0, 1, index)
        crops = tiny.two_crops(cropping.decode(images.path(int(index[0]))), draws[0], 16)
        torch.testing.assert_close(
            batch.query_view[0], augment.weak_view(crops[:1], draws[:, 0])[0]
        )


def test_without_weak_strong_both_views_are_strong(image_tree, monkeypatch):
    images = read_split(image_tree, "train")
    weak = next(iter(loader(images).epoch(1)))
    strong = next(iter(loader(images, weak_strong=False).epoch(1)))
    assert torch.equal(weak.query_view, strong.query_view)
    assert not torch.equal(weak.target_view, strong.target_view)


def test_blur_can_be_left_out(image_tree):
    images = read_split(image_tree, "train")
    drawn = {blur: next(iter(loader(images, blur=blur).epoch(1))) for blur in (0, 0.5, 1)}
    changed = [
        [not torch.equal(*pair) for pair in zip(drawn[0].query_view, other.query_view, strict=True)]
        for other in (drawn[0.5], drawn[1])
    ]
    assert 0 < sum(changed[0]) < sum(changed[1])  # a sigma of 0.1 changes nothing
    assert torch.equal(drawn[0].target_view, drawn[1].target_view)  # weak


def test_fewer_images_than_a_batch(image_tree):
    with pytest.raises(InputError, match="--batch_size 31: only 30 training images"):
        loader(read_split(image_tree, "train"), batch_size=31)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(tmp_path, workers):
    for number in range(4):
        write_image(tmp_path / "train" / "a" / f"{number}.jpg", seed=number)
    (tmp_path / "train" / "a" / "2.jpg").write_bytes(b"\xff\xd8 no picture")
    images = read_split(tmp_path, "train")
    for broken in (
        loader(images, batch_size=4, num_workers=workers).epoch(1),
        EvalLoader(images, batch_size=2, image_size=16, num_workers=workers),
    ):
        with pytest.raises(InputError, match=r"a/2\.jpg: cannot be read") as error:
            list(broken)
        assert "Traceback" not in str(error.value)


def test_evaluation_visits_every_image_in_order(image_tree):
    images = read_split(image_tree, "val")
    batches = list(EvalLoader(images, batch_size=5, image_size=16))
    assert len(batches) == 3
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(12))
    assert torch.cat([batch.label for batch in batches]).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    crop = cropping.center_crop(cropping.decode(images.path(11)), 16)
    torch.testing.assert_close(batches[-1].images[-1], augment.normalize(crop[None])[0])


def test_evaluation_view_is_the_whole_center(tmp_path):
    """A black border outside the central 224/256 is cut away."""
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[4:60, 4:60] = 255
    Image.fromarray(picture).save(tmp_path / "1.png")
    batch = next(iter(EvalLoader(read_image_folder(tmp_path), batch_size=1, image_size=56)))
    white = augment.normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))
    torch.testing.assert_close(batch.images, white.expand_as(batch.images))


def test_the_global_random_state_is_left_alone(image_tree):
    images = read_split(image_tree, "train")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(images, num_workers=1).epoch(1))
    list(loader(images).epoch(1))
    list(EvalLoader(images, batch_size=9, image_size=16))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_numbers_and_labels_are_tensors_of_whole_numbers(image_tree, workers):
    """A worker sends them as arrays, within its message."""
    images = read_split(image_tree, "train")
    sent = read_crops(images, [3, 12], lambda number, image: image, tolerated=0)
    assert isinstance(sent.index, np.ndarray) and isinstance(sent.label, np.ndarray)
    loaders = (
        loader(images, num_workers=workers).epoch(1),
        EvalLoader(images, image_size=16, batch_size=4, num_workers=workers),
    )
    for batches in loaders:
        batch = next(iter(batches))
        assert batch.index.dtype == batch.label.dtype == torch.int64
        assert torch.equal(batch.label, torch.from_numpy(images.labels)[batch.index])
