"""`Run`: order of what it does, stopping, warnings, what it keeps and what it moves aside."""

import json

import pytest
import torch
from torch import nn

from utils.engine import Run
from utils.errors import InputError, RunError


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

    def __init__(self, values=None):
        self.values = values or {}

    def __len__(self):
        return 4

    def epoch(self, epoch):
        for step in range(1, 5):
            yield OneBatch(self.values.get((epoch, step), 1.0), [epoch, step])


def make_run(folder, *, model=None, **options):
    model = model or Method()
    settings = {
        "epochs": 3,
        "learning_rate": lambda epoch: 0.1 / epoch,
        "settings": {"seed": 0},
        **options,
    }
    return Run(model, torch.optim.SGD(model.parameters(), lr=1.0), folder=folder, **settings)


def train(run, loader=None):
    for batch in run.batches(loader or Loader()):
        loss, stats = run.model(batch)
        run.step(loss, stats)


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
    assert run.model.weight.item() == pytest.approx(1 - 4 * (0.1 + 0.05 + 0.1 / 3))
    lines = log(tmp_path)
    assert [(x["epoch"], x["step"]) for x in lines] == [(e, s) for e in (1, 2, 3) for s in (3, 4)]
    assert [x["lr"] for x in lines[::2]] == pytest.approx([0.1, 0.05, 0.1 / 3])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, bad):
    run = make_run(tmp_path, save_freq=1)
    seen = []
    with pytest.raises(RunError) as error:
        for batch in run.batches(Loader({(2, 3): bad})):
            loss, stats = run.model(batch)
            seen.append(run.model.weight.item())
            run.step(loss, stats)
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


def test_debug_makes_two_short_epochs(tmp_path):
    class Long(Loader):
        def __len__(self):
            return 1000

        def epoch(self, epoch):
            for step in range(1000):
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


def test_resuming_keeps_the_run_in_its_own_folder(tmp_path, capsys):
    train(make_run(tmp_path, epochs=4, save_freq=1))
    path = tmp_path / "ckpt_epoch_2.pth"
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"epoch": 4, "half wri')  # as kill -9 leaves it
    train(make_run(tmp_path, epochs=4, save_freq=1, resume=str(path), settings={"seed": 1}))
    assert [line["epoch"] for line in log(tmp_path)] == [1, 2, 3, 4]
    assert not list(tmp_path.glob("earlier_*"))
    assert "--seed was 0" in capsys.readouterr().out


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
        ({"optimizer": None}, "incomplete or damaged"),
        ({"state_dict": {"weight": 3}}, "incomplete or damaged"),
        ({"state_dict": {"weight": torch.ones(2)}}, "1 weights of another shape, first weight"),
        ({"epoch": 3}, "finished epoch 3 of --epochs 3"),
    ],
)
def test_what_cannot_be_resumed(tmp_path, change, words):
    train(make_run(tmp_path, epochs=1))
    path = tmp_path / "ckpt_epoch_1.pth"
    state = torch.load(path, weights_only=True) | change
    torch.save(state, tmp_path / "changed.pth")
    with pytest.raises(InputError, match=words) as error:
        make_run(tmp_path, resume=str(tmp_path / "changed.pth"))
    assert "--resume" in str(error.value)


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
