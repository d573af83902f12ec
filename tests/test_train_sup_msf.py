"""Supervised CMSF: the whole step against a loop written from the paper, and the script."""

import importlib
import json

import oracles
import pytest
import tiny
import torch

from supervised.train_sup_msf import SupervisedCMSF

SCRIPT = importlib.import_module("supervised.train_sup_msf")


def tiny_model(*, bank=10, topk=3, classes=3):
    return SupervisedCMSF(tiny.encoders(), classes, mem_bank_size=bank, topk=topk).double()


class Paper:
    """The neighbors are the k nearest of the same class, or all of it; fewer count as they are."""

    def __init__(self, model, *, bank, topk):
        self.encoders = tiny.PaperEncoders(model.encoders)
        self.size, self.topk = bank, topk
        self.bank = []  # (embedding, label), oldest first

    def loss(self, batch):
        q, t = self.encoders.embed(batch)
        self.bank += list(zip(t, batch.label.tolist(), strict=True))
        self.bank = self.bank[-self.size :]
        rows = [embedding for embedding, _ in self.bank]
        chosen = []
        for target, label in zip(t, batch.label.tolist(), strict=True):
            same = [other == label for _, other in self.bank]
            k = self.topk or len(rows)
            chosen.append(oracles.nearest_rows(target, rows, k=k, allowed=same))
        self.short = 100 * sum(len(c) < (self.topk or 0) for c in chosen) / len(chosen)
        return tiny.loss_over(q, rows, chosen)


@pytest.mark.parametrize(
    ("bank", "topk"), [(10, 3), (7, 5), (12, 1), (100, 4), (9, None), (50, None)]
)
def test_twelve_sgd_steps_as_in_the_paper(bank, topk):
    model = tiny_model(bank=bank, topk=topk)
    paper = Paper(model, bank=bank, topk=topk)
    ours, theirs = tiny.sgd(model), paper.encoders.optimizer()
    for batch in tiny.random_batches(12):
        loss, stats = model(batch)
        expected = paper.loss(batch)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-11)
        if topk:
            assert stats["purity_constrained"].item() == pytest.approx(100)
            assert stats["fewer_than_k"].item() == pytest.approx(paper.short)
        tiny.update(ours, loss)
        tiny.update(theirs, expected)


def test_rows_of_other_classes_never_fill_up():
    """Differs from the published code: with one image of a class, its target alone counts."""
    model = tiny_model(bank=8, topk=4, classes=12)
    paper = tiny.PaperEncoders(model.encoders)
    batch = next(tiny.random_batches(1, classes=12))
    loss, stats = model(batch)
    q, t = paper.embed(batch)
    assert stats["fewer_than_k"].item() == 100
    assert loss.item() == pytest.approx(((q - t) ** 2).sum(dim=1).mean().item(), abs=1e-11)


def test_plain_purity_is_measured_beside():
    model = tiny_model(bank=12)
    for batch in tiny.random_batches(3):
        model(batch)
    rows, labels = model.bank.in_use("features", "label")
    expected = [
        sum(labels[n] == label for n in oracles.nearest_rows(row, rows, k=3)) / 3
        for row, label in zip(rows, labels, strict=True)
    ]
    plain = model.diagnostics()["purity_plain"].item()
    assert plain == pytest.approx(100 * sum(expected).item() / 12)


def test_top_all_forms_no_tensor_of_batch_times_bank():
    model = tiny_model(bank=5000, topk=None)
    with torch.no_grad():
        model.bank.enqueue(
            torch.nn.functional.normalize(torch.randn(5000, 4, dtype=torch.float64), dim=1),
            label=torch.arange(5000) % 3,
            index=torch.arange(5000),
        )
    batch = next(tiny.random_batches(1))
    with oracles.LargestTensor() as seen:
        loss, _ = model(batch)
        loss.backward()
    assert seen.elements <= 5000 * 4


@pytest.mark.parametrize("topk", ["2", "all"])
def test_script(call_script, image_tree, tmp_path, topk):
    flags = (*tiny.FLAGS, "--epochs", 2, "--topk", topk, "--checkpoint_path", tmp_path)
    code, stdout, stderr = call_script(SCRIPT, *flags, image_tree)
    assert code == 0, stderr
    assert "supervised CMSF" in stdout
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert lines[-1]["knn"] and lines[0]["purity_plain"] > 0
    assert ("purity_constrained" in lines[0]) == (topk != "all")


def test_resumed_run_has_the_bits_of_an_undisturbed_one(call_script, image_tree, tmp_path):
    flags = (*tiny.FLAGS, "--epochs", 3, "--save_freq", 1, "--knn_freq", -1, image_tree)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder, extra in ((whole, ()), (broken, ("--resume", whole / "ckpt_epoch_1.pth"))):
        result = call_script(SCRIPT, *flags, "--checkpoint_path", folder, *extra)
        assert result[0] == 0, result
    tiny.assert_same_checkpoint(whole / "ckpt_epoch_3.pth", broken / "ckpt_epoch_3.pth")


def test_needs_labels(call_script, image_tree):
    code, _, stderr = call_script(SCRIPT, *tiny.FLAGS, image_tree / "train" / "a")
    assert code == 2 and "labels need class folders" in stderr
    code, _, stderr = call_script(SCRIPT, *tiny.FLAGS, "--topk", "some", image_tree)
    assert code == 2 and "--topk" in stderr and "some" in stderr
