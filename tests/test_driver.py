"""run_semisup_fullprecision.sh as a user runs it, made small by its own variables; its table."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

COMPARE = importlib.import_module("eval.compare")
SMALL = {
    **{"EPOCHS": 2, "BATCH_SIZE": 8, "MEM_BANK_SIZE": 20, "TOPK": 3, "WORKERS": 0},
    **{"ARCH": "conv4", "IMAGE_SIZE": 16, "SUP_MEM_BANK_SIZE": 16, "HEAD_EPOCHS": 2},
    **{"LINEAR_EPOCHS": 2, "FT_EPOCHS": 2, "FT_BATCH_SIZE": 4, "LABEL_FRACTION": 0.4},
}


def drive(folder, **variables):
    environment = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable},
        **{name: str(value) for name, value in {**SMALL, "OUT": folder, **variables}.items()},
    }
    return subprocess.run(
        ["bash", ROOT / "run_semisup_fullprecision.sh"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_the_whole_driver_twice_on_image_files(image_tree, tmp_path):
    """With a data path: every stage, then once more without training."""
    for train in (1, 0):
        done = drive(tmp_path, DATA=image_tree, TRAIN=train)
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / "results.json").read_text())
        assert list(results) == ["raw pixels", "random network", "semi-supervised CMSF"]
        for figures in results.values():
            assert 0 <= figures["20-NN"] <= 100 and 0 <= figures["linear"] <= 100
        assert results["semi-supervised CMSF"]["fine-tuned"] is not None
        assert results["random network"]["fine-tuned"] is None
    record = json.loads((tmp_path / "semi" / "finetune" / "linear.json").read_text())
    assert record["counts"]["train"] == 12  # the labeled images of the training
    assert record["checkpoint"].endswith("train/ckpt_epoch_2.pth")  # the last one


@pytest.mark.slow
def test_the_demo_compares_with_2q_and_the_labels_alone(tmp_path):
    """Without a data path, as the README has it; few epochs."""
    short = {"EPOCHS": 2, "CONSTRAINT_START": 1, "XENT_EPOCHS": 2}
    environment = {"LINEAR_EPOCHS": 2, "FT_EPOCHS": 2, "WORKERS": 0}
    environment |= {"OUT": tmp_path, "PYTHON": sys.executable, "OMP_NUM_THREADS": 1, **short}
    done = subprocess.run(
        ["bash", "run_semisup_fullprecision.sh"],
        cwd=ROOT,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 5
    assert results["the labels alone (cross-entropy)"]["fine-tuned"] is not None
    assert results["self-supervised 2Q"]["20-NN"] > results["raw pixels"]["20-NN"]


def test_stages_are_switched_off(tmp_path):
    """With a python that only says which script it is to run."""
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(f'#!/bin/sh\nbasename "$1" >> {calls}\n')
    stub.chmod(0o755)
    off = {"KNN": 0, "LINEAR": 0, "FINETUNE": 0, "BASELINES": 0}
    for change, expected in (
        ({}, ["train_pseudo_cmsf.py"]),
        ({"TRAIN": 0, "KNN": 1}, ["eval_knn.py"]),
        ({"TRAIN": 0, "LINEAR": 1}, ["eval_linear.py"]),
        ({"TRAIN": 0, "FINETUNE": 1}, ["eval_linear.py"]),
        ({"TRAIN": 0, "KNN": 1, "BASELINES": 1}, ["eval_knn.py"] * 3),
    ):
        done = drive(tmp_path, DATA="/data", PYTHON=stub, **{**off, **change})
        assert done.returncode == 0, done.stderr
        assert calls.read_text().split() == [*expected, "compare.py"]
        calls.unlink()


@pytest.mark.slow
def test_stages_switched_off_and_a_second_run(image_tree, tmp_path):
    off = {"KNN": 0, "LINEAR": 0, "FINETUNE": 0, "BASELINES": 0}
    done = drive(tmp_path, DATA=image_tree, **off)
    assert done.returncode == 0, done.stderr
    assert "=== training" in done.stdout and "=== k-NN" not in done.stdout
    assert "semi-supervised CMSF" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "train" / "neighbors.png").exists()
    done = drive(tmp_path, DATA=image_tree, **{**off, "TRAIN": 0, "KNN": 1})
    assert done.returncode == 0, done.stderr
    assert "=== training" not in done.stdout and "=== k-NN, semi-supervised" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["semi-supervised CMSF"]["1-NN"] is not None


def test_the_first_failing_stage_is_named_and_stops(image_tree, tmp_path):
    done = drive(tmp_path, DATA=image_tree, TRAIN=0)
    assert done.returncode == 2
    assert "stage 'k-NN, semi-supervised' failed with exit code 2" in done.stderr
    assert "no such file" in done.stderr
    assert "=== linear" not in done.stdout and not (tmp_path / "results.json").exists()


def test_table_of_results(call_script, tmp_path, capsys):
    full, part = tmp_path / "full", tmp_path / "part"
    for folder in (full / "linear", full / "finetune", part):
        folder.mkdir(parents=True)
    knn = {"k": {"1": {"accuracy": 61.25}, "20": {"accuracy": 70.0}}}
    (full / "knn.json").write_text(json.dumps(knn))
    (full / "linear" / "linear.json").write_text(json.dumps({"top1": 80.5}))
    (full / "finetune" / "linear.json").write_text(json.dumps({"top1": 90.75}))
    code, stdout, _ = call_script(COMPARE, "--save", tmp_path, f"a b={full}", f"c={part}")
    assert code == 0
    assert "a b        61.2        70.0        80.5        90.8" in stdout
    assert "c             -           -           -           -" in stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["a b"]["linear"] == 80.5 and results["c"]["1-NN"] is None

    for bad in ("a", f"a={tmp_path / 'none'}"):
        code, _, stderr = call_script(COMPARE, bad)
        assert code == 2 and bad in stderr
    (part / "knn.json").write_text("{")
    code, _, stderr = call_script(COMPARE, f"c={part}")
    assert code == 2 and "no result file" in stderr
