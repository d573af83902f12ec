"""From a picture's file to its crops: decoding, where a crop lies, and cutting it.

Workers cut one picture at a time on the CPU (`random_crops`), a device that holds pictures a whole
batch (`cut_crops`). There a crop is two matrix products: a row of weights for each of its rows and
columns, the triangle that bilinear resizing with antialiasing takes.
"""

import math
from collections.abc import Sequence
from os import PathLike
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.data.random_draws import CROP_ATTEMPTS, Draw
from utils.runtime.streams import upload

RATIO = (3 / 4, 4 / 3)  # lowest and highest width / height of a crop
_LOG_RATIO = tuple(map(math.log, RATIO))
_LONGEST = 64  # times the shorter side: what `center_crop` resizes at most
# Images at a time whose float32 copies stay in a CPU's cache, at most, and pixels of theirs.
_CPU_CHUNK, _CPU_PIXELS = 16, 2**18
_MOST_BITS = 22  # behind the point of a weight


def decode(path: str | PathLike) -> Tensor:
    """The image file as RGB, (3, H, W) uint8, in memory as (H, W, 3), in which resizing is fast.

    Of an animation the first frame. What is transparent shows white. The EXIF orientation is
    ignored, as by torchvision's ImageFolder. Errors of PIL and of the operating system pass
    through, and ValueError for gray levels of an unknown range.
    """
    with Image.open(path) as image:
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = Image.fromarray(_gray_levels(image))
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode != "RGB":
            image = image.convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _gray_levels(image: Image.Image) -> np.ndarray:
    """A gray picture of integers of more than 8 bits or of floats, (H, W) uint8, on white.

    ValueError where the range is not known, or levels lie outside of it. (Pillow's own conversion
    clips at 0 and 255.)
    """
    levels = np.asarray(image)
    low, high = _gray_range(image)
    if not (math.isfinite(low) and math.isfinite(high) and high > low):
        raise ValueError(f"its tags tell gray levels from {low} to {high}")
    least, most = levels.min(), levels.max()
    if not (low <= least and most <= high):  # also nan
        raise ValueError(f"its gray levels are {least:g} to {most:g}, beyond {low:g} to {high:g}")
    if (low, high) == (0, 2**16 - 1):
        scaled = (levels >> 8).astype(np.uint8)  # the high byte, as for 16-bit color
    else:
        scaled = np.rint((levels.astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)
    if "transparency" in image.info:  # of a PNG: the one level that is transparent
        scaled[levels == image.info["transparency"]] = 255
    return scaled


def _gray_range(image: Image.Image) -> tuple[float, float]:
    """Lowest and highest gray level that a file states, or else of its kind of numbers."""
    tags = getattr(image, "tag_v2", {})

    def tag(*numbers: int) -> float | None:
        value = next((tags[number] for number in numbers if number in tags), None)
        return value[0] if isinstance(value, Sequence) else value

    highest = tag(341, 281)  # SMaxSampleValue, MaxSampleValue
    if highest is not None:
        return tag(340, 280) or 0, highest  # SMinSampleValue, MinSampleValue
    if image.mode == "F":
        return 0, 1
    has_16_bits = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    bits = tag(258) or (16 if has_16_bits else 32)  # BitsPerSample
    if bits > 16:
        raise ValueError(f"its {bits}-bit gray levels have no range (no tag MaxSampleValue)")
    if tag(339) == 2:  # SampleFormat: signed
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def crop_box(
    draws: np.ndarray | Tensor, height: int, width: int, *, scale: tuple[float, float] = (0.2, 1.0)
) -> tuple[int, int, int, int]:
    """A random box (top, left, height, width) inside an image of height x width pixels.

    The geometry of torchvision's RandomResizedCrop: the share of the area uniform in scale, the
    aspect ratio log-uniform in RATIO, ten attempts, then the largest central box of allowed ratio.
    draws: (NUM_DRAWS,) in [0, 1), one view's numbers.
    """
    draws = draws.tolist()
    for attempt in range(Draw.CROP, Draw.CROP + 2 * CROP_ATTEMPTS, 2):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[attempt])
        aspect = math.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * draws[attempt + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(draws[Draw.TOP] * (height - h + 1))
            left = int(draws[Draw.LEFT] * (width - w + 1))
            return top, left, h, w
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_boxes(
    draws: np.ndarray, sizes: np.ndarray, *, scale: tuple[float, float] = (0.2, 1.0)
) -> np.ndarray:
    """`crop_box` of many views at once, as a loop over it would hold up a GPU.

    draws: (..., NUM_DRAWS) in [0, 1). sizes: (..., 2) int64, the images' heights and widths.
    Returns (..., 4) int64: top, left, height, width.
    """
    height, width = sizes[..., :1], sizes[..., 1:]
    areas = draws[..., Draw.CROP : Draw.CROP + 2 * CROP_ATTEMPTS : 2]
    aspects = draws[..., Draw.CROP + 1 : Draw.CROP + 2 * CROP_ATTEMPTS : 2]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * areas)
    aspect = np.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * aspects)
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))  # (..., attempts)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(-1)[..., None]
    w, h = (np.take_along_axis(sides, first, -1) for sides in (w, h))
    top = np.floor(draws[..., Draw.TOP, None] * (height - h + 1))
    left = np.floor(draws[..., Draw.LEFT, None] * (width - w + 1))
    widest = np.minimum(width, np.rint(height * RATIO[1]))
    highest = np.minimum(height, np.rint(width / RATIO[0]))
    central = ((height - highest) // 2, (width - widest) // 2, highest, widest)
    drawn = np.concatenate((top, left, h, w), -1)
    found = fits.any(-1, keepdims=True)
    return np.where(found, drawn, np.concatenate(central, -1)).astype(np.int64)


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
    V crops of all groups. original: (height, width) that the image had before it was resized, if it
    was: boxes are drawn in those, so that neither shares of the area nor aspect ratios change, and
    then scaled. ValueError if there are not V draws.
    """
    size = image.shape[1:]
    kinds = [group for group in groups for _ in range(group.count)]
    crops = torch.empty(sum(group.numel for group in groups), dtype=torch.uint8)
    parts = crops.split([3 * group.size**2 for group in kinds])
    for part, numbers, group in zip(parts, draws, kinds, strict=True):
        box = crop_box(numbers, *(size if original is None else original), scale=group.scale)
        if original is not None:
            box = scaled_boxes(np.array(box), np.array(original), size).tolist()
        part.view(3, group.size, group.size).copy_(resized_crop(image, box, group.size))
    return crops


def resized_crop(image: Tensor, box: Sequence[int], size: int) -> Tensor:
    """The box of an image, resized to (3, size, size) uint8; bilinear with antialiasing.

    image: (3, H, W) uint8. box: (top, left, height, width). Within a gray level of torchvision's.
    """
    top, left, height, width = box
    return resize(image[:, top : top + height, left : left + width], (size, size))


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (3, H, W) uint8 in another height and width; bilinear with antialiasing."""
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def split_crops(crops: Tensor, groups: Sequence[CropGroup]) -> list[Tensor]:
    """Rows of `random_crops` (B, bytes) as a tensor (B, count, 3, size, size) for each group."""
    parts = crops.split([group.numel for group in groups], dim=1)
    return [
        part.unflatten(1, (group.count, 3, group.size, group.size))
        for part, group in zip(parts, groups, strict=True)
    ]


def center_crop(image: Tensor, size: int) -> Tensor:
    """The evaluation view, (3, size, size) uint8: resize the shorter side, then cut the center.

    image: (3, H, W) uint8. The shorter side becomes size * 256 / 224. Within a gray level of
    torchvision's.
    """
    short, side = min(image.shape[1:]), round(size * 256 / 224)
    # A strip, as out of a damaged header, would grow to gigabytes: its ends are cut off before.
    for axis in (1, 2):
        if (length := image.shape[axis]) > _LONGEST * short:
            start = (length - _LONGEST * short) // 2
            image = image.narrow(axis, start, _LONGEST * short)
    height, width = image.shape[1:]
    image = resize(image, (side * height // short, side * width // short))
    top, left = (round((length - size) / 2) for length in image.shape[1:])
    return image[:, top : top + size, left : left + size].contiguous()


def cut_crops(images: Tensor, boxes: np.ndarray, size: int) -> Tensor:
    """Boxes of each image, resized to (B, V, 3, size, size) uint8 on the images' device.

    images: (B, 3, H, W) uint8. boxes: (B, V, 4) int64, top, left, height, width. As `resized_crop`,
    but for rare pixels next to a rounding, which are one gray level off (with TF32 more are). Does
    not wait for a GPU.
    """
    count, views = boxes.shape[:2]
    crops = torch.empty(count, views, 3, size, size, dtype=torch.uint8, device=images.device)
    exact = np.float32 if images.device.type == "mps" else np.float64  # all that a Mac's GPU has
    boxes = upload(torch.from_numpy(boxes.astype(exact)), images.device)
    chunk = max(1, count)
    if images.device.type == "cpu":
        chunk = min(_CPU_CHUNK, max(1, _CPU_PIXELS // (images.shape[2] * images.shape[3])))
    with torch.autocast(images.device.type, enabled=False):
        for start in range(0, count, chunk):
            rows = slice(start, start + chunk)
            pixels = images[rows].to(torch.float32, memory_format=torch.contiguous_format)
            crops[rows] = _resized(pixels, boxes[rows], size)
    return crops


def _resized(pixels: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Boxes (n, V, 4) of images (n, 3, H, W): (n, V, 3, size, size) float32 of whole levels."""
    top, left, height, width = boxes[..., None, None].unbind(2)  # (n, V, 1, 1) each
    to_rows = _triangles(top, height, pixels.shape[-2], size)  # (n, V, size, H)
    to_columns = _triangles(left, width, pixels.shape[-1], size)
    # As torch does on a CPU: along the rows first, and each time rounded to whole levels. For all
    # views of an image that is one product with the columns of all of them.
    across = pixels @ to_columns.flatten(1, 2).mT[:, None]  # (n, 3, H, V size)
    across = across.add_(0.5).floor_().unflatten(3, (-1, size)).permute(0, 3, 1, 2, 4)
    return (to_rows[:, :, None] @ across).add_(0.5).floor_()


def _triangles(start: Tensor, length: Tensor, count: int, size: int) -> Tensor:
    """The weights (n, V, size, count) that make `size` pixels of the `length` from `start` on.

    As PIL: a triangle of the width of an output pixel, but at least of one of the input, around the
    output's center; what hangs over the box is left out. The weights are rounded as torch rounds
    them to 16-bit integers, so that products with gray levels are exact in float32.
    """
    step = length / size
    whole = {"dtype": start.dtype, "device": start.device}
    center = start + step * (torch.arange(size, **whole)[:, None] + 0.5)
    middle = torch.arange(count, **whole) + 0.5  # of the input's pixels
    weights = (1 - (middle - center).abs_().div_(step.clamp_min(1))).clamp_min_(0)
    weights.mul_((middle > start) & (middle < start + length))
    weights.div_(weights.sum(-1, keepdim=True))
    highest = weights.amax((2, 3), keepdim=True)
    bits = torch.log2((2**15 - 0.5) / highest).ceil_().sub_(1).clamp_(0, _MOST_BITS)
    unit = torch.exp2(-bits)
    return weights.div_(unit).add_(0.5).floor_().mul_(unit).float()
