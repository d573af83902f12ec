"""Principal axes against numpy's SVD, t-SNE twice, confusions against a plain loop."""

import numpy as np
import pytest

from utils.evaluation import feature_space


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40)], ids=["tall", "wide"])
def test_principal_axes_are_those_of_the_svd(shape):
    features = random(*shape) * np.linspace(1, 3, shape[1], dtype=np.float32) + 5
    places, explained = feature_space.principal_axes(features)
    centered = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    left, scale, _ = np.linalg.svd(centered, full_matrices=False)
    np.testing.assert_allclose(np.abs(places), np.abs(left[:, :2] * scale[:2]), atol=1e-9)
    np.testing.assert_allclose(explained, 100 * scale[:2] ** 2 / (scale**2).sum())


@pytest.mark.parametrize("shape", [(40, 7), (7, 40)], ids=["tall", "wide"])
def test_the_farthest_point_lies_on_the_positive_side(shape):
    """Of both signs that an axis can have one is taken, also if all features are turned over."""
    features = random(*shape)
    places, _ = feature_space.principal_axes(features)
    farthest = np.abs(places).argmax(axis=0)
    assert (places[farthest, [0, 1]] > 0).all()
    turned, _ = feature_space.principal_axes(features[:, ::-1].copy())
    np.testing.assert_allclose(turned, places, atol=1e-5)
    pair, _ = feature_space.principal_axes(features[:2])
    assert pair[0, 0] > 0  # as far as the other: the first


def test_features_that_do_not_differ_lie_in_one_place():
    same = np.repeat(random(1, 64), 50, axis=0)
    for features in (same, same * (1 + 1e-8 * random(50, 64)), np.zeros((5, 3)), random(1, 4)):
        places, explained = feature_space.principal_axes(features.astype(np.float32))
        assert places.shape == (len(features), 2) and not places.any() and not explained.any()
        assert not feature_space.tsne(features.astype(np.float32), seed=0)[0].any()
    line = np.outer(np.arange(9.0), np.ones(4)).astype(np.float32)
    places, explained = feature_space.principal_axes(line)
    assert places[:, 0].any() and not places[:, 1].any() and explained[1] == 0


def test_tsne_parts_groups_and_is_the_same_twice():
    pytest.importorskip("sklearn")
    features = random(60, 8) + 30 * np.repeat(np.eye(3, 8, dtype=np.float32), 20, axis=0)
    places, perplexity = feature_space.tsne(features, seed=2**63 - 1)
    assert perplexity == pytest.approx(59 / 3)
    for group in range(3):
        own = slice(20 * group, 20 * group + 20)
        inside = np.linalg.norm(places[own] - places[own].mean(axis=0), axis=1).max()
        others = np.delete(places, np.r_[own], axis=0)
        assert inside < np.linalg.norm(others - places[own].mean(axis=0), axis=1).min()
    assert (feature_space.tsne(features, seed=2**63 - 1)[0] == places).all()
    assert np.isfinite(feature_space.tsne(random(2, 5), seed=0)[0]).all()


def test_confusions_are_those_of_a_loop():
    labels, predicted = np.random.default_rng(1).integers(0, 4, (2, 200))
    counts = feature_space.confusions(labels, predicted, num_classes=5)
    expected = [[0] * 5 for _ in range(5)]
    for label, guess in zip(labels.tolist(), predicted.tolist(), strict=True):
        expected[label][guess] += 1
    assert counts.tolist() == expected
    wrong = [(i, j, expected[i][j]) for i in range(5) for j in range(5) if i != j]
    ranked = sorted(wrong, key=lambda one: -one[2])  # ties in the order of the classes
    assert feature_space.most_frequent(counts, most=7) == ranked[:7]
    assert len(feature_space.most_frequent(counts, most=99)) == 12  # one class has none
    assert feature_space.most_frequent(np.eye(3, dtype=int), most=5) == []
