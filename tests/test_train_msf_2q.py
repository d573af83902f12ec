"""CMSF-2Q: the whole step against a loop written from the paper, and the script as a process."""

import importlib
import json
import math
import shutil

import oracles
import pytest
import tiny
import torch
from conftest import ROOT

from self_supervised.train_msf_2q import CMSF2Q

SCRIPT = "self_supervised/train_msf_2q.py"
SCRIPT_MODULE = importlib.import_module("self_supervised.train_msf_2q")
TINY = (*tiny.FLAGS, "--topkp", 4)


def tiny_model(*, num_images=12, bank=10, topk=3, topkp=4, topk_plain=None):
    ks = {"topk": topk, "topkp": topkp, "topk_plain": topk_plain}
    return CMSF2Q(tiny.encoders(), num_images, mem_bank_size=bank, **ks).double()


class Paper:
    """CMSF-2Q as sec. 3.1 tells it, one image at a time, on lists."""

    def __init__(self, model, *, bank, topk, topkp, topk_plain=None):
        self.encoders = tiny.PaperEncoders(model.encoders)
        self.size, self.topk, self.topkp = bank, topk, topkp
        self.topk_plain = topk_plain or topk
        self.bank = []  # (embedding, previous embedding or None), oldest first
        self.images = []
        self.last_seen = {}

    def loss(self, batch):
        q, t = self.encoders.embed(batch)
        previous = [self.last_seen.get(image) for image in batch.index.tolist()]
        for image, embedding, before in zip(batch.index.tolist(), t, previous, strict=True):
            self.last_seen[image] = embedding
            self.bank.append((embedding, before))
        self.images = [*self.images, *batch.index.tolist()]
        self.images, self.bank = self.images[-self.size :], self.bank[-self.size :]
        rows = [embedding for embedding, _ in self.bank]
        plain = [oracles.nearest_rows(target, rows, k=self.topk_plain) for target in t]
        nearest = [oracles.nearest_rows(target, rows, k=self.topk) for target in t]
        constrained = []
        for target, u in zip(t, previous, strict=True):
            if u is None:  # no previous visit, no constraint
                constrained.append(oracles.nearest_rows(target, rows, k=self.topk))
                continue
            older = [before for _, before in self.bank]
            there = [before is not None for before in older]
            older = [u * 0 if before is None else before for before in older]
            candidates = oracles.nearest_rows(u, older, k=self.topkp, allowed=there)
            constrained.append(oracles.constrained_rows(target, rows, candidates, k=self.topk))
        self.purities = [
            100
            * sum(
                self.images[n] % 3 == own % 3
                for own, c in zip(batch.index, chosen, strict=True)
                for n in c
            )
            / sum(map(len, chosen))
            for chosen in (nearest, constrained)
        ]
        views = [q, *self.encoders.small_queries(batch)]
        losses = [
            tiny.loss_over(view, rows, chosen) for view in views for chosen in (plain, constrained)
        ]
        return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("bank", "topk", "topkp", "topk_plain", "crops"),
    [
        (10, 3, 4, None, {}),
        (7, 4, 2, None, {}),
        (12, 2, 2, None, {}),
        (100, 5, 3, None, {}),
        (10, 3, 4, 1, {}),
        (10, 2, 4, 5, {}),
        (10, 3, 4, None, {"small": (3, 1)}),
        # An image's two rows tie in M': an even number of candidates out of whole pairs.
        (16, 3, 4, None, {"symmetric": True}),
        (16, 3, 4, 1, {"symmetric": True, "small": (2,)}),
    ],
)
def test_fifteen_sgd_steps_as_in_the_paper(bank, topk, topkp, topk_plain, crops):
    """Passes over the data that leave two images out, so that some come back late.

    The bank is smaller, larger, and no multiple of the batch. With a symmetric loss each image is a
    query and a target twice; small crops are further queries for the neighbors of their target.
    """
    ks = {"topk": topk, "topkp": topkp, "topk_plain": topk_plain}
    model = tiny_model(num_images=14, bank=bank, **ks)
    paper = Paper(model, bank=bank, **ks)
    ours, theirs = tiny.sgd(model), paper.encoders.optimizer()
    constrained = 0
    for batch in tiny.random_batches(15, num_images=14, **crops):
        loss, stats = model(batch)
        expected = paper.loss(batch)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-11)
        assert stats["purity_plain"].item() == pytest.approx(float(paper.purities[0]))
        assert stats["purity_constrained"].item() == pytest.approx(float(paper.purities[1]))
        constrained += stats["loss_constrained"].item() != stats["loss_plain"].item()
        tiny.update(ours, loss)
        tiny.update(theirs, expected)
    assert constrained >= 6  # the constraint was at work


def test_no_gradient_reaches_target_or_bank():
    model = tiny_model()
    for batch in tiny.random_batches(4):
        loss, _ = model(batch)
    loss.backward()
    assert all(p.grad is None for p in model.encoders.target_encoder.parameters())
    assert not model.bank.features.requires_grad and not model.previous.embeddings.requires_grad
    assert all(p.grad is not None for p in model.encoders.query_encoder.parameters())


def test_first_visits_have_no_constraint():
    model = tiny_model()
    for batch in tiny.random_batches(3):  # the first epoch
        _, stats = model(batch)
        assert stats["loss_constrained"] == stats["loss_plain"]
    assert not model.bank.has_previous.any()


def test_a_run_that_diverges_stops(call_script, image_tree, tmp_path):
    flags = (*TINY, "--learning_rate", 1e30, "--epochs", 2, "--checkpoint_path", tmp_path)
    code, _, stderr = call_script(SCRIPT_MODULE, *flags, image_tree)
    assert code == 1
    assert stderr.count("\n") == 1 and "the loss is nan in epoch 1, step" in stderr
    assert "images [" in stderr and "none yet" in stderr


def test_a_flat_folder_trains_without_labels(call_script, image_tree, tmp_path):
    flags = (*TINY, "--debug", "--batch_size", 4, "--checkpoint_path", tmp_path)
    code, stdout, stderr = call_script(SCRIPT_MODULE, *flags, image_tree / "train" / "a")
    assert code == 0, stderr
    assert "no k-NN figures: the training images have no classes" in stdout
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert lines and all(line["purity_plain"] is None for line in lines)


def test_training_starts_from_weights(call_script, image_tree, tmp_path):
    common = (*TINY, "--epochs", 1, "--knn_freq", -1, image_tree)
    assert call_script(SCRIPT_MODULE, *common, "--checkpoint_path", tmp_path / "a")[0] == 0
    start = tmp_path / "a" / "ckpt_epoch_1.pth"
    flags = ("--weights", start, "--learning_rate", 0, "--weight_decay", 0, "--momentum", 1)
    code, stdout, _ = call_script(
        SCRIPT_MODULE, *common, *flags, "--seed", 9, "--checkpoint_path", tmp_path / "b"
    )
    assert code == 0 and "query encoder, predictor and target encoder" in stdout
    one = tiny.state(start)["state_dict"]
    two = tiny.state(tmp_path / "b" / "ckpt_epoch_1.pth")["state_dict"]
    same = [n for n in one if n.startswith("encoders.") and n.endswith("weight")]
    assert len(same) > 20 and all(torch.equal(one[name], two[name]) for name in same)


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


@pytest.mark.parametrize("folder", ["self_supervised", "/"])
def test_script_runs_from_anywhere(run_script, image_tree, tmp_path, folder):
    """As from the root, where the test above runs it."""
    flags = (*TINY, "--debug", "--checkpoint_path", tmp_path, "--knn_freq", -1, image_tree)
    done = run_script(SCRIPT, *flags, cwd=ROOT / folder)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ckpt_epoch_2.pth").exists()


def test_resumed_run_has_the_bits_of_an_undisturbed_one(
    call_script, run_script, image_tree, tmp_path
):
    """3 of 30 images wait in every epoch, so first visits and empty rows cross the break too.

    Resumed by another process, whose hashes and addresses are others.
    """
    flags = (*TINY, "--batch_size", 9, "--epochs", 4, "--save_freq", 1, "--cos", image_tree)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, _, stderr = call_script(SCRIPT_MODULE, *flags, "--checkpoint_path", whole)
    assert code == 0, stderr
    broken.mkdir()
    shutil.copy(whole / "ckpt_epoch_2.pth", broken)
    resume = ("--resume", broken / "ckpt_epoch_2.pth", "--num_workers", 2)
    done = run_script(SCRIPT, *flags, "--checkpoint_path", broken, *resume)
    assert done.returncode == 0, done.stderr
    tiny.assert_same_checkpoint(whole / "ckpt_epoch_4.pth", broken / "ckpt_epoch_4.pth")


def test_dropout_and_log_are_resumed_too(call_script, image_tree, tmp_path):
    """mobilenet_v2 ends in dropout, which draws from torch's own generator."""
    flags = (*TINY, "--arch", "mobilenet_v2", "--image_size", 32, "--epochs", 3, "--knn_freq", -1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder, resume in ((whole, ()), (broken, ("--resume", whole / "ckpt_epoch_1.pth"))):
        result = call_script(
            *(SCRIPT_MODULE, *flags, "--save_freq", 1, "--checkpoint_path", folder),
            *(*resume, image_tree),
        )
        assert result[0] == 0, result
    tiny.assert_same_checkpoint(whole / "ckpt_epoch_3.pth", broken / "ckpt_epoch_3.pth")
    epochs = [json.loads(line)["epoch"] for line in (broken / "log.jsonl").open()]
    assert epochs == [2, 2, 3, 3]


def test_same_seed_same_bits_other_seed_other_bits(call_script, run_script, image_tree, tmp_path):
    common = (*TINY, "--epochs", 1, "--knn_freq", -1, image_tree)
    for name, flags in {"a": (), "c": ("--seed", 1)}.items():
        done = call_script(SCRIPT_MODULE, *common, *flags, "--checkpoint_path", tmp_path / name)
        assert done[0] == 0, done
    flags = ("--num_workers", 2, "--checkpoint_path", tmp_path / "b")
    done = run_script(SCRIPT, *common, *flags)
    assert done.returncode == 0, done.stderr
    last = "ckpt_epoch_1.pth"
    tiny.assert_same_checkpoint(tmp_path / "a" / last, tmp_path / "b" / last)
    one, other = (tiny.state(tmp_path / name / last)["state_dict"] for name in "ac")
    assert not torch.equal(one["bank.features"], other["bank.features"])
