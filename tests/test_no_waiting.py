"""No step of training waits for the device; what is copied to the host arrives as it was."""

import contextlib

import pytest
import tiny
import torch
from every_method import METHODS, Method, Sizes, device_of_shapes, placed
from torch import nn

from utils.method import previous_embeddings
from utils.runtime.errors import RunError
from utils.runtime.streams import HostCopy, upload
from utils.training import loss_watch
from utils.training.log import Means

STEPS = 6


def model_and_batches(method: Method, device: torch.device):
    """In float32, on a device."""
    model = method.build(tiny.encoders(), Sizes()).float().to(device)
    batches = tiny.random_batches(STEPS, small=method.small, symmetric=method.symmetric)
    return model, [placed(batch, device, torch.float32) for batch in batches]


def step(model, optimizer, batch, means, **arguments):
    """What the body of a training loop does, and what is read at the print interval is not."""
    loss, stats = model(batch, **arguments)
    tiny.update(optimizer, loss)
    means.add({"loss": loss, **stats})


@pytest.fixture
def meta():
    """The device "meta" as a device that methods run on."""
    with device_of_shapes() as device:
        yield device


@pytest.mark.parametrize("name", METHODS)
def test_a_step_reads_nothing_from_the_device(meta, name):
    """But that with confident images in the cache: their number decides how many rows it writes."""
    method, means = METHODS[name], Means()
    model, batches = model_and_batches(method, meta)
    optimizer = tiny.sgd(model)
    if method.waits:
        with pytest.raises(NotImplementedError):
            model(batches[0])
        return
    for batch in batches:
        step(model, optimizer, batch, means, **method.arguments)
    with pytest.raises(NotImplementedError):  # the watch itself works
        means.read()


def test_the_stand_in_for_a_gpu_refuses_what_waits():
    x = torch.zeros(3, device="meta")
    waits = (
        x.sum().item,
        x.nonzero,
        x.cpu,
        lambda: bool(x.sum()),
        lambda: x[x > 0],
        lambda: x.long().bincount(minlength=2),
    )
    for wait in waits:
        with pytest.raises((NotImplementedError, RuntimeError)):
            wait()


def test_a_bad_loss_of_a_gpu_is_found_before_anything_is_kept(tmp_path, monkeypatch):
    """As on a GPU, where the loss is looked at a step later: error, log and checkpoints."""
    import test_engine

    monkeypatch.setattr(loss_watch, "_is_read_later", lambda loss: True)
    for last_step, found_in in ((3, "step 4"), (4, "the save after the epoch")):
        folder = tmp_path / found_in.replace(" ", "_")
        run = test_engine.make_run(folder, save_freq=1)
        with pytest.raises(RunError, match=f"epoch 2, step {last_step}") as error, run:
            for batch in run.batches(test_engine.Loader({(2, last_step): float("nan")})):
                run.step(*run.model(batch))
        assert "ckpt_epoch_1.pth" in str(error.value)
        assert [path.name for path in folder.glob("*.pth")] == ["ckpt_epoch_1.pth"]
        line = test_engine.log(folder)[-1]
        assert (line["epoch"], line["step"], line["error"]) == (2, last_step, "loss nan")


def test_on_the_cpu_nothing_is_copied():
    x = torch.randn(3)
    assert HostCopy(x).get() is x and upload(x, x.device) is x


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_a_step_on_a_gpu_does_not_wait(name):
    method, means = METHODS[name], Means()
    model, batches = model_and_batches(method, torch.device("cuda"))
    optimizer = tiny.sgd(model)
    step(model, optimizer, batches[0], means, **method.arguments)  # libraries are set up
    waits = pytest.raises(RuntimeError, match="synchronizing")
    torch.cuda.set_sync_debug_mode("error")
    with contextlib.ExitStack() as stack:
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        with waits if method.waits else contextlib.nullcontext():
            for batch in batches[1:]:
                step(model, optimizer, batch, means, **method.arguments)
    assert means.read()["loss"] > 0


@pytest.mark.gpu
def test_what_comes_from_a_gpu_is_there_when_asked_for():
    store = previous_embeddings.PreviousEmbeddings(50, 64)
    for epoch in range(3):
        order = torch.randperm(50)
        for index in order.split(5):
            rows = (index[:, None] + epoch * 100.0).expand(-1, 64).cuda()
            previous, seen = store.swap(index, rows)
            expected = rows - 100 if epoch else torch.zeros_like(rows)
            assert torch.equal(previous, expected) and bool(seen.all()) == bool(epoch)
    kept = nn.Module.state_dict(store)["embeddings"]
    assert torch.equal(kept, (torch.arange(50.0)[:, None] + 200).expand(-1, 64))
