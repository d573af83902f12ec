"""The part of a view that workers make: an image decoded once, and crops of it as uint8."""

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.data.random_draws import CROP_ATTEMPTS, Draw

_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
# TIFF tags, by their numbers.
_BITS_TAG, _FORMAT_TAG = 258, 339
_LOWEST_TAGS, _HIGHEST_TAGS = (340, 280), (341, 281)
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose gray levels in mode I are of 16 bits
_LONGEST = 64  # times the shorter side: what `center_crop` resizes at most


def decode(path: str | PathLike) -> Tensor:
    """The image file as RGB, (3, H, W) uint8; the first frame if it is animated.

    The memory lies as (H, W, 3), which is the layout that resizing is fast in. What is transparent
    shows white. Gray levels of more than 8 bits and of floats are scaled as `_gray_levels` says.
    The EXIF orientation is ignored, as torchvision's ImageFolder does. Errors of PIL and of the
    operating system pass through, and ValueError for gray levels of an unknown range: the caller
    knows what to say about the file.
    """
    with Image.open(path) as image:
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = Image.fromarray(_gray_levels(image))
        if image.mode in _TRANSPARENT or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode != "RGB":
            image = image.convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _gray_levels(image: Image.Image) -> np.ndarray:
    """A gray picture of integers of more than 8 bits or of floats, (H, W) uint8, on white.

    The range that becomes 0 to 255 is the one that the file states (the TIFF tags Max- and
    MinSampleValue, SMax- and SMinSampleValue), or else that of the integers if they have up to 16
    bits, and 0 to 1 for floats. ValueError where that is not it: 32-bit integers whose range no tag
    tells, levels outside of it, or not finite. (Pillow's own conversion clips at 0 and 255.)
    """
    levels = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    low, high = (
        next((_first(tags[number]) for number in numbers if number in tags), None)
        for numbers in (_LOWEST_TAGS, _HIGHEST_TAGS)
    )
    if high is None:
        low, high = _range_of_kind(image, tags)
    low = low or 0
    if not (math.isfinite(low) and math.isfinite(high) and high > low):
        raise ValueError(f"its tags tell gray levels from {low} to {high}")
    if not np.isfinite(levels).all() or levels.min() < low or levels.max() > high:
        found = f"{levels.min():g} to {levels.max():g}"
        raise ValueError(f"its gray levels are {found}, beyond {low:g} to {high:g}")
    if (low, high) == (0, 2**16 - 1):
        scaled = (levels >> 8).astype(np.uint8)  # the high byte, as for 16-bit color
    else:
        scaled = np.rint((levels.astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)
    if "transparency" in image.info:  # of a PNG: the one level that is transparent
        scaled[levels == image.info["transparency"]] = 255
    return scaled


def _first(value: Sequence[float] | float) -> float:
    return value[0] if isinstance(value, Sequence) else value


def _range_of_kind(image: Image.Image, tags: Mapping) -> tuple[float, float]:
    """Lowest and highest gray level of the kind of numbers that a file holds."""
    if image.mode == "F":
        return 0, 1
    bits = 16 if image.mode.startswith("I;16") or image.format in _SIXTEEN_BITS else 32
    bits = _first(tags.get(_BITS_TAG, bits))
    if bits > 16:
        raise ValueError(f"its {bits}-bit gray levels have no range (no tag MaxSampleValue)")
    signed = _first(tags.get(_FORMAT_TAG, 1)) == 2
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


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
