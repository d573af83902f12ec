"""Random crops of pictures that are held in memory, cut on the training device for a whole batch.

A crop is two matrix products: a row of weights for each of its rows and columns, the triangle that
bilinear resizing with antialiasing takes. Boxes and draws are those of `cropping`.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from utils.data import cropping, random_draws
from utils.data.cropping import CropGroup
from utils.data.datasets import PixelSet
from utils.data.random_draws import CROP_ATTEMPTS, Draw
from utils.data.reading import CropBatch, EpochSampler, Wanted, read_places
from utils.runtime.streams import upload

# Images at a time whose float32 copies stay in the cache, at most, and pixels of theirs.
_CPU_CHUNK, _CPU_PIXELS = 16, 2**18
_MOST_BITS = 22  # behind the point of a weight


def crop_boxes(
    draws: np.ndarray,
    sizes: np.ndarray,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """`cropping.crop_box` of many views: (..., 4) int64, top, left, height, width.

    draws: (..., NUM_DRAWS) in [0, 1). sizes: (..., 2) int64, the images' heights and widths.
    """
    height, width = sizes[..., :1], sizes[..., 1:]
    areas = draws[..., Draw.CROP : Draw.CROP + 2 * CROP_ATTEMPTS : 2]
    aspects = draws[..., Draw.CROP + 1 : Draw.CROP + 2 * CROP_ATTEMPTS : 2]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * areas)
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(log_low + (log_high - log_low) * aspects)
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))  # (..., attempts)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(-1)[..., None]
    w, h = (np.take_along_axis(sides, first, -1) for sides in (w, h))
    top = np.floor(draws[..., Draw.TOP, None] * (height - h + 1))
    left = np.floor(draws[..., Draw.LEFT, None] * (width - w + 1))
    widest = np.minimum(width, np.rint(height * ratio[1]))
    highest = np.minimum(height, np.rint(width / ratio[0]))
    central = ((height - highest) // 2, (width - widest) // 2, highest, widest)
    drawn = np.concatenate((top, left, h, w), -1)
    found = fits.any(-1, keepdims=True)
    return np.where(found, drawn, np.concatenate(central, -1)).astype(np.int64)


def cut_crops(images: Tensor, boxes: np.ndarray, size: int) -> Tensor:
    """Boxes of each image, resized to (B, V, 3, size, size) uint8 on the images' device.

    images: (B, 3, H, W) uint8. boxes: (B, V, 4) int64, top, left, height, width, inside the image.
    What `cropping.resized_crop` gives, but for rare pixels next to a rounding, which are one gray
    level off (with TF32 more are). Does not wait for a GPU.
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


class DeviceCrops:
    """Yields what workers would send, random crops of each image, but cut on the device.

    images: are copied there; those known as broken are replaced as a worker would. sampler: says
    which images. groups: which crops of an image. tolerated: see `reading.read`.
    """

    num_workers = 0

    def __init__(
        self,
        images: PixelSet,
        sampler: EpochSampler,
        *,
        groups: Sequence[CropGroup],
        seed: int,
        tolerated: int,
        device: torch.device,
    ) -> None:
        self._images, self._sampler = images, sampler
        self._groups, self._seed, self._tolerated = groups, seed, tolerated
        self._pixels = images.pixels.to(device)

    def __iter__(self) -> Iterator[CropBatch]:
        for wanted in self._sampler:
            index, broken = self._readable(wanted)
            views = sum(group.count for group in self._groups)
            draws = random_draws.uniforms(self._seed, wanted.epoch, index, views=views)
            sizes = self._images.original_sizes(index)[:, None]  # (B, 1, 2)
            rows = torch.from_numpy(self._images.rows[index])
            pictures = self._pixels.index_select(0, upload(rows, self._pixels.device))
            label = torch.from_numpy(self._images.labels[index])
            crops, first = [], 0
            for group in self._groups:
                own = draws[:, first : first + group.count]
                boxes = crop_boxes(own, sizes, scale=group.scale)
                boxes = cropping.scaled_boxes(boxes, sizes, self._pixels.shape[-2:])
                crops.append(cut_crops(pictures, boxes, group.size).flatten(1))
                first += group.count
            yield CropBatch(torch.cat(crops, dim=1), torch.from_numpy(index), label, broken)

    def _readable(self, wanted: Wanted) -> tuple[np.ndarray, dict[int, str]]:
        """The numbers of the images in this process' part of a batch, and broken ones met."""
        if not self._images.broken:
            own = wanted.numbers[wanted.own.start : wanted.own.stop]
            return np.array(own, dtype=np.int64), {}
        read, broken = read_places(
            *(self._images, wanted.numbers, range(len(wanted.numbers)), lambda number, _: number),
            tolerated=self._tolerated,
            replace=True,
        )
        own = [number for place, (number, _) in read.items() if place in wanted.own]
        return np.array(own, dtype=np.int64), broken
