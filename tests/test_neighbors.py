"""Neighbor selection, loss and purity against slow loops, closed forms and hand-placed points."""

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from utils.method import search
from utils.method.neighbors import (
    Neighbors,
    mean_shift_loss,
    mean_shift_loss_all,
    nearest,
    nearest_among,
    nearest_with_label,
    purity,
    purity_all,
)


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def valid_rows(found: Neighbors) -> list[list[int]]:
    return [rows[valid].tolist() for rows, valid in zip(found.rows, found.valid, strict=True)]


def degrees(*angles):
    radians = torch.deg2rad(torch.tensor(angles, dtype=torch.float64))
    return torch.stack([radians.cos(), radians.sin()], dim=1)


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("slices", [1, 3])
def test_nearest_is_exact_in_one_slice_or_many(monkeypatch, k, slices):
    queries, rows = unit(4, 6), unit(30, 6, seed=1)
    monkeypatch.setattr(search, "_CPU_SIMILARITIES", 4 * 30 // slices)
    found = nearest(queries, rows, k=k)
    assert found.valid.all()
    assert found.rows.tolist() == [oracles.nearest_rows(q, rows, k=k) for q in queries]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.lists(st.booleans(), min_size=9, max_size=9))
def test_nearest_allowed_rows_only(seed, k, allowed):
    queries, rows = unit(3, 5, seed=seed), unit(9, 5, seed=seed + 1)
    found = nearest(queries, rows, k=k, allowed=torch.tensor(allowed))
    expected = [oracles.nearest_rows(q, rows, k=k, allowed=allowed) for q in queries]
    assert valid_rows(found) == expected
    assert found.rows.shape == (3, min(k, 9))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 12),
    labels=st.lists(st.integers(-1, 3), min_size=1, max_size=5),
    row_labels=st.lists(st.integers(-1, 3), min_size=1, max_size=10),
)
def test_rows_of_the_same_label_only(seed, k, labels, row_labels):
    """Also labels that no row has, and queries of label -1, which may find every row."""
    queries, rows = unit(len(labels), 5, seed=seed), unit(len(row_labels), 5, seed=seed + 1)
    expected = [
        oracles.nearest_rows(q, rows, k=k, allowed=[label in (-1, row) for row in row_labels])
        for q, label in zip(queries, labels, strict=True)
    ]
    labels, row_labels = torch.tensor(labels), torch.tensor(row_labels)
    found = nearest_with_label(queries, rows, k=k, labels=labels, row_labels=row_labels)
    assert valid_rows(found) == expected
    masked = (labels[:, None] == row_labels) | (labels < 0)[:, None]  # as on a GPU
    assert valid_rows(nearest(queries, rows, k=k, allowed=masked)) == expected


def test_loss_to_all_rows_of_a_label():
    queries, rows = unit(3, 7).requires_grad_(), unit(20, 7, seed=1)
    labels, row_labels = torch.tensor([0, 2, 0]), torch.arange(20) % 3
    loss = mean_shift_loss_all(queries, rows, labels=labels, row_labels=row_labels, num_classes=4)
    chosen = [[i for i in range(20) if i % 3 == label] for label in labels]
    assert loss.item() == pytest.approx(oracles.loss_of(queries.detach(), rows, chosen))
    loss.backward()
    mean = rows[row_labels == 2].mean(dim=0)
    torch.testing.assert_close(queries.grad[1], -2 / 3 * mean)


def test_rows_without_a_label_are_those_of_no_class():
    """On a GPU the rows that a bad first batch would have filled are such; the run ends by a loss.

    As an index -1 would end the process there, and leave the GPU to it unusable.
    """
    queries, rows = unit(2, 7), unit(9, 7, seed=1)
    labels, row_labels = torch.tensor([0, 1]), torch.tensor([0, 1, -1, 0, 1, -1, 1, 1, -1])
    known = row_labels >= 0
    with_them, without = (
        mean_shift_loss_all(queries, r, labels=labels, row_labels=own, num_classes=2)
        for r, own in ((rows, row_labels), (rows[known], row_labels[known]))
    )
    torch.testing.assert_close(with_them, without)
    nothing = torch.full_like(row_labels, -1)
    assert mean_shift_loss_all(
        queries, rows, labels=labels, row_labels=nothing, num_classes=2
    ).isnan()


def test_fewer_rows_than_neighbors():
    found = nearest(unit(2, 4), unit(3, 4, seed=1), k=5)
    assert found.rows.shape == (2, 3)
    assert found.valid.all()


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 6),
    candidate_count=st.integers(1, 9),
    valid_count=st.integers(0, 9),
)
def test_nearest_among_candidates_and_fill(seed, k, candidate_count, valid_count):
    """k' < k, k' = k, k' > k, and candidates of which some (or all) do not count."""
    queries, rows = unit(3, 5, seed=seed), unit(12, 5, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.stack([torch.randperm(12, generator=generator) for _ in range(3)])
    candidates = Neighbors(
        numbers[:, :candidate_count], torch.arange(candidate_count).expand(3, -1) < valid_count
    )
    fill = nearest(queries, rows, k=k)
    found = nearest_among(queries, rows, candidates=candidates, k=k, fill=fill)
    expected = [
        oracles.constrained_rows(q, rows, own, k=k)
        for q, own in zip(queries, valid_rows(candidates), strict=True)
    ]
    assert found.valid.all()
    assert found.rows.tolist() == expected


def test_nearest_among_on_hand_placed_points():
    """A distant candidate is taken before a near row that is none; the nearest other fills up."""
    rows = degrees(0, 10, 20, 90, 180)
    candidates = Neighbors(torch.tensor([[4, 3]]), torch.tensor([[True, True]]))
    query = degrees(1)
    fill = nearest(query, rows, k=3)
    assert nearest_among(query, rows, candidates=candidates, k=2, fill=fill).rows.tolist() == [
        [3, 4]
    ]
    assert nearest_among(query, rows, candidates=candidates, k=3, fill=fill).rows.tolist() == [
        [3, 4, 0]
    ]


def test_many_candidates_are_read_in_slices(monkeypatch):
    queries, rows = unit(2, 5), unit(40, 5, seed=1)
    candidates = nearest(unit(2, 5, seed=2), rows, k=25)
    fill = nearest(queries, rows, k=4)
    whole = nearest_among(queries, rows, candidates=candidates, k=4, fill=fill)
    monkeypatch.setattr(search, "_CPU_SIMILARITIES", 70)
    sliced = nearest_among(queries, rows, candidates=candidates, k=4, fill=fill)
    assert torch.equal(whole.rows, sliced.rows)


def test_a_query_that_is_nan_gives_a_nan_loss_with_every_search():
    """Among similarities of nan any row may come first, and the loss of that would be finite."""
    queries, rows, labels = unit(2, 5), unit(6, 5, seed=1), torch.tensor([0, 1])
    targets = queries.clone()
    targets[1] = torch.nan
    near = nearest(targets, rows, k=2)
    same = nearest_with_label(targets, rows, k=2, labels=labels, row_labels=torch.arange(6) % 2)
    far = nearest_among(targets, rows, candidates=near, k=2, fill=near)
    for found in (near, same, far):
        assert found.valid[0].all() and not found.valid[1].any()
        assert mean_shift_loss(queries, rows, found).isnan()


def test_loss_equals_squared_distance():
    queries, rows = unit(5, 7), unit(20, 7, seed=1)
    found = nearest(unit(5, 7, seed=2), rows, k=4)
    expected = oracles.loss_of(queries, rows, found.rows.tolist())
    assert mean_shift_loss(queries, rows, found).item() == pytest.approx(expected, abs=1e-12)


def test_loss_averages_over_valid_neighbors_of_each_query():
    queries, rows = unit(2, 7), unit(20, 7, seed=1)
    found = Neighbors(
        torch.tensor([[3, 4, 5], [6, 0, 0]]),
        torch.tensor([[True, True, True], [True, False, False]]),
    )
    expected = oracles.loss_of(queries, rows, [[3, 4, 5], [6]])
    assert mean_shift_loss(queries, rows, found).item() == pytest.approx(expected, abs=1e-12)


def test_loss_of_several_views_is_the_mean_of_theirs():
    """Each view is pulled to the neighbors of its image, of which some do not count."""
    views, rows = unit(3, 2, 7), unit(20, 7, seed=1)
    found = Neighbors(torch.tensor([[3, 4], [6, 0]]), torch.tensor([[True, True], [True, False]]))
    expected = [oracles.loss_of(queries, rows, [[3, 4], [6]]) for queries in views]
    assert mean_shift_loss(views, rows, found).item() == pytest.approx(sum(expected) / 3, abs=1e-12)


def test_loss_bounds():
    point = degrees(0)
    same = Neighbors(torch.tensor([[0]]), torch.tensor([[True]]))
    assert mean_shift_loss(point, degrees(0), same).item() == pytest.approx(0)
    assert mean_shift_loss(point, degrees(180), same).item() == pytest.approx(4)


def test_gradient_is_minus_two_times_the_mean_neighbor():
    """d/dq of the mean over B and k of (2 - 2 q.z) is -2 / B times the mean of z."""
    queries, rows = unit(3, 5).requires_grad_(), unit(10, 5, seed=1)
    found = nearest(unit(3, 5, seed=2), rows, k=2)
    mean_shift_loss(queries, rows, found).backward()
    for query_gradient, numbers in zip(queries.grad, found.rows.tolist(), strict=True):
        mean = sum(rows[i] for i in numbers) / 2
        torch.testing.assert_close(query_gradient, -2 / 3 * mean)


def test_loss_and_backward_form_nothing_of_size_batch_times_bank():
    batch, bank, dim, k = 4, 5000, 3, 2
    queries, rows = unit(batch, dim).requires_grad_(), unit(bank, dim, seed=1)
    found = nearest(queries.detach(), rows, k=k)
    with oracles.LargestTensor() as seen:
        mean_shift_loss(queries, rows, found).backward()
    assert 0 < seen.elements <= batch * k * dim
    with oracles.LargestTensor() as dense:  # the watch itself works: the published way is caught
        (2 - 2 * queries @ rows.T).gather(1, found.rows).mean().backward()
    assert dense.elements >= batch * bank


def test_purity_by_hand():
    row_labels = torch.tensor([0, 0, 1, 2, -1])
    labels = torch.tensor([0, 2, -1])
    found = Neighbors(
        torch.tensor([[0, 1, 2], [3, 4, 0], [0, 1, 4]]),
        torch.tensor([[True, True, True], [True, True, False], [True, True, True]]),
    )
    # 2 of 3, 1 of 2 that count, and a query without label, which is left out.
    assert purity(labels, row_labels, found).item() == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)


@pytest.mark.parametrize("classes", [2, 7, 100_000])
def test_purity_of_all_rows_of_a_label(classes):
    """As `purity` of a query's rows, each of its label, counted one by one; in little memory."""
    random = torch.Generator().manual_seed(0)
    row_labels, row_truth = (
        torch.randint(min(classes, 9), (200,), generator=random) for _ in range(2)
    )
    labels, truth = row_labels[:30], row_truth[:30]
    expected = []
    for label, true in zip(labels, truth, strict=True):
        mine = row_truth[row_labels == label]
        expected.append(float((mine == true).float().mean()))
    among = {"row_labels": row_labels, "row_truth": row_truth, "num_classes": classes}
    with oracles.LargestTensor() as seen:
        found = purity_all(labels, truth, **among)
    assert found.item() == pytest.approx(100 * sum(expected) / 30)
    assert seen.elements <= 200


def test_purity_without_labels_is_nan():
    found = Neighbors(torch.tensor([[0]]), torch.tensor([[True]]))
    assert purity(torch.tensor([-1]), torch.tensor([-1]), found).isnan()


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    queries, rows = unit(8, 16), unit(300, 16, seed=1)
    here, there = nearest(queries, rows, k=5), nearest(queries.cuda(), rows.cuda(), k=5)
    assert torch.equal(here.rows, there.rows.cpu())
