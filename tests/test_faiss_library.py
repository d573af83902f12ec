"""Without faiss all runs that needs none, and what needs it says so before it works for hours."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT
from test_bad_input import assert_refused

from utils.runtime import faiss_library
from utils.runtime.errors import InputError

NONE = "import sys\n\nsys.modules['faiss'] = None\n"  # as if it were not installed


def test_a_run_and_its_evaluation_need_no_faiss(image_tree, tmp_path):
    """By real processes: no module imports it at its head."""
    (tmp_path / "sitecustomize.py").write_text(NONE)
    flags = (*tiny.FLAGS, "--epochs", 1, "--checkpoint_path", tmp_path)
    evaluation = ("--weights", tmp_path / "ckpt_epoch_1.pth", "--num_workers", 0, "--epochs", 1)
    for script, *others in (
        ("self_supervised/train_msf_2q.py", *flags, "--knn_freq", -1),
        ("eval/eval_linear.py", *evaluation),
    ):
        command = [sys.executable, script, *map(str, others), str(image_tree)]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (start,) = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert start["versions"]["faiss"] == "none"


@pytest.mark.parametrize(
    ("script", "flags", "user"),
    [
        ("self_supervised.train_msf", (), "--knn_freq 0 (k-NN figures)"),
        ("supervised.train_sup_xent", ("--knn_freq", 2), "--knn_freq 2 (k-NN figures)"),
        ("self_supervised.train_msf_km", ("--knn_freq", -1), "k-means"),
        ("eval.eval_knn", ("--weights", "random"), "k-NN"),
    ],
)
def test_what_needs_faiss_says_so_at_once(
    call_script, without_package, image_tree, tmp_path, script, flags, user
):
    without_package("faiss")
    if not script.startswith("eval"):
        flags = (*flags, "--checkpoint_path", tmp_path / "run")
    result = call_script(importlib.import_module(script), *flags, image_tree)
    line = f"faiss: cannot be imported (faiss), and {user} needs it: pip install faiss-cpu"
    assert_refused(result, line)
    assert ("--knn_freq -1 trains without" in result[2]) == ("knn_freq" in user)
    assert not (tmp_path / "run").exists()


def test_a_flat_folder_has_no_figures_and_needs_no_faiss(
    call_script, without_package, image_tree, tmp_path
):
    without_package("faiss")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(image_tree / "train" / "a")
    flags = (*tiny.FLAGS, "--epochs", 1, "--checkpoint_path", tmp_path / "run")
    script = importlib.import_module("self_supervised.train_msf")
    code, stdout, stderr = call_script(script, *flags, tmp_path / "data")
    assert code == 0 and "no k-NN figures: the training images have no classes" in stdout, stderr


def test_its_version():
    assert faiss_library.version() == importlib.import_module("faiss").__version__


@pytest.mark.parametrize("error", [ImportError(), OSError("libcudart.so.12"), AttributeError("x")])
def test_a_faiss_that_is_broken_is_as_none(monkeypatch, error):
    class Breaks:
        @staticmethod
        def find_spec(name, *_):
            if name == "faiss":
                raise error

    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Breaks, *sys.meta_path])
    assert faiss_library.version() == "none"
    with pytest.raises(InputError, match="^faiss: cannot be imported .*, and k-NN needs it"):
        faiss_library.load("k-NN")
