"""eval_transfer.py on stand-ins of its data sets and on an image folder."""

import importlib
import json
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, write_image
from oracles import torchvision_resnet18
from stand_ins import WRITERS, without_checksums
from test_bad_input import assert_refused
from test_distributed import run

from utils.evaluation import transfer, transfer_data
from utils.evaluation.transfer import Protocol
from utils.runtime.errors import InputError

TRANSFER = importlib.import_module("eval.eval_transfer")
UNTRAINED = ("--weights", "random", "--arch", "conv4", "--image_size", 16, "-j", 0)
FEW = ("--l2", "0.01,1,100")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Three of the ten sets: one with val, one without, one in memory."""
    without_checksums(monkeypatch)
    folder = tmp_path / "sets"
    for name in ("aircraft", "food101", "cifar10"):
        WRITERS[name](folder)
    return folder


def record(folder) -> dict:
    return json.loads((folder / "transfer.json").read_text())


def test_a_set_against_a_plain_recomputation(call_script, tmp_path):
    """Features by torchvision one image at a time, classifier and choice by scikit-learn."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    model, transform = torchvision_resnet18(tmp_path / "plain.pth")
    WRITERS["dtd"](tmp_path)
    flags = ("--weights", tmp_path / "plain.pth", "--arch", "resnet18", "--image_size", 28)
    flags = (*flags, "--root", tmp_path, "--sets", "dtd", "--save", tmp_path, "-j", 0)
    strengths = [1e-3, 1e-1, 1.0, 10.0, 1e3]
    code, _, stderr = call_script(TRANSFER, *flags, "--l2", ",".join(map(str, strengths)))
    assert code == 0, stderr
    x, y = {}, {}
    for split in ("train", "val", "test"):
        images = torchvision.datasets.DTD(tmp_path, split=split, transform=transform)
        with torch.no_grad():
            x[split] = torch.cat([model(image[None]) for image, _ in images]).double().numpy()
        y[split] = np.array([label for _, label in images])

    def accuracy(l2, train, test) -> float:
        rows, labels = (np.concatenate([part[name] for name in train]) for part in (x, y))
        fitted = linear_model.LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000)
        return 100 * fitted.fit(rows, labels).score(x[test], y[test])

    on_val = {l2: accuracy(l2, ["train"], "val") for l2 in reversed(strengths)}
    chosen = max(on_val, key=on_val.get)
    row = record(tmp_path)["sets"]["dtd"]
    assert {step["l2"]: step["val"] for step in row["path"]} == pytest.approx(on_val)
    assert row["l2"] == chosen and row["metric"] == "top1"
    assert row["top1"] == pytest.approx(accuracy(chosen, ["train", "val"], "test"))
    assert row["counts"] == {"train": 18, "val": 9, "test": 12, "classes": 3}


def test_table_and_json_of_several_sets(call_script, root, tmp_path):
    """What is missing is named and left out; the mean is over what is there."""
    flags = (*UNTRAINED, *FEW, "--root", root, "--save", tmp_path / "deep" / "out")
    code, stdout, stderr = call_script(TRANSFER, *flags)
    assert code == 0, stderr
    found = record(tmp_path / "deep" / "out")
    assert list(found["sets"]) == ["food101", "cifar10", "aircraft"] == found["mean_of"]
    assert len(found["missing"]) == 7 and str(root / "dtd") in found["missing"]["dtd"]
    rows = found["sets"]
    assert rows["aircraft"]["metric"] == "mean_per_class" and rows["food101"]["metric"] == "top1"
    figures = [rows[name][rows[name]["metric"]] for name in rows]
    assert found["mean"] == pytest.approx(sum(figures) / 3)
    assert rows["aircraft"]["counts"] == {"train": 18, "val": 9, "test": 12, "classes": 3}
    assert rows["cifar10"]["counts"] == {"train": 36, "val": 9, "test": 9, "classes": 3}
    assert "20%" in rows["food101"]["splits"] and "20%" not in rows["aircraft"]["splits"]
    assert "l2/2 |W|^2" in found["protocol"] and "best val" in found["protocol"]
    assert found["l2"] == [0.01, 1.0, 100.0] and "--root" in found["command"]
    assert (found["arch"], found["image_size"], found["sha256"]) == ("conv4", 16, None)
    for row in rows.values():
        assert [step["l2"] for step in row["path"]] == [100.0, 1.0, 0.01]
        assert row["converged"] and row["l2"] in found["l2"]
    table = stdout.splitlines()
    assert any(line.startswith("mean of 3 ") for line in table) and "mean of 10" not in stdout
    assert any(line.startswith("DTD ") and "not there" in line for line in table)
    (line,) = [line for line in table if line.startswith("Aircraft ")]
    assert f"{rows['aircraft']['mean_per_class']:.2f}  mean per class" in line


def test_an_image_folder_alone_and_beside_sets(call_script, image_tree, root, tmp_path):
    """Its val/ is the test set; it does not count in the mean."""
    flags = (*UNTRAINED, "--l2", 1, "--save", tmp_path)
    code, stdout, stderr = call_script(TRANSFER, *flags, image_tree)
    assert code == 0, stderr
    found = record(tmp_path)
    assert found["mean"] is None and found["mean_of"] == [] and "mean of" not in stdout
    alone = found["sets"]["folder"]
    assert alone["counts"] == {"train": 24, "val": 6, "test": 12, "classes": 3}
    assert alone["path"] == [] and "as given" in found["protocol"]
    code, stdout, _ = call_script(TRANSFER, *flags, "--root", root, "--sets", "food101", image_tree)
    assert code == 0
    found = record(tmp_path)
    del alone["seconds"], found["sets"]["folder"]["seconds"]
    assert found["sets"]["folder"] == alone and found["mean_of"] == ["food101"]


def test_the_whole_grid_by_default(call_script, image_tree, tmp_path):
    assert call_script(TRANSFER, *UNTRAINED, "--save", tmp_path, image_tree)[0] == 0
    path = record(tmp_path)["sets"]["folder"]["path"]
    assert len(path) == 45 and (path[0]["l2"], path[-1]["l2"]) == pytest.approx((1e5, 1e-6))
    row = record(tmp_path)["sets"]["folder"]
    best = max(step["val"] for step in path)
    assert row["l2"] == max(step["l2"] for step in path if step["val"] == best)


def test_accuracy_by_hand():
    """Class 0: 3 of 4, class 1: 0 of 1, class 3: 1 of 1; class 2 does not occur."""
    predictions = torch.tensor([0, 0, 0, 2, 0, 3])
    labels = torch.tensor([0, 0, 0, 0, 1, 3])
    found = transfer.accuracies(predictions, labels)
    assert found == pytest.approx({"top1": 100 * 4 / 6, "mean_per_class": 100 * (0.75 + 0 + 1) / 3})


def blobs(counts: dict[str, list[int]], *, seed: int = 0, noise: float = 1.0) -> transfer.Features:
    """Features of classes around corners, by split and class."""
    rng = np.random.default_rng(seed)
    features = {}
    for split, sizes in counts.items():
        labels = np.repeat(np.arange(len(sizes)), sizes)
        rows = 3 * np.eye(8)[labels] + noise * rng.normal(size=(len(labels), 8))
        features[split] = torch.tensor(rows, dtype=torch.float32), torch.tensor(labels)
    return features


def test_a_class_that_val_lacks_and_one_that_train_lacks():
    """Each split is measured over the classes it holds."""
    features = blobs({"train": [9, 9, 9, 0], "val": [5, 0, 5, 0], "test": [6, 6, 6, 3]}, noise=0.1)
    figures = Protocol([1e-3, 1.0]).figures(features, "abcd", metric="mean_per_class")
    assert [step["val"] for step in figures["path"]] == [100, 100]
    assert figures["l2"] == 1.0  # the larger of equal ones
    assert figures["top1"] == pytest.approx(100 * 18 / 21)
    assert figures["mean_per_class"] == pytest.approx(75)


def test_the_choice_is_by_the_metric():
    """Many images of one class: strong regularization takes them all, the mean over classes not."""
    features = blobs({"train": [60, 4, 4], "val": [60, 4, 4], "test": [9, 9, 9]}, noise=2.5, seed=1)
    protocol = Protocol([1e4, 1e2, 1, 1e-2])
    by = {name: protocol.figures(features, "abc", metric=name) for name in transfer.METRICS}
    for figures in by.values():
        best = max(step["val"] for step in figures["path"])
        chosen = [step["val"] for step in figures["path"] if step["l2"] == figures["l2"]]
        assert chosen == [best]
    paths = [[step["val"] for step in figures["path"]] for figures in by.values()]
    assert paths[0] != paths[1]


def test_few_shot_of_scikit_learn_on_the_same_draws():
    """n images of every class, other ones in each draw; mean and spread by hand."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    features = blobs({"train": [12, 9, 7], "val": [3, 2, 4], "test": [50, 50, 20]}, noise=2)
    protocol = Protocol([0.5], shots=4, draws=3, seed=5)
    figures = protocol.figures(features, "abc", metric="top1")
    x = torch.cat([features["train"][0], features["val"][0]])
    y = torch.cat([features["train"][1], features["val"][1]]).numpy()
    x, test = (rows / rows.norm(dim=1, keepdim=True) for rows in (x, features["test"][0]))
    expected, drawn = [], []
    for draw in range(3):
        index = np.concatenate(
            [
                np.random.default_rng([5, draw, label]).permutation(np.flatnonzero(y == label))[:4]
                for label in range(3)
            ]
        )
        drawn.append(frozenset(index.tolist()))
        fitted = linear_model.LogisticRegression(C=2, tol=1e-8).fit(x[index], y[index])
        expected.append(100 * fitted.score(test, features["test"][1]))
    assert len(set(drawn)) == 3
    assert [row["top1"] for row in figures["draws"]] == pytest.approx(expected)
    assert figures["top1"] == pytest.approx(np.mean(expected))
    assert figures["top1_std"] == pytest.approx(np.std(expected, ddof=1))
    assert figures["mean_per_class"] != figures["top1"] and figures["converged"]
    once = protocol._replace(draws=1).figures(features, "abc", metric="top1")
    assert once["top1_std"] is None and once["draws"] == figures["draws"][:1]
    with pytest.raises(InputError, match="--shots 12: class b has 11"):
        protocol._replace(shots=12).figures(features, "abc", metric="top1")


def test_few_shot_in_table_and_json(call_script, root, image_tree, tmp_path):
    flags = (*UNTRAINED, "--shots", 3, "--draws", 4, "--save", tmp_path, "--root", root)
    code, stdout, stderr = call_script(TRANSFER, *flags, "--sets", "food101,aircraft", image_tree)
    assert code == 0, stderr
    found = record(tmp_path)
    assert (found["shots"], found["draws"], found["l2"]) == (3, 4, [1.0])
    assert "not chosen" not in found["protocol"] and "as given" in found["protocol"]
    for name in ("food101", "aircraft", "folder"):
        row = found["sets"][name]
        values = [draw[row["metric"]] for draw in row["draws"]]
        assert len(values) == 4 and row["l2"] == 1.0
        assert f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" in stdout


def test_shots_too_large_are_refused_before_the_work(call_script, root, image_tree, monkeypatch):
    monkeypatch.setattr(TRANSFER, "extract_features", None)
    flags = (*UNTRAINED, "--root", root, "--sets", "aircraft", "--shots", 10)
    assert_refused(call_script(TRANSFER, *flags), "--shots 10", "class banded 7 has 9")
    flags = (*UNTRAINED, "--shots", 11, image_tree)
    assert_refused(call_script(TRANSFER, *flags), "--shots 11", "class a has 10")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--sets", "dtd"), ("--sets dtd", "--root")),
        (("--download",), ("--download", "--root")),
        ((), ("--root",)),
        (("--root", "no/such"), ("--root no/such", "no such folder")),
        (("--root", ".", "--sets", "imagenet"), ("--sets", "imagenet", "food101")),
        (("--root", ".", "--sets", "dtd,dtd"), ("--sets", "twice")),
        (("--root", ".", "--sets", ""), ("--sets",)),
        (("--root", ".", "--l2", "0"), ("--l2", "0")),
        (("--root", ".", "--l2", "1,x"), ("--l2", "x")),
        (("--root", ".", "--shots", 0), ("--shots", "0")),
        (("--root", ".", "--draws", 3), ("--draws 3", "--shots")),
        (("--root", ".", "--shots", 3, "--l2", "1,2"), ("--l2", "--shots")),
        (("--root", ".", "--save", "/dev/null/x"), ("--save /dev/null/x",)),
        (("--root", ".", "--save", "/proc/self"), ("--save /proc/self: ",)),
        (("--root", "/dev/null/x", "--download"), ("--root /dev/null/x",)),
    ],
)
def test_flags_that_cannot_work(call_script, monkeypatch, flags, words):
    monkeypatch.setattr(TRANSFER, "open_sets", None)  # nothing is read, nothing is fetched
    assert_refused(call_script(TRANSFER, *UNTRAINED, *flags), *words)


def test_nothing_to_evaluate_is_an_error(call_script, tmp_path):
    result = call_script(TRANSFER, *UNTRAINED, "--root", tmp_path, "--sets", "dtd,pets")
    assert_refused(result, f"--root {tmp_path}", "dtd, pets", "not there")


def test_weights_are_needed(call_script, tmp_path):
    assert_refused(call_script(TRANSFER, "--root", tmp_path), "--weights")


def test_downloads_only_when_told(call_script, tmp_path, monkeypatch):
    """With a stand-in for the network; the folder is made."""
    calls = []

    def fetch(*args, **kwargs):
        calls.append(args)
        WRITERS["dtd"](tmp_path / "new")

    monkeypatch.setattr("torchvision.datasets.dtd.download_and_extract_archive", fetch)
    flags = (*UNTRAINED, "--l2", 1, "--root", tmp_path / "new", "--sets", "dtd")
    assert call_script(TRANSFER, *flags)[0] == 2 and not calls
    code, stdout, stderr = call_script(TRANSFER, *flags, "--download")
    assert code == 0, stderr
    assert len(calls) == 1 and "DTD" in stdout


def test_mean_of_ten_only_of_all_ten():
    row = {"metric": "top1", "top1": 50.0, "l2": 1.0, "converged": False, "counts": {"classes": 2}}
    names = list(transfer_data.SETS)
    for count in (10, 9, 1):
        some = dict.fromkeys(names[:count], row) | {"folder": row | {"top1": 0.0}}
        table = TRANSFER.format_table(some, missing={}, folder="mine")
        assert (f"mean of {count}" in table) == (count > 1)
        assert ("mean of 10" in table) == (count == 10)
        assert "mean of" not in table or table.splitlines()[-1].split()[-1] == "50.00"
        assert "(not converged)" in table and "\nmine  " in table


def test_broken_images_are_left_out_and_counted(call_script, image_tree, tmp_path):
    shutil.copytree(image_tree, tmp_path / "images")
    for name in ("train/a/3.jpg", "val/c/1.jpg"):
        (tmp_path / "images" / name).write_bytes(b"no image")
    flags = (*UNTRAINED, "--l2", 1, "--save", tmp_path, tmp_path / "images")
    assert_refused(call_script(TRANSFER, *flags), "a/3.jpg", "--bad_images skip")
    assert call_script(TRANSFER, *flags, "--bad_images", "skip")[0] == 0
    counts = record(tmp_path)["sets"]["folder"]["counts"]
    assert counts["train"] + counts["val"] == 29 and counts["test"] == 11
    assert len(record(tmp_path)["bad_images"]) == 2
    shots = call_script(TRANSFER, *flags, "--bad_images", "skip", "--shots", 10)
    assert_refused(shots, "--shots 10", "class a has 9")


def test_one_image_a_class_needs_a_given_strength(call_script, tmp_path):
    for number, name in enumerate("ab"):
        for split in ("train", "val"):
            write_image(tmp_path / split / name / "0.png", seed=number)
    assert_refused(call_script(TRANSFER, *UNTRAINED, tmp_path), "--l2", "no val image")
    assert call_script(TRANSFER, *UNTRAINED, "--l2", 1e-3, tmp_path)[0] == 0
    code, stdout, _ = call_script(TRANSFER, *UNTRAINED, "--shots", 1, "--l2", 1e-3, tmp_path)
    assert code == 0 and "100.00" in stdout  # val is train here


def test_one_class_is_refused(call_script, tmp_path):
    for split in ("train", "val"):
        write_image(tmp_path / split / "a" / "0.png", seed=0)
    assert_refused(call_script(TRANSFER, *UNTRAINED, tmp_path), "one class only, a")


def test_it_runs_from_its_own_folder(run_script, image_tree):
    flags = (*UNTRAINED, "--l2", 1, image_tree)
    done = run_script("eval/eval_transfer.py", *flags, cwd=ROOT / "eval")
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(call_script, image_tree, tmp_path):
    """As a process under torchrun."""
    WRITERS["dtd"](tmp_path)
    flags = (*UNTRAINED, *FEW, "--root", tmp_path, "--sets", "dtd,pets", image_tree)
    code, _, errors = run(
        ROOT / "eval" / "eval_transfer.py", *flags, "--save", tmp_path / "two", processes=2
    )
    assert code == 0, errors
    assert call_script(TRANSFER, *flags, "--save", tmp_path / "one")[0] == 0
    one, two = (record(tmp_path / name) for name in ("one", "two"))
    for found in (one, two):
        del found["command"]
        for row in found["sets"].values():
            del row["seconds"]
            row["path"] = [(step["l2"], step["val"]) for step in row["path"]]
    assert one == two
