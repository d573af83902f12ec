"""CMSF-2Q: the whole step against a loop written from the paper, and the script as a process."""

import copy
import json
import math
import shutil

import oracles
import pytest
import torch
from conftest import ROOT
from torch import nn

from self_supervised.train_msf_2q import CMSF2Q
from utils.data import Batch
from utils.encoders import QueryTargetEncoders

SCRIPT = "self_supervised/train_msf_2q.py"
TINY = (
    *("--arch", "conv4", "--image_size", 16, "--batch_size", 8, "--mem_bank_size", 20),
    *("--topk", 3, "--topkp", 4, "--num_workers", 0, "--print_freq", 2),
)


def tiny_model(*, num_images=12, bank=10, topk=3, topkp=4, momentum=0.9):
    """Any backbone module with a known feature size, in float64."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU())
    encoders = QueryTargetEncoders(backbone, 8, proj_dim=4, momentum=momentum)
    return CMSF2Q(encoders, num_images, mem_bank_size=bank, topk=topk, topkp=topkp).double()


def random_batches(count, *, num_images=12, size=4):
    """Epochs of random permutations: batches of `size` images, two views of each."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(num_images, 3, 2, 2, generator=generator, dtype=torch.float64)
    for step in range(count):
        place = step % (num_images // size)
        if place == 0:
            order = torch.randperm(num_images, generator=generator)
        index = order[place * size : (place + 1) * size]
        noise = torch.randn(2, size, 3, 2, 2, generator=generator, dtype=torch.float64) / 3
        yield Batch(base[index] + noise[0], base[index] + noise[1], index, index % 3)


class Paper:
    """CMSF-2Q as sec. 3.1 tells it, one image at a time, on lists."""

    def __init__(self, model, *, bank, topk, topkp):
        self.query = copy.deepcopy(model.encoders.query_encoder)
        self.predictor = copy.deepcopy(model.encoders.predictor)
        self.target = copy.deepcopy(model.encoders.target_encoder)
        self.momentum = model.encoders.momentum
        self.size, self.topk, self.topkp = bank, topk, topkp
        self.bank = []  # (embedding, previous embedding or None, label), oldest first
        self.last_seen = {}

    def loss(self, batch):
        q = self.predictor(self.query(batch.query_view))
        q = q / q.norm(dim=1, keepdim=True)
        with torch.no_grad():
            pairs = zip(self.target.parameters(), self.query.parameters(), strict=True)
            for old, new in pairs:
                old.copy_(self.momentum * old + (1 - self.momentum) * new)
            t = self.target(batch.target_view)
            t = t / t.norm(dim=1, keepdim=True)
        previous = [self.last_seen.get(image) for image in batch.index.tolist()]
        for image, embedding, before in zip(batch.index.tolist(), t, previous, strict=True):
            self.last_seen[image] = embedding
            self.bank.append((embedding, before))
        self.bank = self.bank[-self.size :]
        rows = [embedding for embedding, _ in self.bank]
        plain = [oracles.nearest_rows(target, rows, k=self.topk) for target in t]
        constrained = []
        for target, u, fallback in zip(t, previous, plain, strict=True):
            if u is None:  # no previous visit, no constraint
                constrained.append(fallback)
                continue
            older = [before for _, before in self.bank]
            there = [before is not None for before in older]
            older = [u * 0 if before is None else before for before in older]
            candidates = oracles.nearest_rows(u, older, k=self.topkp, allowed=there)
            constrained.append(oracles.constrained_rows(target, rows, candidates, k=self.topk))
        losses = []
        for numbers in (plain, constrained):
            per_image = [
                sum(((q_i - rows[n]) ** 2).sum() for n in chosen) / len(chosen)
                for q_i, chosen in zip(q, numbers, strict=True)
            ]
            losses.append(sum(per_image) / len(per_image))
        return (losses[0] + losses[1]) / 2


@pytest.mark.parametrize(
    ("bank", "topk", "topkp"), [(10, 3, 4), (7, 4, 2), (12, 2, 2), (100, 5, 3)]
)
def test_twelve_sgd_steps_as_in_the_paper(bank, topk, topkp):
    """Four passes over the data; the bank smaller, larger, and no multiple of the batch."""
    model = tiny_model(bank=bank, topk=topk, topkp=topkp)
    paper = Paper(model, bank=bank, topk=topk, topkp=topkp)
    ours = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(
        [*paper.query.parameters(), *paper.predictor.parameters()], lr=0.1, momentum=0.9
    )
    constrained = 0
    for batch in random_batches(12):
        loss, stats = model(batch)
        expected = paper.loss(batch)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-11)
        constrained += stats["loss_constrained"].item() != stats["loss_plain"].item()
        for optimizer, value in ((ours, loss), (theirs, expected)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert constrained >= 6  # the constraint was at work


def test_each_target_is_its_own_nearest_neighbor():
    """Step order: the targets enter the bank before the search."""
    model = tiny_model(topk=1)
    for batch in random_batches(5):
        seen = {}
        handle = model.encoders.target_encoder.register_forward_hook(
            lambda _m, _i, output, seen=seen: seen.update(target=output)
        )
        _, stats = model(batch)
        handle.remove()
        target = nn.functional.normalize(seen["target"], dim=1)
        newest = (torch.arange(len(target)) + model.bank.written - len(target)) % model.bank.size
        torch.testing.assert_close(model.bank.features[newest], target)
        assert torch.equal(model.bank.index[newest], batch.index)
        assert stats["purity_plain"].item() == 100


def test_the_average_moves_after_the_query_and_before_the_target():
    model = tiny_model()
    calls = []
    encoders = model.encoders
    for name in ("query", "update_target", "target"):
        original = getattr(encoders, name)

        def spy(*args, name=name, original=original):
            calls.append(name)
            return original(*args)

        setattr(encoders, name, spy)
    model(next(random_batches(1)))
    assert calls == ["query", "update_target", "target"]


def test_no_gradient_reaches_target_or_bank():
    model = tiny_model()
    for batch in random_batches(4):
        loss, _ = model(batch)
    loss.backward()
    assert all(p.grad is None for p in model.encoders.target_encoder.parameters())
    assert not model.bank.features.requires_grad and not model.previous.embeddings.requires_grad
    assert all(p.grad is not None for p in model.encoders.query_encoder.parameters())


def test_first_visits_have_no_constraint():
    model = tiny_model()
    for batch in random_batches(3):  # the first epoch
        _, stats = model(batch)
        assert stats["loss_constrained"] == stats["loss_plain"]
    assert not model.bank.has_previous.any()


def test_empty_rows_are_never_neighbors():
    """With more neighbors asked for than rows written, only written rows are met."""
    model = tiny_model(bank=100, topk=9)
    loss, _ = model(next(random_batches(1)))
    assert model.bank.filled == 4
    assert 0 <= loss.item() <= 4


def test_script_trains_saves_and_reports(run_script, image_tree, tmp_path):
    flags = (*TINY, "--epochs", 3, "--save_freq", 2, "--cos", "--weak_strong")
    done = run_script(SCRIPT, *flags, "--checkpoint_path", tmp_path, image_tree)
    assert done.returncode == 0, done.stderr
    assert "20-NN" in done.stdout
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "ckpt_epoch_2.pth",
        "ckpt_epoch_3.pth",
    ]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert [(line["epoch"], line["step"]) for line in lines] == [
        *((1, 2), (1, 3), (2, 2), (2, 3), (3, 2), (3, 3), (3, 3))
    ]
    names = {"loss", "purity_constrained", "purity_plain", "lr", "images_per_s", "spread"}
    assert names | {"effective_rank"} <= lines[0].keys()
    assert all(math.isfinite(lines[0][name]) for name in names)
    assert [line["lr"] for line in lines[:-1:2]] == pytest.approx([0.01, 0.0075, 0.0025])
    assert lines[-1]["knn"].keys() == {"1", "5", "10", "20"}


@pytest.mark.parametrize("folder", [".", "self_supervised", "/"])
def test_script_runs_from_anywhere(run_script, image_tree, tmp_path, folder):
    flags = (*TINY, "--debug", "--checkpoint_path", tmp_path, "--knn_freq", -1, image_tree)
    done = run_script(SCRIPT, *flags, cwd=ROOT / folder)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ckpt_epoch_2.pth").exists()


def state(path):
    return torch.load(path, weights_only=True)


def tensors(value, name=""):
    """Every tensor of a checkpoint by its place in it."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else []
    items = enumerate(value) if isinstance(value, (list, tuple)) else items
    return {k: v for key, part in items for k, v in tensors(part, f"{name}/{key}").items()}


def assert_same_checkpoint(one, two):
    one, two = tensors(state(one)), tensors(state(two))
    assert one.keys() == two.keys()
    differing = [name for name in one if not torch.equal(one[name], two[name])]
    assert not differing


def test_resumed_run_has_the_bits_of_an_undisturbed_one(run_script, image_tree, tmp_path):
    """3 of 30 images wait in every epoch, so first visits and empty rows cross the break too."""
    flags = (*TINY, "--batch_size", 9, "--epochs", 4, "--save_freq", 1, "--cos", image_tree)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run_script(SCRIPT, *flags, "--checkpoint_path", whole)
    assert done.returncode == 0, done.stderr
    broken.mkdir()
    shutil.copy(whole / "ckpt_epoch_2.pth", broken)
    resume = ("--resume", broken / "ckpt_epoch_2.pth", "--num_workers", 2)
    done = run_script(SCRIPT, *flags, "--checkpoint_path", broken, *resume)
    assert done.returncode == 0, done.stderr
    assert_same_checkpoint(whole / "ckpt_epoch_4.pth", broken / "ckpt_epoch_4.pth")


def test_same_seed_same_bits_other_seed_other_bits(run_script, image_tree, tmp_path):
    common = (*TINY, "--epochs", 1, "--knn_freq", -1, image_tree)
    for name, flags in {
        "a": (),
        "b": ("--num_workers", 2),
        "c": ("--seed", 1),
    }.items():
        done = run_script(SCRIPT, *common, *flags, "--checkpoint_path", tmp_path / name)
        assert done.returncode == 0, done.stderr
    last = "ckpt_epoch_1.pth"
    assert_same_checkpoint(tmp_path / "a" / last, tmp_path / "b" / last)
    one, other = (state(tmp_path / name / last)["state_dict"] for name in "ac")
    assert not torch.equal(one["bank.features"], other["bank.features"])
