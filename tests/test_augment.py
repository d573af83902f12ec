"""utils/augment.py against torchvision's functions, one image at a time, and its distributions."""

import colorsys
import math
from itertools import permutations

import numpy as np
import pytest
import tiny
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from utils import augment
from utils.augment import (
    CROP_ATTEMPTS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    JITTER_HIGH,
    JITTER_LOW,
    JITTER_ORDERS,
    NUM_DRAWS,
    CropGroup,
    Draw,
    center_crop,
    crop_box,
    decode,
    normalize,
    random_crops,
    resized_crop,
    split_crops,
    strong_view,
    uniforms,
    weak_view,
)

FACTORS = (Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION, Draw.HUE)
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


def photo(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: a smooth colored field, some edges, a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 40
    waves = rng.uniform(0.2, 2.0, (3, 2)), rng.uniform(0, 6, 3)
    field = [np.sin(a * x + b * y + p) for (a, b), p in zip(*waves, strict=True)]
    pixels = 128 + 90 * np.stack(field, -1) + rng.normal(0, 6, (height, width, 1))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (200, 30, 60)
    return pixels.clip(0, 255).astype(np.uint8)


def unit(views: torch.Tensor) -> torch.Tensor:
    """Normalized views back in [0, 1]."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return views * std + mean


def ks(a: np.ndarray, b: np.ndarray) -> float:
    """The two-sample Kolmogorov-Smirnov distance, in units in which 1.95 has probability 0.001."""
    at = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(s), at, side="right") / len(s) for s in (a, b)]
    return np.abs(below[0] - below[1]).max() / math.sqrt(1 / len(a) + 1 / len(b))


# The hash


def splitmix64(state: int) -> int:
    """One output of the generator, in plain integers."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_splitmix64_gives_the_published_numbers():
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    state = np.array([1234567], dtype=np.uint64)
    assert augment._splitmix64(state, 5).tolist() == published
    assert splitmix64(1234567) == published[0]


@pytest.mark.parametrize(
    "seed, epoch, index, view", [(0, 0, 0, 0), (7, 3, 1281166, 1), (-1, 9, 2, 2)]
)
def test_uniforms_are_a_chain_of_hashes(seed, epoch, index, view):
    key = splitmix64(seed % 2**64)
    for counter in (epoch, index, view):
        key = splitmix64(key ^ counter)
    expected = [
        (splitmix64((key + draw * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53
        for draw in range(NUM_DRAWS)
    ]
    assert uniforms(seed, epoch, np.array([5, index]), views=3)[1, view].tolist() == expected


def test_uniforms_do_not_change_between_versions():
    # A resumed run must see the views it would have seen.
    draws = uniforms(42, 7, np.array([0, 99]))
    assert draws.shape == (2, 2, 32) and draws.dtype == np.float64
    pins = [draws[0, 0, 0], draws[0, 1, 31], draws[1, 0, 20], draws[1, 1, 5]]
    assert pins == [0.27075047714466915, 0.7577564545644979, 0.7817499537493353, 0.629993787313188]


def test_uniforms_depend_on_the_image_alone():
    whole = uniforms(1, 2, np.arange(100))
    some = torch.tensor([17, 3, 99])
    assert np.array_equal(uniforms(1, 2, some), whole[some.numpy()])
    assert np.array_equal(uniforms(1, 2, some, views=1), whole[some.numpy(), :1])
    assert np.array_equal(uniforms(1 + 2**64, 2, some), whole[some.numpy()])


def test_uniforms_refuse_numbers_that_are_no_counters():
    with pytest.raises(TypeError, match="float64"):
        uniforms(0, 0, np.array([0.5]))


def test_uniforms_are_uniform():
    draws = uniforms(0, 0, np.arange(4000))
    assert draws.min() >= 0 and draws.max() < 1
    grid = (np.arange(100_000) + 0.5) / 100_000
    assert ks(draws.ravel(), grid) < 2.2
    for draw in range(NUM_DRAWS):
        assert ks(draws[:, :, draw].ravel(), grid) < 2.5
    bits = (draws * 2**53).astype(np.int64)
    for bit in range(53):
        ones = (bits >> bit & 1).mean()
        assert abs(ones - 0.5) * 2 * math.sqrt(bits.size) < 4.5


def test_uniforms_of_neighboring_counters_are_unrelated():
    index = np.arange(2000)
    base = uniforms(5, 10, index)
    others = {
        "seed": uniforms(6, 10, index),
        "epoch": uniforms(5, 11, index),
        "seed and epoch swapped": uniforms(10, 5, index),
        "index": uniforms(5, 10, index + 1),
        "far index": uniforms(5, 10, index + 2**20),
        "view": base[:, ::-1],
        "draw": np.roll(base, 1, axis=2),
    }
    for name, other in others.items():
        a, b = base - 0.5, other - 0.5
        correlation = 12 * (a * b).mean()
        # Squares too: two streams may be dependent and yet uncorrelated.
        of_squares = 180 * ((a**2 - 1 / 12) * (b**2 - 1 / 12)).mean()
        assert abs(correlation) * math.sqrt(a.size / 2) < 4, name
        assert abs(of_squares) * math.sqrt(a.size / 2) < 4, name
    apart = np.stack([base, *(others[name] for name in ("seed", "epoch", "far index"))])
    assert len(np.unique(apart)) == apart.size
    pairs = np.corrcoef(base.reshape(len(index), -1), rowvar=False)
    assert np.abs(pairs - np.eye(len(pairs))).max() * math.sqrt(len(index)) < 5


# Decoding


def test_decode_keeps_rgb_as_it_is(tmp_path):
    Image.fromarray(photo(33, 50)).save(tmp_path / "a.jpg", quality=90)
    image = decode(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as opened:
        expected = np.array(opened)
    assert image.dtype == torch.uint8 and image.shape == (3, 33, 50)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert image.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("mode, suffix", [
    ("L", "jpg"), ("L", "png"), ("CMYK", "jpg"), ("CMYK", "tiff"), ("P", "png"), ("P", "gif"),
    ("RGBA", "png"), ("LA", "png"), ("1", "png"), ("RGB", "webp"), ("YCbCr", "jpg"),
])  # fmt: skip
def test_decode_makes_rgb_of_other_modes(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(photo(20, 30)).convert(mode).save(path)
    with Image.open(path) as opened:
        expected = np.array(opened.convert("RGB"))
    assert np.array_equal(decode(path).permute(1, 2, 0).numpy(), expected)
    assert expected.std() > 10


def test_decode_ignores_transparency_of_palettes(tmp_path):
    image = Image.fromarray(photo(20, 30)).convert("P")
    image.save(tmp_path / "a.png", transparency=3)
    assert np.array_equal(decode(tmp_path / "a.png").permute(1, 2, 0), image.convert("RGB"))


@pytest.mark.parametrize("kind", ["png", "little tiff", "big tiff", "pgm"])
def test_decode_scales_16_bits_to_8(tmp_path, kind):
    gray = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(40, 30)
    path = tmp_path / f"a.{kind.split()[-1]}"
    if kind == "pgm":
        path.write_bytes(b"P5 30 40 65535\n" + gray.astype(">u2").tobytes())
    elif kind == "big tiff":
        Image.frombytes("I;16B", (30, 40), gray.astype(">u2").tobytes()).save(path)
    else:
        Image.fromarray(gray).save(path)
    with Image.open(path) as opened:
        assert opened.mode.startswith("I")
    image = decode(path)
    assert image.shape == (3, 40, 30)
    assert np.abs(image.numpy() - gray / 65535 * 255).max() <= 1
    assert image.min() == 0 and image.max() == 255


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_decode_takes_the_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "lime", "blue")]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    image = decode(path)
    assert image.shape == (3, 20, 30)
    assert image[:, 10, 10].tolist() == [255, 0, 0]


def test_decode_ignores_the_orientation_tag(tmp_path):
    image = Image.fromarray(photo(20, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert decode(tmp_path / "a.jpg").shape == (3, 20, 30)


def test_decode_lets_errors_pass(tmp_path):
    Image.fromarray(photo(200, 300)).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("half.jpg", "empty.jpg"):
        with pytest.raises(OSError):
            decode(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "none.jpg")


# Cropping

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


@pytest.mark.parametrize("height, width", [(375, 500), (500, 333), (64, 64), (100, 230), (9, 7)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width):
    count = 3000
    draws = uniforms(3, 0, np.arange(count), views=1)[:, 0]
    ours = np.array([crop_box(d, height, width) for d in draws])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = [T.RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(count)]
    for a, b in zip(measures(ours), measures(np.array(theirs)), strict=True):
        assert ks(a, b) < 2.2
    top, left, h, w = ours.T
    assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def measures(boxes: np.ndarray) -> list[np.ndarray]:
    top, left, h, w = boxes.T.astype(float)
    return [top, left, h, w, h * w, w / h, top + h / 2 + left + w / 2]


@pytest.mark.parametrize(
    "height, width", [(30, 400), (400, 30), (32, 400), (400, 32), (1, 500), (500, 1), (1, 1)]
)
def test_crop_boxes_of_elongated_images_are_the_central_ones(height, width):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    expected = {T.RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(100)}
    draws = uniforms(0, 0, np.arange(100), views=1)[:, 0]
    assert {crop_box(d, height, width) for d in draws} == expected


def test_crop_box_tries_ten_times():
    draws = np.full(NUM_DRAWS, 0.999)  # the whole area at ratio 4/3 does not fit a square
    central = crop_box(draws, 100, 100)
    assert central == (0, 0, 100, 100)
    last = 2 * (CROP_ATTEMPTS - 1)
    draws[last : last + 2] = 0.0, 0.5  # 20% of the area, square
    draws[[Draw.TOP, Draw.LEFT]] = 0.0, 0.999
    assert crop_box(draws, 100, 100) == (0, 55, 45, 45)
    assert crop_box(torch.from_numpy(draws), 100, 100) == (0, 55, 45, 45)


def test_crop_box_reaches_both_edges_and_takes_other_limits():
    draws = np.full(NUM_DRAWS, 0.5)
    draws[[Draw.TOP, Draw.LEFT]] = 1 - 2**-53
    top, left, h, w = crop_box(draws, 80, 60, scale=(0.25, 0.25), ratio=(1.0, 1.0))
    assert (h, w) == (35, 35) and (top + h, left + w) == (80, 60)


@pytest.mark.parametrize("size", [32, 96, 224])
def test_resized_crop_is_torchvisions_within_one_gray_level(size):
    pixels = photo(150, 200)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    boxes = [crop_box(d, 150, 200) for d in uniforms(0, 0, np.arange(20), views=1)[:, 0]]
    for box in [*boxes, (0, 0, 150, 200), (149, 199, 1, 1), (0, 5, 150, 1), (7, 0, 1, 200)]:
        ours = resized_crop(image, box, size)
        assert ours.dtype == torch.uint8 and ours.shape == (3, size, size)
        as_pil = TF.pil_to_tensor(TF.resized_crop(Image.fromarray(pixels), *box, [size, size]))
        as_tensor = TF.resized_crop(image.contiguous(), *box, [size, size], antialias=True)
        for theirs in (as_pil, as_tensor):
            assert (ours.int() - theirs.int()).abs().max() <= 1


def test_random_crops_are_crops():
    """Each of its own size, from a box of its own share of the area."""
    image = torch.from_numpy(photo(90, 120)).permute(2, 0, 1)
    draws = uniforms(1, 1, np.array([7]), views=5)[0]
    groups = [CropGroup(2, 48), CropGroup(3, 16, (0.05, 0.2))]
    crops = random_crops(image, draws, groups)
    assert crops.dtype == torch.uint8 and crops.shape == (2 * 3 * 48**2 + 3 * 3 * 16**2,)
    large, small = (part[0] for part in split_crops(crops[None], groups))
    assert large.shape == (2, 3, 48, 48) and small.shape == (3, 3, 16, 16)
    for crop, numbers in zip(large, draws[:2], strict=True):
        assert torch.equal(crop, resized_crop(image, crop_box(numbers, 90, 120), 48))
    for crop, numbers in zip(small, draws[2:], strict=True):
        box = crop_box(numbers, 90, 120, scale=(0.05, 0.2))
        assert 0.04 < box[2] * box[3] / (90 * 120) < 0.21
        assert torch.equal(crop, resized_crop(image, box, 16))
    assert not torch.equal(large[0], large[1])
    assert torch.equal(crops, random_crops(image, torch.from_numpy(draws), groups))
    with pytest.raises(ValueError):
        random_crops(image, draws[:4], groups)


@pytest.mark.parametrize("size", [224, 32, 7])
@pytest.mark.parametrize("height, width", [(150, 200), (201, 150), (64, 64), (33, 150)])
def test_center_crop_is_torchvisions_within_one_gray_level(size, height, width):
    pixels = photo(height, width)
    reference = T.Compose([T.Resize(round(size * 256 / 224)), T.CenterCrop(size), T.PILToTensor()])
    ours = center_crop(torch.from_numpy(pixels).permute(2, 0, 1), size)
    assert ours.shape == (3, size, size) and ours.dtype == torch.uint8 and ours.is_contiguous()
    assert (ours.int() - reference(Image.fromarray(pixels)).int()).abs().max() <= 1


# The device part, one operation at a time

TOLERANCE = 2e-6  # of values in [0, 1], float32; a blur's 42 summands and HSV get ten times that


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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


def random_draws(count: int, *used: Draw) -> np.ndarray:
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
    draws = random_draws(count, FACTORS[number])
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
        views = strong_view(picture, random_draws(count, *used))
        share = ((views - plain).abs().amax((1, 2, 3)) > 1e-5).float().mean().item()
        spread = math.sqrt(probability * (1 - probability) / count)
        assert abs(share - probability) < 4 * spread, used


def test_sigmas_are_distributed_as_torchvisions():
    count, size = 3000, 23
    draws = random_draws(count, Draw.SIGMA)
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
    picture = Image.fromarray(photo(120, 160))
    strong = [
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(0.2),
        T.RandomApply([T.GaussianBlur(21, (0.1, 2.0))], p=0.5),
    ]
    reference = T.Compose([
        T.RandomResizedCrop(size, scale=SCALE),
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
