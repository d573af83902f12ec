"""Semi-supervised CMSF: the step and its rounds against the paper, and the script."""

import copy
import importlib
import json
import os
import signal
from pathlib import Path

import oracles
import pytest
import tiny
import torch
from conftest import write_image
from torch.nn.functional import normalize

from semi_supervised.pseudo_label import PseudoLabelHead, train_head
from semi_supervised.train_pseudo_cmsf import PseudoCMSF
from utils.data.batches import EvalBatch
from utils.data.datasets import ImageSet, read_split
from utils.data.splits import read_split_file

SCRIPT = importlib.import_module("semi_supervised.train_pseudo_cmsf")
LINEAR = importlib.import_module("eval.eval_linear")
LABELED = torch.arange(12) % 4 == 0  # 3 of 12 images, one of each class
ROUND = {
    "epochs": 5,
    "batch_size": 4,
    "learning_rate": 0.3,
    "decay_epochs": [3],
    "momentum": 0.9,
    "weight_decay": 1e-4,
}


def tiny_model(**options):
    encoders = tiny.encoders()
    head = PseudoLabelHead("mlp", encoders.proj_dim, 3)
    settings = {"mem_bank_size": 10, "topk": 3, **options}
    return PseudoCMSF(encoders, head, LABELED, **settings).double()


class Paper:
    """Sec. 3.2 on lists: true labels, confident guesses, and -1 for all others."""

    def __init__(self, model, *, bank, topk, topk_plain, conf_th):
        self.encoders = tiny.PaperEncoders(model.encoders)
        self.head = copy.deepcopy(model.head)
        self.size, self.topk, self.topk_plain, self.conf_th = bank, topk, topk_plain, conf_th
        self.bank = []  # (embedding, label or -1), oldest first
        self.cache = []

    def loss(self, batch):
        q, t = self.encoders.embed(batch)
        labels = []
        self.head.eval()
        for target, image, truth in zip(t, batch.index, batch.label.tolist(), strict=True):
            scores = self.head(target[None])[0].softmax(dim=0)
            guess = int(scores.argmax())
            if LABELED[image]:
                labels.append(truth)
                self.cache.append((target, truth))
            else:
                labels.append(guess if scores[guess] >= self.conf_th else -1)
        self.bank += list(zip(t, labels, strict=True))
        self.bank = self.bank[-self.size :]
        rows = [embedding for embedding, _ in self.bank]
        chosen = []
        for target, label in zip(t, labels, strict=True):
            if label < 0:
                chosen.append(oracles.nearest_rows(target, rows, k=self.topk_plain))
            else:
                same = [other == label for _, other in self.bank]
                chosen.append(oracles.nearest_rows(target, rows, k=self.topk, allowed=same))
        self.labels = labels
        return tiny.loss_over(q, rows, chosen)


@pytest.mark.parametrize(
    ("bank", "topk", "topk_plain", "conf_th"),
    [(10, 3, None, 0.45), (7, 2, 4, 0.4), (30, 5, 1, 0.45), (10, 3, None, 0)],
)
def test_twelve_sgd_steps_with_rounds_as_in_the_paper(bank, topk, topk_plain, conf_th):
    """Rounds of head training on the cache after every third step, confidence or none."""
    model = tiny_model(
        mem_bank_size=bank, topk=topk, topk_plain=topk_plain, conf_th=conf_th, cache_size=6
    )
    paper = Paper(model, bank=bank, topk=topk, topk_plain=topk_plain or topk, conf_th=conf_th)
    ours, theirs = tiny.sgd(model.encoders), paper.encoders.optimizer()
    seen = set()
    for step, batch in enumerate(tiny.random_batches(12)):
        loss, stats = model(batch)
        expected = paper.loss(batch)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
        assert model.bank.label[model.bank.newest(4)].tolist() == paper.labels
        counted = [
            label >= 0
            for label, image in zip(paper.labels, batch.index, strict=True)
            if not LABELED[image]
        ]
        if counted:
            share = 100 * sum(counted) / len(counted)
            assert stats["confident"].item() == pytest.approx(share)
        seen |= set(paper.labels)
        tiny.update(ours, loss)
        tiny.update(theirs, expected)
        if step % 3 == 2:
            rows, labels = model.labeled_embeddings(None)
            # The cache is the newest six labeled embeddings, whatever their order in it.
            newest = paper.cache[-6:]
            assert sorted(labels.tolist()) == sorted(label for _, label in newest)
            assert len(rows) == min(6, len(paper.cache))
            train_head(model.head, rows, labels, seed=[step], **ROUND)
            train_head(paper.head, rows.clone(), labels.clone(), seed=[step], **ROUND)
    assert seen >= ({0, 1, 2} if conf_th == 0 else {-1, 0})


def batch_with_labels(model):
    return next(tiny.random_batches(1, size=12))


def test_labeled_images_always_count_and_others_by_confidence(monkeypatch):
    model = tiny_model(conf_th=0.8, mem_bank_size=20)
    guess = torch.tensor([1, 2] * 6)
    confidence = torch.tensor([0.9, 0.79, 0.8] * 4, dtype=torch.float64)
    monkeypatch.setattr(model.head, "predict", lambda t: (guess, confidence))
    batch = batch_with_labels(model)
    _, stats = model(batch)
    known = LABELED[batch.index]
    expected = torch.where(known, batch.label, torch.where(confidence >= 0.8, guess, -1))
    assert torch.equal(model.bank.label[:12], expected)
    assert torch.equal(model.bank.true_label[:12], batch.label)
    right = (guess == batch.label) & ~known
    sure = (confidence >= 0.8) & ~known
    assert stats["accuracy_all"].item() == pytest.approx(100 * right.sum().item() / 9)
    assert stats["accuracy_confident"].item() == pytest.approx(
        100 * (right & sure).sum().item() / sure.sum().item()
    )
    assert stats["confident"].item() == pytest.approx(100 * sure.sum().item() / 9)


@pytest.mark.parametrize("confident_too", [False, True])
def test_cache_holds_labeled_and_on_request_confident_rows(monkeypatch, confident_too):
    model = tiny_model(conf_th=0.5, cache_size=50, cache_confident=confident_too)
    confidence = torch.tensor([0.9, 0.1, 0.9] * 4, dtype=torch.float64)
    guess = torch.tensor([2, 0, 1] * 4)
    monkeypatch.setattr(model.head, "predict", lambda t: (guess, confidence))
    batch = batch_with_labels(model)
    model(batch)
    known = LABELED[batch.index]
    kept = known | (confidence >= 0.5) if confident_too else known
    rows, labels = model.labeled_embeddings(None)
    assert len(rows) == kept.sum()  # and never an unfilled row
    assert torch.equal(labels, torch.where(known, batch.label, guess)[kept])


def test_without_a_constraint_every_search_is_plain():
    model = tiny_model(topk=3, topk_plain=2, conf_th=0.0)
    paper = tiny.PaperEncoders(model.encoders)
    batch = batch_with_labels(model)
    loss, stats = model(batch, constrained=False)
    q, t = paper.embed(batch)
    rows = list(t)[-10:]
    chosen = [oracles.nearest_rows(target, rows, k=2) for target in t]
    assert loss.item() == pytest.approx(tiny.loss_over(q, rows, chosen).item(), abs=1e-9)
    assert stats["confident"].item() == 0
    assert stats["purity_constrained"].isnan()


def test_without_a_cache_embeddings_come_from_the_images():
    model = tiny_model()
    images = torch.randn(5, 3, 2, 2, dtype=torch.float64)

    class Images:
        images = ImageSet(Path("."), list("abcde"), [0] * 5, [])
        left_out = ()

        def __iter__(self):
            yield EvalBatch(images, torch.arange(5), torch.tensor([0, 1, 2, 0, 1]))

    rows, labels = model.labeled_embeddings(Images())
    expected = model.encoders.target_encoder.eval()(images)
    torch.testing.assert_close(rows, normalize(expected, dim=1).float(), check_dtype=False)
    assert labels.tolist() == [0, 1, 2, 0, 1]


FLAGS = (*tiny.FLAGS, "--use_conf", "--conf_th", 0.4, "--pseudo_lbl_epochs", 3)


@pytest.mark.parametrize(
    "extra",
    [
        ("--cache_sup", "--sup_mem_bank_size", 7, "--mlp_xent", "mlp"),
        ("--cache_sup", "--cache_conf_unsup", "--sup_mem_bank_size", 64, "--mlp_xent", "mlp_3l"),
        ("--mlp_xent", "linear", "--topk_plain", 1, "--constraint_start", 2),
    ],
)
def test_script_and_resume(call_script, image_tree, tmp_path, extra):
    """Each kind of cache and head: rounds in the middle and at the end, resumed bit for bit."""
    flags = (*FLAGS, *extra, "--label_fraction", 0.4, "--epochs", 3, "--save_freq", 1, image_tree)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder, resume in ((whole, ()), (broken, ("--resume", whole / "ckpt_epoch_1.pth"))):
        result = call_script(SCRIPT, *flags, "--checkpoint_path", folder, *resume)
        assert result[0] == 0, result
    tiny.assert_same_checkpoint(whole / "ckpt_epoch_3.pth", broken / "ckpt_epoch_3.pth")

    lines = [json.loads(line) for line in (whole / "log.jsonl").open()]
    rounds = [(line["epoch"], line["step"]) for line in lines if line.get("head_rows", 0) > 1]
    first = 2 if "--constraint_start" in extra else 1
    assert set(rounds) >= {(e, s) for e in range(first + 1, 4) for s in (1, 3)}
    assert {"confident", "accuracy_confident", "accuracy_all", "purity_constrained"} <= {
        *(name for line in lines for name in line)
    }
    assert len((whole / "labeled.txt").read_text().splitlines()) == 12


@pytest.mark.parametrize("confident_too", [False, True])
def test_rows_that_the_head_is_trained_on(
    call_script, image_tree, tmp_path, monkeypatch, confident_too
):
    """With confident rows those of the present epoch alone; labeled rows stay for good.

    Three steps an epoch, a round after the first and the last: the oracle keeps lists of what each
    step wrote to the bank, where a row that counts has a label.
    """
    steps, rounds, guessed = [], [], []

    def forward(model, batch, *, own=PseudoCMSF.forward, **options):
        result = own(model, batch, **options)
        newest = model.bank.newest(len(batch.index))
        rows, labels = model.bank.features[newest].clone(), model.bank.label[newest].tolist()
        steps.append([])
        for row, label, image in zip(rows, labels, batch.index, strict=True):
            if model.labeled[image] or (confident_too and label >= 0):
                steps[-1].append((row, label))
                guessed.append(not model.labeled[image])
        return result

    def train(head, rows, labels, **options):
        rounds.append((len(steps), rows.clone(), labels.clone()))
        return train_head(head, rows, labels, **options)

    monkeypatch.setattr(PseudoCMSF, "forward", forward)
    monkeypatch.setattr(SCRIPT, "train_head", train)
    flags = (*FLAGS, "--cache_sup", *["--cache_conf_unsup"] * confident_too, "--conf_th", 0.34)
    flags = (*flags, "--sup_mem_bank_size", 500, "--label_fraction", 0.4, "--epochs", 3)
    flags = (*flags, "--knn_freq", -1, "--checkpoint_path", tmp_path, image_tree)
    result = call_script(SCRIPT, *flags)
    assert result[0] == 0, result
    assert [step for step, *_ in rounds] == [1, 3, 4, 6, 7, 9]
    for step, rows, labels in rounds:
        first = 3 * ((step - 1) // 3) if confident_too else 0
        expected = [row for written in steps[first:step] for row in written]
        assert labels.tolist() == [label for _, label in expected]
        assert torch.equal(rows, torch.stack([row for row, _ in expected]))
    assert any(guessed) == confident_too


def test_stopped_within_an_epoch_and_resumed(call_script, image_tree, tmp_path, monkeypatch):
    """The cache that is emptied at the start of each epoch keeps what the epoch had put there."""
    flags = (*FLAGS, "--cache_sup", "--cache_conf_unsup", "--label_fraction", 0.4, "--epochs", 2)
    flags = (*flags, "--knn_freq", -1, image_tree, "--checkpoint_path")
    assert call_script(SCRIPT, *flags, tmp_path / "whole")[0] == 0
    calls = []

    def forward(model, batch, *, own=PseudoCMSF.forward, **options):
        calls.append(len(model.cache.in_use("features")[0]))
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return own(model, batch, **options)

    monkeypatch.setattr(PseudoCMSF, "forward", forward)
    assert call_script(SCRIPT, *flags, tmp_path / "broken")[0] == 75
    assert call_script(SCRIPT, *flags, tmp_path / "broken", "--resume", "auto")[0] == 0
    assert calls[0] == calls[3] == 0 and len(calls) == 6 and calls[5] > calls[4] > 0
    names = (tmp_path / name / "ckpt_epoch_2.pth" for name in ("whole", "broken"))
    tiny.assert_same_checkpoint(*names)


def test_split_file_of_a_run_gives_the_same_run(call_script, image_tree, tmp_path):
    common = (*FLAGS, "--cache_sup", "--epochs", 1, "--knn_freq", -1, image_tree)
    drawn = ("--label_fraction", 0.2, "--split_seed", 3, "--checkpoint_path", tmp_path / "a")
    assert call_script(SCRIPT, *common, *drawn)[0] == 0
    named = ("--sup-split-file", tmp_path / "a" / "labeled.txt", "--checkpoint_path", tmp_path)
    assert call_script(SCRIPT, *common, *named)[0] == 0
    tiny.assert_same_checkpoint(tmp_path / "a" / "ckpt_epoch_1.pth", tmp_path / "ckpt_epoch_1.pth")


def test_evaluation_reads_what_training_wrote_of_any_names(call_script, tmp_path):
    root, names = (
        os.fsencode(tmp_path / "data"),
        (b"0.png", b"\n 1\xff.png", "2\u2028.png".encode()),
    )
    for seed, kind in enumerate((b"train", b" blank", b"caf\xe9")):
        for split in (b"train", b"val"):
            for name in names:
                path = os.path.join(root, split, kind, name)
                try:
                    write_image(Path(os.fsdecode(path)), seed=seed)
                except OSError:
                    pytest.skip("this file system has no such names")
    out, size = tmp_path / "out", ("--image_size", 16, "--num_workers", 0, "--epochs", 1)
    flags = (*FLAGS, *size, "--label_fraction", 0.7, "--checkpoint_path", out, tmp_path / "data")
    assert call_script(SCRIPT, *flags)[0] == 0
    written = (out / "labeled.txt").read_bytes().decode("ascii").split("\n")
    named = {json.loads(line) if line.startswith('"') else line for line in written if line}
    images = read_split(tmp_path / "data", "train")
    found = read_split_file(out / "labeled.txt", images, flag="--train_file")
    assert {images.name(number) for number in found} == named and len(named) == 6
    flags = (*size, "--cached", "--save", out, "--train-file", out / "labeled.txt")
    code, _, stderr = call_script(LINEAR, "--weights", "pixels", *flags, tmp_path / "data")
    assert code == 0, stderr
    assert json.loads((out / "linear.json").read_text())["counts"]["train"] == 6


def test_bad_input(call_script, image_tree, tmp_path):
    split = tmp_path / "split.txt"
    split.write_text("nothing.jpg\n")
    for flags, words in (
        (("--cache_conf_unsup",), ("--cache_conf_unsup", "--cache_sup")),
        (("--sup-split-file", split), ("--sup_split_file", "1 entries name no image")),
        (("--sup-split-file", split, "--label_fraction", 0.1), ("--label_fraction",)),
        (("--label_fraction", 0), ("--label_fraction", "0")),
        (("--conf_th", 2), ("--conf_th", "2")),
        (("--topk_plain", 21), ("--topk_plain 21", "--mem_bank_size 20")),
        (("--mlp_xent", "deep"), ("--mlp_xent", "deep")),
        (("--mlp_xent", "mlp", "--pseudo_batch_size", 1), ("--pseudo_batch_size 1", "batch norm")),
    ):
        code, _, stderr = call_script(SCRIPT, *tiny.FLAGS, *flags, image_tree)
        assert code == 2 and stderr.count("\n") == 1
        assert all(word in stderr for word in words), stderr


@pytest.mark.parametrize("rows", [1, 30])
def test_a_cache_too_small_for_the_head_is_warned_of(call_script, image_tree, tmp_path, rows):
    """All 30 images are labeled: a cache of one row never trains the head."""
    flags = (*FLAGS, "--cache_sup", "--sup_mem_bank_size", rows, "--epochs", 1, "--knn_freq", -1)
    code, stdout, stderr = call_script(SCRIPT, *flags, "--checkpoint_path", tmp_path, image_tree)
    assert code == 0, stderr
    warned = rows < 30
    assert ("WARNING --sup_mem_bank_size 1: below the 30 labeled images" in stdout) == warned
    assert ("WARNING the classifier head was not trained: 1 labeled" in stdout) == warned
