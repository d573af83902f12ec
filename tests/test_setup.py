"""From flags to objects: every setting arrives where it belongs."""

import importlib
import json
import sys
from datetime import UTC, datetime

import pytest
import torch
import torchvision

from utils import evaluation, setup
from utils.errors import InputError

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
    encoders = setup.build_encoders(args(*TINY, *flags))
    assert (encoders.momentum, encoders.proj_dim) == (0.7, 6)
    assert encoders.predictor[0].weight.shape == (10, 6)
    assert isinstance(encoders.query_encoder.projector[-1], torch.nn.BatchNorm1d)
    plain = setup.build_encoders(args(*TINY))
    assert (plain.proj_dim, len(plain.query_encoder.projector)) == (32, 4)


@pytest.mark.parametrize("build", [setup.build_encoders, setup.build_sole_backbone])
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


def test_encoders_are_seeded(args):
    one, same, other = (
        setup.build_encoders(args(*TINY, "--seed", seed)).query_encoder.projector[0].weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_optimizer_is_plain_sgd_over_what_has_a_gradient(args):
    given = args(*TINY, "--learning_rate", 0.3, "--sgd_momentum", 0.8, "--weight_decay", 0.02)
    encoders = setup.build_encoders(given)
    optimizer = setup.build_optimizer(given, encoders)
    (group,) = optimizer.param_groups
    expected = {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.02, "nesterov": False, "dampening": 0}
    assert {name: group[name] for name in expected} == expected
    trained = {id(p) for m in (encoders.query_encoder, encoders.predictor) for p in m.parameters()}
    assert {id(p) for p in group["params"]} == trained


def test_loader_follows_its_flags(args):
    given = args(*TINY, "--weak_strong", "--blur", 0.25, "--seed", 4, "--num_workers", 0)
    train, val = setup.read_training_data(given)
    loader = setup.build_loader(given, train)
    assert (loader.batch_size, len(loader), len(val)) == (8, 3, 12)
    direct = setup.TwoViewLoader(
        train, batch_size=8, image_size=16, weak_strong=True, blur=0.25, seed=4
    )
    one, two = next(loader.epoch(2)), next(direct.epoch(2))
    assert torch.equal(one.query_view, two.query_view)
    assert torch.equal(one.target_view, two.target_view)


def test_every_loader_does_about_broken_images_what_the_flags_say(args):
    given = args(*TINY, "--bad_images", "skip", "--max_bad_images", 7, "--num_workers", 0)
    train, val = setup.read_training_data(given)
    bad_images = setup.build_loader(given, train).bad_images
    assert (bad_images.skip, bad_images.most) == (True, 7)
    alone, other = evaluation.eval_loaders(given, train, val)
    assert alone.bad_images is other.bad_images and alone.bad_images.most == 7
    (shared,) = evaluation.eval_loaders(given, val, bad_images=bad_images)
    assert shared.bad_images is bad_images
    plain = setup.build_loader(args(*TINY, "--num_workers", 0), train).bad_images
    assert (plain.skip, plain.most, plain.names) == (False, 100, [])


def test_a_batch_of_one_is_refused(args):
    with pytest.raises(InputError, match="--batch_size 1"):
        setup.check_bank(args(*TINY, "--batch_size", 1))


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
