"""run_semisup_fullprecision.sh as a user runs it, made small by its own variables; its table."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

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
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "log.jsonl").touch()
    pictures = ["show_neighbors.py", "show_features.py", "report.py"]
    for report, expected in ((1, pictures), (0, [])):
        done = drive(tmp_path, DATA="/data", PYTHON=stub, TRAIN=0, REPORT=report, **off)
        assert done.returncode == 0, done.stderr
        assert calls.read_text().split() == ["compare.py", *expected]
        calls.unlink()


@pytest.mark.slow
def test_stages_switched_off_and_a_second_run(image_tree, tmp_path):
    off = {"KNN": 0, "LINEAR": 0, "FINETUNE": 0, "BASELINES": 0}
    done = drive(tmp_path, DATA=image_tree, **off)
    assert done.returncode == 0, done.stderr
    assert "=== training" in done.stdout and "=== k-NN" not in done.stdout
    page = (tmp_path / "report.html").read_text()
    assert "PseudoCMSF" in page
    assert "data:image/png;base64," in page and "data:image/svg+xml;base64," in page
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


def stub(folder, *, body=""):
    """A python that only notes which script it is to run, with its flags."""
    path, calls = folder / "python", folder / "calls"
    path.write_text(f'#!/bin/sh\necho "$(basename "$1")" "$@" >> "{calls}"\n{body}\n')
    path.chmod(0o755)
    return path, calls


def outputs(folder):
    """What a run of the driver leaves, as far as the driver looks at it."""
    for name in ("train/ckpt_epoch_2.pth", "semi/knn.json", "semi/finetune/linear.pth"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_other_settings_are_refused_and_anew_moves_aside_what_they_concern(tmp_path):
    python, calls = stub(tmp_path)
    out = tmp_path / "with blanks [1]"
    common = {"DATA": "/data", "PYTHON": python, "OUT": out, "BASELINES": 0}
    assert drive(tmp_path, **common).returncode == 0  # notes the settings
    done = drive(tmp_path, **common, SEED=3)
    assert done.returncode == 0, "nothing was made yet that could be lost"
    outputs(out)
    calls.unlink()
    for change, words in (
        ({"SEED": 7}, "SEED=3, not 7;"),
        ({"SEED": 3, "FT_LR": 5}, "FT_LR=0.001, not 5;"),
        ({"SEED": 3, "HEAD_SCHEDULE": "1 2"}, r"HEAD_SCHEDULE=15\,30\,40, not 1\ 2;"),
    ):
        done = drive(tmp_path, **common, **change)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert words in done.stderr and "ANEW=1" in done.stderr and not calls.exists()
    # What costs nothing or changes nothing may be otherwise.
    done = drive(tmp_path, **common, SEED=3, GPUS=2, WORKERS=1, KNN=0, REPORT=0)
    assert done.returncode == 0, done.stderr

    done = drive(tmp_path, **common, SEED=3, FT_LR=5, ANEW=1)
    assert done.returncode == 0, done.stderr
    assert (out / "train" / "ckpt_epoch_2.pth").exists()  # the training is the same
    assert (out / "earlier_1" / "semi" / "finetune" / "linear.pth").exists()
    assert "FT_LR=0.001" in (out / "earlier_1" / "settings.txt").read_text()
    assert not list(out.glob("semi/*.json"))
    outputs(out)
    done = drive(tmp_path, **common, SEED=7, FT_LR=5, ANEW=1)
    assert done.returncode == 0, done.stderr
    assert (out / "earlier_2" / "train" / "ckpt_epoch_2.pth").exists()
    assert not (out / "train").exists()
    assert drive(tmp_path, **common, SEED=7, FT_LR=5).returncode == 0


def test_before_the_training_the_evaluations_are_checked(image_tree, tmp_path):
    """Flags and images that an evaluation refuses end it before the training begins."""
    done = drive(tmp_path, DATA=image_tree, FT_BATCH_SIZE=1, KNN=0, LINEAR=0)
    assert done.returncode == 2 and "--batch_size 1" in done.stderr
    assert (
        "=== fine-tuning, checked before the training" in done.stdout
        and "=== training" not in done.stdout
    )


def test_a_signal_to_the_driver_reaches_the_stage_and_home_is_home(tmp_path):
    body = f'trap "echo told >> {tmp_path}/told; exit 75" TERM; touch {tmp_path}/started\n'
    python, _ = stub(tmp_path, body=body + "while :; do sleep 0.05; done")
    (tmp_path / "home").mkdir()
    small = {"PYTHON": python, "DATA": "/data", "OUT": "~/out", "HOME": tmp_path / "home", **SMALL}
    process = subprocess.Popen(
        ["bash", ROOT / "run_semisup_fullprecision.sh"],
        env={**os.environ, **{name: str(value) for name, value in small.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.terminate()
    _, error = process.communicate(timeout=30)
    assert process.returncode == 75 and (tmp_path / "told").read_text() == "told\n"
    assert "failed with exit code 75" in error and "the same command goes on from here" in error
    assert (tmp_path / "home" / "out" / "settings.txt").exists()
    assert not (ROOT / "~").exists()


# In which script and after how many lines of its output a run is stopped.
STAGES = {"training": 2, "linear, semi-supervised": 3, "fine-tuning, semi-supervised": 5}
LONGER = {
    "EPOCHS": 3,
    "LINEAR_EPOCHS": 400,
    "FT_EPOCHS": 12,
    "EVAL_FREQ": 1,
    "BASELINES": 0,
    "REPORT": 0,
}


def driven_until(folder, stage, lines, number, **variables):
    """Start the driver, send a signal to the process of a stage in the middle of it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    variables = {**SMALL, **variables, "OUT": folder, "PYTHON": sys.executable}
    environment |= {name: str(value) for name, value in variables.items()}
    process = subprocess.Popen(
        ["bash", ROOT / "run_semisup_fullprecision.sh"],
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line == f"=== {stage}\n":
            break
    for _ in range(lines):
        process.stdout.readline()
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    (child,) = Path(children).read_text().split()
    os.kill(int(child), number)
    _, error = process.communicate(timeout=300)
    return process.returncode, error


@pytest.mark.slow
def test_stopped_and_killed_it_goes_on_to_the_table_of_an_undisturbed_run(image_tree, tmp_path):
    """SIGTERM and kill -9 in each of three stages of one run, started again each time."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = drive(tmp_path, DATA=image_tree, OUT=whole, **LONGER)
    assert done.returncode == 0, done.stderr
    for stage, lines in STAGES.items():
        for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, 137)):
            found, error = driven_until(broken, stage, lines, number, DATA=image_tree, **LONGER)
            assert found == code, error
            assert f"stage '{stage}' failed" in error and "the same command goes on" in error
    done = drive(tmp_path, DATA=image_tree, OUT=broken, **LONGER)
    assert done.returncode == 0, done.stderr
    tables = [json.loads((out / "results.json").read_text()) for out in (whole, broken)]
    for table in tables:
        for row in table.values():
            row.pop("of")  # its sha256 tells of the time that the run took
    assert tables[0] == tables[1]
    assert not list(broken.glob("train/earlier_*")) and not list(broken.rglob("*.tmp"))
    done = drive(tmp_path, DATA=image_tree, OUT=broken, **LONGER)  # once more: nothing is left
    assert done.returncode == 0 and done.stdout.count("there already, nothing to do") == 3
    assert "epoch 1/" not in done.stdout
