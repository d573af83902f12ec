"""From flags to objects: every setting arrives where it belongs."""

import importlib
import json
import shutil
import sys
from datetime import UTC, datetime

import pytest
import tiny
import torch
import torchvision
from conftest import write_image
from test_bad_input import assert_refused

from utils.cli import build_evaluation, build_training
from utils.data import image_cache
from utils.data.datasets import ImageSet
from utils.data.label_noise import given_labels
from utils.runtime import distributed
from utils.runtime.errors import InputError

TRAIN = importlib.import_module("self_supervised.train_msf_2q")


@pytest.fixture
def args(monkeypatch, image_tree):
    """Parse the flags of the training script."""

    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags), str(image_tree)])
        return TRAIN.parse_args()

    return parse


TINY = ("--arch", "conv4", "--image_size", 16, "--batch_size", 8, "--mem_bank_size", 20)


def test_encoders_follow_their_flags(args):
    flags = ("--momentum", 0.7, "--proj_dim", 6, "--hidden_dim", 10, "--proj_bn")
    encoders = build_training.build_encoders(args(*TINY, *flags))
    assert (encoders.momentum, encoders.proj_dim) == (0.7, 6)
    assert encoders.predictor[0].weight.shape == (10, 6)
    assert isinstance(encoders.query_encoder.projector[-1], torch.nn.BatchNorm1d)
    plain = build_training.build_encoders(args(*TINY))
    assert (plain.proj_dim, len(plain.query_encoder.projector)) == (32, 4)


@pytest.mark.parametrize(
    "build", [build_training.build_encoders, build_training.build_sole_backbone]
)
def test_a_run_that_goes_on_needs_no_weights(args, build, tmp_path, capsys):
    """The file that it started from may be gone; one that starts still needs it."""
    folder = tmp_path / "out"
    flags = ("--weights", tmp_path / "gone.pth", "--checkpoint_path", folder)
    for resume in ((), ("--resume", "auto")):
        with pytest.raises(InputError, match="--weights .*gone.pth: no such file"):
            build(args(*TINY, *flags, *resume))
        folder.mkdir(exist_ok=True)  # without a checkpoint in it
    (folder / "ckpt_epoch_1_step_2.pth").touch()
    with pytest.raises(InputError, match="no such file"):
        build(args(*TINY, *flags))
    for resume in ("auto", tmp_path / "other.pth"):
        build(args(*TINY, *flags, "--resume", resume))
        said = f"--weights {tmp_path}/gone.pth: not read, as --resume {resume} goes on\n"
        assert capsys.readouterr().out == said


@pytest.mark.parametrize("bn", ["shuffle", "sync", "local"])
def test_a_backbone_without_batch_norm_is_told_of(args, monkeypatch, capsys, bn):
    """And of several processes what --bn is about then."""
    pytest.importorskip("timm")
    flags = ("--arch", "timm/test_vit", "--image_size", 32, "--bn", bn)
    heads = "no batch norm in the backbone, only in projector and predictor"
    for build, said, of_several in (
        (build_training.build_encoders, heads, f", which is what --bn {bn} is about\n"),
        (build_training.build_sole_backbone, "no batch norm in it", f", so --bn {bn} changes"),
    ):
        for processes, more in ((1, "\n"), (2, of_several)):
            given = args(*TINY, *flags)
            monkeypatch.setattr(distributed, "world_size", lambda n=processes: n)
            build(given)
            printed = capsys.readouterr().out
            assert printed.startswith(f"--arch timm/test_vit: {said}{more}")
            assert printed.count("\n") == 1
            monkeypatch.undo()
        assert build(args(*TINY)) and not capsys.readouterr().out


def test_encoders_are_seeded(args):
    one, same, other = (
        build_training.build_encoders(args(*TINY, "--seed", seed)).query_encoder.projector[0].weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_optimizer_is_plain_sgd_over_what_has_a_gradient(args):
    given = args(*TINY, "--learning_rate", 0.3, "--sgd_momentum", 0.8, "--weight_decay", 0.02)
    encoders = build_training.build_encoders(given)
    optimizer = build_training.build_optimizer(given, encoders)
    (group,) = optimizer.param_groups
    expected = {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.02, "nesterov": False, "dampening": 0}
    assert {name: group[name] for name in expected} == expected
    assert group["fused"] is None
    given.device = torch.device("cuda")
    assert build_training.build_optimizer(given, encoders).param_groups[0]["fused"]
    trained = {id(p) for m in (encoders.query_encoder, encoders.predictor) for p in m.parameters()}
    assert {id(p) for p in group["params"]} == trained


def test_loader_follows_its_flags(args):
    given = args(*TINY, "--weak_strong", "--blur", 0.25, "--seed", 4, "--num_workers", 0)
    train, val = build_training.read_training_data(given)
    loader = build_training.build_loader(given, train)
    assert (loader.batch_size, len(loader), len(val)) == (8, 3, 12)
    direct = build_training.TwoViewLoader(
        train, batch_size=8, image_size=16, weak_strong=True, blur=0.25, seed=4
    )
    one, two = next(loader.epoch(2)), next(direct.epoch(2))
    assert torch.equal(one.query_view, two.query_view)
    assert torch.equal(one.target_view, two.target_view)


def test_every_loader_does_about_broken_images_what_the_flags_say(args):
    given = args(*TINY, "--bad_images", "skip", "--max_bad_images", 7, "--num_workers", 0)
    train, val = build_training.read_training_data(given)
    bad_images = build_training.build_loader(given, train).bad_images
    assert (bad_images.skip, bad_images.most) == (True, 7)
    alone, other = build_evaluation.eval_loaders(given, train, val)
    assert alone.bad_images is other.bad_images and alone.bad_images.most == 7
    (shared,) = build_evaluation.eval_loaders(given, val, bad_images=bad_images)
    assert shared.bad_images is bad_images
    plain = build_training.build_loader(args(*TINY, "--num_workers", 0), train).bad_images
    assert (plain.skip, plain.most, plain.names) == (False, 100, [])


def test_a_batch_of_one_is_refused(args):
    with pytest.raises(InputError, match="--batch_size 1"):
        build_training.read_training_data(args(*TINY, "--batch_size", 1))


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("eval.eval_knn", "--train_file"),
        ("eval.eval_linear", "--train_file"),
        ("semi_supervised.train_pseudo_cmsf", "--sup_split_file"),
    ],
)
def test_a_split_without_a_class_is_refused(call_script, image_tree, tmp_path, script, flag):
    split = tmp_path / "split.txt"
    split.write_text("a/0.jpg\nc/1.jpg\n")
    result = call_script(importlib.import_module(script), *TINY[:4], flag, split, image_tree)
    assert_refused(result, f"{flag} {split}: no labeled image of 1 of 3 classes: b")


def test_a_class_that_no_image_is_given_is_named(capsys, tmp_path):
    file = tmp_path / "labels.txt"
    images = ImageSet(tmp_path, ["a/1.jpg", "b\n/1.jpg"], [0, 1], ["a", "b\n"])
    for classes, words in (
        (
            ("a", "a"),
            f'WARNING --label_file {file}: no image has the label of 1 of 2 classes: "b\\n"\n',
        ),
        (('"b\\n"', "a"), ""),
    ):
        file.write_text(f'a/1.jpg\t{classes[0]}\n"b\\n/1.jpg"\t{classes[1]}\n')
        assert given_labels(images, file=file, noise=None, seed=0) is not None
        assert capsys.readouterr().out == words


def test_a_run_says_what_it_was_started_with(call_script, image_tree, tmp_path):
    flags = ("--epochs", 1, "--topk", 3, "--num_workers", 0, "--checkpoint_path", tmp_path)
    code, _, _ = call_script(TRAIN, *TINY, *flags, image_tree)
    assert code == 0
    (start,) = json.loads((tmp_path / "run.json").read_text())["starts"]
    saved = torch.load(tmp_path / "ckpt_epoch_1.pth", weights_only=True)
    assert start["settings"] == saved["args"] and start["data"] == saved["data"]
    assert start["method"] == saved["method"] == "CMSF2Q"
    assert start["counts"] == {"train": 30, "classes": 3, "val": 12}
    assert (start["epochs"], start["steps"]) == (1, 30 // 8)
    assert start["versions"]["torchvision"] == torchvision.__version__
    assert start["versions"].keys() == {"python", "torch", "torchvision", "numpy", "faiss"}
    assert start["command"].startswith("python train_msf_2q.py --arch conv4")
    assert (start["processes"], start["device"]) == (1, "cpu")
    age = datetime.now(UTC) - datetime.fromisoformat(start["started"])
    assert 0 <= age.total_seconds() < 60


def test_what_is_left_out_is_said_at_the_start_and_kept(call_script, image_tree, tmp_path):
    tree = shutil.copytree(image_tree, tmp_path / "tree")
    (tree / "train" / "a" / "notes.txt").touch()
    (tree / "val" / ".cache").mkdir()
    script = importlib.import_module("self_supervised.train_msf")
    flags = (*tiny.FLAGS, "--epochs", 1, "--checkpoint_path", tmp_path / "run")
    code, stdout, stderr = call_script(script, *flags, tree)
    assert code == 0, stderr
    text = ": 30 images in 3 classes; left out: 1 .txt (a/notes.txt)"
    assert stdout.startswith(f"data {tree / 'train'}{text}\n")
    (start,) = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert start["left_out"] == {
        "train": {".txt": {"count": 1, "first": ["a/notes.txt"]}},
        "val": {"hidden": {"count": 1, "first": [".cache"]}},
    }


def test_one_class_teaches_nothing_by_labels(call_script, tmp_path):
    for number in range(8):
        write_image(tmp_path / "train" / "a" / f"{number}.jpg", seed=number)
    script = importlib.import_module("supervised.train_sup_msf")
    code, _, stderr = call_script(script, *tiny.FLAGS, tmp_path)
    assert code == 2 and "one class only, a; labels need two" in stderr


@pytest.mark.parametrize(
    ("size", "flags", "warned"),
    [
        (30, (), False),
        (31, (), True),
        (60, ("--symmetric",), False),
        (61, ("--symmetric",), True),
    ],
)
def test_a_bank_above_the_data_set_is_warned_of(args, capsys, size, flags, warned):
    """30 training images: with more rows some image has two, with both views as targets twice."""
    given = args(*TINY, "--num_workers", 0, "--mem_bank_size", size, *flags)
    train, _ = build_training.read_training_data(given)
    build_training.build_loader(given, train)
    lines = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(lines) == warned
    for line in lines:
        assert f"--mem_bank_size {size}" in line and "the 30 training images" in line
        assert ("twice" in line) == bool(flags)


FREE = 10**6


@pytest.mark.parametrize(
    ("flags", "needed", "words"),
    [
        (("--mem_bank_size", 7813), 4 * 7813 * 32, "--mem_bank_size 7813"),
        (("--hidden_dim", 782), 4 * 782 * (2 * (128 + 32) + 2 * 32), "--hidden_dim 782"),
        (("--image_size", 65), 2 * 8 * 3 * 65**2 * 5, "--batch_size 8, --image_size 65"),
        (("--image_size", 65, "--batch_size", 30), 30 * 3 * 65**2 * 5, "--image_size 65"),
    ],
)
def test_what_does_not_fit_the_memory_is_refused_by_name(args, monkeypatch, flags, needed, words):
    """conv4 has 128 features, so 32 in an embedding; of a view a byte and a float a number."""
    given = args(*TINY, "--mem_bank_size", 60, "--num_workers", 0, *flags)
    train, val = build_training.read_training_data(given)

    def build(free):
        monkeypatch.setattr(image_cache, "available_memory", lambda: free)
        if "--batch_size" in flags:
            return build_evaluation.eval_loaders(given, val, train)
        return build_training.build_loader(given, train), build_training.build_encoders(given)

    with pytest.raises(InputError, match=f"{words}.* at least {needed} bytes .*{needed - 1} are"):
        build(needed - 1)
    build(max(needed, FREE))
    build(None)


@pytest.mark.parametrize(("where", "refused"), [("train/run", True), ("val", True), ("run", False)])
def test_a_run_folder_among_the_images_is_refused(args, image_tree, tmp_path, where, refused):
    data = shutil.copytree(image_tree, tmp_path / "tree")
    (tmp_path / "link").symlink_to(data)
    given = args(*TINY, "--checkpoint_path", tmp_path / "link" / where)
    given.data = data
    if refused:
        words = f"--checkpoint_path .*/link/{where}: lies in .*/{where.split('/')[0]}, whose"
        with pytest.raises(InputError, match=words):
            build_training.read_training_data(given)
    else:
        assert len(build_training.read_training_data(given)[0]) == 30


def test_a_val_folder_that_is_a_link_to_nowhere_is_named(args, image_tree, tmp_path):
    data = shutil.copytree(image_tree, tmp_path / "tree")
    shutil.rmtree(data / "val")
    (data / "val").symlink_to("/no/disk")
    given = args(*TINY)
    given.data = data
    with pytest.raises(InputError, match="tree/val: a link to what is not there, /no/disk"):
        build_training.read_training_data(given)
