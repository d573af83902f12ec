"""The views against torchvision's functions, one image at a time, and its distributions."""

import colorsys
import math
from itertools import permutations

import numpy as np
import pytest
import tiny
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from oracles import ks
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from utils.data import augment
from utils.data.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    JITTER_HIGH,
    JITTER_LOW,
    JITTER_ORDERS,
    normalize,
    strong_view,
    weak_view,
)
from utils.data.random_draws import NUM_DRAWS, Draw, uniforms

FACTORS = (Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION, Draw.HUE)
TOLERANCE = 2e-6  # of values in [0, 1], float32; a blur's 42 summands and HSV get ten times that
NOTHING = 0.999  # as the draw of a choice: the operation is left out


def neutral(count: int) -> np.ndarray:
    """Draws (count, NUM_DRAWS) that leave every image as it is."""
    draws = np.full((count, NUM_DRAWS), 0.5)
    draws[:, [Draw.JITTER, Draw.GRAYSCALE, Draw.BLUR, Draw.FLIP]] = NOTHING
    return draws


def pictures(count: int, size: int, *, seed: int = 0) -> torch.Tensor:
    """(count, 3, size, size) uint8: noise, with some saturated, gray and black pixels."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 3, size, size))
    images[..., 0:3] = rng.choice([0, 255], (count, 3, size, 3))
    images[..., 3:6] = rng.integers(0, 256, (count, 1, size, 3))
    images[..., 6] = 0
    return torch.from_numpy(images.astype(np.uint8))


def unit(views: torch.Tensor) -> torch.Tensor:
    """Normalized views back in [0, 1]."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return views * std + mean


def factor_of(draws: np.ndarray, number: int) -> np.ndarray:
    return JITTER_LOW[number] + (JITTER_HIGH - JITTER_LOW)[number] * draws[:, FACTORS[number]]


@pytest.mark.parametrize("number, name, tolerance", [
    (0, "brightness", TOLERANCE), (1, "contrast", TOLERANCE), (2, "saturation", TOLERANCE),
    (3, "hue", 10 * TOLERANCE),
])  # fmt: skip
def test_jitter_operation_is_torchvisions(number, name, tolerance):
    images, draws = pictures(17, 24), neutral(17)
    draws[:, Draw.JITTER] = 0.0
    draws[:, FACTORS[number]] = np.linspace(0, 0.999, 17)
    views = unit(strong_view(images, draws))
    reference = getattr(TF, f"adjust_{name}")
    for view, image, factor in zip(views, images, factor_of(draws, number), strict=True):
        expected = reference(image / 255, factor)
        torch.testing.assert_close(view, expected, rtol=0, atol=tolerance)
    assert (views[0] - views[-1]).abs().max() > 0.1


def test_hue_turns_by_any_angle():
    corners = torch.tensor([[(n >> c) & 1 for n in range(8)] for c in range(3)]).view(3, 8, 1)
    x = torch.stack([corners.expand(3, 8, 8), torch.rand(3, 8, 8), torch.rand(3, 8, 8) * 1e-3])
    for shift in np.linspace(-0.5, 0.5, 21):
        turned = augment._hue(x.clone(), torch.full((3, 1, 1, 1), shift))
        expected = TF.adjust_hue(x, shift)
        torch.testing.assert_close(turned, expected, rtol=0, atol=10 * TOLERANCE)


def test_grayscale_is_torchvisions():
    images, draws = pictures(5, 24), neutral(5)
    draws[::2, Draw.GRAYSCALE] = 0.0
    views = unit(strong_view(images, draws))
    for number, (view, image) in enumerate(zip(views, images / 255, strict=True)):
        expected = image if number % 2 else TF.rgb_to_grayscale(image, 3)
        torch.testing.assert_close(view, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", [7, 11, 12, 31, 32, 33, 70])
def test_blur_is_torchvisions(size):
    images, draws = pictures(12, size), neutral(12)
    draws[:, Draw.BLUR] = 0.0
    draws[:, Draw.SIGMA] = np.linspace(0, 0.999, 12)
    views = unit(strong_view(images, draws))
    kernel = min(33, 2 * size - 1)
    for view, image, sigma in zip(views, images, 0.1 + 1.9 * draws[:, Draw.SIGMA], strict=True):
        expected = TF.gaussian_blur(image / 255, [kernel, kernel], [sigma, sigma])
        torch.testing.assert_close(view, expected, rtol=0, atol=10 * TOLERANCE)


def test_blur_of_a_tiny_image_keeps_its_mean():
    draws = neutral(2)
    draws[:, [Draw.BLUR, Draw.SIGMA]] = 0.0, 0.999
    for size in (1, 2, 5):
        views = unit(strong_view(torch.full((2, 3, size, size), 77, dtype=torch.uint8), draws))
        torch.testing.assert_close(views, torch.full_like(views, 77 / 255))


@pytest.mark.parametrize("render", [strong_view, weak_view])
def test_flip_is_torchvisions(render):
    images, draws = pictures(5, 24), neutral(5)
    draws[::2, Draw.FLIP] = 0.0
    for number, view in enumerate(unit(render(images, draws))):
        expected = images[number] if number % 2 else TF.hflip(images[number])
        torch.testing.assert_close(view, expected / 255, rtol=0, atol=TOLERANCE)


def test_normalize_is_torchvisions():
    images = pictures(9, 24)
    reference = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (normalize(images) - reference(images / 255)).abs().max() < 1e-6
    assert torch.equal(normalize(images), weak_view(images, neutral(9)))
    assert torch.equal(normalize(images), strong_view(images, neutral(9)))
    assert normalize(images).is_contiguous() and normalize(images[:0]).shape == (0, 3, 24, 24)


def test_weak_view_only_flips():
    images, draws = pictures(40, 16), uniforms(0, 0, np.arange(40))[:, 1]
    views = unit(weak_view(images, torch.from_numpy(draws)))
    for view, image, draw in zip(views, images, draws, strict=True):
        expected = TF.hflip(image) if draw[Draw.FLIP] < 0.5 else image
        torch.testing.assert_close(view, expected / 255, rtol=0, atol=TOLERANCE)


def one_strong_view(image: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    """The strong view of one image (3, S, S) uint8 by torchvision's functions in turn."""
    image = image / 255
    operations = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    if draws[Draw.JITTER] < 0.8:
        for number in JITTER_ORDERS[math.floor(draws[Draw.ORDER] * 24)]:
            low, high = ((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1))[number]
            image = operations[number](image, low + (high - low) * draws[FACTORS[number]])
    if draws[Draw.GRAYSCALE] < 0.2:
        image = TF.rgb_to_grayscale(image, 3)
    if draws[Draw.BLUR] < 0.5:
        image = TF.gaussian_blur(image, [25, 25], [0.1 + 1.9 * draws[Draw.SIGMA]] * 2)
    if draws[Draw.FLIP] < 0.5:
        image = TF.hflip(image)
    return TF.normalize(image, IMAGENET_MEAN, IMAGENET_STD)


def test_strong_view_is_torchvisions_one_image_at_a_time():
    images, draws = pictures(61, 40), uniforms(0, 0, np.arange(61))[:, 0]
    before = images.clone()
    views = strong_view(images, draws)
    assert views.dtype == torch.float32 and views.shape == images.shape and views.is_contiguous()
    for view, image, numbers in zip(views, images, draws, strict=True):
        torch.testing.assert_close(view, one_strong_view(image, numbers), rtol=0, atol=2e-4)
    assert torch.equal(images, before)
    assert torch.equal(views, strong_view(images, torch.from_numpy(draws)))


def test_every_order_of_the_jitter_happens_equally_often():
    # Strong factors on colors that saturate: there the operations do not commute.
    image, draws = pictures(1, 16), neutral(240)
    draws[:, Draw.JITTER] = 0.0
    draws[:, FACTORS] = 0.999
    draws[:, Draw.ORDER] = (np.arange(240) + 0.5) / 240
    views = unit(strong_view(image.expand(240, -1, -1, -1), draws))
    operations = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    references = []
    for order in permutations(range(4)):
        x = image[0] / 255
        for number in order:
            x = operations[number](x, factor_of(draws, number)[0])
        references.append(x)
    references = torch.stack(references).flatten(1)
    assert torch.pdist(references, p=math.inf).min() > 1e-3  # all 24 differ
    distance, order = torch.cdist(views.flatten(1), references, p=math.inf).min(1)
    assert distance.max() < 5e-5
    assert torch.bincount(order, minlength=24).tolist() == [10] * 24


def test_result_does_not_depend_on_batch_chunk_or_band(monkeypatch):
    images, draws = pictures(21, 70), uniforms(0, 0, np.arange(21))[:, 0]
    views = strong_view(images, draws)
    alone = torch.cat([strong_view(images[i : i + 1], draws[i : i + 1]) for i in range(21)])
    torch.testing.assert_close(views, alone, rtol=0, atol=1e-5)
    for chunk, alone_from in ((1, 10**9), (2 * 70**2, 0), (2 * 70**2, 10**9)):
        monkeypatch.setattr(augment, "_CPU_CHUNK", chunk)
        monkeypatch.setattr(augment, "_CPU_ALONE", alone_from)
        torch.testing.assert_close(views, strong_view(images, draws), rtol=0, atol=1e-5)
    monkeypatch.setattr(augment, "_CPU_CHUNK", 10**9)  # as on a GPU
    monkeypatch.setattr(augment, "_CPU_BAND", 1000)
    torch.testing.assert_close(views, strong_view(images, draws), rtol=0, atol=1e-5)


def test_views_are_float32_under_autocast():
    images, draws = pictures(8, 40), uniforms(0, 0, np.arange(8))[:, 0]
    with torch.autocast("cpu", torch.bfloat16):
        views = strong_view(images, draws)
    assert torch.equal(views, strong_view(images, draws))


class Recorder(TorchDispatchMode):
    """Notes the name of every operation that tensors go through."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_no_step_reads_values_back_and_their_number_does_not_grow(monkeypatch):
    monkeypatch.setattr(augment, "_CPU_CHUNK", 10**9)  # as on a GPU
    monkeypatch.setattr(augment, "_CPU_BAND", 1000)
    numbers = []
    for count in (100, 200):
        images, draws = pictures(count, 16), uniforms(0, 0, np.arange(count))[:, 0]
        with Recorder() as recorder:
            strong_view(images, draws)
        # What would make the host wait for a GPU: a value, or a result whose size is a value.
        waits = {"_local_scalar_dense", "nonzero", "masked_select", "index", "equal", "unique"}
        assert not waits & set(recorder.names)
        numbers.append(len(recorder.names))
    assert numbers[0] == numbers[1]
    with Recorder() as recorder:
        images.sum().item()
    assert waits & set(recorder.names)  # the recorder sees them


def test_wrong_input_is_refused():
    images, draws = pictures(3, 16), neutral(3)
    with pytest.raises(TypeError, match="float32"):
        strong_view(images / 255, draws)
    with pytest.raises(ValueError, match=r"\(3, 32\)"):
        weak_view(images, draws[:2])
    with pytest.raises(ValueError, match=r"\(3, 32\)"):
        weak_view(images, draws[:, None])


@pytest.mark.gpu
def test_gpu_gives_what_the_cpu_gives_and_is_never_waited_for():
    images, draws = pictures(64, 96), uniforms(0, 0, np.arange(64))[:, 0]
    on_gpu = images.cuda()
    strong_view(on_gpu, draws)  # the first call may load libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        strong, weak, plain = (
            strong_view(on_gpu, draws),
            weak_view(on_gpu, draws),
            normalize(on_gpu),
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(strong.cpu(), strong_view(images, draws), rtol=0, atol=1e-4)
    torch.testing.assert_close(weak.cpu(), weak_view(images, draws), rtol=0, atol=1e-5)
    torch.testing.assert_close(plain.cpu(), normalize(images), rtol=0, atol=1e-5)


# Distributions: factors, probabilities and sigmas as they show in the pixels


def some_draws(count: int, *used: Draw) -> np.ndarray:
    """Real draws for the used numbers, everything else neutral."""
    draws = neutral(count)
    draws[:, used] = uniforms(11, 0, np.arange(count), views=1)[:, 0, used]
    return draws


def flat(colors: list[tuple[int, int, int]], size: int = 4) -> torch.Tensor:
    """(3, size, size) uint8: vertical stripes of the colors."""
    stripes = torch.tensor(colors, dtype=torch.uint8).T[:, None]
    return stripes.repeat_interleave(size // len(colors), -1).expand(3, size, size)


def shown_factor(number: int, views: torch.Tensor) -> np.ndarray:
    """The factor of a jitter operation, read off the views of one striped image."""
    left, right = views[:, :, 0, 0], views[:, :, 0, -1]
    if number == 0:
        return (left[:, 0] * 255 / 100).numpy()
    if number == 1:
        return ((right - left)[:, 0] * 255 / 60).numpy()
    if number == 2:
        return ((left[:, 0] - left[:, 2]) * 255 / 60).numpy()
    return np.array([(colorsys.rgb_to_hsv(*x)[0] - 0.25 + 0.5) % 1 - 0.5 for x in left.tolist()])


STRIPES = ([(100,) * 3] * 2, [(100,) * 3, (160,) * 3], [(150, 110, 90)] * 2, [(120, 160, 80)] * 2)


@pytest.mark.parametrize("number", range(4))
def test_jitter_factors_are_distributed_as_torchvisions(number):
    count = 3000
    draws = some_draws(count, FACTORS[number])
    draws[:, Draw.JITTER] = 0.0
    views = unit(strong_view(flat(STRIPES[number]).expand(count, -1, -1, -1), draws))
    torch.manual_seed(0)
    jitter = T.ColorJitter(0.4, 0.4, 0.4, 0.1)
    limits = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    theirs = [T.ColorJitter.get_params(*limits)[1 + number] for _ in range(count)]
    assert ks(shown_factor(number, views), np.array(theirs)) < 2.2


def test_every_step_happens_as_often_as_it_should():
    count = 10_000
    picture = flat([(200, 60, 20), (20, 90, 160)]).expand(count, -1, -1, -1)
    plain = normalize(picture)
    steps = {
        (Draw.JITTER, Draw.BRIGHTNESS): 0.8,
        (Draw.GRAYSCALE,): 0.2,
        (Draw.BLUR,): 0.5,
        (Draw.FLIP,): 0.5,
    }
    for used, probability in steps.items():
        views = strong_view(picture, some_draws(count, *used))
        share = ((views - plain).abs().amax((1, 2, 3)) > 1e-5).float().mean().item()
        spread = math.sqrt(probability * (1 - probability) / count)
        assert abs(share - probability) < 4 * spread, used


def test_sigmas_are_distributed_as_torchvisions():
    count, size = 3000, 23
    draws = some_draws(count, Draw.SIGMA)
    draws[:, Draw.BLUR] = 0.0
    point = torch.zeros(count, 3, size, size, dtype=torch.uint8)
    point[:, :, size // 2, size // 2] = 255
    row = unit(strong_view(point, draws))[:, 0, size // 2].double().numpy()
    # Neighbor / center of a blurred point is exp(-1 / (2 sigma^2)), too small to see below 0.4.
    ratio = (row[:, size // 2 + 1] / row[:, size // 2]).clip(1e-4, None)
    ours = np.sqrt(-0.5 / np.log(ratio))
    torch.manual_seed(0)
    theirs = np.array([T.GaussianBlur.get_params(0.1, 2.0) for _ in range(count)])
    assert ks(ours.clip(0.4, None), theirs.clip(0.4, None)) < 2.2
    assert 1.99 < ours.max() < 2.001


def statistics(views: torch.Tensor) -> np.ndarray:
    """(n, 8) of (n, 3, S, S): each channel's mean and std, colorfulness, sharpness."""
    edges = views.diff(dim=-1).abs().mean((1, 2, 3))
    color = views.std(1).mean((1, 2))
    return torch.cat([views.mean((2, 3)), views.std((2, 3)), torch.stack([color, edges], 1)], 1)


@pytest.mark.parametrize("kind", ["strong", "weak"])
def test_views_of_a_picture_are_distributed_as_torchvisions(kind):
    count, size = 400, 48
    picture = Image.fromarray(tiny.photo(120, 160))
    strong = [
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(0.2),
        T.RandomApply([T.GaussianBlur(21, (0.1, 2.0))], p=0.5),
    ]
    reference = T.Compose([
        T.RandomResizedCrop(size, scale=(0.2, 1.0)),
        *(strong if kind == "strong" else []),
        T.RandomHorizontalFlip(),
        T.ToTensor(),
        T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])  # fmt: skip
    torch.manual_seed(0)
    theirs = statistics(torch.stack([reference(picture) for _ in range(count)])).numpy()
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    draws = uniforms(0, 0, np.arange(count // 2))
    crops = torch.cat([tiny.two_crops(image, d, size) for d in draws])
    render = strong_view if kind == "strong" else weak_view
    ours = statistics(render(crops, draws.reshape(count, NUM_DRAWS))).numpy()
    spread = np.sqrt((ours.var(0) + theirs.var(0)) / count)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 3.5 * spread).all()
    assert np.abs(np.log(ours.std(0) / theirs.std(0))).max() < 0.2
    for a, b in zip(ours.T, theirs.T, strict=True):
        assert ks(a, b) < 2.2
