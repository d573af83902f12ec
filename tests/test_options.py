"""Flags: published names and defaults, the demo's settings, errors in one line."""

import argparse
import importlib
import os
import signal
import sys

import pytest
import torch

from utils import options
from utils.errors import InputError, RunError

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


@pytest.mark.parametrize("text", ["x", "0", "-3", "1.5", "inf", "nan", ""])
def test_numbers_out_of_range(text):
    with pytest.raises(argparse.ArgumentTypeError, match=text or "is no int"):
        options.positive(text)
    if text not in ("0", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError):
            options.not_negative(text)


def test_devices():
    assert options.device("cpu") == torch.device("cpu")
    for text in ("meta", "cuda:99", "gpu", "xla"):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            options.device(text)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("--topk 0: too few"), 2, "error: --topk 0: too few"),
        (RunError("the loss is nan"), 1, "error: the loss is nan"),
        (RuntimeError("[enforce fail] can't allocate memory: you tried 9 bytes\nmore"), 1, "alloc"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            1,
            "--num_workers",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(capsys, error, code, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit_code:
        options.run_script(main)
    assert exit_code.value.code == code
    printed = capsys.readouterr().err
    assert words in printed and "Traceback" not in printed


def test_other_errors_keep_their_traceback():
    def main():
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        options.run_script(main)


def test_write_json(tmp_path):
    path = options.write_json(tmp_path / "deep", "x.json", {"k": {1: 2.5}})
    assert path.read_text() == '{\n  "k": {\n    "1": 2.5\n  }\n}\n'
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--save"):
        options.write_json(tmp_path / "file", "x.json", {})


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_ends_a_script_in_one_line(monkeypatch, capsys, name):
    """While it has nothing to save; another one, as it ends, changes nothing."""
    monkeypatch.setattr(sys, "argv", ["dir/script.py"])
    with pytest.raises(SystemExit) as stop:
        options.run_script(lambda: os.kill(os.getpid(), getattr(signal, name)))
    assert stop.value.code == 75
    assert capsys.readouterr().err == f"script.py: stopped by {name}\n"
    os.kill(os.getpid(), signal.SIGTERM)
