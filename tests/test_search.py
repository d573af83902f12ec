"""The choice of candidates in bfloat16, rows in half precision, and ranks among all rows."""

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_neighbors import degrees, unit
from torch.nn.functional import normalize

from utils.method import search
from utils.method.neighbors import Neighbors, mean_shift_loss, mean_shift_loss_all, nearest
from utils.method.ranks import plain_ranks, rank_histogram


@pytest.fixture
def chosen_first(monkeypatch):
    """Searches choose candidates in bfloat16 whatever the CPU; counts queries searched again."""
    monkeypatch.setattr(search, "_has_fast_bfloat16", lambda: True)
    monkeypatch.setattr(search, "_MANY_QUERIES", 1)
    again, by_slices = [], search._by_slices

    def count(queries, *others):
        again.extend([len(queries)] * (queries.dtype == torch.float32))
        return by_slices(queries, *others)

    monkeypatch.setattr(search, "_by_slices", count)
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
    assert found.valid.all(dim=1).tolist() == [True, False, True, True]
    assert mean_shift_loss(rows[:4], rows, found).isnan()


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_rows_in_half_precision_are_compared_as_they_are_kept(monkeypatch, has_bfloat16):
    monkeypatch.setattr(search, "_has_fast_bfloat16", lambda: has_bfloat16)
    monkeypatch.setattr(search, "_MANY_QUERIES", 1)
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
        patch.setattr(search, "_CPU_SIMILARITIES", budget)
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
    monkeypatch.setattr(search, "_CPU_SIMILARITIES", 4 * 100)
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
