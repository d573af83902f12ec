"""show_neighbors.py: what is in the picture against slow loops, and what it refuses."""

import importlib
import json
import os
import shutil

import numpy as np
import oracles
import pytest
import tiny
import torch
import torchvision
from conftest import write_image
from PIL import Image, ImageOps
from test_bad_input import assert_refused
from torch.nn.functional import normalize

from utils.data.datasets import read_split
from utils.method import checkpoint
from utils.method.memory_bank import MemoryBank
from utils.reporting import pictures
from utils.runtime import files

SHOW = importlib.import_module("eval.show_neighbors")
TRAIN = importlib.import_module("self_supervised.train_msf_2q")
TRAIN_SUPERVISED = importlib.import_module("supervised.train_sup_msf")
UNTRAINED = ("--weights", "random", "--arch", "conv4", "--image_size", 16, "-j", 0)
ROWS = 24  # of the bank; the last rows written lie over the first


def unit(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator), dim=-1)


def write_checkpoint(path, tree, *, method="CMSF2Q", with_previous=False, clusters=None, **others):
    """A checkpoint with a bank of 24 of 29 rows written, over 15 of the 30 images."""
    images = read_split(tree, "train")
    bank = MemoryBank(ROWS, 6, with_previous=with_previous)
    index = torch.tensor([*range(0, 30, 2), *range(26, -2, -2)])  # 14 images come twice
    columns = {"index": index, "label": torch.from_numpy(images.labels)[index]}
    if with_previous:
        columns |= {"previous": unit(29, 6, seed=2), "has_previous": torch.arange(29) % 5 != 1}
    columns |= others
    bank.enqueue(unit(29, 6, seed=1), **columns)
    weights = {f"bank.{name}": value for name, value in bank.state_dict().items()}
    weights |= {} if clusters is None else {"clusters": clusters}
    state = {"format": checkpoint.FORMAT, "method": method, "epoch": 3, "step": None}
    state |= {"state_dict": weights, "args": {"arch": "conv4"}, "data": {"x": images.digest()}}
    files.save(path, state)
    return bank


@pytest.fixture
def show(call_script, tmp_path):
    """Call the script for a file: (weights, tree, *flags) -> (record, picture)."""

    def call(weights, tree, *flags):
        output = tmp_path / "out" / "picture.png"
        code, stdout, stderr = call_script(
            SHOW, "--weights", weights, "--output", output, *flags, tree
        )
        assert code == 0, stderr
        assert str(output) in stdout
        return json.loads(output.with_suffix(".json").read_text()), Image.open(output)

    return call


def neighbors(target, name):
    (line,) = [line for line in target["rows"] if line["name"] == name]
    return line["neighbors"]


def rows_of(target, name):
    return [neighbor["bank_row"] for neighbor in neighbors(target, name)]


def rank_of(row, query, rows):
    own = oracles.squared_distance(query, rows[row])
    return 1 + sum(oracles.squared_distance(query, other) < own for other in rows)


def newest_row(bank, image):
    """The place of the image's last writing, by the order of writing."""
    return max(
        (row for row in range(ROWS) if bank.index[row] == image),
        key=lambda row: row + ROWS if row < bank.written - ROWS else row,
    )


def assert_line(target, name, bank, expected):
    """These rows in this order, with their images and their ranks by distance to t."""
    assert rows_of(target, name) == expected
    t = bank.features[target["bank_row"]]
    for neighbor in neighbors(target, name):
        assert neighbor["index"] == bank.index[neighbor["bank_row"]]
        assert neighbor["rank"] == rank_of(neighbor["bank_row"], t, bank.features)


def assert_pixels(record, picture, tree):
    """Each thumbnail is its file's central square; sign and frame tell the other classes."""
    corner = pictures.corner_side(record["side"])
    shown = [n for t in record["targets"] for line in t["rows"] for n in line["neighbors"]]
    for target in record["targets"]:
        for item in (item for line in target["rows"] for item in line["neighbors"]):
            folders = {part["file"].split("/")[0] for part in (item, target)}
            assert item["same_class"] == (len(folders) == 1)
            assert item["class"] == item["file"].split("/")[0]
    for item in [*record["targets"], *shown]:
        left, top, side = item["place"]
        got = np.array(picture.crop((left, top, left + side, top + side)))
        with Image.open(tree / "train" / item["file"]) as file:
            expected = np.array(ImageOps.fit(file, (side, side), Image.Resampling.LANCZOS))
        differing = (got != expected).any(axis=2)
        in_sign = differing[:corner, -corner:].sum()
        assert differing.sum() == in_sign
        assert (in_sign > 0) == (item.get("same_class") is False)
    for item in shown:
        left, top, _ = item["place"]
        color = pictures.SAME if item["same_class"] else pictures.OTHER
        assert "#{:02X}{:02X}{:02X}".format(*picture.getpixel((left - 1, top - 1))) == color


def test_previous_embeddings_and_their_rows_in_the_bank(show, image_tree, tmp_path):
    path = tmp_path / "a.pth"
    bank = write_checkpoint(path, image_tree, with_previous=True)
    record, picture = show(path, image_tree, "--count", 9, "-k", 4)
    assert record["constraint"] == "previous embedding"
    assert len({target["index"] for target in record["targets"]}) == 9
    for target in record["targets"]:
        row = target["bank_row"]
        assert row == newest_row(bank, target["index"]) and bank.has_previous[row]
        others = [i for i in range(ROWS) if bank.index[i] != target["index"]]
        allowed = [i in others and bool(bank.has_previous[i]) for i in range(ROWS)]
        older = oracles.nearest_rows(bank.previous[row], bank.previous, k=4, allowed=allowed)
        assert_line(target, "previous", bank, older)
        t = bank.features[row]
        same = sorted(older, key=lambda i: oracles.squared_distance(t, bank.features[i]))
        assert_line(target, "constrained", bank, same)
        allowed = [i in others for i in range(ROWS)]
        plain = oracles.nearest_rows(t, bank.features, k=4, allowed=allowed)
        assert_line(target, "plain", bank, plain)
        for name, query, column in (
            ("previous", bank.previous[row], bank.previous),
            ("constrained", t, bank.features),
        ):
            for neighbor in neighbors(target, name):
                expected = float(query @ column[neighbor["bank_row"]])
                assert neighbor["similarity"] == pytest.approx(expected, abs=1e-5)
    assert_pixels(record, picture, image_tree)


@pytest.mark.parametrize("kind", ["SupervisedCMSF", "PseudoCMSF", "CMSFKM"])
def test_rows_of_the_same_group(show, image_tree, tmp_path, kind):
    """Labels, pseudo-labels of which some are missing, clusters of the images."""
    groups, others = None, {}
    if kind == "PseudoCMSF":
        others = {"label": torch.arange(29) % 4 - 1}
    if kind == "CMSFKM":
        groups = torch.arange(30) // 2 % 4 - 1
    path = tmp_path / "a.pth"
    bank = write_checkpoint(path, image_tree, method=kind, clusters=groups, **others)
    of_row = bank.label if groups is None else groups[bank.index]
    named = ",".join(str(int(i)) for i in bank.index.unique())
    record, picture = show(path, image_tree, "--index", named, "-k", 3)
    assert record["constraint"] == {"S": "label", "P": "pseudo-label", "C": "cluster"}[kind[0]]
    assert [t["index"] for t in record["targets"]] == bank.index.unique().tolist()
    for target in record["targets"]:
        row = target["bank_row"]
        assert row == newest_row(bank, target["index"]) and target["wanted"] == of_row[row]
        others = [bank.index[i] != target["index"] for i in range(ROWS)]
        allowed = [
            bool(others[i]) and of_row[i] == of_row[row] and of_row[row] >= 0 for i in range(ROWS)
        ]
        t = bank.features[row]
        same = oracles.nearest_rows(t, bank.features, k=3, allowed=allowed)
        assert_line(target, "constrained", bank, same)
        plain = oracles.nearest_rows(t, bank.features, k=3, allowed=others)
        assert_line(target, "plain", bank, plain)
    assert kind == "SupervisedCMSF" or not all(rows_of(t, "constrained") for t in record["targets"])
    assert_pixels(record, picture, image_tree)
    drawn, _ = show(path, image_tree, "--count", 5, "--seed", 7)
    assert all(target["wanted"] >= 0 for target in drawn["targets"])  # such as have a constraint


def test_a_method_without_constraint_has_plain_neighbors(show, image_tree, tmp_path):
    write_checkpoint(tmp_path / "a.pth", image_tree, method="MSF")
    record, _ = show(tmp_path / "a.pth", image_tree, "--count", 2)
    assert [[line["name"] for line in t["rows"]] for t in record["targets"]] == [["plain"]] * 2
    assert record["constraint"] is None


def test_as_many_as_asked_by_name_number_or_seed(show, image_tree, tmp_path):
    path = tmp_path / "a.pth"
    write_checkpoint(path, image_tree, with_previous=True)
    record, picture = show(path, image_tree, "--images", "c/2.jpg,a/0.jpg", "-k", 11)
    assert [target["file"] for target in record["targets"]] == ["c/2.jpg", "a/0.jpg"]
    assert [target["class"] for target in record["targets"]] == ["c", "a"]
    assert all(len(line["neighbors"]) == 11 for t in record["targets"] for line in t["rows"])
    assert list(picture.size) == record["size"]
    record, _ = show(path, image_tree, "--index", "24,0", "--side", 64)
    assert [target["file"] for target in record["targets"]] == ["c/4.jpg", "a/0.jpg"]
    assert record["targets"][0]["place"][2] == 96 and record["side"] == 64
    drawn = [
        [t["index"] for t in show(path, image_tree, "--count", 5, "--seed", seed)[0]["targets"]]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert "--seed 2" in show(path, image_tree, "--count", 5, "--seed", 2)[0]["command"]


def test_more_neighbors_than_rows(show, image_tree, tmp_path):
    bank = write_checkpoint(tmp_path / "a.pth", image_tree, with_previous=True)
    record, _ = show(tmp_path / "a.pth", image_tree, "--count", 1, "-k", 50)
    (target,) = record["targets"]
    others = bank.index != target["index"]
    assert len(rows_of(target, "plain")) == others.sum()
    assert len(rows_of(target, "previous")) == (others & bank.has_previous).sum()


def test_a_first_visit_has_no_constraint_yet(show, image_tree, tmp_path):
    none = torch.zeros(29, dtype=torch.bool)
    write_checkpoint(tmp_path / "a.pth", image_tree, with_previous=True, has_previous=none)
    record, _ = show(tmp_path / "a.pth", image_tree, "--count", 3)
    for target in record["targets"]:
        assert not rows_of(target, "previous") and not rows_of(target, "constrained")
        assert len(rows_of(target, "plain")) == 8


def test_checkpoints_of_a_real_run_after_and_within_an_epoch(
    run_script, show, call_script, image_tree, tmp_path
):
    flags = (*tiny.FLAGS, "--topkp", 4, "--epochs", 3, "--knn_freq", -1, "--save_minutes", 1e-9)
    assert call_script(TRAIN, *flags, "--checkpoint_path", tmp_path / "run", image_tree)[0] == 0
    (within,) = (tmp_path / "run").glob("*_step_*.pth")
    for path, step in ((within, True), (tmp_path / "run/ckpt_epoch_3.pth", False)):
        weights = tiny.state(path)["state_dict"]
        record, picture = show(path, image_tree, "--count", 2)
        assert (tiny.state(path)["step"] is not None) == step
        assert record["method"] == "CMSF2Q" and record["epoch"] == 3
        for target in record["targets"]:
            t = weights["bank.features"][target["bank_row"]]
            for neighbor in neighbors(target, "constrained"):
                expected = rank_of(neighbor["bank_row"], t, weights["bank.features"])
                assert neighbor["rank"] == expected
            assert rows_of(target, "constrained")
        assert_pixels(record, picture, image_tree)
    flags = ("--weights", within, "--output", tmp_path / "process.png", "--count", 2)
    done = run_script("eval/show_neighbors.py", *flags, image_tree)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "process.json").exists()


def test_a_method_says_that_its_constraint_is_the_label(show, call_script, image_tree, tmp_path):
    """By a class attribute, which its checkpoints keep: the names of methods are not asked."""
    flags = (*tiny.FLAGS, "--epochs", 1, "--knn_freq", -1, "--checkpoint_path", tmp_path)
    assert call_script(TRAIN_SUPERVISED, *flags, image_tree)[0] == 0
    state = tiny.state(tmp_path / "ckpt_epoch_1.pth")
    files.save(tmp_path / "another.pth", state | {"method": "AMethodOfMyOwn"})
    record, _ = show(tmp_path / "another.pth", image_tree, "--count", 2)
    assert record["constraint"] == "label" and record["method"] == "AMethodOfMyOwn"
    same = [n["same_class"] for t in record["targets"] for n in neighbors(t, "constrained")]
    assert same and all(same)


def test_features_of_any_encoder(show, image_tree, tmp_path):
    """A torchvision state dict, against torchvision's own model one image at a time."""
    model, transform = oracles.torchvision_resnet18(tmp_path / "plain.pth")
    flags = ("--from_features", "--arch", "resnet18", "--image_size", 28, "-j", 0, "-k", 5)
    record, picture = show(tmp_path / "plain.pth", image_tree, *flags, "--index", "3,17,29")
    folder = torchvision.datasets.ImageFolder(image_tree / "train", transform)
    with torch.no_grad():
        features = torch.cat([model(image[None]) for image, _ in folder])
    features /= features.norm(dim=1, keepdim=True)
    for target, number in zip(record["targets"], (3, 17, 29), strict=True):
        allowed = [i != number for i in range(30)]
        expected = oracles.nearest_rows(features[number], features, k=5, allowed=allowed)
        assert [n["index"] for n in neighbors(target, "plain")] == expected
        assert len(target["rows"]) == 1
    assert record["sha256"] and record["from_features"]
    assert_pixels(record, picture, image_tree)


def test_flat_folder_has_names_and_no_marks(show, image_tree, tmp_path):
    tree = image_tree / "train" / "a"
    record, picture = show("random", tree, *UNTRAINED[2:], "--from_features", "--count", 2)
    found = [n for target in record["targets"] for n in neighbors(target, "plain")]
    assert len(found) == 16 and all(n["same_class"] is None and n["class"] is None for n in found)
    colors = {color for _, color in picture.getcolors(2**24)}
    assert not colors & {(0, 0x72, 0xB2), (0xD5, 0x5E, 0)}


def test_broken_files_are_refused_or_left_out(call_script, show, image_tree, tmp_path):
    tree = shutil.copytree(image_tree, tmp_path / "tree")
    write_checkpoint(tmp_path / "a.pth", tree, with_previous=True)
    broken = tree / "train" / "a" / "4.jpg"
    broken.write_bytes(b"no image")
    flags = ("--weights", tmp_path / "a.pth", "--images", "a/4.jpg", "--output", tmp_path / "x.png")
    assert_refused(call_script(SHOW, *flags, tree), "a/4.jpg", "--bad_images skip")
    skip = ("--bad_images", "skip")
    record, _ = show(tmp_path / "a.pth", tree, "--images", "a/4.jpg", *skip)
    assert record["bad_images"] == [str(broken)] and record["targets"][0]["file"] == "a/4.jpg"
    flags = ("random", tree, *UNTRAINED[2:], "--from_features", *skip)
    record, _ = show(*flags, "--count", 29, "-k", 4)
    everywhere = [n["file"] for t in record["targets"] for n in [t, *neighbors(t, "plain")]]
    assert "a/4.jpg" not in everywhere and len(everywhere) == 29 * 5
    assert record["counts"]["rows"] == 29
    flags = (*UNTRAINED, "--from_features", *skip, "--images", "a/4.jpg", tree)
    assert_refused(call_script(SHOW, *flags), "a/4.jpg", "cannot be read")


def test_another_data_set_is_refused(call_script, image_tree, tmp_path):
    write_checkpoint(tmp_path / "a.pth", image_tree, with_previous=True)
    tree = shutil.copytree(image_tree, tmp_path / "tree")
    write_image(tree / "train" / "a" / "new.jpg", seed=5)
    flags = ("--weights", tmp_path / "a.pth", "--output", tmp_path / "x.png")
    refused = call_script(SHOW, *flags, tree)
    assert_refused(refused, f"data {tree / 'train'}", "a.pth was trained on")
    (tree / "train" / "a" / "new.jpg").unlink()
    assert call_script(SHOW, *flags, tree)[0] == 0  # the same images elsewhere
    (tree / "train" / "c").rename(tree / "train" / "d")
    assert_refused(call_script(SHOW, *flags, tree), "not the images or classes")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--images", "a/0.jpg,a/99.jpg"), ("--images a/99.jpg", "not in")),
        (("--images", "a/1.jpg,b/0.jpg"), ("--images: a/1.jpg not in the bank", "15 of 30")),
        (("--images", ""), ("--images",)),
        (("--index", "3"), ("--index: a/3.jpg not in the bank",)),
        (("--index", "30"), ("--index 30", "0 to 29")),
        (("--index=-1",), ("--index -1",)),
        (("--index", "x"), ("--index", "x")),
        (("--index", "2", "--count", 3), ("--count", "--index")),
        (("--index", ",".join(["0"] * 100), "--side", 512), ("--side 512", "megapixels")),
        (("--count", 0), ("--count", "0")),
        (("-k", 0), ("-k", "0")),
        (("--side", 10), ("--side", "10")),
        (("--output", "x.jpg"), ("--output x.jpg", ".png")),
        (("--output", "/dev/null/x.png"), ("--output /dev/null",)),
        (("--output", "/proc/self/x.png"), ("--output /proc/self: ",)),
        (("--weights", "no/such.pth"), ("--weights no/such.pth", "no such file")),
        (("--weights", "random"), ("--weights random", "no memory bank", "--from_features")),
    ],
)
def test_flags_that_cannot_work(call_script, image_tree, tmp_path, flags, words):
    write_checkpoint(tmp_path / "a.pth", image_tree, with_previous=True)
    common = ("--weights", tmp_path / "a.pth", "--output", tmp_path / "x.png")
    assert_refused(call_script(SHOW, *common, *flags, image_tree), *words)
    assert not (tmp_path / "x.png").exists()


def test_the_checkpoint_must_be_named(call_script, image_tree, tmp_path):
    flags = ("--output", tmp_path / "x.png", image_tree)
    assert_refused(call_script(SHOW, *flags), "--weights: name the checkpoint")
    assert_refused(call_script(SHOW, "--from_features", *flags), "--weights: name the checkpoint")


@pytest.mark.parametrize("kind", ["plain", "published", "empty bank"])
def test_checkpoints_without_a_bank(call_script, image_tree, tmp_path, kind):
    path = tmp_path / "a.pth"
    if kind == "plain":
        torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    elif kind == "published":
        torch.save({"state_dict": {"module.queue": torch.zeros(4, 3)}, "epoch": 2}, path)
    else:
        bank = {f"bank.{n}": v for n, v in MemoryBank(5, 3).state_dict().items()}
        files.save(path, {"format": checkpoint.FORMAT, "state_dict": bank})
    flags = ("--weights", path, "--output", tmp_path / "x.png", image_tree)
    word = "is empty" if kind == "empty bank" else "no memory bank in it (--from_features"
    assert_refused(call_script(SHOW, *flags), f"--weights {path}", word)


def test_it_replaces_only_what_it_wrote(call_script, image_tree, tmp_path):
    write_checkpoint(tmp_path / "a.pth", image_tree)
    output = tmp_path / "x.png"
    flags = ("--weights", tmp_path / "a.pth", "--count", 2, image_tree, "--output")
    for _ in range(2):
        assert call_script(SHOW, *flags, output)[0] == 0
    output.with_suffix(".json").unlink()  # as if it had not come to be written
    assert call_script(SHOW, *flags, output)[0] == 0
    for name, kind in (("run.json", "record"), ("image.png", "picture")):
        path = tmp_path / name
        if kind == "record":
            path.write_text('{"starts": []}')
        else:
            Image.new("RGB", (8, 8)).save(path)
        before = path.read_bytes()
        words = f"--output {path}: is there already and no {kind} of neighbors"
        assert_refused(call_script(SHOW, *flags, path.with_suffix(".png")), words)
        assert path.read_bytes() == before
    assert not (tmp_path / "run.png").exists() and not (tmp_path / "image.json").exists()


def test_a_disk_that_is_full_is_one_line(call_script, image_tree, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "a.pth", image_tree)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    flags = ("--weights", tmp_path / "a.pth", "--output", tmp_path / "x.png", image_tree)
    code, _, error = call_script(SHOW, *flags)
    assert code == 1 and error.count("\n") == 1
    assert f"--output {tmp_path / 'x.png'} could not be written: No space left" in error
    assert os.listdir(tmp_path) == ["a.pth"]


def test_a_small_set_is_shown_whole(call_script, image_tree, tmp_path):
    """What is drawn can be less than --count; what is named has to be there."""
    write_checkpoint(tmp_path / "a.pth", image_tree, with_previous=True)
    flags = ("--weights", tmp_path / "a.pth", "--output", tmp_path / "x.png", image_tree)
    code, out, _ = call_script(SHOW, *flags, "--count", 16)
    assert code == 0 and "--count 16: only 12 images to draw from, all are shown" in out
    targets = json.loads((tmp_path / "x.json").read_text())["targets"]
    numbers = [target["index"] for target in targets]
    assert numbers == sorted(set(numbers)) and len(numbers) == 12
