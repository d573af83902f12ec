"""Flags: published names and defaults, the demo's settings."""

import importlib
import sys

import pytest
import torch

from utils import options, reading, workers

TRAIN = importlib.import_module("self_supervised.train_msf_2q")


def parse(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train_msf_2q.py", *map(str, flags)])
    return TRAIN.parse_args()


def test_published_defaults(monkeypatch, tmp_path):
    """SPEC: names and defaults of the published code; --arch is the one exception."""
    args = vars(parse(monkeypatch, tmp_path))
    published = {
        "dataset": "imagenet",
        "debug": False,
        "print_freq": 100,
        "save_freq": 10,
        "batch_size": 256,
        "epochs": 200,
        "learning_rate": 0.01,
        "lr_decay_epochs": [90, 120],
        "lr_decay_rate": 0.2,
        "cos": False,
        "weight_decay": 1e-4,
        "sgd_momentum": 0.9,
        "arch": "resnet50",
        "momentum": 0.99,
        "mem_bank_size": 128000,
        "topk": 5,
        "topkp": 10,
        "weak_strong": False,
        "weights": None,
        "resume": None,
    }
    assert {name: args[name] for name in published} == published
    assert str(args["checkpoint_path"]) == "output/mean_shift_default"
    new = {"image_size": 224, "small_stem": False, "seed": 0, "knn_freq": 0, "proj_bn": False}
    assert {name: args[name] for name in new} == new
    assert (args["proj_dim"], args["hidden_dim"], args["blur"]) == (None, None, 0.5)


def test_explicit_flags_override_the_demo(monkeypatch, tmp_path):
    monkeypatch.setattr(options.demo_data, "draw_data_set", lambda root: tmp_path / root.name)
    args = parse(monkeypatch, "--demo", "--epochs", 7)
    assert (args.arch, args.image_size, args.epochs) == ("conv4", 32, 7)
    assert args.data == tmp_path / "demo"
    args = parse(monkeypatch, "--demo", "--arch", "resnet18", tmp_path)
    assert (args.arch, args.data) == ("resnet18", tmp_path)
    assert args.checkpoint_path == options.ROOT / "output" / "demo_2q"


def test_a_drawing_that_cannot_be_used_is_one_line(monkeypatch, capsys):
    def refuse(root):
        raise ValueError(f"{root} holds something else")

    monkeypatch.setattr(options.demo_data, "draw_data_set", refuse)
    with pytest.raises(SystemExit) as code:
        parse(monkeypatch, "--demo")
    error = capsys.readouterr().err
    assert code.value.code == 2
    assert error.count("\n") == 1 and "--demo" in error and "holds something else" in error


@pytest.mark.parametrize(
    ("num_workers", "processes", "words"),
    [(3, 1, ""), (4, 1, "--num_workers 4: more worker processes than the 3 cores"), (0, 4, "")]
    + [(1, 3, ""), (2, 2, "--num_workers 2: more worker processes in each of 2 processes")],
)
def test_more_workers_than_cores_are_said_to_be_slow(
    monkeypatch, capsys, tmp_path, num_workers, processes, words
):
    monkeypatch.setattr(workers, "cores", lambda: 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert parse(monkeypatch, "--num_workers", num_workers, tmp_path).num_workers == num_workers
    out = capsys.readouterr().out
    assert out.startswith(words) and out.count("\n") == bool(words)


def test_torch_says_nothing_of_them(recwarn, tmp_path):
    reading.data_loader([0], torch.device("cpu"), num_workers=workers.cores() + 1)
    assert not recwarn.list
