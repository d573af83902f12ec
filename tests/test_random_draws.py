"""The hash behind all random numbers: published values, independence, uniformity."""

import math

import numpy as np
import pytest
import torch
from oracles import ks

from utils.data import random_draws
from utils.data.random_draws import NUM_DRAWS, uniforms


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
    assert random_draws._splitmix64(state, 5).tolist() == published
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
