"""`Run`: order of what it does, stopping, warnings, what it keeps and what it moves aside."""

import json
import os
import signal

import pytest
import tiny
import torch
from torch import nn

from utils.data.bad_images import BadImages
from utils.runtime import distributed
from utils.runtime.errors import InputError, Interrupted, RunError
from utils.training import loss_watch
from utils.training.engine import Run


class Method(nn.Module):
    """A method of one weight whose figures a test can set."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.health = {"spread": torch.tensor(0.9), "effective_rank": torch.tensor(20.0)}

    def forward(self, batch):
        return (self.weight * batch.value).sum(), {"value": batch.value.sum()}

    def diagnostics(self):
        return self.health


class OneBatch:
    def __init__(self, value, index):
        self.value, self.index = torch.tensor([value]), torch.tensor(index)


class Loader:
    """Four steps an epoch; the value of a batch tells where it came from."""

    batch_size = 2

    def __init__(self, values=None, *, after=None):
        self.values = values or {}
        self.after = after or {}  # (epoch, step) -> what happens before the batch comes
        self.bad_images = BadImages()

    def __len__(self):
        return 4

    def epoch(self, epoch, *, start=0):
        for step in range(start + 1, 5):
            self.after.get((epoch, step), lambda: None)()
            yield OneBatch(self.values.get((epoch, step), 1.0), [epoch, step])


RATES = {"learning_rate": 0.1, "lr_decay_epochs": [1, 2], "lr_decay_rate": 0.5}
NOT_FLAGS = ("about", "evaluate", "compare_with", "num_images", "num_classes", "digests")


def make_run(folder, *, model=None, **options):
    """options: flags, and other arguments of `Run`; `digests` for its data."""
    model = model or Method()
    others = {name: options.pop(name) for name in NOT_FLAGS if name in options}
    if "digests" in others:
        others["data"] = others.pop("digests")
    args = tiny.run_args(folder, **{"epochs": 3, **RATES, **options})
    return Run(args, model, torch.optim.SGD(model.parameters(), lr=1.0), **others)


def train(run, loader=None):
    with run:
        for batch in run.batches(loader or Loader()):
            loss, stats = run.model(batch)
            run.step(loss, stats)
    return run


def names(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").open()]


def test_learning_rate_steps_and_places(tmp_path):
    run = make_run(tmp_path, print_freq=3)
    places = []
    for batch in run.batches(Loader()):
        places.append((run.epoch, run.epoch_step, run.epoch_steps, run.total_steps))
        run.step(*run.model(batch))
    assert places == [(e, s, 4, 4 * (e - 1) + s) for e in (1, 2, 3) for s in (1, 2, 3, 4)]
    # d loss / d weight is 1: the weight has moved by the learning rates.
    assert run.model.weight.item() == pytest.approx(1 - 4 * (0.1 + 0.05 + 0.025))
    lines = log(tmp_path)
    assert [(x["epoch"], x["step"]) for x in lines] == [(e, s) for e in (1, 2, 3) for s in (3, 4)]
    assert [x["lr"] for x in lines[::2]] == pytest.approx([0.1, 0.05, 0.025])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, bad):
    run = make_run(tmp_path, save_freq=1)
    seen = []
    with pytest.raises(RunError) as error, run:
        for batch in run.batches(Loader({(2, 3): bad})):
            loss, stats = run.model(batch)
            seen.append(run.model.weight.item())
            run.step(loss, stats)
    line = log(tmp_path)[-1]
    assert (line["epoch"], line["step"], line["lr"], line["images"]) == (2, 3, 0.05, [2, 3])
    assert line["error"] == f"loss {bad}"
    assert run.model.weight.item() == seen[-1]
    for words in ("epoch 2, step 3", "learning rate 0.05", "images [2, 3]", "ckpt_epoch_1.pth"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["ckpt_epoch_1.pth"]


@pytest.mark.parametrize(
    ("health", "words"),
    [
        ({"spread": 0.05}, "collapse"),
        ({"effective_rank": 2.0}, "effective rank of 2.0"),
        ({}, None),
    ],
)
def test_collapse_is_warned_of_in_log_and_console(tmp_path, capsys, health, words):
    model = Method()
    model.health |= {name: torch.tensor(value) for name, value in health.items()}
    train(make_run(tmp_path, model=model))
    warnings = [line.get("warning") for line in log(tmp_path)]
    printed = capsys.readouterr().out
    if words is None:
        assert warnings == [None] * 3 and "WARNING" not in printed
    else:
        assert all(words in warning and "--proj_bn" in warning for warning in warnings)
        assert printed.count("WARNING") == 3


@pytest.mark.parametrize(
    ("knn_freq", "expected"), [(0, [3]), (1, [1, 2, 3]), (2, [2, 3]), (-1, [])]
)
def test_knn_frequency(tmp_path, knn_freq, expected):
    figures = {1: {"accuracy": 50.0, "purity": 40.0}}
    run = make_run(tmp_path, knn_freq=knn_freq, evaluate=lambda: figures)
    train(run)
    assert [line["epoch"] for line in log(tmp_path) if "knn" in line] == expected
    assert run.knn == (figures if expected else None)


def test_the_bar_shows_what_was_last_logged(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "shows_bars", lambda: True)
    run = make_run(tmp_path, epochs=2, print_freq=3)
    loader, shown = Loader(), []
    with run:
        for batch in run.batches(loader):
            shown.append(capsys.readouterr().err)
            run.step(*run.model(batch))
    figures = [f"loss {x['loss']:.3f}, {x['images_per_s']:.0f} images/s" for x in log(tmp_path)]
    # Lines after steps 3 and 4 of each epoch; the next epoch's bar begins with the last of them.
    assert "loss" not in "".join(shown[:3])
    assert figures[0] in shown[3] and figures[1] in shown[4] and figures[2] in shown[7]
    (first_of_second, *_) = [part for part in shown[4].split("\r") if "epoch 2/2" in part]
    assert figures[1] in first_of_second


def test_nothing_is_noted_of_a_step_whose_loss_is_bad(tmp_path, monkeypatch):
    """As on a GPU, where the loss is looked at later: no figure made of what the step broke."""
    monkeypatch.setattr(loss_watch, "_is_read_later", lambda loss: True)
    run = make_run(tmp_path)
    with pytest.raises(RunError, match="epoch 1, step 4"), run:
        for batch in run.batches(Loader({(1, 4): float("nan")})):
            run.step(*run.model(batch))
            if run.epoch_step == run.epoch_steps:
                run.note({"accuracy": 1.0})
    assert not [line for line in log(tmp_path) if "accuracy" in line]


@pytest.mark.parametrize(
    ("step", "flags"),
    [
        (2, {"save_minutes": 1e-9}),
        (2, {"print_freq": 2}),
        (4, {"knn_freq": 1, "evaluate": lambda: pytest.fail("evaluated what is broken")}),
    ],
    ids=["saving", "reporting", "evaluating"],
)
def test_a_bad_loss_is_found_at_its_step_before(tmp_path, monkeypatch, step, flags):
    """As on a GPU, where otherwise the next step would find it: its own is the last one."""
    monkeypatch.setattr(loss_watch, "_is_read_later", lambda loss: True)
    run, steps = make_run(tmp_path, **{"print_freq": 100, **flags}), []
    with pytest.raises(RunError, match=f"the loss is nan in epoch 1, step {step}"), run:
        for batch in run.batches(Loader({(1, step): float("nan")})):
            steps.append(run.epoch_step)
            run.step(*run.model(batch))
    assert steps[-1] == step
    lines = log(tmp_path)
    assert lines[-1]["error"] == "loss nan"
    assert not [line for line in lines[:-1] if line["step"] == step]


def test_debug_makes_two_short_epochs(tmp_path):
    class Long(Loader):
        def __len__(self):
            return 1000

        def epoch(self, epoch, *, start=0):
            for step in range(start, 1000):
                yield OneBatch(1.0, [step])

    run = make_run(tmp_path, debug=True)
    train(run, Long())
    assert run.total_steps == 10
    assert (tmp_path / "ckpt_epoch_2.pth").exists()


def test_an_earlier_run_is_moved_aside(tmp_path):
    train(make_run(tmp_path, epochs=1))
    before = (tmp_path / "ckpt_epoch_1.pth").read_bytes()
    train(make_run(tmp_path, epochs=2))
    train(make_run(tmp_path, epochs=1))
    assert (tmp_path / "earlier_1" / "ckpt_epoch_1.pth").read_bytes() == before
    assert [line["epoch"] for line in log(tmp_path / "earlier_1")] == [1]
    assert (tmp_path / "earlier_2" / "ckpt_epoch_2.pth").exists()
    assert [line["epoch"] for line in log(tmp_path)] == [1]


def starts(folder):
    """What run.json tells of the starts of a run."""
    record = json.loads((folder / "run.json").read_text())
    assert record.keys() == {"format", "starts"} and record["format"] == "cmsf-run-1"
    return record["starts"]


def test_run_json_tells_of_each_start(tmp_path):
    about = {"command": "python a.py", "counts": {"train": 8}}
    run = train(make_run(tmp_path, epochs=1, digests={"images": "abc"}, about=about))
    first = {
        "method": "Method",
        "settings": json.loads(json.dumps(run.settings)),
        "data": {"images": "abc"},
        "epochs": 1,
        "steps": 4,
        "resumed_from": None,
        **about,
    }
    assert starts(tmp_path) == [first]
    assert first["settings"]["checkpoint_path"] == str(tmp_path)
    options = {"epochs": 2, "digests": {"images": "abc"}, "about": about | {"command": "again"}}
    run = train(make_run(tmp_path, resume="auto", **options))
    newest = tmp_path / "ckpt_epoch_1.pth"
    origin = {"checkpoint": str(newest), "epoch": 1, "step": 4}
    changed = {"epochs": 2, "command": "again", "resumed_from": origin}
    second = first | changed | {"settings": json.loads(json.dumps(run.settings))}
    assert starts(tmp_path) == [first, second]
    other = make_run(tmp_path / "b", resume=str(newest), **options)  # a run of its own from here
    train(other)
    (start,) = starts(tmp_path / "b")
    assert start["resumed_from"] == origin and len(starts(tmp_path)) == 2


def test_a_new_run_begins_run_json_anew(tmp_path):
    train(make_run(tmp_path, epochs=1, about={"name": "first"}))
    run = make_run(tmp_path, epochs=1, about={"name": "second"})
    assert not (tmp_path / "run.json").exists()  # until it begins
    train(run)
    assert [start["name"] for start in starts(tmp_path)] == ["second"]
    assert [start["name"] for start in starts(tmp_path / "earlier_1")] == ["first"]


@pytest.mark.parametrize(("save_freq", "advised"), [(1, True), (10, False)])
def test_advice_against_a_bad_loss(tmp_path, save_freq, advised):
    """--resume_anyway is no help where there is nothing to resume."""
    with pytest.raises(RunError) as error:
        train(make_run(tmp_path, save_freq=save_freq), Loader({(2, 3): float("nan")}))
    last = f"{tmp_path}/ckpt_epoch_1.pth (--resume auto)" if advised else "none yet"
    again = " (with --resume_anyway)" * advised
    expected = f"; try a lower --learning_rate (or --weight_decay){again}; last checkpoint: {last}"
    assert str(error.value).endswith(expected)


@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGUSR2", 75), ("SIGINT", 130)]
)
def test_signals_save_and_stop(tmp_path, name, code):
    loader = Loader(after={(1, 2): lambda: os.kill(os.getpid(), getattr(signal, name))})
    with pytest.raises(Interrupted, match=f"{name} after epoch 1, step 2") as stop:
        train(make_run(tmp_path), loader)
    assert stop.value.exit_code == code
    assert names(tmp_path) == ["ckpt_epoch_1_step_2.pth"]
    os.kill(os.getpid(), signal.SIGTERM)  # another one, as the process ends, changes nothing


def test_a_second_interrupt_does_not_wait(tmp_path):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(make_run(tmp_path), Loader(after={(1, 2): twice}))


@pytest.mark.parametrize("save_freq", [1, 10])
def test_a_signal_breaks_an_evaluation_off(tmp_path, save_freq):
    def evaluate():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")

    options = {"save_freq": save_freq, "knn_freq": 1}
    with pytest.raises(Interrupted, match="after epoch 1, step 4"):
        train(make_run(tmp_path, evaluate=evaluate, **options))
    figures = {1: {"accuracy": 50.0}}
    train(make_run(tmp_path, evaluate=lambda: figures, resume="auto", **options))
    assert [line["epoch"] for line in log(tmp_path) if "knn" in line] == [1, 2, 3]


def test_saves_within_an_epoch_by_time(tmp_path, monkeypatch):
    """A step takes a minute."""
    clock = iter(range(0, 10**6, 60))
    minute = {(e, s): lambda: now.append(next(clock)) for e in (1, 2, 3) for s in (1, 2, 3, 4)}
    now = [next(clock)]
    monkeypatch.setattr("utils.training.engine.time.monotonic", lambda: now[-1])
    saved = []
    run = make_run(tmp_path, save_minutes=3, save_freq=2)
    path = tmp_path / "x"
    save = run._files.save
    monkeypatch.setattr(
        *(run._files, "save"),
        lambda state: save(state) if state["step"] is None else saved.append(state) or path,
    )
    train(run, Loader(after=minute))
    # Minutes 3 and 6; at 8 the epoch's own; 11, and at 12 the last epoch's.
    assert [(state["epoch"], state["step"]) for state in saved] == [(1, 3), (2, 2), (3, 3)]
    assert names(tmp_path) == ["ckpt_epoch_2.pth", "ckpt_epoch_3.pth"]
    never = make_run(tmp_path / "never", save_minutes=0)
    train(never, Loader(after=minute))
    assert names(tmp_path / "never") == ["ckpt_epoch_3.pth"]


def test_errors_name_the_last_checkpoint(tmp_path):
    """Also those that come from the loader, a dead worker's among them."""

    def fail(error):
        raise error

    text = "DataLoader worker (pid 12) is killed by signal: Killed. "
    for number, error in enumerate((InputError("bad file"), RunError("x"), RuntimeError(text))):
        folder = tmp_path / str(number)
        loader = Loader(after={(2, 2): lambda error=error: fail(error)})
        with pytest.raises((InputError, RunError)) as raised:
            train(make_run(folder, save_freq=1), loader)
        assert f"last checkpoint: {folder}/ckpt_epoch_1.pth (--resume auto)" in str(raised.value)
        with pytest.raises((InputError, RunError), match="last checkpoint: none yet"):
            loader = Loader(after={(1, 1): lambda error=error: fail(error)})
            train(make_run(tmp_path / f"{number}b"), loader)
    with pytest.raises(RuntimeError, match="another"):
        train(make_run(tmp_path), Loader(after={(1, 1): lambda: fail(RuntimeError("another"))}))


def test_finish_prints_the_comparison(tmp_path, capsys):
    figures = {1: {"accuracy": 50.0}, 20: {"accuracy": 60.25}}
    run = make_run(
        tmp_path,
        evaluate=lambda: figures,
        compare_with={"raw pixels": {1: {"accuracy": 9.0}, 20: {"accuracy": 8.0}}},
    )
    train(run)
    run.finish("the method")
    lines = capsys.readouterr().out.splitlines()
    assert "raw pixels     9.0     8.0" in lines
    assert "the method    50.0    60.2" in lines
    assert "ckpt_epoch_3.pth after" in lines[-1]
