"""What the studies on real images rest on: images held out, break-even purity, class shares."""

import argparse
import importlib
import json

import gpu_parts  # noqa: F401  the benchmarks' folder
import methods
import pytest
import torch
from purity import Point, break_even, curve_of, points_of
from stages import rank_of_means, share_between

from utils.data import demo_data

HELD_OUT = "tests/benchmarks/held_out.py"


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))


def test_images_are_held_out(run_script, image_tree, tmp_path):
    done = run_script(HELD_OUT, image_tree, tmp_path, "--train", 6, "--held_out", 3)
    assert done.returncode == 0, done.stderr
    chosen = {split: names(tmp_path / "choose" / split) for split in ("train", "val")}
    assert chosen["train"] == [f"{c}/{n}.jpg" for c in "abc" for n in range(3, 9)]
    assert chosen["val"] == [f"{c}/{n}.jpg" for c in "abc" for n in range(3)]
    assert names(tmp_path / "test" / "val") == names(image_tree / "val")
    assert (tmp_path / "test" / "train").resolve() == tmp_path / "choose" / "train"
    first = tmp_path / "choose" / "val" / "a" / "0.jpg"
    assert first.read_bytes() == (image_tree / "train" / "a" / "0.jpg").read_bytes()


def test_too_few_to_hold_out(run_script, image_tree, tmp_path):
    done = run_script(HELD_OUT, image_tree, tmp_path, "--train", 8, "--held_out", 3)
    assert done.returncode == 1 and "a has 10 images only" in done.stderr


def test_break_even():
    """From which purity on all of the curve lies above a level, by straight lines."""
    curve = [Point(20, 40, 0), Point(40, 50, 0), Point(60, 48, 0), Point(100, 58, 0)]
    assert break_even(curve, 53) == pytest.approx(80)
    assert break_even(curve, 49) == pytest.approx(64)  # not 38: it falls below again
    assert break_even(curve, 45) == pytest.approx(30)
    assert break_even(curve, 30) == 20 and break_even(curve, 58) is None


def test_points_of_methods():
    runs = {
        "byol": [{"20-NN": 50.0}, {"20-NN": 52.0}],
        "msf": [{"20-NN": 49.0, "purity_plain": 38.0}],
        "2q": [{"20-NN": 48.0, "purity_plain": 38.0, "purity_constrained": 40.0}],
        "sup all + own": [{"20-NN": 60.0}],
        "noise 60%": [{"20-NN": 55.0, "purity_constrained": 28.0}],
    }
    points = points_of(runs, "20-NN")
    assert points["byol"][:2] == (100, 51) and points["byol"].deviation == pytest.approx(2**0.5)
    # Of 5 neighbors one is the target itself: 38% are 0.9 of the other 4.
    assert points["msf"] == (22.5, 49, 0) and points["2q"] == (25, 48, 0)
    assert curve_of(points) == [(28, 55, 0), (100, 60, 0)]


def test_share_of_the_variance_between_classes():
    """Of a known mixture; none by chance, however many classes there are; all without spread."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(3000) % 10
    means = torch.randn(10, 40, generator=random)
    noise = torch.randn(3000, 40, generator=random)
    between = means.var(dim=0).sum() * 9 / 10
    expected = 100 * between / (between + 40 * 0.25)
    assert share_between(means[labels] + 0.5 * noise, labels) == pytest.approx(expected, abs=1.5)
    assert share_between(noise, torch.arange(3000) % 300) == pytest.approx(0, abs=0.5)
    assert share_between(means[labels], labels + 7) == pytest.approx(100)


def test_rank_of_class_means():
    labels = torch.arange(40) % 4
    line = torch.tensor([0.0, 1, 2, 5]).unsqueeze(1) * torch.ones(1, 6)
    assert rank_of_means(line[labels], labels) == pytest.approx(1, abs=1e-3)
    corners = torch.eye(4, 6)  # four corners of a simplex span three dimensions, evenly
    assert rank_of_means(corners[labels], labels) == pytest.approx(3, abs=1e-3)


@pytest.mark.slow
def test_methods_and_purity_end_to_end(run_script, image_tree, tmp_path):
    """Two methods with toy sizes; started again, nothing is run again."""
    out = tmp_path / "out"
    flags = ("--data", image_tree, "--test", image_tree, "--out", out, "--epochs", 1)
    some = ("--seeds", "0", "--only", "byol,noise 60%,sup all + own")
    toy = ("--", "--batch_size", 8)
    done = run_script("tests/benchmarks/methods.py", *flags, *some, *toy)
    assert done.returncode == 0, done.stderr
    assert "sup all + own" in done.stdout
    figures = json.loads((out / "figures.json").read_text())["methods"]
    assert figures["noise 60%"][0]["purity_constrained"] < 100
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.pth")}
    again = run_script("tests/benchmarks/methods.py", *flags, *some, *toy)
    assert again.stdout == done.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.pth")} == written
    picture = tmp_path / "purity.png"
    drawn = run_script("tests/benchmarks/purity.py", f"toy={out}", "--output", picture)
    assert drawn.returncode == 0, drawn.stderr
    assert "neighbors pay" in drawn.stdout and picture.stat().st_size > 10_000


@pytest.mark.parametrize("data", [None, "images"])
def test_each_method_of_a_study_is_an_experiment_of_its_own(monkeypatch, data):
    """Its script takes the flags, and no two methods come down to the same settings."""
    seen = {}
    every = methods.REAL if data else methods.DEMO_METHODS
    args = argparse.Namespace(data=data)
    monkeypatch.setattr(demo_data, "draw_data_set", lambda folder: folder)
    for name, (script, flags) in every.items():
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        argv = [script, *map(str, methods.setting(script, args)), *flags]
        monkeypatch.setattr("sys.argv", argv)
        settings = {k: str(v) for k, v in vars(module.parse_args()).items()}
        assert (script, settings) not in seen.values(), name
        seen[name] = (script, settings)
