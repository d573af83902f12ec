"""The random numbers that an image's views are made with.

All are a hash of (seed, epoch, image index, view, draw): no generator has a state, so views do not
depend on workers, processes, the device, or on resuming.
"""

from enum import IntEnum

import numpy as np
from torch import Tensor

CROP_ATTEMPTS = 10


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
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


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
