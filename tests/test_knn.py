"""k-NN search, vote and purity on hand-placed points and against slow loops."""

from collections import Counter

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import knn
from utils.errors import InputError


def circle(*degrees):
    radians = np.deg2rad(np.array(degrees, dtype=np.float64))
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def vote_by_hand(labels):
    """Count; among the labels with most votes the first met from near to far."""
    counts = Counter(labels)
    most = max(counts.values())
    return next(label for label in labels if counts[label] == most)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 8).flatmap(
        lambda k: st.lists(st.lists(st.integers(0, 4), min_size=k, max_size=k), min_size=1)
    )
)
def test_majority_vote_against_counting(neighbor_labels):
    expected = [vote_by_hand(labels) for labels in neighbor_labels]
    assert knn.majority_vote(np.array(neighbor_labels)).tolist() == expected


@pytest.mark.parametrize(
    ("labels", "winner"),
    [
        ([7], 7),
        ([1, 2], 1),  # one vote each: the nearer
        ([1, 2, 2], 2),
        ([3, 1, 1, 2, 2], 1),  # 1 and 2 tie with two; 3 is nearest but has one
        ([2, 1, 1, 2], 2),  # 2 and 2: 2 has the nearest member
        ([4, 4, 0, 0, 1, 1], 4),
    ],
)
def test_ties_go_to_the_nearer_neighbor(labels, winner):
    assert knn.majority_vote(np.array([labels])).tolist() == [winner]


def test_search_on_hand_placed_points():
    base = circle(0, 30, 90, 180)
    rows = knn.search(base, circle(10, 170, 80), k=4)
    assert rows.tolist() == [[0, 1, 2, 3], [3, 2, 1, 0], [2, 1, 0, 3]]


def test_equal_distances_are_in_the_order_of_the_base():
    base = circle(90, 0, 0, 0, 90)
    assert knn.search(base, circle(0), k=5).tolist() == [[1, 2, 3, 0, 4]]


def test_search_against_a_loop():
    random = np.random.default_rng(0)
    base, queries = random.normal(size=(60, 5)), random.normal(size=(7, 5))
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    rows = knn.search(base.astype(np.float32), queries.astype(np.float32), k=6)
    assert rows.tolist() == [oracles.nearest_rows(q, base, k=6) for q in queries]


def test_search_refuses_what_has_no_neighbors():
    with pytest.raises(ValueError, match="1 queries without 5 finite neighbors among 4"):
        knn.search(circle(0, 1, 2, 3), circle(0), k=5)
    with pytest.raises(ValueError, match="1 queries"):
        knn.search(circle(0, 1, 2, 3), np.array([[np.nan, 0], [1, 0]], dtype=np.float32), k=2)


def test_accuracy_and_purity_by_hand():
    neighbor_labels = np.array([[0, 1, 1], [2, 2, 0]])
    figures = knn.accuracy_and_purity(neighbor_labels, np.array([0, 2]), ks=[1, 3])
    assert figures[1] == {"accuracy": 100.0, "purity": 100.0}
    assert figures[3] == {"accuracy": 50.0, "purity": pytest.approx(100 * (1 / 3 + 2 / 3) / 2)}


def test_ks():
    assert knn.ks_for(1000) == [1, 5, 10, 20]
    assert knn.ks_for(1000, also=3) == [1, 3, 5, 10, 20]
    assert knn.ks_for(7) == [1, 5]
    with pytest.raises(InputError, match="-k 8"):
        knn.ks_for(7, also=8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_search_equals_cpu(monkeypatch):
    random = np.random.default_rng(0)
    base = random.normal(size=(2000, 64)).astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    there = knn.search(base, base[:100], k=20)
    monkeypatch.setattr(knn.faiss, "get_num_gpus", lambda: 0, raising=False)
    assert (there == knn.search(base, base[:100], k=20)).mean() > 0.999
