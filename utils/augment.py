"""The strong and the weak view of an image, in a part for workers and a part for the device.

A worker decodes an image once and cuts random crops of it as uint8 (`decode`, `random_crops`). The
device does the rest for a whole batch (`strong_view`, `weak_view`): color, blur, flip, normalize.
Every random number comes from `uniforms`, a hash of (seed, epoch, image index, view, draw): no
generator has a state, so views do not depend on workers, processes, the device, or on resuming.

The strong view is MoCo v2's (arXiv 2003.04297), which CMSF keeps. Unlike the published code, which
rounds to 8 bits after each operation, color and blur are float32, and the blur is a true Gaussian.
"""

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from itertools import permutations
from os import PathLike
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.streams import upload

CROP_ATTEMPTS = 10
_LONGEST = 64  # times the shorter side: what `center_crop` resizes at most


class Draw(IntEnum):
    """What each of a view's NUM_DRAWS uniform numbers decides."""

    CROP = 0  # CROP_ATTEMPTS pairs: the area, the aspect ratio
    TOP = 2 * CROP_ATTEMPTS
    LEFT = TOP + 1
    FLIP = TOP + 2
    JITTER = TOP + 3  # is the color jitter applied?
    BRIGHTNESS = TOP + 4  # the four factors stand together, in the order of JITTER_LOW
    CONTRAST = TOP + 5
    SATURATION = TOP + 6
    HUE = TOP + 7
    ORDER = TOP + 8  # which of the 24 orders of the four operations
    GRAYSCALE = TOP + 9
    BLUR = TOP + 10
    SIGMA = TOP + 11


NUM_DRAWS = Draw.SIGMA + 1

JITTER_PROBABILITY = 0.8
JITTER_LOW = np.array([0.6, 0.6, 0.6, -0.1])  # brightness, contrast, saturation, hue
JITTER_HIGH = np.array([1.4, 1.4, 1.4, 0.1])
JITTER_ORDERS = np.array(list(permutations(range(4))))  # (24, 4)
GRAYSCALE_PROBABILITY = 0.2
BLUR_PROBABILITY = 0.5
BLUR_SIGMA = (0.1, 2.0)
BLUR_RADIUS = 10  # five of the largest sigma
FLIP_PROBABILITY = 0.5
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_CPU_CHUNK = 8 * 224**2  # pixels of images whose float32 copies and temporaries stay in the cache
_CPU_ALONE = 128**2  # pixels from which an image is worth calls of its own
_CPU_BAND = 32  # rows of the image that one matrix product of the blur yields


def uniforms(seed: int, epoch: int, index: np.ndarray | Tensor, *, views: int = 2) -> np.ndarray:
    """All random numbers of the views of some images, as a pure function of its arguments.

    Each view reads NUM_DRAWS numbers of its own splitmix64 stream (Steele, Lea, Flood, "Fast
    splittable pseudorandom number generators", 2014); the start of the stream is a chain of
    splitmix64 hashes over seed, epoch, image index and view.

    index: (B,) int64, the images' numbers in the data set. Returns (B, views, NUM_DRAWS) float64
    in [0, 1). What a number decides: `Draw`. Raises TypeError if index holds no integers.
    """
    index = np.asarray(index)
    if index.dtype.kind not in "iu":
        raise TypeError(f"index must hold integers, not {index.dtype}")
    key = _splitmix64(np.array([seed % 2**64], dtype=np.uint64))
    key = _splitmix64(key ^ np.uint64(epoch % 2**64))
    key = _splitmix64(key ^ index.astype(np.uint64))
    key = _splitmix64(key[:, None] ^ np.arange(views, dtype=np.uint64))
    bits = _splitmix64(key[..., None], NUM_DRAWS)
    return (bits >> np.uint64(11)) * 2.0**-53


def _splitmix64(state: np.ndarray, count: int = 1) -> np.ndarray:
    """The first `count` outputs of splitmix64 from uint64 states; broadcast over the last axis."""
    z = state + _GOLDEN_GAMMA * np.arange(1, count + 1, dtype=np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def decode(path: str | PathLike) -> Tensor:
    """The image file as RGB, (3, H, W) uint8; the first frame if it is animated.

    The memory lies as (H, W, 3), which is the layout that resizing is fast in. The EXIF
    orientation is ignored, as torchvision's ImageFolder does. Errors of PIL and of the operating
    system pass through: the caller knows what to say about the file.
    """
    with Image.open(path) as image:
        if image.mode == "I" or image.mode.startswith("I;16"):
            # 16-bit gray: PIL's own conversion clips at 255. The high byte, as for 16-bit color.
            gray = np.asarray(image).astype(np.int64).clip(0, 2**16 - 1) >> 8
            image = Image.fromarray(gray.astype(np.uint8))
        if image.mode != "RGB":
            image = image.convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def crop_box(
    draws: np.ndarray | Tensor,
    height: int,
    width: int,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """A random box (top, left, height, width) inside an image of height x width pixels.

    The geometry of torchvision's RandomResizedCrop: the share of the area uniform in scale, the
    aspect ratio log-uniform in ratio, ten attempts, then the largest central box of allowed ratio.
    draws: (NUM_DRAWS,) in [0, 1), one view's numbers.
    """
    draws = draws.tolist()
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(Draw.CROP, Draw.CROP + 2 * CROP_ATTEMPTS, 2):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[attempt])
        aspect = math.exp(log_low + (log_high - log_low) * draws[attempt + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(draws[Draw.TOP] * (height - h + 1))
            left = int(draws[Draw.LEFT] * (width - w + 1))
            return top, left, h, w
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image: Tensor, box: tuple[int, int, int, int], size: int) -> Tensor:
    """The box of an image, resized to (3, size, size) uint8; bilinear with antialiasing.

    image: (3, H, W) uint8. box: (top, left, height, width), inside the image. Within one gray
    level of torchvision's resized_crop.
    """
    top, left, height, width = box
    return _resize(image[:, top : top + height, left : left + width], (size, size))


def random_box(
    image: Tensor, draws: np.ndarray | Tensor, original: Sequence[int] | None = None, **limits
) -> tuple[int, int, int, int]:
    """`crop_box` in an image (3, H, W); limits: its scale and ratio.

    original: (height, width) that the image had before it was resized, if it was. The box is drawn
    in those, so that neither shares of the area nor aspect ratios change, and then scaled.
    """
    if original is None:
        return crop_box(draws, *image.shape[1:], **limits)
    box = np.array(crop_box(draws, *original, **limits))
    return tuple(scaled_boxes(box, np.array(original), image.shape[1:]).tolist())


def scaled_boxes(boxes: np.ndarray, originals: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Boxes in images as boxes in their resized pictures, to whole pixels and at least one.

    boxes: (..., 4) int64, top, left, height, width. originals: (..., 2), the images' heights and
    widths. size: (height, width) of the pictures.
    """
    ends = np.stack((boxes[..., :2], boxes[..., :2] + boxes[..., 2:]))
    first, last = np.rint(ends * np.array(size) / originals).astype(np.int64)
    first = np.minimum(first, np.array(size) - 1)
    return np.concatenate((first, np.maximum(last - first, 1)), -1)


class CropGroup(NamedTuple):
    """Crops of one kind: how many of an image, their side in pixels, the share of its area."""

    count: int
    size: int
    scale: tuple[float, float] = (0.2, 1.0)

    @property
    def numel(self) -> int:
        """Bytes of an image's crops."""
        return self.count * 3 * self.size**2


def random_crops(
    image: Tensor,
    draws: np.ndarray | Tensor,
    groups: Sequence[CropGroup],
    *,
    original: Sequence[int] | None = None,
) -> Tensor:
    """Random crops of an image, group after group, as one row of bytes; see `split_crops`.

    image: (3, H, W) uint8. draws: (V, NUM_DRAWS) in [0, 1), the image's row of `uniforms`, for the
    V crops of all groups. original: see `random_box`. ValueError if there are not V draws.
    """
    kinds = [group for group in groups for _ in range(group.count)]
    crops = torch.empty(sum(group.numel for group in groups), dtype=torch.uint8)
    parts = crops.split([3 * group.size**2 for group in kinds])
    for part, numbers, group in zip(parts, draws, kinds, strict=True):
        box = random_box(image, numbers, original, scale=group.scale)
        part.view(3, group.size, group.size).copy_(resized_crop(image, box, group.size))
    return crops


def split_crops(crops: Tensor, groups: Sequence[CropGroup]) -> list[Tensor]:
    """Rows of `random_crops` (B, bytes) as a tensor (B, count, 3, size, size) for each group."""
    parts = crops.split([group.numel for group in groups], dim=1)
    return [
        part.unflatten(1, (group.count, 3, group.size, group.size))
        for part, group in zip(parts, groups, strict=True)
    ]


def center_crop(image: Tensor, size: int) -> Tensor:
    """The evaluation view, (3, size, size) uint8: resize the shorter side, then cut the center.

    image: (3, H, W) uint8. The shorter side becomes size * 256 / 224. Within one gray level of
    torchvision's Resize and CenterCrop.
    """
    short, side = min(image.shape[1:]), round(size * 256 / 224)
    # A strip, as out of a damaged header, would grow to gigabytes: its ends are cut off before.
    for axis in (1, 2):
        if (length := image.shape[axis]) > _LONGEST * short:
            start = (length - _LONGEST * short) // 2
            image = image.narrow(axis, start, _LONGEST * short)
    height, width = image.shape[1:]
    image = _resize(image, (side * height // short, side * width // short))
    top, left = (round((length - size) / 2) for length in image.shape[1:])
    return image[:, top : top + size, left : left + size].contiguous()


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def strong_view(
    images: Tensor, draws: np.ndarray | Tensor, *, blur: float = BLUR_PROBABILITY
) -> Tensor:
    """Color jitter, grayscale, blur, flip and normalization, each image by its own draws.

    images: (B, 3, S, S) uint8, on any device. draws: (B, NUM_DRAWS) in [0, 1), on the CPU; which
    images are touched is decided there, so a GPU is never waited for. blur: its probability, 0 to
    1; sigma is in pixels, so the published 0.5 suits the published 224 pixels, not small images.
    Returns (B, 3, S, S) float32 on the images' device, normalized by ImageNet's mean and spread.
    Raises TypeError if images are not uint8, ValueError if the draws do not fit them.
    """
    return _render(images, draws, (_jitter_, _grayscale_, partial(_blur_, blur), _flip_))


def weak_view(images: Tensor, draws: np.ndarray | Tensor) -> Tensor:
    """Flip and normalization, each image by its own draws. In, out and errors: `strong_view`."""
    return _render(images, draws, (_flip_,))


def normalize(images: Tensor) -> Tensor:
    """Images (B, 3, S, S) uint8 as float32, normalized by ImageNet's mean and spread.

    Raises TypeError if images are not uint8.
    """
    return _render(images, np.empty((len(images), NUM_DRAWS)), ())


def _render(
    images: Tensor,
    draws: np.ndarray | Tensor,
    steps: Sequence[Callable[[Tensor, np.ndarray], None]],
) -> Tensor:
    """Float copies in [0, 1], changed in place by each step(copies, draws), then normalized."""
    draws = np.asarray(draws)
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, not {images.dtype}")
    if draws.shape != (len(images), NUM_DRAWS):
        raise ValueError(f"draws must be ({len(images)}, {NUM_DRAWS}), not {draws.shape}")
    views = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    mean, std = (
        _to_device(np.reshape(values, (3, 1, 1)), images.device)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    chunk = max(1, len(images))
    if images.device.type == "cpu":
        chunk = max(1, _CPU_CHUNK // max(1, images.shape[2] * images.shape[3]))
    with torch.autocast(images.device.type, enabled=False):  # the blur is a matrix product
        for start in range(0, len(images), chunk):
            rows = slice(start, start + chunk)
            x = views[rows].copy_(images[rows]).div_(255)
            for step in steps:
                step(x, draws[rows])
            x.sub_(mean).div_(std)
    return views


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A small array as a tensor there, floats as float32. Does not wait for a GPU's queue."""
    values = values.astype(np.float32) if values.dtype.kind == "f" else values
    return upload(torch.from_numpy(values), device)


def _apply_(
    x: Tensor, chosen: np.ndarray, operation: Callable[..., Tensor], *parameters: np.ndarray
) -> None:
    """Replace the chosen images of x (B, 3, S, S) by operation(copies of them, parameters).

    chosen: (B,) bool. parameters: (B,), those of the chosen images arrive as (n, 1, 1, 1).
    """
    if not chosen.any():
        return
    rows = _to_device(np.flatnonzero(chosen), x.device)
    values = (_to_device(p[chosen].reshape(-1, 1, 1, 1), x.device) for p in parameters)
    x.index_copy_(0, rows, operation(x.index_select(0, rows), *values))


def _jitter_(x: Tensor, draws: np.ndarray) -> None:
    """torchvision's ColorJitter(0.4, 0.4, 0.4, 0.1): four operations in an order of each image."""
    applied = draws[:, Draw.JITTER] < JITTER_PROBABILITY
    order = JITTER_ORDERS[(draws[:, Draw.ORDER] * len(JITTER_ORDERS)).astype(np.int64)]
    factors = JITTER_LOW + (JITTER_HIGH - JITTER_LOW) * draws[:, Draw.BRIGHTNESS : Draw.HUE + 1]
    operations = (_brightness, _contrast, _saturation, _hue)
    if x.device.type == "cpu" and x.shape[2] * x.shape[3] >= _CPU_ALONE:
        # One image at a time stays in the cache, and needs no copies.
        values = _to_device(factors, x.device)
        for row in np.flatnonzero(applied):
            for number in order[row]:
                operations[number](x[row : row + 1], values[row, number].view(1, 1, 1, 1))
        return
    for step in range(4):
        for number, operation in enumerate(operations):
            _apply_(x, applied & (order[:, step] == number), operation, factors[:, number])


def _grayscale_(x: Tensor, draws: np.ndarray) -> None:
    chosen = draws[:, Draw.GRAYSCALE] < GRAYSCALE_PROBABILITY
    _apply_(x, chosen, lambda x: _gray(x).expand_as(x))


def _blur_(probability: float, x: Tensor, draws: np.ndarray) -> None:
    sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * draws[:, Draw.SIGMA]
    _apply_(x, draws[:, Draw.BLUR] < probability, _gaussian_blur, sigma)


def _flip_(x: Tensor, draws: np.ndarray) -> None:
    _apply_(x, draws[:, Draw.FLIP] < FLIP_PROBABILITY, lambda x: x.flip(-1))


# Operations on (n, 3, S, S) float32 in [0, 1] with factors (n, 1, 1, 1). Those of the color jitter
# change x itself, which they return.


def _gray(x: Tensor) -> Tensor:
    """Luma, (n, 1, S, S)."""
    red, green, blue = x.split(1, dim=1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _gray(x.mean((2, 3), keepdim=True))
    return x.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    gray = _gray(x).mul_(1 - factor)
    return x.mul_(factor).add_(gray).clamp_(0, 1)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of the HSV hexagon by `shift` turns; value and saturation stay.

    Selecting by the largest channel is slow, so the hue comes from one formula: its distance from
    red in sixths of a turn is 1 + (G + B - R - min) / chroma, towards green where G > B.
    """
    red, green, blue = x.unbind(1)
    low = x.amin(1)
    chroma = x.amax(1).sub_(low)
    distance = (green + blue).sub_(red).sub_(low).div_(chroma.clamp_min(1e-6)).add_(1)
    hue = distance.copysign_(green - blue).div_(6).add_(shift[:, 0])
    # A channel is full within a sixth of a turn around its own hue and empty beyond a third.
    for channel, start in enumerate((2, 5 / 3, 4 / 3)):  # turns since pure red, green, blue
        torch.add(hue, start, out=x[:, channel])
    x.frac_().sub_(0.5).abs_().mul_(6).sub_(1).clamp_(0, 1)
    return x.mul_(chroma[:, None]).add_(low[:, None])


def _gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian of a sigma of its own for each image, edges reflected.

    Both passes are matrix products. Sigmas end at two pixels, so most of a full (S, S) matrix is
    zero: a CPU multiplies bands of rows, a GPU rather starts one big product.
    """
    size = x.shape[-1]
    radius = min(BLUR_RADIUS, size - 1)
    band = min(_CPU_BAND, size) if x.device.type == "cpu" else size
    row = torch.arange(band, device=x.device)[:, None]
    offset = torch.arange(-radius, band + radius, device=x.device) - row
    kernel = torch.exp(offset**2 / (-2 * sigma**2)) * (offset.abs() <= radius)
    kernel /= kernel.sum(-1, keepdim=True)  # (n, 1, band, band + 2 radius)
    x = F.pad(x, (radius, radius, radius, radius), mode="reflect")
    return _filter_rows(_filter_rows(x.mT, kernel).mT, kernel)


def _filter_rows(x: Tensor, kernel: Tensor) -> Tensor:
    """(n, 3, S + 2 radius, any) -> (n, 3, S, any), a band of rows at a time."""
    band, reach = kernel.shape[-2:]
    size = x.shape[-2] - (reach - band)
    bands = []
    for start in range(0, size, band):
        rows = min(band, size - start)
        near = rows + reach - band
        bands.append(kernel[..., :rows, :near] @ x[..., start : start + near, :])
    return torch.cat(bands, dim=-2)
