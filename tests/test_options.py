"""Flags: published names and defaults, the demo's settings."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from utils.cli import options
from utils.data import batches
from utils.runtime import origin, workers

TRAIN = importlib.import_module("self_supervised.train_msf_2q")


def parse(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train_msf_2q.py", *map(str, flags)])
    return TRAIN.parse_args()


class Built(Exception):
    """Carries a parser out of the function that builds it."""


@pytest.fixture
def parser_of(monkeypatch):
    """The parser of a script, by its module's name."""

    def build(script):
        with pytest.raises(Built) as built:
            importlib.import_module(script).parse_args()
        return built.value.args[0]

    def parse(parser, **_):
        raise Built(parser)

    monkeypatch.setattr(options, "parse", parse)
    return build


# The published flags of each script with their defaults; ...: the name alone is kept.
TRAINING = {
    **{"--dataset": "imagenet", "--debug": False, "--print_freq": 100, "--save_freq": 10},
    **{"--batch_size": 256, "--epochs": 200, "--learning_rate": 0.01, "--cos": False},
    **{"--lr_decay_epochs": [90, 120], "--lr_decay_rate": 0.2, "--weight_decay": 1e-4},
    **{"--sgd_momentum": 0.9, "--momentum": 0.99, "--mem_bank_size": 128000, "--topk": 5},
    **{"--weak_strong": False, "--weights": None, "--resume": None},
    **{"--checkpoint_path": Path("output/mean_shift_default"), "--num_workers": ...},
}
PUBLISHED = {
    "self_supervised.train_msf": TRAINING,
    "self_supervised.train_msf_2q": TRAINING | {"--topkp": 10},
    "self_supervised.train_msf_km": TRAINING | {"--num_clusters": 50000},
    "supervised.train_sup_msf": TRAINING,
    "semi_supervised.train_pseudo_cmsf": TRAINING
    | {"--sup-split-file": None, "--pseudo_batch_size": 256, "--pseudo_lbl_epochs": 40}
    | {"--pseudo_lbl_lr": 0.01, "--pseudo_lbl_lr_schedule": [15, 30, 40]}
    | {"--pseudo_lbl_momentum": 0.9, "--pseudo_lbl_weight_decay": 1e-4, "--use_conf": False}
    | {"--cache_sup": False, "--cache_conf_unsup": False, "--mlp_xent": "linear"},
    "eval.eval_knn": {"--weights": None, "--save": None, "--load_cache": None, "--epoch": None}
    | {"-b": 256, "--batch-size": 256, "--train-file": None, "--save-acc": None}
    | {"-k": ..., "-j": ..., "--workers": ...},
    "eval.eval_linear": {"--weights": None, "--lr": [0.01], "--epochs": 40, "--momentum": 0.9}
    | {"--lr_schedule": [15, 30, 40], "--wd": 1e-4, "-b": 256, "--fine-tune": False}
    | {"--train-file": None, "--use-target": False, "--mlp": False, "--evaluate": False}
    | {"--resume": None, "--save": None, "--seed": ...},
}
# What docs/deviations.md names: published flags with another default here. --arch crashed.
CHANGED = {
    **{f"{script} --arch": "resnet50" for script in PUBLISHED if "train" in script},
    "semi_supervised.train_pseudo_cmsf --conf_th": 0.85,  # published 0.0
    "semi_supervised.train_pseudo_cmsf --sup_mem_bank_size": 128000,  # published 12800
}


@pytest.mark.parametrize("script", PUBLISHED)
def test_published_names_and_defaults(parser_of, script):
    parser = parser_of(script)
    defaults = vars(parser.parse_args([]))
    places = {flag: action.dest for action in parser._actions for flag in action.option_strings}
    expected = dict(PUBLISHED[script])
    for name, default in CHANGED.items():
        if name.startswith(f"{script} "):
            expected[name.split()[1]] = default
    assert expected.keys() <= places.keys()
    ours = {flag: defaults[places[flag]] for flag in expected}
    assert ours == {flag: ours[flag] if d is ... else d for flag, d in expected.items()}


def test_changed_defaults_are_named():
    text = (ROOT / "docs" / "deviations.md").read_text()
    for name in (*CHANGED, *(f"x {flag}" for flag in ("--num_workers", "-k"))):
        assert f"`{name.split()[1]}`" in text
    assert "docs/deviations.md" in (ROOT / "README.md").read_text()


def test_new_defaults(monkeypatch, tmp_path):
    args = vars(parse(monkeypatch, tmp_path))
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
    assert args.checkpoint_path == origin.ROOT / "output" / "demo_2q"


@pytest.mark.parametrize(
    ("device", "flags", "expected"),
    [("cpu", "", True), ("cpu", "--precision bf16", True), ("cuda", "", False), ("mps", "", False)]
    + [("cuda", "--precision bf16", True), ("cuda", "--tf32", True)]
    + [("cpu", "--no_channels_last", False), ("cuda", "--tf32 --no-channels_last", False)]
    + [("cuda", "--channels_last", True), ("cpu", "--no_channels_last --channels_last", True)],
)
def test_channels_last_where_it_is_faster_unless_said(
    monkeypatch, tmp_path, device, flags, expected
):
    monkeypatch.setattr(options.distributed, "start", lambda _: torch.device(device))
    assert parse(monkeypatch, *flags.split(), tmp_path).channels_last is expected


@pytest.mark.parametrize(
    ("device", "flags", "variable", "expected"),
    [("cpu", ["--demo"], None, [1]), ("cpu", ["--demo"], "4", []), ("cpu", [], None, [])]
    + [("cuda", ["--demo"], None, [])],
)
def test_the_demo_computes_on_one_thread(monkeypatch, tmp_path, device, flags, variable, expected):
    """On a CPU, unless OMP_NUM_THREADS says how many."""
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(options.distributed, "start", lambda _: torch.device(device))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    parse(monkeypatch, *flags, tmp_path)
    assert chosen == expected


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
    batches.data_loader([0], torch.device("cpu"), num_workers=workers.cores() + 1)
    assert not recwarn.list
