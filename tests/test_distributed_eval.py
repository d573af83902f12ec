"""Evaluations by several real processes under torchrun against one."""

import importlib
import json
import shutil

import pytest
import torch
from conftest import ROOT, write_image
from linear_runs import write_checkpoint
from test_distributed import run
from test_driver import drive
from tiny import FLAGS

from utils.data.bad_images import BadImages
from utils.data.datasets import read_split
from utils.data.eval_loader import LabeledLoader
from utils.evaluation import feature_cache

WORKER = ROOT / "tests" / "evaluation_worker.py"
BROKEN = ("train/a/3x.jpg", "train/c/5x.jpg", "val/b/1x.jpg")  # in parts of several processes
# Of three processes each has a part of its own size, or none.
PROCESSES = pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
LINEAR = ("-b", 15, "--epochs", 3, "--lr_schedule", 2)  # the last batch: 2 of 32 images


@pytest.fixture(scope="module")
def broken_tree(image_tree, tmp_path_factory):
    """32 train images, of which 2 are broken, and 13 val images, of which 1 is."""
    root = tmp_path_factory.mktemp("broken") / "images"
    shutil.copytree(image_tree, root)
    for name in BROKEN:
        (root / name).write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def two_images(tmp_path_factory):
    """Two train and two val images: fewer than three processes."""
    root = tmp_path_factory.mktemp("two")
    for number, name in enumerate(("train/a/0", "train/b/0", "val/a/0", "val/b/0")):
        write_image(root / f"{name}.png", seed=number)
    return root


def commands(weights, data, two, out) -> list[list[str]]:
    """Every kind of evaluation; the last one parts with the processes that have no more to do."""
    flags = ("--weights", weights, "-j", 0, data)
    skip = (*flags, "--bad_images", "skip")
    lines = [
        ("eval.eval_knn", *skip, "-b", 4, "--save", out / "knn", "--save_features"),
        ("eval.eval_knn", *skip, "--max_bad_images", 1),
        ("eval.eval_linear", *skip, *LINEAR, "--lr", "0.1,0.3", "--save", out / "crops"),
        ("eval.eval_linear", *skip, *LINEAR, "--lr", 0.1, "--mlp", "--save", out / "mlp"),
        ("eval.eval_linear", *skip, *LINEAR, "--lr", 0.005, "--fine-tune", "--save", out / "tuned"),
        (
            *("eval.eval_linear", *skip, *LINEAR[:2], "--epochs", 4, *LINEAR[4:], "--lr", 0.005),
            *("--fine-tune", "--resume", out / "tuned" / "linear.pth", "--save", out / "resumed"),
        ),
        (
            *("eval.eval_linear", *skip, "--evaluate"),
            *("--resume", out / "tuned" / "linear.pth", "--save", out / "measured"),
        ),
        ("eval.eval_knn", *flags[:-1], two, "--save", out / "two"),
        ("eval.show_features", *skip, "--map", "pca", "--output", out / "shown" / "features.svg"),
        (
            *("eval.eval_linear", *skip, *LINEAR, "--lr", 0.1, "--cached"),
            *("--cache_dir", out / "knn", "--save", out / "cached"),
        ),
    ]
    return [[str(word) for word in line] for line in lines]


@pytest.fixture(scope="module")
def evaluated(broken_tree, two_images, tmp_path_factory):
    """Number of processes -> the folder they wrote to, each one's errors, all warnings."""
    root = tmp_path_factory.mktemp("evaluated")
    weights = write_checkpoint(root / "ckpt.pth")
    done = {}

    def get(processes: int):
        if processes not in done:
            out = root / str(processes)
            out.mkdir()
            lines = out / "commands.json"
            lines.write_text(json.dumps(commands(weights, broken_tree, two_images, out)))
            code, stdout, errors = run(WORKER, lines, processes=processes)
            assert code == 0, errors
            assert "extracted anew" not in stdout
            lines = stdout.replace(str(out), "OUT").splitlines()
            warnings = sorted(line for line in lines if "WARNING" in line)
            ended = [json.loads((out / f"commands.json.{r}").read_text()) for r in range(processes)]
            done[processes] = out, ended, warnings
        return done[processes]

    return get


def record(folder, name="linear.json") -> dict:
    """A result file without what differs from run to run."""
    result = json.loads((folder / name).read_text())
    for varying in ("seconds", "command"):
        del result[varying]
    return result


@PROCESSES
def test_features_and_nearest_neighbors(evaluated, processes):
    """Rows, labels and key as of one process; k-NN figures, counts and broken images the same."""
    (one, *_), (several, *_) = evaluated(1), evaluated(processes)
    assert record(one / "knn", "knn.json") == record(several / "knn", "knn.json")
    assert record(one / "two", "knn.json") == record(several / "two", "knn.json")
    assert len(record(one / "knn", "knn.json")["bad_images"]) == len(BROKEN)
    shown = [json.loads((part / "shown" / "features.json").read_text()) for part in (one, several)]
    explained = [(part.pop("command"), part.pop("explained_variance"))[1] for part in shown]
    assert shown[0] == shown[1] and explained[0] == pytest.approx(explained[1], rel=1e-3)
    states = [
        torch.load(folder / "knn" / feature_cache.NAME, weights_only=True)
        for folder in (one, several)
    ]
    for state in states:
        assert state["features"]["train"][0].shape == (30, 128)
        assert state["features"]["val"][0].shape == (12, 128)
    torch.testing.assert_close(*(state.pop("features") for state in states), rtol=1e-5, atol=1e-6)
    assert states[0] == states[1]


@PROCESSES
@pytest.mark.parametrize("kind", ["crops", "mlp", "tuned", "resumed", "cached"])
def test_linear_probe_and_fine_tuning(evaluated, processes, kind):
    """The whole history up to rounding, with a last batch of which a process has no part."""
    (one, *_), (several, *_) = evaluated(1), evaluated(processes)
    states = [
        torch.load(folder / kind / "linear.pth", weights_only=True) for folder in (one, several)
    ]
    rows = [
        [{name: torch.tensor(row[name]) for name in ("loss", "top1")} for row in state["history"]]
        for state in states
    ]
    assert len(rows[0]) == (4 if kind == "resumed" else 3)
    torch.testing.assert_close(*rows, rtol=0, atol=1e-4)
    for part in {"probe", "state_dict"} & states[0].keys():
        torch.testing.assert_close(states[1][part], states[0][part], rtol=1e-3, atol=1e-3)
    one, several = record(one / kind), record(several / kind)
    assert one.pop("lr").keys() == several.pop("lr").keys()
    assert one == several and len(one["bad_images"]) == len(BROKEN)


@PROCESSES
def test_measuring_a_fine_tuned_encoder(evaluated, processes):
    (one, *_), (several, *_) = evaluated(1), evaluated(processes)
    figures = [record(folder / "measured", "evaluate.json")["lr"] for folder in (one, several)]
    assert figures[0] == figures[1]
    assert (
        record(several / "measured", "evaluate.json")["top1"] == record(several / "tuned")["top1"]
    )


@PROCESSES
def test_too_many_broken_images_end_all_processes(evaluated, processes):
    """One in the part of each of two processes, one may be: all say the same."""
    _, ended, _ = evaluated(processes)
    assert len(ended) == processes
    for errors in ended:
        assert [number for number, error in enumerate(errors) if error] == [1]
        assert "--max_bad_images 1: 2 files cannot be read as images" in errors[1]


@PROCESSES
def test_each_broken_image_is_announced_once_a_command(evaluated, processes):
    """By the main process, whichever met it."""
    assert evaluated(processes)[2] == evaluated(1)[2]
    assert any(BROKEN[0] in line for line in evaluated(processes)[2])


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_training_ends_with_the_figures_of_what_it_saved(
    image_tree, tmp_path, call_script, processes
):
    """Though each process has running statistics of its own: they are those of the main one."""
    flags = (*FLAGS, "--batch_size", 12, "--epochs", 2, "--bn", "local", "--sgd_momentum", 0)
    flags += ("--checkpoint_path", tmp_path, image_tree)
    code, stdout, errors = run(
        ROOT / "self_supervised" / "train_msf_2q.py", *flags, processes=processes
    )
    assert code == 0, errors
    assert stdout.count("k-NN accuracy on the val images") == 1
    lines = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    (logged,) = [line["knn"] for line in lines if "knn" in line]
    knn = importlib.import_module("eval.eval_knn")
    flags = ("--weights", tmp_path / "ckpt_epoch_2.pth", "-j", 0, "--save", tmp_path, image_tree)
    assert call_script(knn, *flags)[0] == 0
    assert record(tmp_path, "knn.json")["k"] == logged


@pytest.mark.slow
def test_the_head_is_trained_on_images_by_several_processes(image_tree, tmp_path):
    """Without a cache of embeddings: all images on every process."""
    flags = (*FLAGS, "--epochs", 2, "--pseudo_lbl_epochs", 2, "--label_fraction", 0.5)
    flags += ("--print_freq", 1, "--checkpoint_path", tmp_path, image_tree)
    code, stdout, errors = run(
        ROOT / "semi_supervised" / "train_pseudo_cmsf.py", *flags, processes=2
    )
    assert code == 0, errors
    assert "head_rows 15" in stdout


@pytest.mark.slow
def test_the_demo_compares_with_the_untrained(tmp_path):
    flags = ("--demo", "--debug", "-j", 0, "--checkpoint_path", tmp_path)
    code, stdout, errors = run(ROOT / "self_supervised" / "train_msf_2q.py", *flags, processes=2)
    assert code == 0, errors
    assert "raw pixels" in stdout and "random network" in stdout


@pytest.mark.slow
def test_a_broken_image_of_one_process_ends_all(broken_tree):
    flags = ("--weights", "random", "--arch", "conv4", "--image_size", 16, "-j", 0, broken_tree)
    code, stdout, errors = run(ROOT / "eval" / "eval_knn.py", *flags, processes=2)
    assert code == 1 and all(line.startswith("data ") for line in stdout.splitlines())
    assert "cannot be read as an image" in errors and "--bad_images skip" in errors
    assert 'eval_knn.py", line' not in errors  # no traceback of ours


@pytest.mark.parametrize("processes", [None, 1, 4])
def test_the_driver_starts_every_stage_so(image_tree, tmp_path, processes):
    """With a python that only says how it was called."""
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    stub.chmod(0o755)
    gpus = {"GPUS": processes} if processes else {}
    done = drive(tmp_path, DATA=image_tree, PYTHON=stub, **gpus)
    assert done.returncode == 0, done.stderr
    *stages, table = calls.read_text().splitlines()
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node={processes} "
    expected = launcher + str(ROOT) if processes == 4 else str(ROOT)
    assert len(stages) == 11 and all(stage.startswith(expected) for stage in stages)
    assert table.startswith(str(ROOT / "eval" / "compare.py"))


@pytest.mark.slow
def test_the_driver_with_two_processes(image_tree, tmp_path):
    done = drive(tmp_path, DATA=image_tree, GPUS=2, BASELINES=0)
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert None not in figures.values()


@pytest.mark.parametrize("processes", [2, 3])
def test_parts_of_a_batch_with_broken_images_make_up_the_batch(
    image_tree, tmp_path, monkeypatch, processes
):
    """Also where broken images in several parts compete for what replaces them."""
    shutil.copytree(image_tree, tmp_path / "images")
    broken = (
        "a/2.jpg",
        "a/3.jpg",
        "a/4.jpg",
        "b/0.jpg",
        "b/1.jpg",
        "b/2.jpg",
        "c/7.jpg",
        "c/8.jpg",
    )
    for name in broken:
        (tmp_path / "images" / "train" / name).write_bytes(b"no image")
    images = read_split(tmp_path / "images", "train")

    def batches(part: int, parts: int):
        def own_share(count: int) -> range:
            return range(count * part // parts, count * (part + 1) // parts)

        monkeypatch.setattr("utils.data.batches.distributed.own_share", own_share)
        skip = BadImages(skip=True)
        loader = LabeledLoader(images, batch_size=10, image_size=16, bad_images=skip)
        return [batch for epoch in range(1, 6) for batch in loader.epoch(epoch)]

    parts = [batches(part, processes) for part in range(processes)]
    for whole, *own in zip(batches(0, 1), *parts, strict=True):
        for name in ("index", "label", "images"):
            assert torch.equal(torch.cat([getattr(b, name) for b in own]), getattr(whole, name))
