"""Means, the health of embeddings in closed form, and the log."""

import json

import pytest
import torch
from torch.nn.functional import normalize

from utils.evaluation import knn
from utils.method.collapse import effective_rank, embedding_health, spread
from utils.training.log import Log, Means


def test_means_start_over_after_reading():
    means = Means()
    means.add({"loss": torch.tensor(1.0)})
    means.add({"loss": torch.tensor(4.0)})
    assert means.read() == {"loss": 2.5}
    means.add({"loss": torch.tensor(7.0)})
    assert means.read() == {"loss": 7.0}


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_of_equal_directions(rank):
    embeddings = torch.eye(8)[:rank].repeat(5, 1)
    assert effective_rank(embeddings).item() == pytest.approx(rank, rel=1e-4)


def test_effective_rank_of_known_singular_values():
    """Singular values 3 and 1: shares 3/4 and 1/4."""
    entropy = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log())
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(entropy.exp())


def test_spread():
    assert spread(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item() == pytest.approx(1)
    assert spread(torch.tensor([[1.0, 0.0]] * 3)).item() == pytest.approx(0)
    # Two directions at a right angle: the mean has length sqrt(1/2).
    assert spread(torch.eye(2)).item() == pytest.approx(0.5**0.5)


def test_health_of_a_large_bank_is_taken_from_a_sample():
    embeddings = normalize(torch.randn(5000, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    health = embedding_health(embeddings, most=1000)
    assert health["effective_rank"].item() == pytest.approx(6, rel=0.02)
    assert health["spread"].item() == pytest.approx(1, abs=0.02)


def test_log_writes_json_lines_without_nan(tmp_path, capsys):
    log = Log(tmp_path / "log.jsonl")
    log.write({"epoch": 1, "loss": 0.5, "purity": float("nan")})
    log.write({"epoch": 2, "knn": {20: {"accuracy": float("inf")}}})
    first, second = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert (first["epoch"], first["loss"], first["purity"]) == (1, 0.5, None)
    assert second["knn"] == {"20": {"accuracy": None}}
    assert first["seconds"] >= 0
    log.say("plain")
    assert capsys.readouterr().out == "plain\n"


def test_resumed_log_keeps_what_was_before(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.resume(3, None, seconds=5)  # nothing there yet
    for epoch, step in ((1, 2), (1, 4), (2, 2), (2, 4)):
        log.write({"epoch": epoch, "step": step})
    with log.path.open("a") as file:
        file.write('{"epoch": 1, "st')  # as kill -9 leaves it
    log.resume(2, 2, seconds=100)
    lines = [json.loads(line) for line in log.path.open()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 2), (1, 4), (2, 2)]
    assert 5 <= lines[0]["seconds"] < 20 and log.seconds >= 100
    log.resume(1, None, seconds=0)
    assert len(log.path.read_text().splitlines()) == 2


def test_a_damaged_log_is_not_shortened_in_silence(tmp_path, capsys):
    log = Log(tmp_path / "log.jsonl")
    good = '{"epoch": 1, "step": 2}\n'
    for text, damaged in ((good + '{"epoch": 1, "st', 0), (good + "\x00\n[]\n" + good, 2)):
        log.path.write_text(text)
        capsys.readouterr()
        log.resume(1, None, seconds=0)
        said = capsys.readouterr().out
        assert said == f"WARNING {log.path}: damaged, 2 lines are no records: left out\n" * (
            damaged > 0
        )
        assert set(log.path.read_text().splitlines()) == {good.strip()}


def test_find_the_figures_of_an_epoch(tmp_path):
    """What is none, as in a log that another program has changed, counts as not there."""
    log = Log(tmp_path / "log.jsonl")
    figures = {"1": {"accuracy": 3.0, "top5": None}}
    log.write({"epoch": 1, "step": 4})
    log.write({"epoch": 1, "step": 4, "knn": figures})
    for odd in (3, {}, {"1": 3.0}, {"x": {"accuracy": 1.0}}, {"1": {"accuracy": None}}, {"1": {}}):
        log.write({"epoch": 1, "step": 4, "knn": odd})
    with log.path.open("a") as file:
        file.write('[1]\n{"epoch": "1", "step": 2}\n{"epo')
    assert log.find("knn", knn.LOGGED, epoch=1) == figures
    assert log.find("knn", knn.LOGGED, epoch=2) is None


def test_means_go_on_from_their_state():
    whole, first, second = Means(), Means(), Means()
    values = torch.tensor([1.0, 5.0, float("nan"), 3.0])
    for value in values:
        whole.add({"a": value})
    for value in values[:2]:
        first.add({"a": value})
    second.restore(first.state())
    for value in values[2:]:
        second.add({"a": value})
    assert second.read() == whole.read() == {"a": 3.0}
