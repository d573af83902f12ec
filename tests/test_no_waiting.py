"""No step of training waits for the device; what is copied to the host arrives as it was.

The device "meta" stands for a GPU: its tensors have shapes and no data, so that whatever needs to
know one of their values fails. Host tensors beside it are real.
"""

import contextlib

import pytest
import tiny
import torch
from torch import nn

from self_supervised.train_msf import MSF
from self_supervised.train_msf_2q import CMSF2Q
from self_supervised.train_msf_km import CMSFKM
from semi_supervised.pseudo_label import PseudoLabelHead
from semi_supervised.train_pseudo_cmsf import PseudoCMSF
from supervised.train_sup_msf import SupervisedCMSF
from supervised.train_sup_xent import CrossEntropy
from utils import loss_watch, memory_bank
from utils.encoders import SoleBackbone
from utils.errors import RunError
from utils.loaders import Batch
from utils.meters import Means
from utils.streams import HostCopy, upload


def clustered() -> CMSFKM:
    model = CMSFKM(tiny.encoders(), 12, mem_bank_size=10, topk=3, num_clusters=4)
    model.clusters = torch.arange(12) % 4
    return model


def pseudo(**flags) -> PseudoCMSF:
    head, labeled = PseudoLabelHead("mlp", 4, 3), torch.arange(12) % 2 == 0
    return PseudoCMSF(tiny.encoders(), head, labeled, mem_bank_size=10, topk=3, **flags)


METHODS = {
    "msf": lambda: MSF(tiny.encoders(), mem_bank_size=10, topk=3),
    "km": clustered,
    "cross-entropy": lambda: CrossEntropy(SoleBackbone(tiny.encoders().query_encoder), 4, 3),
    "2q": lambda: CMSF2Q(tiny.encoders(), 12, mem_bank_size=10, topk=3, topkp=4),
    "supervised": lambda: SupervisedCMSF(tiny.encoders(), 3, mem_bank_size=10, topk=3),
    "top-all": lambda: SupervisedCMSF(tiny.encoders(), 3, mem_bank_size=10, topk=None),
    "pseudo-labels": lambda: pseudo(conf_th=0.5, cache_size=8),
    "all pseudo-labels": lambda: pseudo(),
}


class NeverThere:
    """A `HostCopy` that does not look at what it copies."""

    def __init__(self, tensor):
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def get(self):
        return torch.ones(self.shape, dtype=self.dtype)


def step(model, optimizer, batch, means):
    """What the body of a training loop does, and what is read at the print interval is not."""
    loss, stats = model(batch)
    tiny.update(optimizer, loss)
    means.add({"loss": loss, **stats})


@pytest.fixture
def meta(monkeypatch):
    """The device "meta" as a device that methods run on."""
    monkeypatch.setattr(memory_bank, "HostCopy", NeverThere)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def batches_on(device, count, **crops):
    """Random batches there, in float32; their index is on the host."""
    for b in tiny.random_batches(count, **crops):
        query, target, *small = (v.float().to(device) for v in (*b[:2], *b.small_views))
        yield Batch(query, target, b.index, b.label.to(device), tuple(small))


CROPS = [{}, {"small": (2, 1), "symmetric": True}]


@pytest.mark.parametrize("crops", CROPS, ids=["two", "more"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_reads_nothing_from_the_device(meta, name, crops):
    model = METHODS[name]().to("meta").float()
    optimizer, means = tiny.sgd(model), Means()
    for batch in batches_on("meta", 5, **crops):
        step(model, optimizer, batch, means)
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


def test_confident_images_in_the_cache_are_the_exception(meta):
    """Their number decides how many rows are written; the flag's help says so."""
    model = pseudo(conf_th=0.5, cache_size=8, cache_confident=True).to("meta").float()
    with pytest.raises(NotImplementedError):
        model(next(batches_on("meta", 1)))


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
@pytest.mark.parametrize("crops", CROPS, ids=["two", "more"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_on_a_gpu_does_not_wait(name, crops):
    model = METHODS[name]().float().cuda()
    optimizer, means = tiny.sgd(model), Means()
    batches = list(batches_on("cuda", 6, **crops))
    step(model, optimizer, batches[0], means)  # libraries are set up
    torch.cuda.set_sync_debug_mode("error")
    with contextlib.ExitStack() as stack:
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        for batch in batches[1:]:
            step(model, optimizer, batch, means)
    assert means.read()["loss"] > 0


@pytest.mark.gpu
def test_what_comes_from_a_gpu_is_there_when_asked_for():
    store = memory_bank.PreviousEmbeddings(50, 64)
    for epoch in range(3):
        order = torch.randperm(50)
        for index in order.split(5):
            rows = (index[:, None] + epoch * 100.0).expand(-1, 64).cuda()
            previous, seen = store.swap(index, rows)
            expected = rows - 100 if epoch else torch.zeros_like(rows)
            assert torch.equal(previous, expected) and bool(seen.all()) == bool(epoch)
    kept = nn.Module.state_dict(store)["embeddings"]
    assert torch.equal(kept, (torch.arange(50.0)[:, None] + 200).expand(-1, 64))
