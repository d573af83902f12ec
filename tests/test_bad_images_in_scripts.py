"""Scripts on broken image files: the figures of the images that are left, and what they say."""

import importlib
import json
import shutil

import pytest
import tiny
from conftest import BROKEN, write_image
from test_bad_input import assert_refused
from tiny import FLAGS

from utils.data.datasets import ImageSet
from utils.evaluation import feature_cache

TRAIN = importlib.import_module("self_supervised.train_msf_2q")
KNN = importlib.import_module("eval.eval_knn")
LINEAR = importlib.import_module("eval.eval_linear")
UNTRAINED = ("--weights", "random", "--arch", "conv4", "--image_size", 16, "-j", 0, "-b", 7)
SKIP = ("--bad_images", "skip")


def run_json(call_script, module, folder, name, *flags):
    code, stdout, stderr = call_script(module, *flags)
    assert code == 0, stderr
    return json.loads((folder / name).read_text()), stdout


def test_knn_without_the_broken_images(call_script, broken_tree, tree_without, tmp_path):
    """The figures of the tree from which they were removed; and out of the cache the same."""
    run = (call_script, KNN, tmp_path, "knn.json", *UNTRAINED, "--save", tmp_path)
    expected, _ = run_json(*run, tree_without)
    record, stdout = run_json(*run, *SKIP, "--save_features", broken_tree)
    assert record["k"] == expected["k"]
    assert record["counts"] == expected["counts"] == {"train": 26, "val": 11, "classes": 3}
    assert record["bad_images"] == [str(broken_tree / name) for name in BROKEN]
    assert expected["bad_images"] == []
    assert stdout.count("WARNING") == len(BROKEN)

    load = ("--load_cache", tmp_path / "features.pth")
    cached, _ = run_json(*run, *SKIP, *load, broken_tree)
    for name in ("k", "counts", "bad_images"):
        assert cached[name] == record[name]
    refused = call_script(KNN, *UNTRAINED, *load, broken_tree)
    assert_refused(refused, BROKEN[0], "no features", "--bad_images skip")
    few = call_script(KNN, *UNTRAINED, *SKIP, "--max_bad_images", 4, *load, broken_tree)
    assert_refused(few, "--max_bad_images 4", "5 files")
    assert_refused(call_script(KNN, *UNTRAINED, *SKIP, "-k", 27, broken_tree), "-k 27", "only 26")


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (KNN, ()),
        (LINEAR, ("--cached", "--epochs", 1)),
        (LINEAR, ("--epochs", 1)),
        (importlib.import_module("eval.eval_transfer"), ("--l2", 1)),
    ],
)
def test_a_class_of_which_nothing_can_be_read_is_refused(call_script, tmp_path, module, flags):
    for split in ("train", "val"):
        for seed, name in enumerate(("a/1.png", "a/2.png", "b/1.png", "b/2.png", "c/1.png")):
            write_image(tmp_path / split / name, seed=seed)
    (tmp_path / "train/c/1.png").write_bytes(b"")
    refused = call_script(module, *UNTRAINED, *SKIP, *flags, tmp_path)
    assert_refused(refused, "can be read: no labeled image of 1 of 3 classes: c")


def test_knn_of_fewer_images_than_its_k(call_script, tmp_path):
    for number in range(20):
        write_image(tmp_path / "train" / "ab"[number % 2] / f"{number}.jpg", seed=number)
    for name in "ab":
        write_image(tmp_path / "val" / name / "0.jpg", seed=0)
    (tmp_path / "train" / "a" / "0.jpg").write_bytes(b"")
    record, _ = run_json(
        *(call_script, KNN, tmp_path, "knn.json", *UNTRAINED, *SKIP, "--save", tmp_path),
        tmp_path,
    )
    assert list(record["k"]) == ["1", "5", "10"]


@pytest.mark.parametrize("flags", [("--cached",), ()])
def test_linear_evaluation_without_the_broken_images(
    call_script, broken_tree, tree_without, tmp_path, flags
):
    """Cached features: the figures of the tree without them. Crops: the counts."""
    flags = (*UNTRAINED, *flags, "--epochs", 2, "--lr", 0.1, "--save", tmp_path)
    run = (call_script, LINEAR, tmp_path, "linear.json", *flags)
    record, _ = run_json(*run, *SKIP, broken_tree)
    assert record["counts"] == {"train": 26, "val": 11, "classes": 3}
    assert record["bad_images"] == [str(broken_tree / name) for name in BROKEN]

    resume = ("--resume", tmp_path / "linear.pth")
    resumed, stdout = run_json(*run, *SKIP, "--epochs", 3, *resume, broken_tree)
    assert resumed["counts"] == record["counts"]
    assert resumed["bad_images"] == record["bad_images"]
    measured, _ = run_json(*run, *SKIP, "--evaluate", *resume, broken_tree)
    assert measured["counts"] == record["counts"] and measured["top1"] == resumed["top1"]
    if "--cached" in flags:
        (tmp_path / "features.pth").unlink()
        expected, _ = run_json(*run, tree_without)
        one, two = record["lr"]["0.1"], expected["lr"]["0.1"]
        # The features were extracted in other batches, which round otherwise.
        assert one.pop("loss") == pytest.approx(two.pop("loss"), rel=1e-4)
        assert one == two


def test_a_cache_with_images_left_out_is_not_used_without_skip(
    call_script, broken_tree, tmp_path, monkeypatch
):
    flags = (*UNTRAINED, "--cached", "--epochs", 1, "--save", tmp_path)
    assert call_script(LINEAR, *flags, *SKIP, broken_tree)[0] == 0
    code, stdout, stderr = call_script(LINEAR, *flags, broken_tree)
    assert "extracted anew" in stdout
    assert_refused((code, stdout, stderr), BROKEN[0], "--bad_images skip")
    monkeypatch.setattr(feature_cache, "extract", None)
    assert call_script(LINEAR, *flags, *SKIP, broken_tree)[0] == 0


def test_digest_of_a_missing_file(tmp_path):
    write_image(tmp_path / "0.jpg", seed=0)
    images = ImageSet(tmp_path, ["0.jpg", "1.jpg"], [0, 0], ["a"])
    without = feature_cache.image_digest(images, missing_ok=True)
    write_image(tmp_path / "1.jpg", seed=1)
    assert without != feature_cache.image_digest(images, missing_ok=True)


# Whole runs.


def test_training_with_broken_files_ends_with_figures(run_script, broken_tree, tmp_path):
    flags = (*FLAGS, "--epochs", 2, "--num_workers", 1, "--checkpoint_path", tmp_path)
    done = run_script("self_supervised/train_msf_2q.py", *flags, *SKIP, broken_tree)
    assert done.returncode == 0, done.stderr
    assert "20-NN" in done.stdout and "Traceback" not in done.stderr
    for name in BROKEN:
        assert f"WARNING data {broken_tree / name}: cannot be read" in done.stdout


def test_too_many_broken_files(call_script, broken_tree, tmp_path):
    flags = (*FLAGS, *SKIP, "--max_bad_images", 3, "--checkpoint_path", tmp_path, broken_tree)
    assert_refused(call_script(TRAIN, *flags), "--max_bad_images 3: 4 files")


@pytest.mark.parametrize("flags", [("--bad_images", "drop"), ("--max_bad_images", -1)])
def test_flags(call_script, image_tree, flags):
    assert_refused(call_script(TRAIN, *FLAGS, *flags, image_tree), *map(str, flags))


@pytest.fixture(scope="module")
def without_a_class(image_tree, tmp_path_factory):
    """Tells a copy of the image tree in which no image of class b of a split can be read."""

    def make(split):
        root = shutil.copytree(image_tree, tmp_path_factory.mktemp("classes") / "tree")
        for path in (root / split / "b").iterdir():
            path.write_bytes(b"")
        return root

    return {split: make(split) for split in ("train", "val")}


@pytest.mark.parametrize(
    ("script", "extra", "name", "find"),
    [
        ("eval_knn", (), "knn.json", lambda found: found),
        ("eval_linear", ("--epochs", 1), "linear.json", lambda found: found),
        ("eval_linear", ("--epochs", 1, "--cached"), "linear.json", lambda found: found),
        ("eval_transfer", ("--l2", 1), "transfer.json", lambda found: found["sets"]["folder"]),
    ],
)
def test_a_val_class_that_cannot_be_read_is_named(
    call_script, without_a_class, tmp_path, script, extra, name, find
):
    flags = ("--weights", "random", "--arch", "conv4", "--image_size", 16, "--num_workers", 0)
    flags = (*flags, "--bad_images", "skip", "--save", tmp_path, *extra, without_a_class["val"])
    code, stdout, stderr = call_script(importlib.import_module(f"eval.{script}"), *flags)
    assert code == 0, stderr
    said = "no readable image of 1 of 3 classes: b; figures are over the others"
    assert stdout.count(said) == 1
    absent = find(json.loads((tmp_path / name).read_text()))["classes_without_images"]
    assert absent["test" if script == "eval_transfer" else "val"] == ["b"]


@pytest.mark.parametrize(
    ("split", "so"),
    [("train", "its images count as wrong"), ("val", "figures are over the others")],
)
@pytest.mark.parametrize("cache", [(), ("--cache_sup",)])
def test_training_warns_of_a_class_that_cannot_be_read(
    call_script, without_a_class, tmp_path, split, so, cache
):
    script = importlib.import_module("semi_supervised.train_pseudo_cmsf")
    flags = (*tiny.FLAGS, "--bad_images", "skip", "--epochs", 1, "--pseudo_lbl_epochs", 1, *cache)
    root = without_a_class[split]
    code, stdout, stderr = call_script(script, *flags, "--checkpoint_path", tmp_path, root)
    assert code == 0, stderr
    found = "no readable image of 1 of 3 classes: b;"
    assert f"WARNING data {root / split}: {found} {so}" in stdout
    head = f"WARNING labeled images: {found} the classifier head does not learn it"
    assert (head in stdout) == (split == "train")
