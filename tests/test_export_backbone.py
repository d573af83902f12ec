"""export_backbone.py: what it writes gives equal output here, in torchvision and in timm."""

import argparse
import importlib
import itertools
import json
import os

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT
from linear_runs import write_checkpoint
from test_bad_input import assert_refused
from test_checkpoint import Malicious, published_layout
from tiny import FLAGS
from torch import nn

from utils.data.eval_loader import EvalLoader
from utils.evaluation import linear_run
from utils.method import checkpoint
from utils.method.encoders import QueryTargetEncoders, build_backbone
from utils.runtime import files, safetensors_file
from utils.runtime.errors import DamagedError

EXPORT = importlib.import_module("eval.export_backbone")
EXTRACT = importlib.import_module("eval.extract_features")
KNN = importlib.import_module("eval.eval_knn")
LINEAR = importlib.import_module("eval.eval_linear")
TRAIN = importlib.import_module("self_supervised.train_msf_2q")
FORMAT = "cmsf-backbone-1"
ENDINGS = ["pth", "safetensors"]
# Name, the last layer's name in torchvision, its replacement there.
NETWORKS = [("resnet18", "fc"), ("resnet50", "fc"), ("densenet121", "classifier")]


def read(path):
    """An exported file's state dict, by the libraries alone."""
    if path.suffix == ".pth":
        return torch.load(path, weights_only=True)["state_dict"]
    return pytest.importorskip("safetensors.torch").load_file(path)


def read_metadata(path):
    """An exported file's metadata; in .safetensors all are text."""
    if path.suffix == ".pth":
        return torch.load(path, weights_only=True)["metadata"]
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(arch, last layer) -> a checkpoint in the published layout, query unlike target.

    No batch norm has its initial statistics, and no layer its initial scale.
    """
    folder = tmp_path_factory.mktemp("published")

    def get(arch):
        path = folder / f"{arch}.pth"
        if not path.exists():
            torch.manual_seed(0)
            backbone = build_backbone(arch)
            encoders = QueryTargetEncoders(backbone.module, backbone.feature_dim, hidden_dim=8)
            for name, value in encoders.state_dict().items():
                if name.endswith(("running_mean", "bias")):
                    value.normal_(std=0.1)
                elif name.endswith("running_var"):
                    value.uniform_(0.5, 2)
            for value in encoders.target_encoder.parameters():
                value.mul_(0.9)
            state = published_layout(encoders)
            if backbone.classifier != "fc":  # the published code took ResNets only
                ours = {f"encoders.{n}": v for n, v in encoders.state_dict().items()}
                state = {"state_dict": ours, "epoch": 200, "args": {"arch": arch}}
            torch.save(state, path)
        return path

    return get


def expected_weights(path, arch, encoder):
    """What the file holds of one encoder's backbone, taken out by hand."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path, weights_only=True)["state_dict"]
    if arch == "densenet121":
        prefix = f"encoders.{encoder}_encoder.backbone."
    else:
        prefix = f"encoder_{encoder[0]}.module."
    weights = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    return {name: v for name, v in weights.items() if not name.startswith("fc.")}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("encoder", ["query", "target"])
def test_weights_and_metadata(call_script, published, tmp_path, encoder, ending):
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    source, out = published("resnet18"), tmp_path / f"out.{ending}"
    flags = ("--use_target",) if encoder == "target" else ()
    code, said, errors = call_script(EXPORT, "--weights", source, *flags, "--output", out)
    assert code == 0, errors
    weights, expected = read(out), expected_weights(source, "resnet18", encoder)
    assert weights.keys() == expected.keys() and not any(name.startswith("fc") for name in weights)
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name
    about = read_metadata(out)
    expected = {
        "arch": "resnet18",
        "encoder": encoder,
        "checkpoint_sha256": files.sha256(source),
        "epoch": 200,
        "image_size": 224,
        "feature_dim": 512,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "small_stem": False,
        "view": EvalLoader.VIEW,
    }
    if ending == "safetensors":
        numbers = {"epoch": "200", "image_size": "224", "feature_dim": "512"}
        lists = {"mean": "[0.485, 0.456, 0.406]", "std": "[0.229, 0.224, 0.225]"}
        expected |= {**numbers, **lists, "small_stem": "false", "format": "pt", "cmsf": FORMAT}
    assert about == expected
    assert f"encoder: {encoder}" in said
    assert os.listdir(tmp_path) == [out.name]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(("arch", "last"), NETWORKS)
def test_torchvision_and_timm_load_strictly(call_script, published, tmp_path, arch, last, ending):
    """Their outputs are those of our own network."""
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    source, out = published(arch), tmp_path / f"out.{ending}"
    assert call_script(EXPORT, "--weights", source, "--arch", arch, "--output", out)[0] == 0
    backbone = build_backbone(arch)
    backbone.module.load_state_dict(expected_weights(source, arch, "query"))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = backbone.module.eval()(images)
        assert expected.std() > 0.01
        model = getattr(torchvision.models, arch)(weights=None)
        setattr(model, last, nn.Identity())
        model.load_state_dict(read(out))
        torch.testing.assert_close(model.eval()(images), expected, rtol=1e-6, atol=1e-6)
        timm = pytest.importorskip("timm")
        model = timm.create_model(arch, num_classes=0)
        model.load_state_dict(read(out))
        torch.testing.assert_close(model.eval()(images), expected, rtol=1e-6, atol=1e-6)
        model = timm.create_model(arch, num_classes=0, checkpoint_path=out)
        torch.testing.assert_close(model.eval()(images), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ending", ENDINGS)
def test_our_scripts_read_it_again(call_script, image_tree, tmp_path, ending):
    """From a run with a small stem: it needs neither flag again, and results are equal."""
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    run, out = tmp_path / "run", tmp_path / f"out.{ending}"
    flags = (*FLAGS, "--arch", "resnet18", "--small_stem", "--image_size", 8, "--topkp", 5)
    flags += ("--epochs", 1, "--debug", "--knn_freq", -1)
    assert call_script(TRAIN, *flags, "--checkpoint_path", run, image_tree)[0] == 0
    source = next(run.glob("*.pth"))
    assert call_script(EXPORT, "--weights", source, "--output", out)[0] == 0
    figures = []
    for weights in (source, out):
        save = ("-j", 0, "--save", tmp_path)
        code, _, errors = call_script(KNN, "--weights", weights, *save, image_tree)
        assert code == 0, errors
        record = json.loads((tmp_path / "knn.json").read_text())
        figures.append([record[name] for name in ("k", "epoch", "arch", "image_size", "encoder")])
    assert figures[0] == figures[1]
    state = checkpoint.load(out, flag="--weights")
    about, original = checkpoint.metadata(state), torch.load(source, weights_only=True)
    assert about["small_stem"] is True and about["data"] == original["data"]
    assert about["method"] == original["method"] and about["arch"] == "resnet18"
    flags += ("--weights", out, "--checkpoint_path", tmp_path / "second")
    code, said, errors = call_script(TRAIN, *flags, image_tree)
    assert code == 0 and "backbone only" in said, errors


def test_a_fine_tuned_encoder_and_an_exported_one(call_script, image_tree, tmp_path):
    """linear.pth to .pth to .safetensors and back: weights and origin stay."""
    pytest.importorskip("safetensors")
    source = write_checkpoint(tmp_path / "ours.pth")
    flags = ("--weights", source, "--fine-tune", "--lr", 0.1, "--epochs", 1, "-b", 15, "-j", 0)
    assert call_script(LINEAR, *flags, "--save", tmp_path, image_tree)[0] == 0
    tuned = tmp_path / "linear.pth"
    paths = [tuned, *(tmp_path / name for name in ("one.pth", "two.safetensors", "three.pth"))]
    for before, after in itertools.pairwise(paths):
        code, _, errors = call_script(EXPORT, "--weights", before, "--output", after)
        assert code == 0, errors
    saved = torch.load(tuned, weights_only=True)
    weights = read(paths[-1])
    assert {linear_run.ENCODER + n for n in weights} == saved["state_dict"].keys()
    assert all(
        torch.equal(v, saved["state_dict"][linear_run.ENCODER + n]) for n, v in weights.items()
    )
    about = read_metadata(paths[-1])
    assert about == read_metadata(paths[1])
    assert about["checkpoint_sha256"] == files.sha256(tuned)
    assert about["protocol"] == saved["protocol"] and about["data"] == saved["key"]


def test_an_exported_target_encoder_is_called_that(call_script, image_tree, tmp_path):
    source, out = write_checkpoint(tmp_path / "ours.pth"), tmp_path / "target.pth"
    flags = ("--weights", source, "--use_target", "--output", out)
    assert call_script(EXPORT, *flags)[0] == 0
    flags = ("--weights", out, "-j", 0, "--save", tmp_path, image_tree)
    assert call_script(KNN, *flags)[0] == 0
    assert json.loads((tmp_path / "knn.json").read_text())["encoder"] == "target"
    assert call_script(KNN, "--use_target", *flags)[0] == 0
    assert call_script(EXPORT, "--weights", source, "--output", out, "--force")[0] == 0
    refused = call_script(KNN, "--use_target", *flags)
    assert_refused(refused, f"--weights {out}", "no target encoder in it, but query")


def test_files_of_others(call_script, tmp_path):
    """A torchvision state dict as .safetensors, with a header that means nothing to us."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = torchvision.models.resnet18(weights=None)
    source, out = tmp_path / "theirs.safetensors", tmp_path / "out.pth"
    safetensors.save_file(model.state_dict(), source, {"arch": "vit", "image_size": "x"})
    flags = ("--weights", source, "--arch", "resnet18", "--output", out)
    code, _, errors = call_script(EXPORT, *flags)
    assert code == 0, errors
    assert torch.equal(read(out)["conv1.weight"], model.conv1.weight)
    assert read_metadata(out).keys().isdisjoint({"epoch", "method", "data"})


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_overwritten_unasked(call_script, tmp_path, ending):
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    source, out = write_checkpoint(tmp_path / "ours.pth"), tmp_path / f"out.{ending}"
    out.write_bytes(b"precious")
    flags = ("--weights", source, "--output", out)
    assert_refused(call_script(EXPORT, *flags), f"--output {out}", "--force")
    assert out.read_bytes() == b"precious"
    assert call_script(EXPORT, *flags, "--force")[0] == 0
    assert len(read(out)) == 24  # four convolutions, and five of each batch norm
    whole = source.read_bytes()
    (tmp_path / "link.pth").symlink_to(source)
    for same in (source, tmp_path / "link.pth"):
        refused = call_script(EXPORT, "--weights", source, "--output", same, "--force")
        assert_refused(refused, f"--output {same}", "--weights itself")
    assert source.read_bytes() == whole


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_half_file(call_script, tmp_path, monkeypatch, ending):
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    source, out = write_checkpoint(tmp_path / "ours.pth"), tmp_path / f"out.{ending}"

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    code, _, errors = call_script(EXPORT, "--weights", source, "--output", out)
    assert code == 1 and "No space left on device" in errors and errors.count("\n") == 1
    assert os.listdir(tmp_path) == ["ours.pth"]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("out.onnx", ("out.onnx", ".pth, .safetensors")),
        ("out", ("out: ends in none",)),
        ("none/out.pth", ("none/out.pth", "no folder")),
        ("folder.pth", ("folder.pth: is a folder",)),
        ("pipe.pth", ("pipe.pth: not a regular file",)),
        ("/proc/self/out.pth", ("/proc/self: ",)),
    ],
)
def test_outputs_that_cannot_be(call_script, tmp_path, output, words):
    source = write_checkpoint(tmp_path / "ours.pth")
    (tmp_path / "folder.pth").mkdir()
    os.mkfifo(tmp_path / "pipe.pth")
    refused = call_script(EXPORT, "--weights", source, "--force", "--output", tmp_path / output)
    assert_refused(refused, "--output", *words)
    assert sorted(os.listdir(tmp_path)) == ["folder.pth", "ours.pth", "pipe.pth"]


def test_weights_that_cannot_be(call_script, tmp_path):
    out = ("--output", tmp_path / "out.pth")
    assert_refused(call_script(EXPORT, "--weights", "x.pth"), "--output")
    assert_refused(call_script(EXPORT, *out), "--weights")
    for name in ("random", "pixels", "no/such.pth"):
        assert_refused(call_script(EXPORT, "--weights", name, *out), f"--weights {name}")
    source = write_checkpoint(tmp_path / "ours.pth")
    refused = call_script(EXPORT, "--weights", source, "--arch", "resnet18", *out)
    assert_refused(refused, f"--weights {source} (--arch resnet18)", "missing")
    state = torch.load(source, weights_only=True)
    state["state_dict"]["encoders.query_encoder.backbone.features.0.weight"][0, 0, 0, 0] = np.nan
    torch.save(state, source)
    refused = call_script(EXPORT, "--weights", source, *out)
    assert_refused(refused, f"--weights {source}", "1 weights are not finite", "features.0.weight")
    assert call_script(EXPORT, "--weights", source, "--use_target", *out)[0] == 0


@pytest.mark.parametrize("script", [EXPORT, EXTRACT])
def test_code_in_a_checkpoint_is_not_run(call_script, image_tree, tmp_path, script):
    path, trace = tmp_path / "evil.pth", tmp_path / "was_run"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "opt": Malicious(trace)}, path)
    out = tmp_path / ("out.npz" if script is EXTRACT else "out.pth")
    data = (image_tree / "val",) if script is EXTRACT else ()
    flags = ("--weights", path, "--output", out, *data)
    assert_refused(
        call_script(script, *flags), f"--weights {path}: holds posix.mkdir, a pickled object"
    )
    assert os.listdir(tmp_path) == ["evil.pth"]


def test_without_the_library_one_line(call_script, tmp_path, monkeypatch):
    source, out = write_checkpoint(tmp_path / "ours.pth"), tmp_path / "out.safetensors"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused = call_script(EXPORT, "--weights", source, "--output", out)
    assert_refused(refused, f"--output {out}", "pip install")
    out.write_bytes(b"anything")
    refused = call_script(EXPORT, "--weights", out, "--output", tmp_path / "out.pth")
    assert_refused(refused, f"--weights {out}", "pip install")
    assert call_script(EXPORT, "--weights", source, "--output", tmp_path / "out.pth")[0] == 0


def test_a_safetensors_file_and_what_is_left_of_one(tmp_path):
    pytest.importorskip("safetensors")
    about = {"arch": "conv4", "epoch": 3, "image_size": 32, "small_stem": False, "mean": [0.5]}
    weights = {"a": torch.randn(40, 3), "b": torch.tensor(7), "c": torch.ones(2).bfloat16()}
    path = tmp_path / "file.safetensors"
    whole = safetensors_file.encode(weights, about, format=checkpoint.EXPORTED)
    path.write_bytes(whole)
    state = checkpoint.load(path, flag="--weights")
    assert checkpoint.metadata(state) == about and state["epoch"] == 3
    assert all(torch.equal(state["state_dict"][name], value) for name, value in weights.items())
    for part in (b"", whole[:4], whole[:100], whole[:-1], b"\0" + whole[1:]):
        path.write_bytes(part)
        with pytest.raises(DamagedError, match="file.safetensors: not a readable checkpoint"):
            checkpoint.load(path, flag="--weights")


def test_a_file_of_an_early_version_with_a_digest(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    header = {"arch": "conv4", "epoch": "3", "image_size": "32", "small_stem": "true"}
    header |= {"encoder": "target", "mean": "[0.5]", "format": "pt"}
    path, weights = tmp_path / "file.safetensors", {"a": torch.randn(4, 3)}
    safetensors.save_file(weights, path, header | {"cmsf": FORMAT, "digest": "0f" * 32})
    state = checkpoint.load(path, flag="--weights")
    assert torch.equal(state["state_dict"]["a"], weights["a"]) and state["epoch"] == 3
    expected = {"arch": "conv4", "epoch": 3, "image_size": 32, "small_stem": True}
    assert checkpoint.metadata(state) == expected | {"encoder": "target", "mean": [0.5]}


def test_as_a_process(run_script, tmp_path):
    source, out = write_checkpoint(tmp_path / "ours.pth"), tmp_path / "out.pth"
    flags = ("--weights", source, "--output", out)
    done = run_script("eval/export_backbone.py", *flags, cwd=ROOT / "eval")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "24 weights" in done.stdout and "arch: conv4" in done.stdout
