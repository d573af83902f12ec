"""Runs that go on: from where, with which flags, and what is left alone."""

import os
import signal

import pytest
import torch
from test_engine import Loader, Method, log, make_run, names, train
from torch import nn

from utils.method.memory_bank import MemoryBank
from utils.runtime import files
from utils.runtime.errors import InputError, Interrupted


def test_resuming_keeps_the_run_in_its_own_folder(tmp_path):
    train(make_run(tmp_path, epochs=4, save_freq=1))
    path = tmp_path / "ckpt_epoch_2.pth"
    later = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)[2:]}
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"epoch": 4, "half wri')  # as kill -9 leaves it
    train(make_run(tmp_path, epochs=4, save_freq=1, resume=str(path)))
    assert [line["epoch"] for line in log(tmp_path)] == [1, 2, 3, 4]
    aside = tmp_path / "earlier_1"  # what the resumed run makes again
    assert {name: (aside / name).read_bytes() for name in names(aside)} == later
    assert not (tmp_path / "earlier_2").exists()


def test_resuming_into_another_folder_does_not_touch_the_run_there(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        train(make_run(folder, epochs=2, save_freq=1))
    before = (there / "ckpt_epoch_2.pth").read_bytes()
    train(make_run(there, epochs=2, save_freq=1, resume=str(here / "ckpt_epoch_1.pth")))
    assert (there / "earlier_1" / "ckpt_epoch_2.pth").read_bytes() == before
    assert len(log(there / "earlier_1")) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "not a run of this repository"),
        ({"method": "Another"}, "a run of Another"),
        ({"optimizer": None}, "optimizer is None, not a table"),
        ({"state_dict": {"weight": 3}}, "weight weight is 3"),
        (
            {"state_dict": {"weight": torch.tensor([torch.nan])}},
            "1 weights are not finite",
        ),
        ({"state_dict": {"weight": torch.ones(2)}}, "1 weights of another shape, first weight"),
        ({"epoch": 3}, "finished epoch 3 of --epochs 3"),
        ({"epoch": 5, "step": 2}, "finished epoch 4 of --epochs 3"),
        ({"epoch": 0}, "epoch is 0, not a whole number of 1 or more"),
        ({"step": -1}, "step is -1, not a whole number of 0 or more or nothing"),
        ({"seconds": float("nan")}, "seconds is nan, not a finite number of 0 or more"),
        ({"bad_images": {"a": 1}}, "bad_images is a dict, not a list of text"),
        ({"data": ["a"]}, "data is a list, not a table of text"),
        ({"parts": {"previous": [1]}}, "parts is a dict, not a table of a table"),
        ({"args": {"seed": torch.zeros(2)}}, "args is a dict, not a table of plain values"),
        (
            {"rng_states": [{"cpu": torch.zeros(5, dtype=torch.uint8)}]},
            "rng_states is none of this",
        ),
        ({"means": {"sums": {"a": 1}}}, "means is a dict, not sums of figures"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "optimizer: param_groups has other"),
        ({7: 1}, "its key 7 is not text"),
    ],
)
def test_what_cannot_be_resumed(tmp_path, change, words):
    train(make_run(tmp_path, epochs=1))
    path = tmp_path / "ckpt_epoch_1.pth"
    state = torch.load(path, weights_only=True) | change
    files.save(tmp_path / "changed.pth", state)
    with pytest.raises(InputError, match=words) as error:
        make_run(tmp_path, resume=str(tmp_path / "changed.pth"))
    assert "--resume" in str(error.value)
    assert path.exists() and len(log(tmp_path)) == 1  # nothing was touched


@pytest.mark.parametrize(
    ("flag", "before", "now", "refused"),
    [
        ("batch_size", 8, 16, True),
        ("seed", 0, 1, True),
        ("topk", 5, "all", True),
        ("lr_decay_epochs", [90, 120], [90], True),
        ("epochs", 3, 2, True),
        ("epochs", 2, 3, False),
        ("num_workers", 0, 4, False),
        ("print_freq", 10, 1, False),
        ("data", "/here", "/there", False),
    ],
)
def test_flags_that_make_another_experiment_are_refused(
    tmp_path, capsys, flag, before, now, refused
):
    train(make_run(tmp_path, **{"epochs": 2, "save_freq": 1, "cos": True, flag: before}))
    again = {"epochs": 2, "cos": True, flag: now, "resume": str(tmp_path / "ckpt_epoch_1.pth")}
    there = names(tmp_path)
    if not refused:
        make_run(tmp_path, **again)
        return
    with pytest.raises(InputError) as error:
        make_run(tmp_path, **again)
    assert f"--{flag} {before}, not {now} (to go on all the same: --resume_anyway)" in str(
        error.value
    )
    assert names(tmp_path) == there
    make_run(tmp_path, **again, resume_anyway=True)
    assert f"--{flag} {before}, not {now}" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_with_resume_anyway_too(tmp_path):
    train(make_run(tmp_path, epochs=1))
    wider = Method()
    wider.weight = nn.Parameter(torch.ones(2))
    path = str(tmp_path / "ckpt_epoch_1.pth")
    with pytest.raises(InputError, match="1 weights of another shape"):
        make_run(tmp_path, model=wider, resume=path, resume_anyway=True)


def test_a_bank_out_of_a_file_is_of_these_images(tmp_path):
    class Banked(Method):
        def __init__(self):
            super().__init__()
            self.bank = MemoryBank(4, 2)

    model = Banked()
    rows = torch.tensor([[1.0, 0], [0, 1]])
    model.bank.enqueue(rows, index=torch.tensor([0, 6]), label=torch.tensor([2, -1]))
    train(make_run(tmp_path, model=model, epochs=1))
    resume = {"resume": str(tmp_path / "ckpt_epoch_1.pth"), "epochs": 2}
    make_run(tmp_path / "a", model=Banked(), **resume, num_images=7, num_classes=3)
    for numbers, words in (((6, 3), "index is not .* 0 to 5"), ((7, 2), "label is not .* -1 to 1")):
        counts = dict(zip(("num_images", "num_classes"), numbers, strict=True))
        with pytest.raises(InputError, match=f"ckpt_epoch_1.pth: memory bank bank: {words}"):
            make_run(tmp_path / "b", model=Banked(), **resume, **counts)


def test_a_step_beyond_the_epoch_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        stop = {(1, 3): lambda: os.kill(os.getpid(), signal.SIGTERM)}
        train(make_run(tmp_path), Loader(after=stop))
    state = torch.load(tmp_path / "ckpt_epoch_1_step_3.pth", weights_only=True)
    path = tmp_path / "changed.pth"
    files.save(path, state | {"step": 5})
    with pytest.raises(InputError, match="changed.pth: holds step 5 of an epoch of 4"):
        train(make_run(tmp_path / "b", resume=str(path)))


def test_other_images_are_refused(tmp_path):
    train(make_run(tmp_path, epochs=1, digests={"images": "abc", "labels": "d"}))
    path = str(tmp_path / "ckpt_epoch_1.pth")
    make_run(tmp_path, digests={"images": "abc", "labels": "d"}, resume=path)
    with pytest.raises(InputError, match="a run with other labels "):
        make_run(tmp_path, digests={"images": "abc", "labels": "e"}, resume=path)


def test_auto_starts_goes_on_and_ends(tmp_path, capsys):
    """The same command again and again, as a queue would start it."""
    train(make_run(tmp_path, epochs=2, save_freq=1, resume="auto"))
    assert "no checkpoint" in capsys.readouterr().out
    figures = {1: {"accuracy": 50.0}}
    run = train(make_run(tmp_path, epochs=3, resume="auto", evaluate=lambda: figures))
    assert "resumed after epoch 2 from" in capsys.readouterr().out
    weight = run.model.weight.item()
    # It is finished: nothing is trained or measured again, the result is there all the same.
    run = train(make_run(tmp_path, epochs=3, resume="auto", evaluate=lambda: 1 / 0))
    assert run.knn == figures and run.model.weight.item() == weight
    run.finish("x")
    assert not list(tmp_path.glob("earlier_*"))


def test_auto_falls_back_from_a_damaged_checkpoint(tmp_path, capsys):
    train(make_run(tmp_path, epochs=2, save_freq=1))
    newest = tmp_path / "ckpt_epoch_2.pth"
    newest.write_bytes(newest.read_bytes()[:-9])
    run = make_run(tmp_path, epochs=3, resume="auto")
    said = capsys.readouterr().out
    assert str(newest) in said and "ckpt_epoch_1.pth" in said
    assert (run.epoch, run.epoch_step) == (1, 0)
    assert (tmp_path / "earlier_1" / newest.name).exists()
    (tmp_path / "ckpt_epoch_1.pth").write_bytes(b"")
    with pytest.raises(InputError, match="no whole checkpoint"):
        make_run(tmp_path, resume="auto")


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_run_saved_within_an_epoch_goes_on_there(tmp_path, step):
    """The learning rate, the sums of the log and the place are those of an undisturbed run."""
    values = {(2, s): float(s) for s in (1, 2, 3, 4)}
    figures = {1: {"accuracy": 50.0}}
    options = {"print_freq": 4, "knn_freq": 1, "evaluate": lambda: figures}
    whole = train(make_run(tmp_path / "whole", **options), Loader(values))
    broken = Loader(values, after={(2, step): lambda: os.kill(os.getpid(), signal.SIGUSR1)})
    with pytest.raises(Interrupted, match=f"SIGUSR1 after epoch 2, step {step}: saved ") as stop:
        train(make_run(tmp_path / "broken", **options), broken)
    assert stop.value.exit_code == 75
    run = train(make_run(tmp_path / "broken", **options, resume="auto"), Loader(values))
    assert torch.equal(run.model.weight, whole.model.weight)

    def without_times(line):
        return {k: v for k, v in line.items() if k not in ("seconds", "images_per_s")}

    lines = [list(map(without_times, log(tmp_path / name))) for name in ("whole", "broken")]
    assert lines[0] == lines[1]
