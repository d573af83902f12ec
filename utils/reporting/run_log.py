"""Reading what a run has written: the curves of `log.jsonl`, and `run.json` beside it.

What to draw of them, and in which panels, stands here for all who draw.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.evaluation.result_files import TABLE
from utils.runtime import checked, plain_json
from utils.runtime.errors import InputError
from utils.training.log import record_of
from utils.training.run_folder import ABOUT

LOG = "log.jsonl"
RANKS = "constrained_ranks"  # see `RunLog.rank_histograms`
_KNN = "knn_"
_DRAWN = checked.real(-1e100, 1e100)  # beyond, the axis of a chart overflows
# What a line of a log, a start of run.json and what stands in it must hold where they hold it.
FIGURES = {
    **{"error": checked.TEXT, "warning": checked.TEXT, "seconds": checked.real(0)},
    **{"knn": TABLE, RANKS: checked.list_of(checked.ANY)},
}
START = {
    **dict.fromkeys(("method", "started", "script", "command", "device"), checked.TEXT),
    **dict.fromkeys(("epochs", "steps", "processes"), checked.whole(1)),
    **dict.fromkeys(("settings", "resumed_from"), checked.table_of(checked.ANY)),
    **dict.fromkeys(("data", "versions"), checked.table_of(checked.TEXT)),
    "counts": checked.table_of(checked.whole(0)),
}
PLACE = {"epoch": checked.whole(0), "step": checked.whole(0)}
SETTINGS = {"constraint_start": checked.whole(1)}


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
        return {epoch: shares[: max(used)] for epoch, shares in found.items()} if used else {}


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
    lines = plain_json.read_text(log).rstrip("\n").split("\n")
    records, cut = [], False
    for number, line in enumerate(lines, 1):
        record = record_of(line)
        if record is not None:
            _check(record, FIGURES, what=f"{log}, line {number}")
            records.append(record)
        elif number < len(lines):
            raise InputError(f"{log}: damaged, line {number} is no record of a run")
        else:
            cut = line != ""
    if not records:
        raise InputError(f"{log}: empty, the run has not logged anything yet")
    return RunLog(log, records, _starts(log.parent / ABOUT), cut)


def _check(record: dict, kinds: dict[str, checked.Kind], *, what: str) -> None:
    """InputError for a value that is neither null nor of its kind; those without one may be any."""
    for name, kind in kinds.items():
        checked.take(record, name, checked.or_none(kind), what=what, default=None)


def _starts(path: Path) -> list[dict]:
    """The starts that a run.json tells of, [] without one; InputError for one that is damaged.

    What is null there counts as not there.
    """
    if not os.path.lexists(path):
        return []
    try:
        starts = plain_json.loads(plain_json.read_text(path))["starts"]
        if not all(isinstance(start, dict) for start in starts):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged, it does not tell of the starts of a run") from None
    for number, start in enumerate(starts, 1):
        what = f"{path}, start {number}"
        _check(start, START, what=what)
        _check(start.get("resumed_from") or {}, PLACE, what=what)
        _check(start.get("settings") or {}, SETTINGS, what=what)
    return [{name: v for name, v in start.items() if v is not None} for start in starts]


def _figure(record: dict, name: str) -> float | None:
    """A figure of a line, nan for null; None if it has no such figure."""
    if name.startswith(_KNN):
        figures = record.get("knn") or {}
        row = figures.get(name.removeprefix(_KNN))
        return None if row is None else _number(row.get("accuracy"))
    return _number(record[name]) if name in record else None


def _number(value: object) -> float:
    """A number that can be drawn, nan for any other value."""
    return float(value) if _DRAWN.holds(value) else float("nan")
