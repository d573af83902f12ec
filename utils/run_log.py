"""Reading what a run has written: the curves of `log.jsonl`, and `run.json` beside it.

What to draw of them, and in which panels, stands here for all who draw.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import InputError
from utils.run_folder import ABOUT

LOG = "log.jsonl"
RANKS = "constrained_ranks"  # see `RunLog.rank_histograms`
_KNN = "knn_"


class Panel(NamedTuple):
    """A small picture: its title, the unit of its y axis, and name in the log -> label."""

    title: str
    unit: str
    figures: dict[str, str]


# In the order they are drawn; a panel of which a log has no figure is left out.
PANELS = (
    Panel("loss", "squared distance", {"loss": "loss"}),
    Panel(
        "purity of neighbors",
        "percent",
        {"purity_constrained": "constrained", "purity_plain": "plain"},
    ),
    Panel("k-NN accuracy", "percent", {f"{_KNN}{k}": f"{k}-NN" for k in (1, 5, 10, 20)}),
    Panel(
        "pseudo-labels",
        "percent",
        {"confident": "coverage", "accuracy_confident": "their accuracy"},
    ),
    Panel("effective rank", "dimensions", {"effective_rank": "effective rank"}),
    Panel("spread", "0 to 1", {"spread": "spread"}),
    Panel("learning rate", "", {"lr": "learning rate"}),
    Panel("speed", "images/s", {"images_per_s": "images/s"}),
)


@dataclass(frozen=True)
class RunLog:
    """The log of one run.

    records: its lines, each with "epoch" and "step". starts: those of `run.json`, the newest last;
    [] for a run without one. cut: the last line was half written and is left out.
    """

    path: Path
    records: list[dict]
    starts: list[dict]
    cut: bool = False

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().parent.name

    @property
    def about(self) -> dict:
        """What the newest start was: see `RunFolder.describe`; {} if it is not known."""
        return self.starts[-1] if self.starts else {}

    @property
    def method(self) -> str | None:
        """Class name of the method."""
        return self.about.get("method")

    @property
    def settings(self) -> dict:
        """The flags of the newest start."""
        return self.about.get("settings", {})

    @property
    def epochs(self) -> int | None:
        """The epochs that the run is to have."""
        return self.about.get("epochs")

    @property
    def steps(self) -> int:
        """Steps of an epoch; the most that were logged where nothing else is known.

        The last step of every epoch is logged.
        """
        return self.about.get("steps") or max(1, *(record["step"] for record in self.records))

    @property
    def place(self) -> tuple[int, int]:
        """Epoch and step of the last line."""
        return self.records[-1]["epoch"], self.records[-1]["step"]

    @property
    def finished(self) -> bool | None:
        """Whether the last epoch is over; None if it is not known how many there are to be."""
        return None if self.epochs is None else self.place >= (self.epochs, self.steps)

    def curve(self, name: str) -> dict[float, float]:
        """Epochs that have passed -> a figure, nan where it was not finite.

        name: as in the log; "knn_20": accuracy of 20-NN. Step s of S in epoch e is e - 1 + s / S.
        Of two lines of one step the later counts.
        """
        return {
            record["epoch"] - 1 + record["step"] / self.steps: number
            for record in self.records
            if (number := _figure(record, name)) is not None
        }

    def has(self, name: str) -> bool:
        """Whether there is a finite figure of this name."""
        return bool(np.isfinite(list(self.curve(name).values())).any())

    def last(self, name: str) -> float | None:
        """The newest finite figure of this name."""
        numbers = [number for number in self.curve(name).values() if np.isfinite(number)]
        return numbers[-1] if numbers else None

    def rank_histograms(self, count: int = 4) -> dict[float, list[float]]:
        """Epochs that have passed -> histogram, `count` of them from the first to the last line.

        Bin i is the share in percent of constrained neighbors that by plain distance have rank
        2^i to 2^(i+1) - 1. Evenly taken; {} without any.
        """
        found = self._histograms()
        places = list(found)
        chosen = np.unique(np.linspace(0, len(places) - 1, count).round().astype(int))
        return {places[i]: found[places[i]] for i in chosen} if places else {}

    def _histograms(self) -> dict[float, list[float]]:
        """Those with a figure, by epoch, without the bins behind the last that any has."""
        found = {
            record["epoch"] - 1 + record["step"] / self.steps: [_number(x) for x in record[RANKS]]
            for record in self.records
            if isinstance(record.get(RANKS), list)
        }
        found = {epoch: shares for epoch, shares in found.items() if np.isfinite(shares).any()}
        used = [np.flatnonzero(shares)[-1] + 1 for shares in found.values() if np.any(shares)]
        return {epoch: shares[: max(used, default=0)] for epoch, shares in found.items()}


def read(path: str | Path) -> RunLog:
    """The log of a run: its folder, or the log itself.

    A last line that is half written, as a run that goes on or was killed leaves it, is left out.
    Raises InputError for what is missing, empty or no log.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    log = path / LOG if path.is_dir() else path
    if not log.is_file():
        raise InputError(f"{path}: no run, there is no {LOG} in it")
    lines = _text(log).splitlines()
    records, cut = [], False
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise InputError(f"{log}: damaged, line {number} is no record of a run")
        else:
            cut = True
    if not records:
        raise InputError(f"{log}: empty, the run has not logged anything yet")
    return RunLog(log, records, _starts(log.parent / ABOUT), cut)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def _record(line: str) -> dict | None:
    """A line of a log, None if it is none."""
    try:
        record = json.loads(line)
        epoch, step = record["epoch"], record["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return record if isinstance(epoch, int) and isinstance(step, int) else None


def _starts(path: Path) -> list[dict]:
    """The starts that a run.json tells of, [] without one; InputError for one that is damaged."""
    if not path.is_file():
        return []
    try:
        starts = json.loads(_text(path))["starts"]
        if not all(isinstance(start, dict) for start in starts):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged, it does not tell of the starts of a run") from None
    return starts


def _figure(record: dict, name: str) -> float | None:
    """A figure of a line, nan for null; None if it has no such figure."""
    if name.startswith(_KNN):
        figures = record.get("knn") or {}
        row = figures.get(name.removeprefix(_KNN))
        return None if row is None else _number(row.get("accuracy"))
    return _number(record[name]) if name in record else None


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
