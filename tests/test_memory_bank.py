"""The bank against a deque, and previous embeddings against a dictionary."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.method import previous_embeddings
from utils.method.memory_bank import MemoryBank
from utils.method.previous_embeddings import PreviousEmbeddings


def columns(start, batch, dim):
    """Rows numbered from `start`: every column tells which row it belongs to."""
    numbers = torch.arange(start, start + batch)
    features = numbers[:, None] + torch.arange(dim) / 100
    return {
        "features": features,
        "label": numbers * 2,
        "index": numbers * 3,
        "previous": -features,
        "has_previous": numbers % 2 == 0,
    }


@settings(max_examples=1000, deadline=None)
@given(st.integers(1, 13), st.lists(st.integers(1, 30), max_size=6))
def test_any_bank_against_any_batches(size, batches):
    bank = MemoryBank(size, 2, with_previous=True)
    expected: deque[int] = deque(maxlen=size)
    for batch in batches:
        start = bank.written
        bank.enqueue(**columns(start, batch, 2))
        expected.extend(range(start, start + batch))
        filled = bank.filled
        assert filled == len(expected)
        numbers = bank.label[:filled] // 2
        assert sorted(numbers.tolist()) == sorted(expected)
        for row, number in enumerate(numbers.tolist()):
            own = columns(number, 1, 2)
            for name, values in own.items():
                assert torch.equal(getattr(bank, name)[row], values[0].to(getattr(bank, name)))
    assert (bank.label[bank.filled :] == -1).all()


def test_oldest_rows_go_first():
    bank = MemoryBank(5, 1)
    for start in (0, 3, 6):
        numbers = torch.arange(start, start + 3)
        bank.enqueue(numbers[:, None].float(), label=numbers, index=numbers)
    # Written 0..8 over five rows: 5 6 7 8 in their places and 4 the oldest left.
    assert bank.label.tolist() == [5, 6, 7, 8, 4]


def test_a_cleared_bank_finds_only_what_comes_after():
    bank = MemoryBank(5, 2, with_previous=True)
    bank.enqueue(**columns(0, 7, 2))
    bank.clear()
    assert bank.filled == 0 and not len(bank.newest(3))
    bank.enqueue(**columns(7, 2, 2))
    restored = MemoryBank(5, 2, with_previous=True)
    restored.load_state_dict(bank.state_dict())
    for one in (bank, restored):
        (labels,) = one.in_use("label")
        assert labels.tolist() == [14, 16]


def test_columns_must_be_complete():
    bank = MemoryBank(4, 2)
    with pytest.raises(TypeError, match="label"):
        bank.enqueue(torch.zeros(1, 2), index=torch.zeros(1))
    with pytest.raises(TypeError, match="previous"):
        bank.enqueue(torch.zeros(1, 2), index=torch.zeros(1), label=torch.zeros(1), previous=None)


def test_state_dict_restores_the_place_to_write():
    one, two = MemoryBank(5, 2, with_previous=True), MemoryBank(5, 2, with_previous=True)
    one.enqueue(**columns(0, 7, 2))
    two.load_state_dict(one.state_dict())
    for bank in (one, two):
        bank.enqueue(**columns(7, 2, 2))
    assert two.written == 9
    for name, buffer in one.named_buffers():
        assert torch.equal(buffer, getattr(two, name)), name


def test_only_the_rows_asked_for_are_written():
    """Of a batch with more of them than the bank has rows, the newest."""
    bank, expected = MemoryBank(3, 2, with_previous=True), MemoryBank(3, 2, with_previous=True)
    batch, where = columns(0, 9, 2), torch.tensor([0, 1, 1, 0, 1, 0, 1, 0, 0]).bool()
    bank.enqueue(**batch, where=where)
    expected.enqueue(**{name: values[where] for name, values in batch.items()})
    assert bank.written == 4 and sorted(bank.label.tolist()) == [4, 8, 12]
    bank.enqueue(**batch, where=torch.zeros(9, dtype=torch.bool))
    assert bank.written == 4
    for name, buffer in bank.named_buffers():
        assert torch.equal(buffer, getattr(expected, name)), name


class SaysItIsOnAGpu(torch.Tensor):
    """A tensor of the host that takes the ways of one on a GPU."""

    device = property(lambda self: torch.device("cuda"))


class LateCopy:
    """A `HostCopy` that holds what it copied once it is asked for, nan before."""

    def __init__(self, tensor):
        self.tensor = tensor.as_subclass(torch.Tensor).clone()

    def get(self):
        return self.tensor


@pytest.fixture
def coming(monkeypatch):
    """A store of 5 images of which 2 are on their way from a GPU."""
    monkeypatch.setattr(previous_embeddings, "HostCopy", LateCopy)
    store = PreviousEmbeddings(5, 2)
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    store.remember(torch.tensor([3, 1]), rows.as_subclass(SaysItIsOnAGpu))
    assert not store.seen.any()  # a step does not wait for them
    return store


ARRIVED = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [1.0, 2.0], [0.0, 0.0]])


def test_what_is_on_its_way_is_saved(coming):
    state = coming.state_dict()
    assert torch.equal(state["embeddings"], ARRIVED)
    assert state["seen"].tolist() == [False, True, False, True, False]


def test_what_is_on_its_way_is_the_next_previous_embedding(coming):
    previous, seen = coming.swap(torch.tensor([1, 2]), torch.ones(2, 2))
    assert torch.equal(previous, ARRIVED[1:3]) and seen.tolist() == [True, False]
    assert torch.equal(coming.embeddings[3], ARRIVED[3])


def test_of_two_batches_on_their_way_none_is_lost(coming):
    rows = torch.tensor([[5.0, 6.0]])
    coming.remember(torch.tensor([0]), rows.as_subclass(SaysItIsOnAGpu))
    embeddings, seen = coming.on_main()
    assert torch.equal(embeddings[1:], ARRIVED[1:]) and torch.equal(embeddings[:1], rows)
    assert seen.tolist() == [True, True, False, True, False]


def test_what_was_on_its_way_does_not_survive_loading(coming):
    coming.load_state_dict(PreviousEmbeddings(5, 2).state_dict())
    assert not coming.state_dict()["seen"].any()


def test_embeddings_that_are_not_finite_are_not_remembered():
    store = PreviousEmbeddings(3, 2)
    store.swap(torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [torch.nan, 0.0]]))
    assert not store.seen.any() and store.embeddings.isfinite().all()


def test_a_bank_in_half_precision():
    one, half = MemoryBank(5, 2, with_previous=True), MemoryBank(5, 2, with_previous=True)
    half.store_as(torch.float16)
    assert half.features.dtype == half.previous.dtype == torch.float16
    assert half.label.dtype == torch.int64 and half.has_previous.dtype == torch.bool
    for bank in (one, half):
        bank.enqueue(
            **{
                name: value / 3 if value.is_floating_point() else value
                for name, value in columns(0, 4, 2).items()
            }
        )
    torch.testing.assert_close(half.features.float(), one.features, rtol=2**-11, atol=0)
    assert not torch.equal(half.features.float(), one.features)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.permutations(range(6)), min_size=1, max_size=5), st.integers(1, 6))
def test_previous_embeddings_against_a_dictionary(orders, batch):
    store, last, stamp = PreviousEmbeddings(6, 3), {}, 1.0
    for order in orders:
        index = torch.tensor(order[:batch])
        now = torch.full((batch, 3), stamp) + torch.arange(batch)[:, None] / 10
        previous, seen = store.swap(index, now)
        for row, image in enumerate(index.tolist()):
            assert bool(seen[row]) == (image in last)
            expected = last.get(image, torch.zeros(3))
            assert torch.equal(previous[row], expected)
            last[image] = now[row].clone()
        stamp += 1


def test_index_minus_one_does_not_alias_the_last_image():
    store = PreviousEmbeddings(4, 2)
    with pytest.raises(IndexError):
        store.swap(torch.tensor([-1]), torch.zeros(1, 2))
    with pytest.raises(IndexError):
        store.swap(torch.tensor([4]), torch.zeros(1, 2))
    assert not store.seen.any()


def test_previous_embeddings_follow_dtype_and_keep_their_values():
    store = PreviousEmbeddings(4, 2)
    store.swap(torch.tensor([1]), torch.tensor([[0.6, 0.8]]))
    store.double()
    assert store.embeddings.dtype == torch.float64
    assert store.seen.dtype == torch.bool
    third = torch.tensor([[1 / 3, 2 / 3]], dtype=torch.float64)
    store.swap(torch.tensor([2]), third)
    assert torch.equal(store.swap(torch.tensor([2]), third)[0], third)


@pytest.mark.gpu
def test_previous_embeddings_stay_on_the_host():
    store = PreviousEmbeddings(4, 2).cuda()
    previous, seen = store.swap(torch.tensor([1]), torch.ones(1, 2, device="cuda"))
    assert store.embeddings.device.type == "cpu"
    assert previous.device.type == seen.device.type == "cuda"
