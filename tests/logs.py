"""Logs of runs, written by hand, for the tests of what reads them."""

import json
from pathlib import Path

from utils.training.run_folder import ABOUT, ABOUT_FORMAT


def record(epoch: int, step: int, **figures: object) -> dict:
    """A line as a run of CMSF-2Q writes it, its figures made of epoch and step."""
    place = epoch + step / 100
    return {
        "epoch": epoch,
        "step": step,
        "loss": 2 / place,
        "no_previous_visit": 0.0,
        "purity_constrained": 59 + 5 * place,
        "purity_plain": 60 + 5 * place,
        "spread": 0.99,
        "effective_rank": 40 - place,
        "lr": 0.05,
        "images_per_s": 400.0,
        "seconds": 10 * place,
        **figures,
    }


def start(**changes: object) -> dict:
    """A start as run.json tells of it."""
    flags = {"seed": 0, "topk": 5, "epochs": 3, "num_workers": 0}
    return {
        "method": "CMSF2Q",
        "epochs": 3,
        "steps": 4,
        "settings": flags | changes.pop("settings", {}),
        "data": {"training images or classes": "a" * 64},
        "started": "2026-01-02T03:04:05+00:00",
        "script": "self_supervised/train_msf_2q.py",
        "command": "python self_supervised/train_msf_2q.py <b>images</b>",
        "versions": {"python": "3.11", "torch": "2.11"},
        "processes": 1,
        "device": "cpu",
        "counts": {"train": 30, "classes": 3, "val": 12},
        "resumed_from": None,
        **changes,
    }


def records(epochs: int = 3, **figures: object) -> list[dict]:
    """Lines after steps 2 and 4 of each epoch, and k-NN figures after the last."""
    lines = [record(e, s, **figures) for e in range(1, epochs + 1) for s in (2, 4)]
    knn = {"1": {"accuracy": 47.25}, "20": {"accuracy": 48.5}}
    return [*lines, {"epoch": epochs, "step": 4, "knn": knn, "seconds": 99.0}]


def write(
    folder: Path, lines: list[dict], *, starts: list[dict] | None = None, tail: str = ""
) -> Path:
    """A run's folder with its log (tail: after the last line), and run.json if there are starts."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines) + tail
    (folder / "log.jsonl").write_text(text)
    if starts is not None:
        (folder / ABOUT).write_text(json.dumps({"format": ABOUT_FORMAT, "starts": starts}))
    return folder
