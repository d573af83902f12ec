"""CMSF-KM: the whole step against a loop written from the paper, its refits, and the script."""

import importlib
import json

import oracles
import pytest
import tiny
import torch
from conftest import ROOT

from self_supervised.train_msf_km import CMSFKM
from utils.method.kmeans import kmeans

SCRIPT = importlib.import_module("self_supervised.train_msf_km")
FLAGS = (*tiny.FLAGS, "--num_clusters", 5)


def tiny_model(*, num_images=12, bank=10, topk=3, topk_plain=None, num_clusters=4):
    sizes = {"mem_bank_size": bank, "topk": topk, "num_clusters": num_clusters}
    sizes["topk_plain"] = topk_plain
    return CMSFKM(tiny.encoders(), num_images, **sizes).double()


class Paper:
    """Rows of the same cluster as the image has now; of an image without one, every row."""

    def __init__(self, model, *, bank, topk, topk_plain=None):
        self.encoders = tiny.PaperEncoders(model.encoders)
        self.size, self.topk, self.topk_plain = bank, topk, topk_plain or topk
        self.bank = []  # (embedding, image), oldest first
        self.last, self.cluster_of = {}, {}

    def loss(self, batch):
        q, t = self.encoders.embed(batch)
        images = batch.index.tolist()
        self.bank = [*self.bank, *zip(t, images, strict=True)][-self.size :]
        self.last |= dict(zip(images, t, strict=True))
        rows = [embedding for embedding, _ in self.bank]
        nearest = [oracles.nearest_rows(target, rows, k=self.topk) for target in t]
        plain, constrained = [], []
        for target, image in zip(t, images, strict=True):
            own = self.cluster_of.get(image)
            same = [own is None or self.cluster_of.get(other) == own for _, other in self.bank]
            plain.append(oracles.nearest_rows(target, rows, k=self.topk_plain))
            constrained.append(oracles.nearest_rows(target, rows, k=self.topk, allowed=same))
        self.figures = {
            "no_cluster": self.percent([image not in self.cluster_of for image in images]),
            "fewer_than_k": self.percent([len(c) < self.topk for c in constrained]),
            "purity_plain": self.purity(images, nearest),
            "purity_constrained": self.purity(images, constrained),
        }
        losses = [tiny.loss_over(q, rows, chosen) for chosen in (plain, constrained)]
        self.figures |= {"loss_plain": losses[0].item(), "loss_constrained": losses[1].item()}
        return sum(losses) / 2

    def purity(self, images, chosen):
        shares = [
            sum(self.bank[n][1] % 3 == image % 3 for n in numbers) / len(numbers)
            for image, numbers in zip(images, chosen, strict=True)
        ]
        return 100 * sum(shares) / len(shares)

    @staticmethod
    def percent(hits):
        return 100 * sum(hits) / len(hits)


def check_step(model, paper, batch, optimizers):
    """One step of both: the same loss and figures; whether the constraint was at work."""
    loss, stats = model(batch)
    expected = paper.loss(batch)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-11)
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(paper.figures)
    for optimizer, value in zip(optimizers, (loss, expected), strict=True):
        tiny.update(optimizer, value)
    return paper.figures["loss_plain"] != pytest.approx(paper.figures["loss_constrained"])


@pytest.mark.parametrize(
    ("bank", "topk", "topk_plain"),
    [(10, 3, None), (7, 4, None), (12, 1, None), (100, 5, None), (10, 3, 1), (10, 2, 4)],
)
def test_twelve_sgd_steps_with_given_clusters(bank, topk, topk_plain):
    """Some images have none, some are alone in theirs; other clusters from step 6 on."""
    ks = {"topk": topk, "topk_plain": topk_plain}
    model = tiny_model(bank=bank, **ks)
    paper = Paper(model, bank=bank, **ks)
    optimizers = tiny.sgd(model), paper.encoders.optimizer()
    at_work = 0
    for step, batch in enumerate(tiny.random_batches(12)):
        if step % 6 == 0:
            given = [0, 0, 1, 1, 1, 2, -1, 3, 3, 3, -1, 1] if step == 0 else [1, 2, 0, -1] * 3
            model.clusters = torch.tensor(given)
            paper.cluster_of = {image: c for image, c in enumerate(given) if c >= 0}
        at_work += check_step(model, paper, batch, optimizers)
    assert at_work >= (8 if topk > 1 else 0)


@pytest.mark.parametrize(("bank", "topk", "num_clusters"), [(10, 3, 4), (100, 4, 3), (9, 2, 50)])
def test_fifteen_sgd_steps_with_refits(bank, topk, num_clusters):
    """14 images in passes of 12: some are seen late, and have no cluster before."""
    sizes = {"bank": bank, "topk": topk}
    model = tiny_model(num_images=14, num_clusters=num_clusters, **sizes)
    paper = Paper(model, **sizes)
    optimizers = tiny.sgd(model), paper.encoders.optimizer()
    at_work = 0
    for step, batch in enumerate(tiny.random_batches(15, num_images=14), 1):
        at_work += check_step(model, paper, batch, optimizers)
        if step % 3 == 0:
            figures = model.refit(seed=[7, step])
            images = sorted(paper.last)
            last = torch.stack([paper.last[image] for image in images])
            found = kmeans(last, num_clusters=num_clusters, seed=[7, step])
            clusters = found.assignments.tolist()
            paper.cluster_of = dict(zip(images, clusters, strict=True))
            assert model.clusters.tolist() == [paper.cluster_of.get(i, -1) for i in range(14)]
            sizes = sorted(clusters.count(number) for number in set(clusters))
            assert figures["clusters"] == len(sizes)
            assert (figures["cluster_min"], figures["cluster_max"]) == (sizes[0], sizes[-1])
            assert figures["cluster_median"] == sizes[(len(sizes) - 1) // 2]
            assert figures["cluster_distance"] == pytest.approx(
                found.squared_distance.mean(), abs=1e-6
            )
    assert at_work >= 6


def test_before_any_refit_the_loss_is_plain():
    model = tiny_model()
    for batch in tiny.random_batches(3):
        _, stats = model(batch)
        assert stats["loss_constrained"] == stats["loss_plain"] and stats["no_cluster"] == 100


def test_script_and_resume_across_refits(call_script, image_tree, tmp_path):
    """3 of 30 images wait in every epoch; the break is in the middle of the third epoch."""
    flags = (*FLAGS, "--batch_size", 9, "--epochs", 4, "--save_freq", 1, "--knn_freq", 4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    runs = ((whole, ()), (broken, ("--resume", whole / "ckpt_epoch_2.pth", "--num_workers", 1)))
    for folder, resume in runs:
        code, stdout, stderr = call_script(
            SCRIPT, *flags, "--checkpoint_path", folder, *resume, image_tree
        )
        assert code == 0, stderr
        assert "\nCMSF-KM" in stdout
    tiny.assert_same_checkpoint(whole / "ckpt_epoch_4.pth", broken / "ckpt_epoch_4.pth")
    one, other = (tiny.state(whole / f"ckpt_epoch_{epoch}.pth")["state_dict"] for epoch in (2, 4))
    assert not torch.equal(one["clusters"], other["clusters"])
    assert torch.equal(other["clusters"] >= 0, other["previous.seen"])

    lines = [json.loads(line) for line in (whole / "log.jsonl").open()]
    refits = [line for line in lines if "clusters" in line]
    assert [(line["epoch"], line["step"]) for line in refits] == [(e, 3) for e in range(1, 5)]
    assert all(1 <= line["clusters"] <= 5 and line["refit_s"] >= 0 for line in refits)
    steps = [line for line in lines if "no_cluster" in line]
    assert steps[0]["no_cluster"] == 100 and steps[-1]["no_cluster"] < 50
    names = {"fewer_than_k", "purity_constrained", "purity_plain", "loss_plain", "spread"}
    assert names <= steps[0].keys()


def test_script_runs_from_its_folder_with_more_clusters_than_images(
    run_script, image_tree, tmp_path
):
    flags = (*tiny.FLAGS, "--debug", "--checkpoint_path", tmp_path, "--knn_freq", -1, image_tree)
    done = run_script("self_supervised/train_msf_km.py", *flags, cwd=ROOT / "self_supervised")
    assert done.returncode == 0, done.stderr
    state = tiny.state(tmp_path / "ckpt_epoch_2.pth")
    assert state["args"]["num_clusters"] == 50000
    clusters = state["state_dict"]["clusters"]
    assert len(clusters[clusters >= 0].unique()) == (clusters >= 0).sum() > 20


def test_bad_input(call_script, image_tree):
    for flags, words in (
        (("--num_clusters", 0), ("--num_clusters", "0")),
        (("--num_clusters", "many"), ("--num_clusters", "many")),
        (("--topk", 21), ("--topk 21", "--mem_bank_size 20")),
    ):
        code, _, stderr = call_script(SCRIPT, *tiny.FLAGS, *flags, image_tree)
        assert code == 2 and stderr.count("\n") == 1
        assert all(word in stderr for word in words), stderr


@pytest.mark.parametrize("count", [30, 31])
def test_more_clusters_than_images_are_warned_of(call_script, image_tree, tmp_path, count):
    flags = (*FLAGS, "--num_clusters", count, "--epochs", 1, "--knn_freq", -1)
    code, stdout, stderr = call_script(SCRIPT, *flags, "--checkpoint_path", tmp_path, image_tree)
    assert code == 0, stderr
    said = f"WARNING --num_clusters {count}: above the 30 training images"
    assert (said in stdout) == (count > 30)
