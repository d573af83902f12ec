"""eval_knn.py as a process, on checkpoints of ours and of torchvision."""

import hashlib
import importlib
import json
import os

import pytest
import torch
import torchvision
from conftest import write_image
from oracles import torchvision_resnet18
from test_bad_input import assert_refused

from utils.evaluation import feature_cache
from utils.method.encoders import build_backbone

KNN = importlib.import_module("eval.eval_knn")
UNTRAINED = ("--weights", "random", "--arch", "conv4", "--image_size", 16, "-j", 0)


def test_checkpoint_of_ours_gives_the_figures_of_training(
    call_script, run_script, image_tree, tmp_path
):
    """What training logs after the last epoch is what the evaluation finds in the checkpoint."""
    flags = ("--arch", "conv4", "--image_size", 16, "--batch_size", 8, "--mem_bank_size", 20)
    flags += ("--epochs", 1, "--num_workers", 0, "--checkpoint_path", tmp_path, image_tree)
    code, _, stderr = call_script(importlib.import_module("self_supervised.train_msf_2q"), *flags)
    assert code == 0, stderr
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").open()][-1]["knn"]

    weights = tmp_path / "ckpt_epoch_1.pth"
    flags = ("--weights", weights, "-k", 3, "-j", 0, "--save", tmp_path / "deep" / "out")
    done = run_script("eval/eval_knn.py", *flags, image_tree)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "deep" / "out" / "knn.json").read_text())
    assert list(record["k"]) == ["1", "3", "5", "10", "20"]
    for k, figures in logged.items():
        assert record["k"][k] == pytest.approx(figures)
    assert record["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record["counts"] == {"train": 30, "val": 12, "classes": 3}
    assert record["left_out"] == {"train": {}, "val": {}}
    assert (record["arch"], record["image_size"], record["epoch"]) == ("conv4", 16, 1)
    assert "-k 3" in record["command"]
    for row in record["k"].values():
        assert 0 <= row["accuracy"] <= 100 and 0 <= row["purity"] <= 100
        assert 0 <= row["weighted"] <= 100
        assert row["top5"] is None and row["weighted_top5"] is None  # three classes
    assert f"{record['k']['20']['accuracy']:.2f}" in done.stdout


def test_torchvision_weights_against_a_plain_recomputation(call_script, image_tree, tmp_path):
    """1-NN by torchvision's own model and transforms, one image at a time, and torch alone."""
    model, transform = torchvision_resnet18(tmp_path / "plain.pth")
    flags = ("--weights", tmp_path / "plain.pth", "--arch", "resnet18", "--image_size", 28)
    code, stdout, stderr = call_script(KNN, *flags, "-j", 0, "--save", tmp_path, image_tree)
    assert code == 0, stderr
    record = json.loads((tmp_path / "knn.json").read_text())
    features, labels = {}, {}
    for split in ("train", "val"):
        folder = torchvision.datasets.ImageFolder(image_tree / split, transform)
        with torch.no_grad():
            rows = torch.cat([model(image[None]) for image, _ in folder])
        features[split] = rows / rows.norm(dim=1, keepdim=True)
        labels[split] = torch.tensor(folder.targets)
    nearest = torch.cdist(features["val"], features["train"]).argmin(dim=1)
    accuracy = 100 * (labels["train"][nearest] == labels["val"]).double().mean().item()
    assert record["k"]["1"]["accuracy"] == pytest.approx(accuracy)
    assert record["k"]["1"]["purity"] == pytest.approx(accuracy)


def test_top5_where_there_are_more_than_five_classes(call_script, tmp_path):
    for number in range(6):
        for split in ("train", "val"):
            write_image(tmp_path / split / str(number) / "1.png", seed=number)
    code, stdout, stderr = call_script(KNN, *UNTRAINED, "--save", tmp_path, tmp_path)
    assert code == 0, stderr
    rows = json.loads((tmp_path / "knn.json").read_text())["k"]
    assert {k: (row["top5"], row["weighted_top5"]) for k, row in rows.items()} == {
        "1": (100.0, 100.0),  # val is train here
        "5": (100.0, 100.0),
    }
    assert "top-5" in stdout


def test_temperature_counts(call_script, image_tree, tmp_path):
    """The colder, the more it is 1-NN; the warmer, the more it is the majority."""
    figures = {}
    for temperature in (1e-6, 1e6):
        flags = (*UNTRAINED, "--temperature", temperature, "--save", tmp_path)
        assert call_script(KNN, *flags, image_tree)[0] == 0
        record = json.loads((tmp_path / "knn.json").read_text())
        assert record["temperature"] == temperature
        figures[temperature] = record["k"]
    assert figures[1e-6]["20"]["weighted"] == figures[1e-6]["1"]["accuracy"]
    assert figures[1e6]["10"]["weighted"] == figures[1e6]["10"]["accuracy"]
    assert figures[1e6]["20"]["accuracy"] != figures[1e6]["1"]["accuracy"]


def test_a_protocol_by_name(call_script, image_tree, tmp_path):
    """Its k as far as there are images, its column and temperature; another is another result."""
    lines = tmp_path / "acc.csv"
    flags = (*UNTRAINED, "--save", tmp_path, "--save-acc", lines, "--epoch", 3)
    code, out, _ = call_script(KNN, *flags, "--protocol", "dino", "-k", 3, image_tree)
    record = json.loads((tmp_path / "knn.json").read_text())
    assert code == 0 and list(record["k"]) == ["3", "10", "20"] and record["temperature"] == 0.07
    assert record["protocol"].startswith("dino: vote weighted by exp(similarity / temperature)")
    assert "k 100, 200 of protocol dino left out" in out
    assert "protocol dino: its own column is weighted, " in out
    weighted = [row["weighted"] for row in record["k"].values()]
    assert weighted != [row["accuracy"] for row in record["k"].values()]
    assert [float(cell) for cell in lines.read_text().split(",")] == [3, *weighted]

    flags = (*UNTRAINED, "--save", tmp_path, "--keep_done", "-k", 20)
    code, out, _ = call_script(KNN, *flags, "--protocol", "lightly", image_tree)
    assert code == 0 and "has another --protocol (dino)" in out.replace("'", "")
    record = json.loads((tmp_path / "knn.json").read_text())
    assert list(record["k"]) == ["20"] and record["temperature"] == 0.1
    assert record["settings"]["protocol"] == "lightly"
    assert "there already" in call_script(KNN, *flags, "--protocol", "lightly", image_tree)[1]
    code, out, _ = call_script(KNN, *flags, image_tree)
    assert json.loads((tmp_path / "knn.json").read_text())["protocol"].startswith("cmsf: majority")


def test_features_saved_and_loaded_give_equal_numbers(
    call_script, image_tree, tmp_path, monkeypatch
):
    first, second = tmp_path / "first", tmp_path / "second"
    flags = (*UNTRAINED, "--save", first, "--save_features", image_tree)
    assert call_script(KNN, *flags)[0] == 0
    monkeypatch.setattr(feature_cache, "extract", None)  # nothing may be extracted
    flags = (*UNTRAINED, "--save", second, "--load_cache", first / "features.pth")
    code, _, stderr = call_script(KNN, *flags, image_tree)
    assert code == 0, stderr
    one, two = (json.loads((folder / "knn.json").read_text()) for folder in (first, second))
    assert one["k"] == two["k"]
    assert not (second / "features.pth").exists()


def test_features_of_something_else_are_refused(call_script, image_tree, tmp_path):
    flags = (*UNTRAINED, "--save", tmp_path, "--save-features", image_tree)
    assert call_script(KNN, *flags)[0] == 0
    cache = tmp_path / "features.pth"
    load = (*UNTRAINED, "--load-cache", cache)
    for other, words in (
        (("--seed", 1), ["another checkpoint"]),
        (("--image_size", 24), ["another image size"]),
        (("--label_fraction", 0.5), ["another train images"]),
        (("--arch", "resnet18", "--image_size", 32), ["another arch, image size"]),
    ):
        refused = call_script(KNN, *load, *other, image_tree)
        assert_refused(refused, f"--load_cache {cache}", *words)
    cache.write_bytes(cache.read_bytes()[:-100])
    assert_refused(call_script(KNN, *load, image_tree), f"--load_cache {cache}", "not a readable")
    missing = (*UNTRAINED, "--load_cache", tmp_path / "none.pth", image_tree)
    assert_refused(call_script(KNN, *missing), "--load_cache", "no such file")


def test_features_of_other_pixels_in_files_that_look_the_same(call_script, tmp_path):
    """Two pictures change places, and every file keeps its size and time."""
    for number, name in enumerate("ab"):
        for split in ("train", "val"):
            write_image(tmp_path / split / name / "0.bmp", seed=number)
    files = [tmp_path / "train" / name / "0.bmp" for name in "ab"]
    for path in files:
        os.utime(path, ns=(10**9, 10**9))
    flags = (*UNTRAINED, "--save", tmp_path, tmp_path)
    assert call_script(KNN, *flags, "--save-features")[0] == 0
    for path in files:
        os.utime(path, ns=(10**9, 2 * 10**9))
    load = ("--load-cache", tmp_path / "features.pth")
    assert call_script(KNN, *flags, *load)[0] == 0  # times do not matter
    pictures = [path.read_bytes() for path in files]
    for path, picture in zip(files, reversed(pictures), strict=True):
        path.write_bytes(picture)
        os.utime(path, ns=(10**9, 2 * 10**9))
    assert_refused(call_script(KNN, *flags, *load), "--load_cache", "another train images")


def test_a_network_that_is_not_finite_ends_in_words(call_script, image_tree, tmp_path):
    """Nothing is written; the first image is named. Here a variance is below zero."""
    state = build_backbone("conv4").module.state_dict()
    last = [value for name, value in state.items() if name.endswith("running_var")][-1]
    last[0] = -1
    torch.save(state, tmp_path / "ckpt.pth")
    flags = ("--weights", tmp_path / "ckpt.pth", "--arch", "conv4", "--image_size", 16, "-j", 0)
    code, _, stderr = call_script(KNN, *flags, "--save", tmp_path, "--save-features", image_tree)
    assert code == 1 and stderr.count("\n") == 1
    first = image_tree / "train" / "a" / "0.jpg"
    assert f"30 of 30 images are not finite, first image {first}" in stderr
    assert "weights are finite, but what it makes of images is not" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pth"]


def test_accuracies_are_appended(call_script, image_tree, tmp_path):
    lines = tmp_path / "acc.csv"
    for epoch in (3, 4):
        flags = (*UNTRAINED, "--save-acc", lines, "--epoch", epoch, "--save", tmp_path)
        assert call_script(KNN, *flags, image_tree)[0] == 0
    rows = json.loads((tmp_path / "knn.json").read_text())["k"]
    written = [[float(cell) for cell in line.split(",")] for line in lines.read_text().splitlines()]
    accuracies = [row["accuracy"] for row in rows.values()]
    assert written == [[3, *accuracies], [4, *accuracies]]


def test_the_epoch_of_the_line_is_the_checkpoints(call_script, image_tree, tmp_path):
    model = torchvision.models.resnet18(weights=None)
    torch.save({"state_dict": model.state_dict(), "epoch": 12}, tmp_path / "ckpt.pth")
    flags = ("--weights", tmp_path / "ckpt.pth", "--arch", "resnet18", "--image_size", 32, "-j", 0)
    assert call_script(KNN, *flags, "--save_acc", tmp_path / "acc", image_tree)[0] == 0
    assert (tmp_path / "acc").read_text().startswith("12,")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--temperature", 0), ("--temperature", "0")),
        (("--save_features",), ("--save_features", "--save")),
        (("--save_acc", "acc.csv"), ("--save_acc acc.csv", "--epoch")),
        (("--save_acc", "/dev/null/x", "--epoch", 1), ("--save_acc /dev/null/x",)),
        (("--save_acc", __file__, "--epoch", 1), (f"--save_acc {__file__}", "no list of figures")),
        (("--save", "/dev/null/x"), ("--save /dev/null/x",)),
        (("--save", "/proc/self"), ("--save /proc/self: ",)),
        (("--epoch", "x"), ("--epoch", "x")),
        (("--keep_done",), ("--keep_done", "--save")),
        (("--protocol", "lightly"), ("--protocol lightly", "k 200", "only 30 training images")),
        (("--protocol", "dino", "-k", 31), ("-k 31", "only 30 training images")),
    ],
)
def test_flags_that_cannot_work(call_script, image_tree, monkeypatch, flags, words):
    """Refused before the work, not after it."""
    monkeypatch.setattr(feature_cache, "extract", None)
    assert_refused(call_script(KNN, *UNTRAINED, *flags, image_tree), *words)


def test_a_result_that_is_there_is_kept(call_script, image_tree, tmp_path, monkeypatch):
    flags = (*UNTRAINED, "--keep_done", "--save", tmp_path)
    assert call_script(KNN, *flags, image_tree)[0] == 0
    path = tmp_path / "knn.json"
    before, figures = path.read_bytes(), json.loads(path.read_text())["k"]["20"]
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "extract", None)
        for only in ((), ("--check",)):
            code, out, _ = call_script(KNN, *flags, *only, image_tree)
            assert code == 0 and path.read_bytes() == before
            assert ("there already" in out) == (not only)
            assert (f"20: accuracy {figures['accuracy']:g}" in out) == (not only)
    for change, reason in (("--seed", 1), "seed"), (("--temperature", 1), "--temperature (0.07)"):
        _, out, _ = call_script(KNN, *flags, *change, image_tree)
        assert f"--keep_done: {path} has another {reason}: replaced" in out
        assert call_script(KNN, *flags, image_tree)[0] == 0
    assert json.loads(path.read_text())["k"]["20"] == figures
    path.write_text("")  # as a full disk left it before files were written whole
    code, out, _ = call_script(KNN, *flags, image_tree)
    assert code == 0 and f"{path}: no result file" in out
    assert json.loads(path.read_text())["k"]["20"] == figures
