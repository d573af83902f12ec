"""show_features.py: picture and record against torchvision's own model and loops; refusals."""

import importlib
import json
import os
import xml.etree.ElementTree as ElementTree

import numpy as np
import oracles
import pytest
import torch
import torchvision
from conftest import write_image
from test_bad_input import assert_refused

SHOW = importlib.import_module("eval.show_features")
UNTRAINED = ("--weights", "random", "--arch", "conv4", "--image_size", 16, "-j", 0)
TAG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def show(call_script, tmp_path):
    """Call the script: (tree, *flags) -> (record, points of each map by words, picture, stdout)."""

    def call(tree, *flags):
        output = tmp_path / "out" / "features.svg"
        code, stdout, stderr = call_script(SHOW, *flags, "--output", output, tree)
        assert code == 0, stderr
        assert stdout.count(f"{output}\n") == 1
        root = ElementTree.parse(output).getroot()
        maps = [
            {
                e.find(TAG + "title").text: (float(e.get("x")), float(e.get("y")), e.get("href"))
                for e in group.iter(TAG + "use")
            }
            for group in root.iter(TAG + "g")
            if group.get("class") == "map"
        ]
        record = json.loads(output.with_suffix(".json").read_text())
        return record, maps, output.read_text(), stdout

    return call


def vote(labels):
    """The most frequent label; of equally frequent ones that of the nearest."""
    return max(labels, key=lambda label: (labels.count(label), -labels.index(label)))


def test_any_encoder(show, image_tree, tmp_path):
    """A torchvision state dict, against torchvision's own model one image at a time."""
    model, transform = oracles.torchvision_resnet18(tmp_path / "plain.pth")
    flags = ("--weights", tmp_path / "plain.pth", "--arch", "resnet18", "--image_size", 28)
    record, (points,), _, stdout = show(image_tree, *flags, "-j", 0, "--map", "pca")
    features, labels = {}, {}
    for split in ("train", "val"):
        folder = torchvision.datasets.ImageFolder(image_tree / split, transform)
        with torch.no_grad():
            found = torch.cat([model(image[None]) for image, _ in folder])
        features[split], labels[split] = found / found.norm(dim=1, keepdim=True), folder.targets
    expected = {true: {} for true in "abc"}
    words = []
    for number, (query, label) in enumerate(zip(features["val"], labels["val"], strict=True)):
        near = oracles.nearest_rows(query, features["train"], k=20)
        true, taken = "abc"[label], "abc"[vote([labels["train"][row] for row in near])]
        expected[true][taken] = expected[true].get(taken, 0) + 1
        words.append(f"{true}/{number % 4}.jpg: {true}, for k-NN {taken}")
    assert record["confusions"] == expected and record["k"] == 20
    right = sum(row.get(true, 0) for true, row in expected.items())
    assert record["accuracy"] == pytest.approx(100 * right / 12)
    assert f"20-NN accuracy {record['accuracy']:.2f}%" in stdout
    wrong = {(t, g): n for t, row in expected.items() for g, n in row.items() if t != g}
    told = [line for line in stdout.splitlines() if " taken for " in line]
    lines = {f"{t} taken for {g}: {n} of 4 ({25 * n:.1f}%)" for (t, g), n in wrong.items()}
    assert set(told) <= lines and len(told) == min(5, len(lines)) > 0

    centered = features["val"].double().numpy()
    centered -= centered.mean(axis=0)
    left, scale, _ = np.linalg.svd(centered, full_matrices=False)
    explained = 100 * scale**2 / (scale**2).sum()
    assert record["explained_variance"] == pytest.approx(explained[:2], rel=0.01)
    assert set(points) == set(words) and record["points"] == 12
    places = np.array([points[word][:2] for word in words])
    for axis in range(2):
        assert abs(np.corrcoef(places[:, axis], left[:, axis])[0, 1]) > 0.999
    assert record["sha256"] and record["arch"] == "resnet18" and record["bad_images"] == []
    assert record["counts"] == {"train": 30, "val": 12, "classes": 3}


def test_the_same_twice_and_both_maps(show, image_tree):
    pytest.importorskip("sklearn")
    record, maps, picture, _ = show(image_tree, *UNTRAINED, "--seed", 3)
    assert record["maps"] == ["pca", "tsne"] and len(maps[0]) == 12
    assert maps[0].keys() == maps[1].keys() and maps[0] != maps[1]
    assert "t-SNE (perplexity 3.67, seed 3)" in picture
    share = f"axis 1: {record['explained_variance'][0]:.1f}% of the variance"
    assert share in picture
    again = show(image_tree, *UNTRAINED, "--seed", 3)
    assert again[2] == picture and again[0] == record
    alone, (points,), picture, _ = show(image_tree, *UNTRAINED, "--seed", 3, "--map", "tsne")
    assert points == maps[1] and alone["explained_variance"] is None and "PCA" not in picture


def test_without_scikit_learn(show, call_script, image_tree, without_package, tmp_path):
    without_package("sklearn")
    record, maps, picture, stdout = show(image_tree, *UNTRAINED)
    assert record["maps"] == ["pca"] and len(maps) == 1
    said = "t-SNE needs scikit-learn, which is not installed"
    assert f"{said}: the map is by PCA alone" in stdout.splitlines()[0] and said in picture
    assert said not in show(image_tree, *UNTRAINED, "--map", "pca")[2]
    flags = ("--map", "tsne", "--output", tmp_path / "x.svg", "--weights", "no/such.pth", "nowhere")
    assert_refused(call_script(SHOW, *flags), f"--map tsne: {said}")


PCA = (*UNTRAINED, "--map", "pca")


def test_some_points_evenly_and_some_classes(show, image_tree):
    record, (points,), picture, _ = show(image_tree, *PCA, "--points", 4, "--classes", "c,a")
    names = {words.split(":")[0]: marker for words, (*_, marker) in points.items()}
    assert names == {"a/0.jpg": "#m1", "b/0.jpg": "#other", "b/3.jpg": "#other", "c/3.jpg": "#m0"}
    assert "features of 4 of 12 val images, evenly taken; with a color: 2 named of 3" in picture
    assert record["points"] == 4 and record["colored"] == ["c", "a"]
    assert sum(sum(row.values()) for row in record["confusions"].values()) == 12


def test_raw_pixels_and_a_class_with_a_comma(show, tmp_path):
    """Three train images: k is three."""
    for number, name in enumerate(("train/a, b/1.png", "train/c/1.png", "train/c/2.png")):
        write_image(tmp_path / "set" / name, seed=number)
        write_image(tmp_path / "set" / name.replace("train", "val"), seed=number + 9)
    flags = ("--weights", "pixels", "--image_size", 8, "-j", 0, "--map", "pca")
    record, _, _, _ = show(tmp_path / "set", *flags, "--classes", "a, b")
    assert record["k"] == 3 and record["colored"] == ["a, b"]
    assert record["confusions"] == {"a, b": {"c": 1}, "c": {"c": 2}}


def test_hostile_names_on_the_disk(show, tmp_path):
    """25 classes, of which the last have no color of their own."""
    names = [b"<script>alert(1)<", b"a'b\"c&d", b"line\nfeed", b"\xff\xfe", b"]]>", b"-->"]
    names += [b"class %d" % i for i in range(19)]
    try:
        for split in ("train", "val"):
            for number, name in enumerate(names):
                write_image(tmp_path / "set" / split / os.fsdecode(name) / "1.png", seed=number)
    except OSError:
        pytest.skip("this file system has no such names")
    record, (points,), picture, _ = show(tmp_path / "set", *PCA)
    assert len(points) == 25 and "<script" not in picture
    assert [marker for *_, marker in points.values()].count("#other") == 5
    assert "with a color: the first 20 of 25 classes" in picture
    assert len(record["confusions"]) == 25
    assert r"line\nfeed/1.png: line\nfeed" in picture and r"\xff\xfe/1.png" in picture


def test_broken_images_have_no_point(show, call_script, broken_tree, tmp_path):
    flags = (*PCA, "--output", tmp_path / "x.svg")
    assert_refused(call_script(SHOW, *flags, broken_tree), "a/3.jpg", "--bad_images skip")
    record, (points,), _, _ = show(broken_tree, *PCA, "--bad_images", "skip")
    numbers = {words.split(":")[0]: words.split(": ")[1][0] for words in points}
    expected = {f"{name}/{i}.jpg": name for name in "abc" for i in range(4)}
    del expected["b/2.jpg"]
    assert numbers == expected and len(record["bad_images"]) == 5
    assert record["counts"] == {"train": 26, "val": 11, "classes": 3}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--map", "umap"), ("--map", "umap")),
        (("--points", 1), ("--points", "1")),
        (("--points", 10_001), ("--points", "10001")),
        (("--classes", "a,x,y"), ("--classes x,y: no such class",)),
        (("--classes", ""), ("--classes",)),
        (("--output", "x.png"), ("--output x.png", ".svg")),
        (("--output", "/dev/null/x.svg"), ("--output /dev/null",)),
        (("--output", "/proc/self/x.svg"), ("--output /proc/self: ",)),
        (("--weights", "no/such.pth"), ("--weights no/such.pth", "no such file")),
        (("--weights", "random", "--arch", "x"), ("--arch x",)),
    ],
)
def test_what_is_refused_before_the_work(
    call_script, image_tree, tmp_path, extractions, flags, words
):
    output = ("--output", tmp_path / "x.svg")
    assert_refused(call_script(SHOW, *PCA, *output, *flags, image_tree), *words)
    assert not extractions and not list(tmp_path.iterdir())


def test_most_classes_and_the_checkpoint_must_be_named(call_script, image_tree, tmp_path):
    with pytest.raises(SHOW.InputError, match="--classes: 21 classes, 20 at most"):
        SHOW.choose_classes(",".join(map(str, range(21))), [str(i) for i in range(30)])
    flags = ("--map", "pca", "--output", tmp_path / "x.svg", image_tree)
    assert_refused(call_script(SHOW, *flags), "--weights: name the checkpoint")


def test_it_replaces_only_what_it_wrote(show, call_script, image_tree, tmp_path):
    show(image_tree, *PCA)
    output = tmp_path / "out" / "features.svg"
    output.with_suffix(".json").unlink()  # as if it had not come to be written
    show(image_tree, *PCA)
    for name, text, kind in (
        ("run.json", '{"starts": []}', "record"),
        ("image.svg", '<svg xmlns="http://www.w3.org/2000/svg"/>', "picture"),
    ):
        path = tmp_path / name
        path.write_text(text)
        words = f"--output {path}: is there already and no {kind} of features"
        refused = call_script(SHOW, *PCA, "--output", path.with_suffix(".svg"), image_tree)
        assert_refused(refused, words)
        assert path.read_text() == text
    assert not (tmp_path / "run.svg").exists() and not (tmp_path / "image.json").exists()


def test_it_runs_as_a_script(run_script, image_tree, tmp_path):
    output = tmp_path / "a.svg"
    done = run_script("eval/show_features.py", *PCA, "--output", output, image_tree, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ElementTree.parse(output)
