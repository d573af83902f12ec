"""Means, the health of embeddings in closed form, and the log."""

import json

import pytest
import torch
from torch.nn.functional import normalize

from utils.meters import Log, Means, effective_rank, embedding_health, spread


def test_means_start_over_after_reading():
    means = Means()
    means.add({"loss": torch.tensor(1.0)})
    means.add({"loss": torch.tensor(4.0)})
    assert means.count == 2
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


def test_resumed_log_keeps_earlier_epochs_only(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.keep_until(3)  # nothing there yet
    for epoch in (1, 2, 3):
        log.write({"epoch": epoch})
    log.keep_until(2)
    assert [json.loads(line)["epoch"] for line in log.path.open()] == [1, 2]
