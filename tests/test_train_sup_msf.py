"""Supervised CMSF: the whole step against a loop written from the paper, and the script."""

import importlib
import json

import oracles
import pytest
import tiny
import torch
from conftest import write_image

from supervised.train_sup_msf import SupervisedCMSF
from utils.runtime import files

SCRIPT = importlib.import_module("supervised.train_sup_msf")


GIVEN = torch.tensor([1, 1, 0, 2, 2, 0, 0, 1, 2, 1, 0, 2])  # of 12 images, 5 as they were


def tiny_model(*, bank=10, topk=3, topk_plain=0, classes=3, given=None):
    sizes = {"mem_bank_size": bank, "topk": topk, "topk_plain": topk_plain}
    return SupervisedCMSF(tiny.encoders(), classes, given=given, **sizes).double()


class Paper:
    """The neighbors are the k nearest of the same class, or all of it; fewer count as they are.

    With topk_plain half of the loss is on so many nearest rows of all.
    """

    def __init__(self, model, *, bank, topk, topk_plain=0, given=None):
        self.given = given
        self.encoders = tiny.PaperEncoders(model.encoders)
        self.size, self.topk, self.topk_plain = bank, topk, topk_plain
        self.bank = []  # (embedding, label), oldest first

    def loss(self, batch):
        q, t = self.encoders.embed(batch)
        labels = [self.given[i] if self.given else i % 3 for i in batch.index.tolist()]
        self.bank += list(zip(t, labels, batch.index.tolist(), strict=True))
        self.bank = self.bank[-self.size :]
        rows = [embedding for embedding, _, _ in self.bank]
        chosen = []
        for target, label in zip(t, labels, strict=True):
            same = [other == label for _, other, _ in self.bank]
            k = self.topk or len(rows)
            chosen.append(oracles.nearest_rows(target, rows, k=k, allowed=same))
        self.true_purity = 100 * sum(
            sum(self.bank[n][2] % 3 == image % 3 for n in numbers) / len(numbers) / len(chosen)
            for image, numbers in zip(batch.index.tolist(), chosen, strict=True)
        )
        self.short = 100 * sum(len(c) < (self.topk or 0) for c in chosen) / len(chosen)
        self.parts = [tiny.loss_over(q, rows, chosen)]
        if self.topk_plain:
            plain = [oracles.nearest_rows(target, rows, k=self.topk_plain) for target in t]
            self.parts.append(tiny.loss_over(q, rows, plain))
        return sum(self.parts) / len(self.parts)


@pytest.mark.parametrize(
    ("bank", "topk", "topk_plain"),
    [
        (10, 3, 0),
        (7, 5, 0),
        (12, 1, 0),
        (100, 4, 0),
        (9, None, 0),
        (50, None, 0),
        (10, 3, 1),
        (10, 2, 4),
        (50, None, 1),
        (9, None, 3),
    ],
)
@pytest.mark.parametrize("given", [None, GIVEN], ids=["own", "given"])
def test_twelve_sgd_steps_as_in_the_paper(bank, topk, topk_plain, given):
    """With the images' own labels, and with given ones."""
    ks = {"topk": topk, "topk_plain": topk_plain}
    model = tiny_model(bank=bank, given=given, **ks)
    paper = Paper(model, bank=bank, given=given if given is None else given.tolist(), **ks)
    ours, theirs = tiny.sgd(model), paper.encoders.optimizer()
    for batch in tiny.random_batches(12):
        loss, stats = model(batch)
        expected = paper.loss(batch)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-11)
        if topk:
            assert stats["purity_constrained"].item() == pytest.approx(100)
            assert stats["fewer_than_k"].item() == pytest.approx(paper.short)
        assert ("purity_true" in stats) == (given is not None)
        if topk_plain:
            found = stats["loss_constrained"].item(), stats["loss_plain"].item()
            assert found == pytest.approx([part.item() for part in paper.parts], abs=1e-11)
        if given is not None:
            assert stats["purity_true"].item() == pytest.approx(paper.true_purity)
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


def test_a_plain_loss_cannot_begin_in_the_middle(call_script, image_tree, tmp_path):
    """Neither in a run that says it has none, nor in one from before there was the flag."""
    flags = (*tiny.FLAGS, "--epochs", 2, "--knn_freq", -1, "--checkpoint_path", tmp_path)
    assert call_script(SCRIPT, *flags, "--epochs", 1, image_tree)[0] == 0
    path = tmp_path / "ckpt_epoch_1.pth"
    for there in (True, False):
        state = tiny.state(path)
        if not there:
            del state["args"]["topk_plain"]
            files.save(path, state)
        again = (*flags, "--resume", path, image_tree)
        code, _, stderr = call_script(SCRIPT, *again, "--topk_plain", 1)
        assert code == 2 and "--topk_plain" in stderr, stderr
    assert call_script(SCRIPT, *again)[0] == 0


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
            true_label=torch.arange(5000) % 3,
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


def test_label_noise(call_script, image_tree, tmp_path):
    """The list beside the checkpoint, both purities, resuming, and a file with the same labels."""
    common = (*tiny.FLAGS, "--epochs", 2, "--save_freq", 1, image_tree)
    noise = ("--label_noise", 0.25, "--noise_seed", 5)
    whole, broken, named = (tmp_path / name for name in ("whole", "broken", "named"))
    assert call_script(SCRIPT, *common, *noise, "--checkpoint_path", whole)[0] == 0
    lines = [line.split("\t") for line in (whole / "label_noise.txt").read_text().splitlines()]
    assert len(lines) == 8  # of 30
    assert all(path[0] == true != given for path, true, given in lines)
    records = [json.loads(line) for line in (whole / "log.jsonl").open()]
    assert records[0]["purity_constrained"] == 100 > records[0]["purity_true"] > 0

    resume = ("--resume", whole / "ckpt_epoch_1.pth")
    code, _, stderr = call_script(SCRIPT, *common, *noise, "--checkpoint_path", broken, *resume)
    assert code == 0, stderr
    tiny.assert_same_checkpoint(whole / "ckpt_epoch_2.pth", broken / "ckpt_epoch_2.pth")
    assert (broken / "label_noise.txt").read_text() == (whole / "label_noise.txt").read_text()

    classes = {f"{c}/{n}.jpg": c for c in "abc" for n in range(10)}
    classes |= {path: given for path, _, given in lines}
    file = tmp_path / "labels.txt"
    file.write_text("".join(f"{path} {given}\n" for path, given in classes.items()))
    flags = (*common, "--checkpoint_path", named, "--label_file", file)
    assert call_script(SCRIPT, *flags)[0] == 0
    tiny.assert_same_checkpoint(whole / "ckpt_epoch_2.pth", named / "ckpt_epoch_2.pth")
    assert (
        json.loads((whole / "log.jsonl").read_text().splitlines()[-1])["knn"]
        == (json.loads((named / "log.jsonl").read_text().splitlines()[-1])["knn"])
    )

    file.write_text(file.read_text().replace("a/0.jpg", "a/x.jpg").replace("a/1.jpg", "a/0.jpg"))
    code, _, stderr = call_script(SCRIPT, *flags)
    assert code == 2 and "1 entries name no image (first: a/x.jpg); 1 images have no" in stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--label_noise", 0.5), "--label_noise 0.25, not 0.5"),
        (("--label_noise", 0.25, "--noise_seed", 1), "--noise_seed 0, not 1; other given labels"),
        ((), "other given labels"),
    ],
)
def test_resuming_with_other_labels(call_script, image_tree, tmp_path, change, words):
    flags = (*tiny.FLAGS, "--epochs", 1, "--knn_freq", -1, "--checkpoint_path", tmp_path)
    assert call_script(SCRIPT, *flags, "--label_noise", 0.25, image_tree)[0] == 0
    code, _, stderr = call_script(SCRIPT, *flags, "--resume", "auto", *change, image_tree)
    assert code == 2 and words in stderr, stderr


def test_bad_label_flags(call_script, image_tree, tmp_path):
    write_image(tmp_path / "train" / "a" / "1.jpg", seed=1)
    for flags, data, words in (
        (("--label_noise", 1.5), image_tree, ("--label_noise", "1.5")),
        (("--label_noise", "half"), image_tree, ("--label_noise", "half")),
        (("--label_noise", 0.1, "--label_file", "x"), image_tree, ("--label_file", "not allowed")),
        (("--label_file", "no/such"), image_tree, ("--label_file no/such", "No such file")),
        (("--label_noise", 0.1, "--knn_freq", -1), tmp_path, ("one class only, a",)),
    ):
        code, _, stderr = call_script(SCRIPT, *tiny.FLAGS, *flags, data)
        assert code == 2 and stderr.count("\n") == 1
        assert all(word in stderr for word in words), stderr


def test_needs_labels(call_script, image_tree):
    code, _, stderr = call_script(SCRIPT, *tiny.FLAGS, image_tree / "train" / "a")
    assert code == 2 and "labels need class folders" in stderr
    code, _, stderr = call_script(SCRIPT, *tiny.FLAGS, "--topk", "some", image_tree)
    assert code == 2 and "--topk" in stderr and "some" in stderr
