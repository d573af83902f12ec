"""eval_linear.py: saved runs go on, are measured and kept, or refused."""

import importlib
import json
import os
import shutil

import pytest
from conftest import write_image
from linear_runs import QUICK, assert_same_bits, write_checkpoint
from test_bad_input import assert_refused

LINEAR = importlib.import_module("eval.eval_linear")


@pytest.mark.parametrize(
    "flags",
    [
        ("--cached", "--lr", "0.1,1"),
        ("--mlp",),
        # Its dropout draws random numbers, which a resumed run must draw again.
        ("--fine-tune", "--weights", "random", "--arch", "mobilenet_v2", "--image_size", 32),
    ],
)
def test_resumed_run_has_the_bits_of_an_undisturbed_one(run_linear, tmp_path, flags):
    whole_record, _, whole = run_linear(tmp_path / "whole", *flags)
    run_linear(tmp_path / "broken", *flags, "--epochs", 1)
    resume = ("--resume", tmp_path / "broken" / "linear.pth")
    record, console, resumed = run_linear(tmp_path / "broken", *flags, *resume)
    assert console.startswith("epoch 2/3")
    assert_same_bits(whole, resumed)
    assert record["lr"] == whole_record["lr"]


def test_a_run_of_which_one_rate_diverged_goes_on(run_linear, tmp_path):
    flags = ("--lr", "0.1,1e30", "--cached")
    whole, _, _ = run_linear(tmp_path / "a", *flags)
    _, _, saved = run_linear(tmp_path / "b", *flags, "--epochs", 2)
    assert not saved["probe"]["heads.1.weight"].isfinite().all()
    resumed, _, _ = run_linear(tmp_path / "c", *flags, "--resume", tmp_path / "b" / "linear.pth")
    assert resumed["lr"] == whole["lr"] and whole["lr"]["1e+30"]["loss"] is None


@pytest.mark.parametrize("flags", [("--lr", "0.1,1"), ("--mlp",), ("--fine-tune",)])
def test_measuring_a_saved_probe(run_linear, extractions, tmp_path, flags):
    trained, _, _ = run_linear(tmp_path, *flags, "--label_fraction", 0.5)
    files = [tmp_path / "linear.pth", tmp_path / "linear.json"]
    before = [path.read_bytes() for path in files]
    resume = ("--evaluate", "--resume", tmp_path / "linear.pth")
    _, console, _ = run_linear(tmp_path, *resume, "--cached")
    measured = json.loads((tmp_path / "evaluate.json").read_text())
    assert "epoch" not in console and not extractions  # only val is needed
    for rate, figures in measured["lr"].items():
        assert figures == {name: trained["lr"][rate][name] for name in ("top1", "top5")}
    for name in ("top1", "epochs", "counts", "protocol"):
        assert measured[name] == trained[name]
    assert [path.read_bytes() for path in files] == before


@pytest.mark.parametrize("flags", [("--cached",), ("--fine-tune",)])
def test_resume_auto_goes_on_from_its_own_file(run_linear, tmp_path, flags):
    """From the middle, from an end of which linear.json was not written, or from nothing."""
    auto = (*flags, "--resume", "auto")
    whole_record, console, whole = run_linear(tmp_path / "whole", *auto)
    assert console.startswith("epoch 1/3")
    run_linear(tmp_path / "broken", *flags, "--epochs", 2)
    for first in ("epoch 3/3", "12 val images"):
        record, console, resumed = run_linear(tmp_path / "broken", *auto)
        assert console.startswith(first) and record["lr"] == whole_record["lr"]
        assert_same_bits(whole, resumed)
        (tmp_path / "broken" / "linear.json").unlink()
    # The file of another run, of one with more epochs, and none that can be read.
    saved = tmp_path / "broken" / "linear.pth"
    for change, reason in ((("--lr", 0.2), "--lr"), (("--epochs", 1), "it has finished epoch 3")):
        _, console, _ = run_linear(tmp_path / "broken", *auto, *change)
        (said,) = [line for line in console.splitlines() if line.endswith(": replaced")]
        assert f"--resume {saved}: " in said and reason in said and "epoch 1/" in console
        run_linear(tmp_path / "broken", *flags)
    saved.write_bytes(b"half")
    record, console, _ = run_linear(tmp_path / "broken", *auto)
    assert "not a readable checkpoint" in console and record["lr"] == whole_record["lr"]


def test_a_result_that_is_there_is_kept(run_linear, weights, image_tree, tmp_path):
    keep = ("--cached", "--keep_done")
    first, _, _ = run_linear(tmp_path, *keep)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    moved = tmp_path.parent / "moved.pth"
    moved.write_bytes(weights.read_bytes())
    _, console, _ = run_linear(tmp_path, *keep, "--weights", moved, "-j", 1)
    assert console.startswith(f"{tmp_path / 'linear.json'}: there already, nothing to do\n")
    assert f"top1 {first['top1']:g}" in console and "epoch 1/" not in console
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    other = write_checkpoint(tmp_path.parent / "other.pth", seed=1)
    for change, reason in (
        (("--weights", other), "sha256"),
        (("--use-target",), "encoder, backbone"),
        (("--label_fraction", 0.5), "images"),
        (("--wd", 0.5), "--wd (0.0001)"),
        (("--epochs", 1), "--epochs (3)"),
    ):
        _, console, _ = run_linear(tmp_path, *keep, *change)
        assert f"--keep_done: {tmp_path / 'linear.json'} has another {reason}: replaced" in console
        assert run_linear(tmp_path, *keep)[0]["lr"] == first["lr"]
    for text in ("", '{"lr": 3}'):
        (tmp_path / "linear.json").write_text(text)
        record, console, _ = run_linear(tmp_path, *keep)
        assert "linear.json: " in console and ": replaced" in console
        assert record["lr"] == first["lr"]


@pytest.mark.parametrize("flags", [("--keep_done", "--cached"), ("--resume", "auto", "--cached")])
def test_a_result_of_other_pixels_is_not_kept(run_linear, image_tree, tmp_path, flags):
    """The val images of two classes change places, with the sizes and times of before."""
    data = shutil.copytree(image_tree, tmp_path / "data")
    for path in data.rglob("*.jpg"):
        path.write_bytes(path.read_bytes().ljust(4000, b"\0"))
        os.utime(path, ns=(10**18, 10**18))
    first, _, _ = run_linear(tmp_path, *flags, data=data)
    for number in range(4):
        one, two = (data / "val" / name / f"{number}.jpg" for name in "ab")
        pixels = one.read_bytes(), two.read_bytes()
        for path, content in zip((two, one), pixels, strict=True):
            path.write_bytes(content)
            os.utime(path, ns=(10**18, 10**18))
    again, console, _ = run_linear(tmp_path, *flags, data=data)
    assert ": replaced" in console and "epoch 3/3" in console
    fresh, _, _ = run_linear(tmp_path / "fresh", "--cached", data=data)
    assert again["lr"] == fresh["lr"] != first["lr"]


def test_a_finished_run_is_measured_again(run_linear, image_tree, tmp_path):
    """So that what is said of val, as an image that cannot be read, is so."""
    data = shutil.copytree(image_tree, tmp_path / "data")
    (data / "val" / "a" / "0.jpg").write_text("no image")
    flags = ("--bad_images", "skip", "--resume", "auto")
    first, _, _ = run_linear(tmp_path, *flags, data=data)
    (tmp_path / "linear.json").unlink()
    again, console, _ = run_linear(tmp_path, *flags, data=data)
    assert "epoch " not in console
    for name in ("lr", "counts", "bad_images"):
        assert again[name] == first[name], name
    assert again["counts"]["val"] == 11 and len(again["bad_images"]) == 1


def test_saved_probes_that_do_not_fit(run_linear, call_script, weights, image_tree, tmp_path):
    run_linear(tmp_path / "run", "--cached")
    saved = tmp_path / "run" / "linear.pth"
    common = (*QUICK, "--epochs", 5, "--cached", "--weights", weights, "--resume", saved)
    other = write_checkpoint(tmp_path / "other.pth", seed=1)

    def refused(*flags, words):
        assert_refused(
            call_script(LINEAR, *common, *flags, image_tree), f"--resume {saved}", *words
        )

    refused("--weights", other, words=["another checkpoint"])
    refused("--weights", other, "--evaluate", words=["another checkpoint"])
    refused("--use-target", words=["another encoder"])
    refused("--label_fraction", 0.5, words=["another train images"])
    refused("--lr", "0.2", words=["--lr [0.1], not [0.2]"])
    refused("--mlp", words=["--mlp False, not True"])
    refused("--epochs", 3, words=["epoch 3 of --epochs 3"])
    for split in ("train", "val"):
        for name in "xyz":
            write_image(tmp_path / "others" / split / name / "1.jpg", seed=1)
    result = call_script(LINEAR, *common, "--evaluate", tmp_path / "others")
    assert_refused(result, f"--resume {saved}", "other classes")
    result = call_script(LINEAR, *common, "--resume", weights, image_tree)
    assert_refused(result, f"--resume {weights}", "no linear.pth")
    saved.write_bytes(saved.read_bytes()[:500])
    refused(words=["not a readable"])
