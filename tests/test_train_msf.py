"""MSF: the whole step against a loop written from the paper, and the script."""

import importlib
import json

import oracles
import pytest
import tiny
from conftest import ROOT
from torch import nn

from self_supervised.train_msf import MSF

SCRIPT = importlib.import_module("self_supervised.train_msf")


def tiny_model(*, bank=10, topk=3):
    return MSF(tiny.encoders(), mem_bank_size=bank, topk=topk).double()


class Paper:
    """The k nearest rows of a bank of past targets, the present ones among them."""

    def __init__(self, model, *, bank, topk):
        self.encoders = tiny.PaperEncoders(model.encoders)
        self.size, self.topk = bank, topk
        self.bank = []  # (embedding, label), oldest first

    def loss(self, batch):
        q, t = self.encoders.embed(batch)
        self.bank += list(zip(t, batch.label.tolist(), strict=True))
        self.bank = self.bank[-self.size :]
        rows = [embedding for embedding, _ in self.bank]
        chosen = [oracles.nearest_rows(target, rows, k=self.topk) for target in t]
        hits = [
            self.bank[n][1] == label
            for label, numbers in zip(batch.label.tolist(), chosen, strict=True)
            for n in numbers
        ]
        self.purity = 100 * sum(hits) / len(hits)
        return tiny.loss_over(q, rows, chosen)


@pytest.mark.parametrize(("bank", "topk"), [(10, 3), (7, 5), (12, 1), (100, 4)])
def test_twelve_sgd_steps_as_in_the_paper(bank, topk):
    model = tiny_model(bank=bank, topk=topk)
    paper = Paper(model, bank=bank, topk=topk)
    ours, theirs = tiny.sgd(model), paper.encoders.optimizer()
    for batch in tiny.random_batches(12):
        loss, stats = model(batch)
        expected = paper.loss(batch)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-11)
        assert stats["purity_plain"].item() == pytest.approx(paper.purity)
        tiny.update(ours, loss)
        tiny.update(theirs, expected)


def test_top_1_is_one_sided_byol():
    """The mean squared distance between normalized prediction and target of the same image."""
    model = tiny_model(topk=1)
    encoders = tiny.PaperEncoders(model.encoders)
    ours, theirs = tiny.sgd(model), encoders.optimizer()
    for batch in tiny.random_batches(12):
        loss, stats = model(batch)
        q, t = encoders.embed(batch)
        expected = nn.functional.mse_loss(q, t, reduction="sum") / len(q)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-11)
        assert stats["purity_plain"].item() == 100
        tiny.update(ours, loss)
        tiny.update(theirs, expected)


@pytest.mark.parametrize(("topk", "name"), [(3, "MSF"), (1, "BYOL, one-sided")])
def test_script_and_resume(call_script, image_tree, tmp_path, topk, name):
    flags = (*tiny.FLAGS, "--topk", topk, "--epochs", 3, "--save_freq", 1, "--weak_strong")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder, resume in ((whole, ()), (broken, ("--resume", whole / "ckpt_epoch_1.pth"))):
        code, stdout, stderr = call_script(
            SCRIPT, *flags, "--checkpoint_path", folder, *resume, image_tree
        )
        assert code == 0, stderr
        assert f"\n{name}" in stdout
    tiny.assert_same_checkpoint(whole / "ckpt_epoch_3.pth", broken / "ckpt_epoch_3.pth")
    lines = [json.loads(line) for line in (whole / "log.jsonl").open()]
    assert lines[0]["loss"] > 0 and lines[0]["purity_plain"] > 0 and lines[-1]["knn"]


@pytest.mark.parametrize("folder", [".", "self_supervised"])
def test_script_runs_from_anywhere(run_script, image_tree, tmp_path, folder):
    flags = (*tiny.FLAGS, "--debug", "--checkpoint_path", tmp_path, "--knn_freq", -1, image_tree)
    done = run_script("self_supervised/train_msf.py", *flags, cwd=ROOT / folder)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ckpt_epoch_2.pth").exists()


def test_knn_figures_of_a_network_that_diverged_end_the_run(call_script, image_tree, tmp_path):
    """One step an epoch, and figures before the first save."""
    flags = (*tiny.FLAGS, "--batch_size", 20, "--epochs", 2, "--save_freq", 2, "--knn_freq", 1)
    flags = (*flags, "--learning_rate", 1e38, "--checkpoint_path", tmp_path, image_tree)
    code, _, stderr = call_script(SCRIPT, *flags)
    assert code == 1 and stderr.count("\n") == 1
    assert f"images are not finite, first image {image_tree}/train/" in stderr
    assert "a lower learning rate" in stderr and "last checkpoint: none yet" in stderr


def test_bad_input(call_script, image_tree):
    for flags, words in (
        (("--topk", 0), ("--topk", "0")),
        (("--topk", 21), ("--topk 21", "--mem_bank_size 20")),
        (("--topkp", 3), ("--topkp",)),
    ):
        code, _, stderr = call_script(SCRIPT, *tiny.FLAGS, *flags, image_tree)
        assert code == 2 and stderr.count("\n") == 1
        assert all(word in stderr for word in words), stderr
