"""compare.py on encoders that it measures itself: its figures, what is kept, what is refused."""

import importlib
import json
import math
import shutil

import pytest
import torch
from conftest import ROOT
from linear_runs import write_checkpoint
from oracles import aligned, torchvision_resnet18, uniform
from test_bad_input import assert_refused
from test_distributed import run
from torch.nn.functional import normalize

from utils.cli import build_evaluation
from utils.data.datasets import read_split
from utils.data.eval_loader import LabeledLoader
from utils.evaluation import comparison, feature_cache
from utils.method import checkpoint
from utils.method.encoders import build_backbone

COMPARE, KNN, LINEAR = (
    importlib.import_module(f"eval.{name}") for name in ("compare", "eval_knn", "eval_linear")
)
QUICK = ("-j", 0, "-b", 9, "--epochs", 3, "--lr_schedule", "1,2", "--lr", "0.1,0.3")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No second of passes for each row."""
    monkeypatch.setattr(comparison, "_SECONDS", 0.0)


@pytest.fixture
def compare(call_script, tmp_path):
    """Call the script: (*flags) -> (results.json, stdout)."""

    def call(*flags):
        code, out, error = call_script(COMPARE, *QUICK, "--save", tmp_path / "out", *flags)
        assert (code, error) == (0, "")
        saved = flags[flags.index("--save") + 1] if "--save" in flags else tmp_path / "out"
        return json.loads((saved / "results.json").read_text()), out

    return call


def test_figures_are_those_of_the_scripts_for_each(
    compare, call_script, weights, image_tree, tmp_path
):
    results, out = compare("--weights", f"an encoder={weights}", image_tree)
    assert list(results) == ["raw pixels", "random network", "an encoder"]
    row, more = results["an encoder"], results["an encoder"]["more"]
    flags = ("--weights", weights, "-j", 0, "-b", 9, image_tree, "--save", tmp_path)
    assert call_script(KNN, *flags)[0] == 0
    knn = json.loads((tmp_path / "knn.json").read_text())
    assert row["1-NN"] == knn["k"]["1"]["accuracy"] and row["20-NN"] == knn["k"]["20"]["accuracy"]
    assert row["weighted 20-NN"] == knn["k"]["20"]["weighted"]
    assert call_script(LINEAR, *flags, *QUICK, "--cached")[0] == 0
    linear = json.loads((tmp_path / "linear.json").read_text())
    assert (row["linear"], more["lr"]) == (linear["top1"], linear["lr"])
    for name in ("best_lr", "epochs", "protocol", "counts", "torch"):
        assert more[name] == linear[name]
    for name in ("sha256", "epoch", "encoder", "arch", "image_size", "small_stem", "seed"):
        assert row["of"][name] == linear[name]
    assert row["parameters"] == sum(p.numel() for p in build_backbone("conv4").module.parameters())
    assert row["images/s"] > 0 and 1 <= more["images/s with batches of"] <= 9
    assert results["raw pixels"]["parameters"] == 0 and results["raw pixels"]["images/s"] is None
    assert (results["raw pixels"]["of"]["image_size"], row["of"]["image_size"]) == (32, 16)
    assert f"an encoder{row['1-NN']:>16.1f}" in out.replace("random network", "")


def test_rank_alignment_and_uniformity_by_hand(compare, weights, image_tree, tmp_path):
    results, _ = compare("--weights", f"x={weights}", image_tree, "--baselines")
    assert list(results) == ["x"]
    backbone = build_backbone("conv4")
    checkpoint.load_backbone(backbone, checkpoint.load(weights, flag=""), what="")
    network = backbone.module.eval()
    crops = []
    for epoch in (1, 2):
        loader = LabeledLoader(read_split(image_tree, "val"), batch_size=12, image_size=16)
        (batch,) = loader.epoch(epoch)
        with torch.no_grad():
            crops.append(normalize(network(batch.images[batch.index.argsort()]), dim=1))
    assert results["x"]["alignment"] == pytest.approx(aligned(*crops), rel=1e-4)
    expected = sum(map(uniform, crops)) / 2
    assert results["x"]["uniformity"] == pytest.approx(expected, rel=1e-4)
    kept = torch.load(tmp_path / "out" / "x" / "features.pth", weights_only=True)
    singular = torch.linalg.svdvals(normalize(kept["features"]["val"][0], dim=1)).tolist()
    shares = [value / sum(singular) for value in singular]
    rank = math.exp(-sum(share * math.log(share) for share in shares if share > 0))
    assert results["x"]["effective rank"] == pytest.approx(rank, rel=1e-4)


def test_one_val_image_has_no_distances(compare, image_tree, tmp_path, weights):
    tree = shutil.copytree(image_tree, tmp_path / "tree")
    images = sorted((tree / "val").rglob("*.*"))
    for path in images[1:]:
        path.write_bytes(b"")
    flags = ("--bad_images", "skip", "--max_bad_images", 11, "--baselines")
    results, out = compare(tree, "--weights", f"one={weights}", *flags)
    assert results["one"]["alignment"] is results["one"]["uniformity"] is None
    assert results["one"]["1-NN"] in (0, 100) and out.splitlines()[-3].split()[6:8] == ["-", "-"]
    assert "one: alignment left out: only one val image" in out


def test_what_cannot_be_measured_says_why(compare, image_tree, weights, tmp_path):
    few = ("--label_fraction", 0.3)
    results, out = compare("--weights", f"x={weights}", *few, image_tree, "--baselines")
    assert results["x"]["20-NN"] is None and results["x"]["1-NN"] is not None
    assert "x: weighted 20-NN left out: only 9 training images" in out
    state = torch.load(weights, weights_only=True)
    for name, value in state["state_dict"].items():
        if "query_encoder.backbone" in name and value.is_floating_point():
            value.zero_()
    torch.save(state, tmp_path / "zero.pth")
    results, out = compare("--weights", f"x={tmp_path / 'zero.pth'}", image_tree, "--baselines")
    assert results["x"]["effective rank"] is None
    assert "x: effective rank left out: all features are zero" in out


def test_files_of_somebody_else_stay(compare, call_script, image_tree, weights, tmp_path):
    flags = ("--weights", f"x={weights}", image_tree, "--baselines")
    for name, text in (("results.md", "|  | my notes |"), ("results.json", '{"my": "own"}')):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
        refused = call_script(COMPARE, *QUICK, "--save", folder, *flags)
        assert_refused(refused, f"--save {folder / name}", "no table of this script")
        assert [p.name for p in folder.iterdir()] == [name] and (folder / name).read_text() == text
    for _ in range(2):
        compare(*flags)  # its own it replaces


def test_a_random_network_by_name_is_one_row(compare, image_tree):
    small = ("--arch", "conv4", "--image_size", 16, "--prefix", "of_files_alone")
    results, _ = compare("--weights", "mine=random", *small, image_tree)
    assert list(results) == ["raw pixels", "mine"]
    assert results["mine"]["more"]["k-NN"].startswith("majority vote")


def test_kept_features_are_used_again_for_the_same_weights_only(
    compare, image_tree, tmp_path, extractions, monkeypatch
):
    path = write_checkpoint(tmp_path / "ckpt.pth")
    flags = ("--weights", f"x={path}", image_tree, "--baselines", "random")
    first, _ = compare(*flags)
    assert len(extractions) == 2
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/*.pth")}
    assert len(kept) == 4
    again, out = compare(*flags)
    assert len(extractions) == 2 and "extracted anew" not in out
    assert kept == {p: p.stat().st_mtime_ns for p in kept}
    for results in (first, again):
        for row in results.values():
            del row["images/s"]
    assert first == again
    state = torch.load(path, weights_only=True)
    state["state_dict"]["encoders.query_encoder.backbone.features.0.weight"][0, 0, 0, 0] += 1
    torch.save(state, path)
    touched, out = compare(*flags)
    assert len(extractions) == 3 and out.count("another checkpoint: extracted anew") == 2
    assert touched["x"]["alignment"] != first["x"]["alignment"]
    assert touched["random network"]["alignment"] == first["random network"]["alignment"]
    _, out = compare(*flags, "--seed", 1)  # of crops and random weights, not of the checkpoint
    assert len(extractions) == 4 and out.count("extracted anew") == 3


def test_what_was_extracted_stays_when_it_is_interrupted(
    compare, call_script, image_tree, weights, tmp_path, extractions, monkeypatch
):
    flags = ("--weights", f"x={weights}", f"y={weights}", image_tree, "--baselines")
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "extract_crops", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call_script(COMPARE, *QUICK, "--save", tmp_path / "out", *flags)
    assert len(extractions) == 1
    compare(*flags)
    assert len(extractions) == 2  # of y alone
    _, out = compare(*flags, "--label_fraction", 0.5)
    assert len(extractions) == 4 and out.count("another train images: extracted anew") == 2


def test_settings_of_rows(compare, image_tree, tmp_path, weights):
    """Of all, of one, of none; a random network for each distinct one."""
    torchvision_resnet18(tmp_path / "plain.pth")
    own = ("--arch", "plain=resnet18", "--image_size", 24, "plain=32", "--use_target", "b")
    rows = (*(f"{name}={weights}" for name in "abc"), f"plain={tmp_path / 'plain.pth'}")
    prefix = ("--prefix", "c=target_encoder.backbone")
    results, _ = compare("--weights", *rows, *own, *prefix, "--", image_tree)
    assert list(results)[:3] == [
        *("raw pixels", "random network (conv4, 24 px)", "random network (resnet18, 32 px)"),
    ]
    told = {n: (r["of"]["arch"], r["of"]["image_size"]) for n, r in results.items()}
    assert told["a"] == told["b"] == ("conv4", 24) and told["plain"] == ("resnet18", 32)
    whole = "state_dict.encoders.target_encoder.backbone"
    encoders = {name: results[name]["of"]["encoder"] for name in "abc"}
    assert encoders == {"a": "query", "b": "target", "c": whole}
    assert results["c"]["of"]["backbone"] == results["b"]["of"]["backbone"] == whole
    assert results["a"]["alignment"] != results["b"]["alignment"] == results["c"]["alignment"]


def test_rows_of_both_kinds_and_odd_names(compare, call_script, image_tree, tmp_path, weights):
    """One table; the val images are compared between both kinds, by their digest."""
    folder, other = tmp_path / "a=b", tmp_path / "other"
    flags = ("--weights", weights, "-j", 0, image_tree)
    assert call_script(KNN, *flags, "--save", folder)[0] == 0
    other.mkdir()
    record = json.loads((folder / "knn.json").read_text())
    (other / "knn.json").write_text(json.dumps(record | {"images": {"val": "f" * 64}}))
    names = ("a|b\n", "../x", "results.json")
    results, out = compare(
        *("--weights", *(f"{name}={weights}" for name in names), "--baselines"),
        *("--results", f"kept={folder}", f"other={other}", image_tree),
    )
    assert list(results) == [*names, "kept", "other"]
    assert results["kept"]["1-NN"] == pytest.approx(results["../x"]["1-NN"])
    assert results["kept"]["of"]["sha256"] == results["../x"]["of"]["sha256"]
    said = [line for line in out.splitlines() if "not comparable" in line]
    assert len(said) == 1 and said[0].startswith("other: on 12 val images of 3 classes (digest fff")
    assert r"a|b\n " in out and "kept" in out
    lines = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert lines[2].startswith(r"| a\|b\\n | ") and lines[8].startswith("Note: other: on 12 val")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a=b", "other", "out"]
    assert len([p for p in (tmp_path / "out").iterdir() if p.is_dir()]) == 3


def test_a_classifier_that_diverges_leaves_the_other_figures(compare, image_tree, weights):
    results, out = compare("--weights", f"x={weights}", image_tree, "--baselines", "--lr", 1e38)
    assert results["x"]["linear"] is None and results["x"]["20-NN"] is not None
    assert "x: linear left out: the loss is nan in epoch 1" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), ("--weights", "--results")),
        (("--weights", "ckpt.pth", "{data}"), ("--weights ckpt.pth", "not NAME=FILE")),
        (("--weights", "x=", "{data}"), ("--weights: x= has no path",)),
        (("--weights", "=ckpt.pth", "{data}"), ("--weights =ckpt.pth", "not NAME=FILE")),
        (("--weights", "x=no.pth", "{data}"), ("--weights no.pth", "no such file")),
        (("--weights", "x={ckpt}"), ("data: name the folder",)),
        (("--weights", "x={ckpt}", "x={ckpt}", "{data}"), ("x={ckpt}", "a row of the name 'x'")),
        (("--weights", "x={ckpt}", "y={plain}", "{data}"), ("{plain}", "does not fit")),
        (
            ("--weights", "x={ckpt}", "--arch", "z=conv4", "{data}"),
            ("--arch z=conv4", "no row 'z'"),
        ),
        (("--weights", "x={ckpt}", "--image_size", "x=0", "{data}"), ("--image_size x=0", "range")),
        (("--weights", "x={ckpt}", "--image_size", 4, "{data}"), ("--image_size 4", "conv4")),
        (("--weights", "x={ckpt}", "--use_target", "y", "{data}"), ("--use_target y", "no row")),
        (("--weights", "raw pixels={ckpt}", "{data}"), ("--baselines pixels", "'raw pixels'")),
        (("--weights", "x={ckpt}", "--results", "x={data}", "{data}"), ("--weights", "row", "'x'")),
        (("--weights", "x={ckpt}", "--save", "/dev/null/x", "{data}"), ("--save /dev/null/x",)),
        (("--results", "x={ckpt}"), ("--results x={ckpt}", "not NAME=DIR")),
        (("--results", "x={data}", "{data}"), ("data {data}", "without --weights")),
        (("x={data}",), ("x={data}", "--weights")),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(
    call_script, image_tree, weights, tmp_path, monkeypatch, flags, words
):
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "plain.pth")
    monkeypatch.setattr(build_evaluation, "image_digest", None)
    monkeypatch.setattr(feature_cache, "extract", None)
    monkeypatch.chdir(tmp_path)
    places = {"data": image_tree, "ckpt": weights, "plain": tmp_path / "plain.pth"}
    flags, words = ([str(part).format(**places) for part in parts] for parts in (flags, words))
    assert_refused(call_script(COMPARE, "-j", 0, *flags), *words)
    assert not list(tmp_path.glob("output/compare/*/*"))


def test_by_default_it_writes_below_output(call_script, image_tree, weights, tmp_path, monkeypatch):
    """The data may stand anywhere behind names; a name may be a folder's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conv4").mkdir()
    flags = ("--weights", f"x={weights}", image_tree, "--baselines", *QUICK, "--arch", "conv4")
    assert call_script(COMPARE, *flags)[0] == 0
    assert (tmp_path / "output" / "compare" / "results.md").exists()


def test_several_processes_extract(compare, image_tree, weights, tmp_path):
    """And one does the rest, with the figures of one."""
    alone, _ = compare("--weights", f"x={weights}", image_tree)
    shutil.move(tmp_path / "out", tmp_path / "alone")
    flags = (*QUICK, "--save", tmp_path / "out", "--weights", f"x={weights}", image_tree)
    code, out, errors = run(ROOT / "eval" / "compare.py", *flags, processes=2)
    assert code == 0, errors
    assert out.count("x: measured") == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for name, row in results.items():
        for column in ("1-NN", "20-NN", "linear", "alignment", "uniformity", "effective rank"):
            assert row[column] == pytest.approx(alone[name][column], rel=1e-4)
    assert "extracted anew" not in compare("--weights", f"x={weights}", image_tree)[1]


@pytest.mark.gpu
def test_a_gpu_measures_what_a_cpu_does(compare, weights, image_tree, tmp_path):
    rows = []
    for device in ("cpu", "cuda"):
        flags = ("--device", device, "--save", tmp_path / device, image_tree)
        rows.append(compare("--weights", f"x={weights}", *flags)[0]["x"])
    for column in ("effective rank", "alignment", "uniformity"):
        assert rows[0][column] == pytest.approx(rows[1][column], rel=0.02, abs=1e-3), column
    assert rows[0]["parameters"] == rows[1]["parameters"] and rows[1]["images/s"] > 0
