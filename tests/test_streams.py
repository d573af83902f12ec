"""Work ahead on a side stream: the order of events, and that no operation waits for a GPU."""

import contextlib
from functools import lru_cache

import pytest
import torch
from conftest import write_image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from utils.data import augment, random_draws, train_loader
from utils.data.datasets import read_image_folder
from utils.data.train_loader import TwoViewLoader
from utils.runtime import streams
from utils.runtime.streams import ahead, upload

CPU = torch.device("cpu")


GPU = torch.device("cuda", 1)


class OnGpu(torch.Tensor):
    """Says that it is on a GPU, and is on the CPU."""

    device, is_cuda = torch.device("cuda"), True

    def record_stream(self, stream):
        stream.events.append(f"keep {int(self)}")


def made(number):
    return torch.tensor(number).as_subclass(OnGpu)


class Stream:
    """Stands in for torch.cuda.Stream: writes down what happens; `made` counts them."""

    made: list = []

    def __init__(self, device):
        self.device, self.waited_for, self.events, self.recorded = device, [], [], 0
        self.made.append(self)

    def wait_stream(self, other):
        self.waited_for.append(other)

    def record_event(self):
        self.recorded += 1
        return self.recorded - 1

    def wait_event(self, event):
        self.events.append(f"wait {event}")


@pytest.fixture
def current(monkeypatch):
    """The current stream of what seems to be a GPU, as is the side stream beside it."""
    stream = Stream(GPU)
    monkeypatch.setattr(Stream, "made", [])
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(streams, "_side_stream", lru_cache(streams._side_stream.__wrapped__))
    return stream


def consume(items, current, seen):
    def noted():
        for number, *others in items:
            current.events.append(f"make {number}")
            yield (made(number), *others)

    for item in ahead(noted(), GPU):
        current.events.append(f"train {int(item[0])}")
        seen.append(int(item[0]))


def test_the_next_item_is_made_before_one_is_handed_out(current):
    """It waits for its making, and its memory is kept."""
    seen = []
    consume([(0,), (1,), (2,)], current, seen)
    assert seen == [0, 1, 2]
    assert current.events == [
        *("make 0", "make 1", "wait 0", "keep 0", "train 0"),
        *("make 2", "wait 1", "keep 1", "train 1", "wait 2", "keep 2", "train 2"),
    ]


def test_the_memory_of_every_part_is_kept(current):
    (item,) = ahead(iter([(made(1), torch.zeros(2), (made(2), made(3)))]), GPU)
    assert [event for event in current.events if "keep" in event] == ["keep 1", "keep 2", "keep 3"]


@pytest.mark.parametrize("count", [0, 1])
def test_few_items(current, count):
    seen = []
    consume([(number,) for number in range(count)], current, seen)
    assert seen == list(range(count))


def test_an_error_comes_in_its_place(current):
    def items():
        yield (0,)
        yield (1,)
        raise ValueError("broken")

    seen = []
    with pytest.raises(ValueError, match="broken"):
        consume(items(), current, seen)
    assert seen == [0, 1]
    with pytest.raises(ZeroDivisionError):
        consume(((1 // number,) for number in (0,)), current, seen)


def test_all_epochs_share_one_side_stream(current):
    """Memory that one stream has used serves no other: one an epoch would hold it many times."""
    devices = [torch.device("cuda", number) for number in (0, 1)]
    for _ in range(3):
        for device in devices:
            assert not list(ahead(iter(()), device))
    assert [stream.device for stream in Stream.made] == devices
    for stream in Stream.made:
        assert stream.waited_for == [current] * 3


def test_a_cpu_makes_nothing_ahead():
    made = []

    def items():
        for number in range(3):
            made.append(number)
            yield (number,)

    for (number,) in ahead(items(), CPU):
        assert made == list(range(number + 1))
    tensor = torch.zeros(2)
    assert upload(tensor, CPU) is tensor


class NeverWaits(TorchDispatchMode):
    """Raises for copies between devices that make the host wait; counts those that do not."""

    uploads = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        sources = [value for value in arguments if isinstance(value, torch.Tensor)]
        result = function(*arguments, **named)
        name = function.name().removeprefix("aten::").split(".")[0]
        if name in ("_to_copy", "copy_", "copy"):
            source = sources[-1].device
            if source.type != result.device.type:
                blocking = not (named.get("non_blocking") or True in arguments[2:])
                assert result.device.type == "cuda" and not blocking, f"{function} waits"
                self.uploads += 1
        return result


@pytest.fixture
def pinned(monkeypatch):
    """Fake tensors cannot be pinned: counts the tensors that would be."""
    count = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: count.append(1) or tensor)
    return count


def test_the_views_never_wait_for_a_gpu(pinned):
    """Fake tensors have no values, so what needs one (item, nonzero, a mask as index) raises."""
    draws = random_draws.uniforms(0, 1, torch.arange(64))
    with FakeTensorMode(), NeverWaits() as mode:
        crops = torch.empty(64, 3, 24, 24, dtype=torch.uint8, device="cuda")
        for view in (
            augment.strong_view(crops, draws[:, 0]),
            augment.weak_view(crops, draws[:, 1]),
            augment.normalize(crops),
        ):
            assert view.device.type == "cuda" and view.dtype == torch.float32
    # All from pinned memory: mean and spread of each view, row numbers and factors of two.
    assert mode.uploads == len(pinned) == 7


def test_both_crops_at_once_are_as_one_after_the_other():
    crops = torch.arange(5 * 2 * 12, dtype=torch.uint8).view(5, 2, 3, 2, 2)
    draws, calls = random_draws.uniforms(0, 1, torch.arange(5), views=4), []

    def render(crops, draws):
        calls.append(len(crops))
        return crops.as_subclass(torch.Tensor) + torch.from_numpy(draws[:, :1, None, None])

    here, there = (
        train_loader._of_both(render, c, draws) for c in (crops, crops.as_subclass(OnGpu))
    )
    assert calls == [5, 5, 10]
    assert all(torch.equal(*pair) for pair in zip(here, there, strict=True))


WAITING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "to the host": lambda x: x.to("cpu"),
    "to the host, left to itself": lambda x: x.to("cpu", non_blocking=True),
    "blocking upload": lambda x: torch.ones(2).to("cuda"),
}


@pytest.mark.parametrize("waits", WAITING.values(), ids=WAITING.keys())
def test_the_test_notices_what_waits(waits):
    with pytest.raises((RuntimeError, AssertionError)), FakeTensorMode(), NeverWaits():
        waits(torch.empty(3, device="cuda"))


# On a GPU.


@pytest.mark.gpu
def test_batches_ahead_are_those_of_the_cpu(tmp_path):
    for number in range(24):
        write_image(tmp_path / f"{number}.png", seed=number)
    images = read_image_folder(tmp_path)
    loaders = [
        TwoViewLoader(images, batch_size=4, image_size=16, device=device)
        for device in ("cpu", "cuda")
    ]
    for here, there in zip(*(loader.epoch(1) for loader in loaders), strict=True):
        assert there.index.device.type == "cpu" and there.label.is_cuda
        assert torch.equal(here.index, there.index)
        for one, two in zip(here[:2], there[:2], strict=True):
            torch.testing.assert_close(one, two.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_the_current_stream_waits_for_what_it_is_handed():
    """A long computation on the side stream: its end is seen, and its memory kept."""
    device = torch.device("cuda")

    def items():
        for number in range(4):
            x = torch.full((2048, 2048), 1.0 / 2048, device=device)
            for _ in range(30):
                x = x @ x * 1.0
                x = x / x.mean() / 2048
            yield (x + number,)

    found = [(x * 1).mean().item() for (x,) in ahead(items(), device)]
    assert found == pytest.approx([1 / 2048 + number for number in range(4)], abs=1e-3)


@pytest.mark.gpu
def test_no_operation_makes_the_host_wait():
    draws = random_draws.uniforms(0, 1, torch.arange(64))
    crops = torch.zeros(64, 3, 24, 24, dtype=torch.uint8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment.strong_view(crops, draws[:, 0])
        streams.upload(torch.arange(3), torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_copy_to_the_host_ends_on_the_stream_of_its_own_gpu(monkeypatch):
    """Not on that of the current GPU, whose event would be over before the copy is."""
    recorded, device = [], torch.device("cuda", 1)

    class Event:
        def record(self, stream="of the current GPU"):
            recorded.append(stream)

    class There:
        def copy_(self, tensor, non_blocking):
            assert non_blocking

    class OnGpu:
        shape, dtype = (2,), torch.float32

    OnGpu.device = device
    monkeypatch.setattr(torch, "empty", lambda *_, **__: There())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("stream of", device))
    streams.HostCopy(OnGpu())
    assert recorded == [("stream of", device)]
