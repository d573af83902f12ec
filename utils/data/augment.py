"""The strong and the weak view of crops, a whole batch at a time on its device.

The crops are cut as uint8 before (`cropping`). What is left to do is done here: color, blur, flip,
normalize. Random numbers are those of `random_draws`.

The strong view is MoCo v2's (arXiv 2003.04297), which CMSF keeps. Unlike the published code, which
rounds to 8 bits after each operation, color and blur are float32, and the blur is a true Gaussian.
"""

from collections.abc import Callable
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.data.random_draws import NUM_DRAWS, Draw
from utils.runtime.streams import upload

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

_CPU_CHUNK = 8 * 224**2  # pixels of images whose float32 copies and temporaries stay in the cache
_CPU_ALONE = 128**2  # pixels from which an image is worth calls of its own
_CPU_BAND = 32  # rows of the image that one matrix product of the blur yields


class _Work(NamedTuple):
    """An operation on the chosen images ((B,) bool) of a batch, each with its factor (B,).

    operation: (copies of the images (n, 3, S, S), factors (n, 1, 1, 1)) -> what replaces them.
    """

    operation: Callable[[Tensor, Tensor], Tensor]
    chosen: np.ndarray
    factors: np.ndarray


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

    def works(draws: np.ndarray) -> list[_Work]:
        gray = draws[:, Draw.GRAYSCALE] < GRAYSCALE_PROBABILITY
        sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * draws[:, Draw.SIGMA]
        return [
            *_jitter(draws),
            _Work(lambda x, _: _gray(x).expand_as(x), gray, sigma),
            _Work(_gaussian_blur, draws[:, Draw.BLUR] < blur, sigma),
            *_flip(draws),
        ]

    return _render(images, draws, works)


def weak_view(images: Tensor, draws: np.ndarray | Tensor) -> Tensor:
    """Flip and normalization, each image by its own draws. In, out and errors: `strong_view`."""
    return _render(images, draws, _flip)


def normalize(images: Tensor) -> Tensor:
    """Images (B, 3, S, S) uint8 as float32, normalized by ImageNet's mean and spread.

    Raises TypeError if images are not uint8.
    """
    return _render(images, np.empty((len(images), NUM_DRAWS)), lambda _: [])


def _jitter(draws: np.ndarray) -> list[_Work]:
    """torchvision's ColorJitter(0.4, 0.4, 0.4, 0.1): four operations in an order of each image."""
    applied = draws[:, Draw.JITTER] < JITTER_PROBABILITY
    order = JITTER_ORDERS[(draws[:, Draw.ORDER] * len(JITTER_ORDERS)).astype(np.int64)]
    factors = JITTER_LOW + (JITTER_HIGH - JITTER_LOW) * draws[:, Draw.BRIGHTNESS : Draw.HUE + 1]
    return [
        _Work(operation, applied & (order[:, place] == number), factors[:, number])
        for place in range(4)
        for number, operation in enumerate(_IN_PLACE)
    ]


def _flip(draws: np.ndarray) -> list[_Work]:
    chosen = draws[:, Draw.FLIP] < FLIP_PROBABILITY
    return [_Work(lambda x, _: x.flip(-1), chosen, draws[:, Draw.FLIP])]


def _render(
    images: Tensor, draws: np.ndarray | Tensor, works: Callable[[np.ndarray], list[_Work]]
) -> Tensor:
    """Float copies in [0, 1], changed by the works of their draws, then normalized."""
    draws = np.asarray(draws)
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, not {images.dtype}")
    if draws.shape != (len(images), NUM_DRAWS):
        raise ValueError(f"draws must be ({len(images)}, {NUM_DRAWS}), not {draws.shape}")
    views = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    mean, std = _to_device(np.reshape((IMAGENET_MEAN, IMAGENET_STD), (2, 3, 1, 1)), images.device)
    chunk = max(1, len(images))
    if images.device.type == "cpu":
        chunk = max(1, _CPU_CHUNK // max(1, images.shape[2] * images.shape[3]))
    with torch.autocast(images.device.type, enabled=False):  # the blur is a matrix product
        for start in range(0, len(images), chunk):
            rows = slice(start, start + chunk)
            x = views[rows].copy_(images[rows]).div_(255)
            _do_(x, works(draws[rows]))
            x.sub_(mean).div_(std)
    return views


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A small array as a tensor there, floats as float32. Does not wait for a GPU's queue."""
    values = values.astype(np.float32) if values.dtype.kind == "f" else values
    return upload(torch.from_numpy(values), device)


def _do_(x: Tensor, works: list[_Work]) -> None:
    """Do all work on x (B, 3, S, S) in its order.

    Row numbers go to the device in one copy, and factors in another: a GPU's copies are slow to
    start.
    """
    works = [work for work in works if work.chosen.any()]
    if not works:
        return
    rows = [np.flatnonzero(work.chosen) for work in works]
    counts = [len(some) for some in rows]
    factors = [work.factors[some] for work, some in zip(works, rows, strict=True)]
    factors = _to_device(np.concatenate(factors), x.device).view(-1, 1, 1, 1).split(counts)
    places = _to_device(np.concatenate(rows), x.device).split(counts)
    done = 0
    if x.device.type == "cpu" and x.shape[2] * x.shape[3] >= _CPU_ALONE:
        # What works in place comes first, image by image: one stays in the cache, without copies.
        done = sum(work.operation in _IN_PLACE for work in works)
        steps = [(row, n, k) for n in range(done) for k, row in enumerate(rows[n].tolist())]
        for row, number, k in sorted(steps):
            works[number].operation(x[row : row + 1], factors[number][k : k + 1])
    for work, own, values in zip(works[done:], places[done:], factors[done:], strict=True):
        x.index_copy_(0, own, work.operation(x.index_select(0, own), values))


# Operations on (n, 3, S, S) float32 in [0, 1] with factors (n, 1, 1, 1). Those of the color jitter
# (`_IN_PLACE`) change x itself, which they return.


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


_IN_PLACE = (_brightness, _contrast, _saturation, _hue)  # in the order of JITTER_LOW


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
