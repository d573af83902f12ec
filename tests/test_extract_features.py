"""extract_features.py: rows, names and labels against torchvision, image by image."""

import importlib
import json
import os

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, write_image
from linear_runs import write_checkpoint
from PIL import Image
from test_bad_input import assert_refused
from test_distributed import run as run_processes
from test_export_backbone import published_layout

from utils.data.datasets import read_any_folder
from utils.method.encoders import QueryTargetEncoders, build_backbone
from utils.runtime import files

EXTRACT = importlib.import_module("eval.extract_features")
EXPORT = importlib.import_module("eval.export_backbone")
RANDOM = ("--weights", "random", "--arch", "conv4", "--image_size", 16, "-j", 0)


@pytest.fixture
def folder(tmp_path):
    """Images in it, in folders of it and deeper, a text file, a folder without images."""
    root = tmp_path / "photos"
    names = ("z.jpg", "b.png", "cat/2.jpg", "cat/1.jpg", "dog/deep/er/1.png")
    for number, name in enumerate(names):
        write_image(root / name, seed=number)
    (root / "notes.txt").write_text("no image")
    (root / "bare").mkdir()
    return root


def extract(call_script, out, *flags):
    """The arrays that the script writes."""
    code, said, errors = call_script(EXTRACT, "--output", out, *flags)
    assert code == 0, errors
    with np.load(out, allow_pickle=False) as file:
        arrays = dict(file)
    arrays["metadata"] = json.loads(str(arrays["metadata"]))
    assert str(len(arrays["names"])) in said
    return arrays


def rows_of(network, root, names, *, size):
    """Each image by itself through torchvision's transforms and a network."""
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(int(size * 256 / 224)),
            torchvision.transforms.CenterCrop(size),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images = [transform(Image.open(root / name).convert("RGB")) for name in names]
    with torch.no_grad():
        return torch.cat([network(image[None]) for image in images])


def test_any_folder(call_script, folder, tmp_path):
    """With a torchvision state dict of this shape: the features are torchvision's own."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    weights = tmp_path / "plain.pth"
    torch.save(model.state_dict(), weights)
    flags = ("--weights", weights, "--arch", "resnet18", "--image_size", 28, "-j", 0, "-b", 2)
    found = extract(call_script, tmp_path / "out.npz", *flags, folder)
    names = ["b.png", "z.jpg", "cat/1.jpg", "cat/2.jpg", "dog/deep/er/1.png"]
    assert found["names"].tolist() == names
    assert found["labels"].tolist() == [-1, -1, 0, 0, 1] and found["labels"].dtype == np.int64
    assert found["classes"].tolist() == ["cat", "dog"]
    model.fc = torch.nn.Identity()
    expected = rows_of(model, folder, names, size=28)
    assert found["features"].dtype == np.float32
    # Two ways to resize differ by a gray level at some pixels; images differ by much more.
    assert torch.cdist(expected, expected).add(torch.eye(5) * 9).min() > 1
    np.testing.assert_allclose(found["features"], expected, atol=0.01)
    about = found["metadata"]
    assert about["sha256"] == files.sha256(weights) and about["arch"] == "resnet18"
    assert (about["image_size"], about["encoder"], about["layer"]) == (28, "query", "backbone")
    assert about["counts"] == {"images": 5, "classes": 2} and about["normalized"] is False
    assert "256/224" in about["view"] and "--image_size 28" in about["command"]


def test_a_split_and_unit_norm(call_script, image_tree, tmp_path):
    flags = (*RANDOM, image_tree, "--split", "val")
    plain = extract(call_script, tmp_path / "plain.npz", *flags)
    assert plain["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert plain["names"].tolist() == [f"{c}/{i}.jpg" for c in "abc" for i in range(4)]
    same = extract(call_script, tmp_path / "same.npz", *RANDOM, image_tree / "val")
    assert all(np.array_equal(plain[key], same[key]) for key in plain if key != "metadata")
    unit = extract(call_script, tmp_path / "unit.npz", *flags, "--normalize")
    expected = [row / np.sqrt(sum(float(x) ** 2 for x in row)) for row in plain["features"]]
    np.testing.assert_allclose(unit["features"], expected, rtol=1e-5)
    assert unit["metadata"]["normalized"] is True


def test_a_flat_folder_has_no_labels(call_script, image_tree, tmp_path):
    found = extract(call_script, tmp_path / "out.npz", *RANDOM, image_tree / "val" / "a")
    assert found["labels"].tolist() == [-1] * 4 and found["classes"].shape == (0,)


@pytest.mark.parametrize("encoder", ["query", "target"])
@pytest.mark.parametrize(
    ("layout", "proj_bn"), [("ours", False), ("ours", True), ("published", False)]
)
def test_embeddings_behind_the_projector(
    call_script, image_tree, tmp_path, layout, proj_bn, encoder
):
    torch.manual_seed(0)
    arch = "conv4" if layout == "ours" else "resnet18"
    backbone = build_backbone(arch)
    encoders = QueryTargetEncoders(
        backbone.module, backbone.feature_dim, proj_dim=9, hidden_dim=7, proj_bn=proj_bn
    )
    for name, value in encoders.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point() and name.startswith("target_encoder"):
            value.normal_(std=0.1)
    state = {f"encoders.{name}": value for name, value in encoders.state_dict().items()}
    state = {"state_dict": state, "args": {"arch": arch}}
    if layout == "published":
        state = published_layout(encoders)
    torch.save(state, tmp_path / "ckpt.pth")
    flags = ("--weights", tmp_path / "ckpt.pth", "--image_size", 28, "-j", 0, "--projected")
    flags += ("--use_target",) if encoder == "target" else ()
    found = extract(call_script, tmp_path / "out.npz", *flags, image_tree / "val")
    network = getattr(encoders.eval(), f"{encoder}_encoder")
    expected = rows_of(network, image_tree / "val", found["names"], size=28)
    assert expected.shape == (12, 9)
    np.testing.assert_allclose(found["features"], expected, rtol=1e-3, atol=1e-4)
    assert found["metadata"]["layer"] == "projector"
    assert found["metadata"]["encoder"] == encoder


def test_weights_without_a_projector(call_script, image_tree, tmp_path):
    out = ("--output", tmp_path / "out.npz", image_tree / "val")
    refused = call_script(EXTRACT, *RANDOM, "--projected", *out)
    assert_refused(refused, "--projected", "--weights random", "no projector")
    source, exported = write_checkpoint(tmp_path / "ours.pth"), tmp_path / "exported.pth"
    assert call_script(EXPORT, "--weights", source, "--output", exported)[0] == 0
    refused = call_script(EXTRACT, "--weights", exported, "-j", 0, "--projected", *out)
    assert_refused(refused, f"--weights {exported}", "no projector")


def test_bad_images_have_no_row(call_script, folder, tmp_path):
    (folder / "cat" / "1.jpg").write_bytes(b"broken")
    out = tmp_path / "out.npz"
    refused = call_script(EXTRACT, *RANDOM, "--output", out, folder)
    assert_refused(refused, "cat/1.jpg", "--bad_images skip")
    assert not out.exists()
    found = extract(call_script, out, *RANDOM, "--bad_images", "skip", folder)
    assert found["names"].tolist() == ["b.png", "z.jpg", "cat/2.jpg", "dog/deep/er/1.png"]
    assert found["labels"].tolist() == [-1, -1, 0, 1] and len(found["features"]) == 4
    assert found["metadata"]["bad_images"] == [str(folder / "cat" / "1.jpg")]
    whole = extract(
        call_script, tmp_path / "one.npz", *RANDOM, "--bad_images", "skip", folder / "dog"
    )
    np.testing.assert_allclose(found["features"][-1:], whole["features"], rtol=1e-5)


def test_names_that_are_no_text(tmp_path):
    """A file system may have names that are no UTF-8: they come back as os.fsdecode has them."""
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        write_image(tmp_path / name, seed=1)
    except OSError:
        pytest.skip("this file system has no such names")
    images = read_any_folder(tmp_path)
    loader = EXTRACT.EvalLoader(images, batch_size=2, image_size=16)
    EXTRACT.write(tmp_path / "out.npz", torch.zeros(1, 3), loader, {"bad_images": [name]})
    with np.load(tmp_path / "out.npz") as file:
        assert file["names"].tolist() == [name]
        assert json.loads(str(file["metadata"])) == {"bad_images": [name]}


def test_nothing_is_overwritten_or_half_written(call_script, image_tree, tmp_path, monkeypatch):
    out = tmp_path / "out.npz"
    out.write_bytes(b"precious")
    flags = (*RANDOM, "--output", out, image_tree / "val")
    assert_refused(call_script(EXTRACT, *flags), f"--output {out}", "--force")
    assert out.read_bytes() == b"precious"

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        code, _, errors = call_script(EXTRACT, *flags, "--force")
    assert code == 1 and "No space left on device" in errors
    assert os.listdir(tmp_path) == ["out.npz"] and out.read_bytes() == b"precious"
    assert extract(call_script, out, *flags[:-3], "--force", image_tree / "val")["names"].size == 12


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--output", "out.npy"), ("--output out.npy", ".npz")),
        (("--output", "no/such/out.npz"), ("--output no/such/out.npz", "no folder")),
        (("--dataset", "imagenet100"), ("--dataset imagenet100", "--split")),
        (("--split", "test"), ("--split", "test")),
        (("--split", "train", "a"), ("a",)),
        (("--batch_size", 0), ("--batch_size", "0")),
    ],
)
def test_flags_that_cannot_work(call_script, image_tree, tmp_path, monkeypatch, flags, words):
    """Refused before the work, not after it."""
    monkeypatch.setattr(EXTRACT, "extract_features", None)
    data = () if flags[-1] == "a" else (image_tree / "val",)
    out = ("--output", tmp_path / "out.npz")
    assert_refused(call_script(EXTRACT, *RANDOM, *out, *flags, *data), *words)


def test_folders_that_cannot_be(call_script, image_tree, folder, tmp_path):
    out = ("--output", tmp_path / "out.npz")
    for data, word in (
        (tmp_path / "none", "no such folder"),
        (folder / "bare", "no images"),
        (image_tree, "--split"),
    ):
        assert_refused(call_script(EXTRACT, *RANDOM, *out, data), f"data {data}", word)
    assert_refused(call_script(EXTRACT, *RANDOM, *out), "data")
    assert_refused(call_script(EXTRACT, *out, folder), "--weights")


@pytest.mark.slow
def test_two_processes_write_what_one_does(call_script, folder, tmp_path):
    """With a broken image in the part of the second one."""
    (folder / "dog" / "2.jpg").write_bytes(b"broken")
    flags = (*RANDOM, "--bad_images", "skip", folder)
    alone = extract(call_script, tmp_path / "one.npz", *flags)
    out = tmp_path / "two.npz"
    code, _, errors = run_processes(
        ROOT / "eval" / "extract_features.py", *flags, "--output", out, processes=2
    )
    assert code == 0, errors
    with np.load(out) as file:
        for name in ("names", "labels", "classes"):
            assert np.array_equal(file[name], alone[name])
        np.testing.assert_allclose(file["features"], alone["features"], rtol=1e-5)
        assert json.loads(str(file["metadata"]))["bad_images"] == alone["metadata"]["bad_images"]


def test_as_a_process(run_script, image_tree, tmp_path):
    weights, out = write_checkpoint(tmp_path / "ours.pth"), tmp_path / "out.npz"
    flags = ("--weights", weights, "--output", out, "-j", 0, "--projected")
    done = run_script("eval/extract_features.py", *flags, image_tree / "val", cwd=ROOT / "eval")
    assert done.returncode == 0 and not done.stderr, done.stderr
    said = f"data {image_tree / 'val'}: 12 images in 3 classes\n"
    said += f"--weights {weights}: backbone state_dict.encoders.query_encoder.backbone"
    said += "; also there: state_dict.encoders.target_encoder.backbone\n"
    assert done.stdout == f"{said}{out}: 12 images, 32 embeddings each\n"
