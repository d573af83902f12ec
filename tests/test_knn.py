"""k-NN search, vote and purity on hand-placed points and against slow loops."""

from collections import Counter

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.evaluation import knn
from utils.runtime import faiss_library
from utils.runtime.errors import InputError, RunError


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
    rows, similarity = knn.search(base, circle(10, 170, 80), k=4)
    assert rows.tolist() == [[0, 1, 2, 3], [3, 2, 1, 0], [2, 1, 0, 3]]
    assert similarity[0] == pytest.approx(np.cos(np.deg2rad([10, 20, 80, 170])), abs=1e-6)


def test_equal_distances_are_in_the_order_of_the_base():
    base = circle(90, 0, 0, 0, 90)
    assert knn.search(base, circle(0), k=5)[0].tolist() == [[1, 2, 3, 0, 4]]


def test_search_against_a_loop():
    random = np.random.default_rng(0)
    base, queries = random.normal(size=(60, 5)), random.normal(size=(7, 5))
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    found = knn.search(base.astype(np.float32), queries.astype(np.float32), k=6)
    assert found[0].tolist() == [oracles.nearest_rows(q, base, k=6) for q in queries]


def test_search_refuses_what_has_no_neighbors():
    with pytest.raises(RunError, match="1 queries without 5 finite neighbors among 4"):
        knn.search(circle(0, 1, 2, 3), circle(0), k=5)
    with pytest.raises(RunError, match="1 queries"):
        knn.search(circle(0, 1, 2, 3), np.array([[np.nan, 0], [1, 0]], dtype=np.float32), k=2)


def test_accuracy_and_purity_by_hand():
    neighbor_labels = np.array([[0, 1, 1], [2, 2, 0]])
    similarity = np.array([[0.9, 0.1, 0.1], [0.5, 0.5, 0.5]])
    figures = knn.vote_figures(
        neighbor_labels, similarity, np.array([0, 2]), ks=[1, 3], num_classes=3
    )
    assert [figures[1][name] for name in ("accuracy", "purity", "weighted")] == [100.0] * 3
    assert figures[3]["accuracy"] == 50.0
    assert figures[3]["purity"] == pytest.approx(100 * (1 / 3 + 2 / 3) / 2)
    assert figures[3]["weighted"] == 100.0  # exp(0.9 / T) outweighs two exp(0.1 / T)
    assert figures[3]["top5"] is None and figures[3]["weighted_top5"] is None


def ranking_by_hand(labels, votes):
    """Classes by their summed votes; among equals the one met first from near to far."""
    sums = {}
    for label, vote in zip(labels, votes, strict=True):
        sums[label] = sums.get(label, 0) + vote
    return sorted(sums, key=lambda label: -sums[label])  # stable, and dicts keep their order


@st.composite
def neighborhoods(draw):
    """Labels (Q, k) of up to nine classes; similarities, nearest first, with many equal ones."""
    queries, k = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    label = st.integers(0, 8)
    steps = st.integers(-4, 4)
    rows = [draw(st.lists(label, min_size=k, max_size=k)) for _ in range(queries)]
    near = [sorted(draw(st.lists(steps, min_size=k, max_size=k)))[::-1] for _ in range(queries)]
    truth = draw(st.lists(label, min_size=queries, max_size=queries))
    return np.array(rows), np.array(near, dtype=np.float32) / 4, np.array(truth)


@settings(max_examples=300, deadline=None)
@given(neighborhoods(), st.sampled_from([0.07, 0.5, 10.0]))
def test_votes_and_top5_against_a_loop(neighborhood, temperature):
    neighbor_labels, similarity, labels = neighborhood
    ks = sorted({1, 1 + neighbor_labels.shape[1] // 2, neighbor_labels.shape[1]})
    figures = knn.vote_figures(*neighborhood, ks=ks, num_classes=9, temperature=temperature)
    for k in ks:
        hits = dict.fromkeys(("accuracy", "weighted", "top5", "weighted_top5"), 0)
        for row, near, label in zip(neighbor_labels, similarity, labels, strict=True):
            # Relative to the nearest: sums of exp(s / T) itself round equal sums apart.
            weights = [np.exp((float(s) - float(near[0])) / temperature) for s in near[:k]]
            plain = ranking_by_hand(row[:k].tolist(), [1] * k)
            weighted = ranking_by_hand(row[:k].tolist(), weights)
            hits["accuracy"] += plain[0] == label
            hits["top5"] += label in plain[:5]
            hits["weighted"] += weighted[0] == label
            hits["weighted_top5"] += label in weighted[:5]
        for name, count in hits.items():
            assert figures[k][name] == pytest.approx(100 * count / len(labels)), (k, name)


@pytest.mark.parametrize(
    ("labels", "weights", "ranked"),
    [
        ([3, 1, 1], None, [1, 3, -1]),
        ([3, 1, 1], [1.0, 0.3, 0.3], [3, 1, -1]),
        ([2, 4, 4, 2], [0.5, 0.25, 0.25, 0.0], [2, 4, -1, -1]),  # equal sums: the nearer
        ([0, 5, 6], [1.0, 0.0, 0.0], [0, 5, 6]),  # far ones whose weight is 0 keep their order
    ],
)
def test_ranking_by_hand(labels, weights, ranked):
    weights = None if weights is None else np.array([weights])
    assert knn.rank_classes(np.array([labels]), weights).tolist() == [ranked]


@pytest.mark.parametrize("temperature", [1e-6, 0.07, 1e6])
def test_weights_are_ratios_of_exponentials_and_never_overflow(temperature):
    similarity = np.array([[1.0, 0.5, -1.0], [0.2, 0.2, 0.1]], dtype=np.float32)
    weights = knn.vote_weights(similarity, temperature=temperature)
    assert np.isfinite(weights).all() and (weights[:, 0] == 1).all()
    if temperature == 0.07:
        assert weights[0, 1] == pytest.approx(np.exp(1 / 0.07 / 2) / np.exp(1 / 0.07))


def test_ks():
    assert knn.ks_for(1000) == [1, 5, 10, 20]
    assert knn.ks_for(1000, also=3) == [1, 3, 5, 10, 20]
    assert knn.ks_for(7) == [1, 5]
    with pytest.raises(InputError, match="-k 8"):
        knn.ks_for(7, also=8)
    dino, lightly = knn.PROTOCOLS["dino"], knn.PROTOCOLS["lightly"]
    assert knn.ks_for(1000, protocol=dino, also=20) == [10, 20, 100, 200]
    assert knn.ks_for(199, protocol=dino) == [10, 20, 100]
    assert knn.ks_for(199, protocol=lightly, also=5) == [5]
    with pytest.raises(InputError, match="--protocol lightly: k 200, but only 199 "):
        knn.ks_for(199, protocol=lightly)


def majority_of(similarities, classes):
    """CMSF: the class that most of the neighbors have."""
    return vote_by_hand(classes)


def weighted_at(temperature):
    """DINO's and lightly's vote: each neighbor adds exp(s / T) to its class, the most wins."""

    def vote(similarities, classes):
        sums = dict.fromkeys(classes, 0.0)  # in the order of nearness
        for similarity, its_class in zip(similarities, classes, strict=True):
            sums[its_class] += np.exp(similarity / temperature)
        return max(sums, key=sums.get)

    return vote


# By name: k, and the vote, as the papers and lightly's code have them.
DESCRIBED = {
    "cmsf": ([1, 5, 10, 20], majority_of),
    "dino": ([10, 20, 100, 200], weighted_at(0.07)),
    "lightly": ([200], weighted_at(0.1)),
}


def described(name, base, queries):
    """k -> accuracy in percent of a protocol, image by image, from features of any length."""
    ks, vote = DESCRIBED[name]
    unit = [row / np.sqrt((row**2).sum()) for row in base[0].double().numpy()]
    hits = dict.fromkeys(ks, 0)
    for row, label in zip(queries[0].double().numpy(), queries[1].tolist(), strict=True):
        row = row / np.sqrt((row**2).sum())
        similarity = [float((row * one).sum()) for one in unit]
        near = sorted(range(len(unit)), key=lambda i: -similarity[i])
        for k in ks:
            classes = [int(base[1][i]) for i in near[:k]]
            hits[k] += vote([similarity[i] for i in near[:k]], classes) == label
    return {k: 100 * count / len(queries[1]) for k, count in hits.items()}


def own_figures(name, base, queries):
    """k -> what a protocol of this name gives here."""
    protocol = knn.PROTOCOLS[name]
    copies = [(features.clone(), labels) for features, labels in (base, queries)]
    how = {"ks": knn.ks_for(len(base[1]), protocol=protocol), "num_classes": 4}
    figures = knn.knn_figures(*copies, temperature=protocol.temperature, **how)
    return {k: row[protocol.vote] for k, row in figures.items()}


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_protocol_is_as_it_is_described(name):
    """On clouds that overlap, so that the votes differ."""
    random = torch.Generator().manual_seed(1)
    centers = torch.randn(4, 6, generator=random)
    sets = []
    for count in (240, 80):
        labels = torch.arange(count) % 4
        noise = torch.randn(count, 6, generator=random)
        sets.append((3 * (centers[labels] + 1.3 * noise), labels))
    expected = described(name, *sets)
    assert own_figures(name, *sets) == pytest.approx(expected)
    assert list(knn.PROTOCOLS) == list(DESCRIBED)
    others = [described(other, *sets) for other in DESCRIBED if other != name]
    assert all(expected[k] != other[k] for other in others for k in expected if k in other)


def test_protocols_on_hand_placed_points():
    """One at 5 degrees against fifteen at 40: 1 to 27 at the temperature 0.07, 1 to 10 at 0.1."""
    degrees = [5] + [40] * 15 + [180] * 184
    labels = torch.tensor([1] + [0] * 15 + [2] * 184)
    base = (2 * torch.from_numpy(circle(*degrees)), labels)

    def winner(name, k):
        for label in range(3):
            queries = (torch.from_numpy(circle(0)), torch.tensor([label]))
            if own_figures(name, base, queries)[k] == 100:
                return label

    assert [winner("cmsf", k) for k in (1, 5, 20)] == [1, 0, 0]
    assert [winner("dino", k) for k in (10, 200)] == [1, 1]
    assert winner("lightly", 200) == 0
    # Of equal sums the class of the nearer one: here both have one at 10 and one at 20 degrees.
    base = (torch.from_numpy(circle(10, -10, 20, -20, *[180] * 196)), torch.arange(200) % 2)
    base[1][:4] = torch.tensor([1, 0, 0, 1])
    base[1][4:] = 2
    assert winner("dino", 10) == winner("lightly", 200) == 1


@pytest.mark.gpu
def test_gpu_search_equals_cpu(monkeypatch):
    if not faiss_library.has_gpu(pytest.importorskip("faiss")):
        pytest.skip("this faiss is one for CPUs")
    random = np.random.default_rng(0)
    base = random.normal(size=(2000, 64)).astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    there = knn.search(base, base[:100], k=20)[0]
    monkeypatch.setattr(faiss_library, "has_gpu", lambda faiss: False)
    assert (there == knn.search(base, base[:100], k=20)[0]).mean() > 0.999
