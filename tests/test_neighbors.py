"""Neighbor selection, loss and purity against slow loops, closed forms and hand-placed points."""

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from utils.method import neighbors
from utils.method.neighbors import (
    Neighbors,
    mean_shift_loss,
    mean_shift_loss_all,
    nearest,
    nearest_among,
    nearest_with_label,
    plain_ranks,
    purity,
    purity_all,
    rank_histogram,
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
    monkeypatch.setattr(neighbors, "_CPU_SIMILARITIES", 4 * 30 // slices)
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
    monkeypatch.setattr(neighbors, "_CPU_SIMILARITIES", 70)
    sliced = nearest_among(queries, rows, candidates=candidates, k=4, fill=fill)
    assert torch.equal(whole.rows, sliced.rows)


def test_nan_stays_in_the_loss_of_every_search():
    """A nan that counted as "no neighbor" would give a loss of 0, at which a run goes on."""
    queries, rows, labels = unit(2, 5) * torch.nan, unit(6, 5, seed=1), torch.tensor([0, 1])
    near = nearest(queries, rows, k=2)
    same = nearest_with_label(queries, rows, k=2, labels=labels, row_labels=torch.arange(6) % 2)
    far = nearest_among(queries, rows, candidates=near, k=2, fill=near)
    for found in (near, same, far):
        assert found.valid.all()
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


@pytest.fixture
def chosen_first(monkeypatch):
    """Searches choose candidates in bfloat16 whatever the CPU; counts queries searched again."""
    monkeypatch.setattr(neighbors, "_has_fast_bfloat16", lambda: True)
    monkeypatch.setattr(neighbors, "_MANY_QUERIES", 1)
    again, search = [], neighbors._nearest_of_all

    def count(queries, *others):
        again.append(len(queries))
        return search(queries, *others)

    monkeypatch.setattr(neighbors, "_nearest_of_all", count)
    return again


def closest(queries, rows, k, allowed=None):
    """The k largest inner products in float64, by sorting each query's."""
    similarity = queries.double() @ rows.double().T
    if allowed is not None:
        similarity[~allowed.expand_as(similarity)] = -2
    return similarity.sort(dim=1, descending=True).values[:, :k]


def assert_found(queries, rows, k, allowed=None):
    """What was found has the largest similarities there are, to float32."""
    found = nearest(queries, rows, k=k, allowed=allowed)
    similarity = (queries.double() @ rows.double().T).gather(1, found.rows)
    expected = closest(queries, rows, k, allowed)
    assert torch.equal(found.valid, expected > -2)
    torch.testing.assert_close(similarity[found.valid], expected[found.valid], rtol=0, atol=1e-6)


@pytest.mark.parametrize("spread", [1.0, 0.3, 0.05, 0.01, 0.001])
def test_candidates_chosen_in_bfloat16_miss_nothing(chosen_first, spread):
    """From rows far apart to rows that bfloat16 cannot tell apart."""
    generator = torch.Generator().manual_seed(0)
    center = torch.randn(1, 96, generator=generator)
    rows = normalize(center + spread * torch.randn(3000, 96, generator=generator), dim=1)
    queries = normalize(center + spread * torch.randn(40, 96, generator=generator), dim=1)
    assert_found(queries, rows, 5)
    if spread == 1:
        assert sum(chosen_first) < 10
    if spread <= 0.01:
        assert chosen_first == [40]
    few = torch.zeros(3000, dtype=torch.bool)
    few[[5, 77, 2999]] = True
    assert_found(queries, rows, 5, few)
    assert_found(queries, rows, 5, torch.rand(40, 3000, generator=generator) < 0.002)


def test_rows_between_two_values_of_bfloat16(chosen_first):
    """The worst case: wrong rows round up and the nearest ones down."""
    near = torch.full((1600,), 0.5 + 2**-9 - 2**-20)  # down, as all that follow the first
    near[1000:1005] = 0.5 + 2**-9 - 2**-22  # the nearest
    rows = torch.zeros(1600, 64)
    rows[:, 0], rows[:, 1] = near, (1 - near.square()).sqrt()
    queries = torch.zeros(2, 64)
    queries[:, 0] = 1
    found = nearest(queries, rows, k=5)
    assert sorted(found.rows[0].tolist()) == [1000, 1001, 1002, 1003, 1004]
    assert chosen_first == [2]


def test_nan_survives_the_choice_in_bfloat16(chosen_first):
    rows = normalize(torch.randn(3000, 64), dim=1)
    queries = normalize(torch.randn(4, 64), dim=1)
    queries[1, 3] = torch.nan
    found = nearest(queries, rows, k=5)
    assert found.valid.all()
    assert mean_shift_loss(queries, rows, found).isnan()


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_rows_in_half_precision_are_compared_as_they_are_kept(monkeypatch, has_bfloat16):
    monkeypatch.setattr(neighbors, "_has_fast_bfloat16", lambda: has_bfloat16)
    monkeypatch.setattr(neighbors, "_MANY_QUERIES", 1)
    queries, rows = unit(6, 64).float(), unit(3000, 64, seed=1).half()
    kept = nearest(queries, rows.float(), k=5)
    found = nearest(queries, rows, k=5)
    assert torch.equal(found.rows, kept.rows)
    queries.requires_grad_()
    loss = mean_shift_loss(queries, rows, found)
    loss.backward()
    assert loss.dtype == queries.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(mean_shift_loss(queries, rows.float(), kept).item())
    labels, row_labels = torch.arange(6) % 3, torch.arange(3000) % 3
    all_rows = [
        mean_shift_loss_all(queries, r, labels=labels, row_labels=row_labels, num_classes=3).item()
        for r in (rows, rows.float())
    ]
    assert all_rows[0] == pytest.approx(all_rows[1], abs=1e-6)


def test_labels_beyond_sixteen_bits():
    queries, rows = unit(3, 5), unit(9, 5, seed=1)
    row_labels = torch.tensor([70000, 5, 70000, 5, -1, 4464, 4464, 2**40, 70000])
    found = nearest_with_label(
        queries, rows, k=9, labels=torch.tensor([70000, 4464, 2**40]), row_labels=row_labels
    )
    assert [sorted(own) for own in valid_rows(found)] == [
        [0, 2, 8],
        [5, 6],
        [7],
    ]  # 70000 = 4464 + 2^16


def ranks_by_counting(queries, rows, found):
    """One plus the rows strictly nearer, each neighbor by itself, in squared distances."""
    ranks = []
    for query, numbers, valid in zip(queries, found.rows.tolist(), found.valid, strict=True):
        distances = [oracles.squared_distance(query, row) for row in rows]
        ranks.append([1 + sum(d < distances[n] for d in distances) for n in numbers])
        ranks[-1] = [r if v else -1 for r, v in zip(ranks[-1], valid, strict=True)]
    return ranks


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 30),
    k=st.integers(1, 6),
    budget=st.sampled_from([1, 20, 37, 10**6]),
)
def test_ranks_among_all_rows(seed, count, k, budget):
    """In slices of any size, with neighbors that come twice and neighbors that do not count."""
    queries, rows = unit(3, 5, seed=seed), unit(count, 5, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    found = Neighbors(
        torch.randint(count, (3, k), generator=generator),
        torch.rand(3, k, generator=generator) < 0.7,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors, "_CPU_SIMILARITIES", budget)
        ranks = plain_ranks(queries, rows, found)
    assert ranks.dtype == torch.int64
    assert ranks.tolist() == ranks_by_counting(queries, rows, found)


def test_ranks_of_the_nearest_are_their_order():
    queries, rows = unit(7, 40).float(), unit(500, 40, seed=1).float()
    found = nearest(queries, rows, k=500)
    assert plain_ranks(queries, rows, found).tolist() == [list(range(1, 501))] * 7


def test_equal_rows_share_the_better_rank():
    rows = degrees(0, 90, 0, 45, 90, 0)
    found = Neighbors(torch.tensor([[5, 4, 3, 0]]), torch.tensor([[True, True, True, False]]))
    assert plain_ranks(degrees(0), rows, found).tolist() == [[1, 5, 4, -1]]


def test_a_row_in_the_bank_has_rank_1_of_itself_in_float32():
    """However the product rounds at its place in the slice."""
    rows = normalize(torch.randn(3001, 67, generator=torch.Generator().manual_seed(0)), dim=1)
    itself = Neighbors(torch.arange(3001)[:, None], torch.ones(3001, 1, dtype=torch.bool))
    assert (plain_ranks(rows, rows, itself) == 1).all()


def test_ranks_form_nothing_of_size_batch_times_bank(monkeypatch):
    monkeypatch.setattr(neighbors, "_CPU_SIMILARITIES", 4 * 100)
    queries, rows = unit(4, 3), unit(5000, 3, seed=1)
    found = nearest(queries, rows, k=2)
    with oracles.LargestTensor() as seen:
        plain_ranks(queries, rows, found)
    assert 0 < seen.elements <= 4 * 100


def test_histogram_of_ranks_by_powers_of_two():
    ranks = torch.tensor([[1, 2, 3, 4], [7, 8, 1024, -1], [2**40, 2**19, 2**19 - 1, -1]])
    expected = [0.0] * 20
    for rank in ranks.flatten().tolist():
        if rank > 0:
            expected[min(rank.bit_length() - 1, 19)] += 100 / 10
    figures = rank_histogram(ranks)
    assert figures.dtype == torch.float32
    assert figures.tolist() == pytest.approx(expected)
    assert rank_histogram(ranks, bins=2).tolist() == pytest.approx([10, 90])
    assert rank_histogram(torch.full((2, 2), -1)).isnan().all()
