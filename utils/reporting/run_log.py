"""Reading what a run has written: the figures of `log.jsonl`, and `run.json` beside it.

What is not there, or null, is no figure; what is of a wrong type ends in an InputError that names
file and line.
"""

import os
from pathlib import Path

import numpy as np

from utils.evaluation import result_files
from utils.runtime import checked, plain_json
from utils.runtime.errors import InputError
from utils.training.log import record_of
from utils.training.run_folder import ABOUT

LOG = "log.jsonl"
KNN = "knn_"  # how the names of k-NN accuracies begin: knn_20
RANKS = "constrained_ranks"
_DRAWN = checked.real(-1e100, 1e100)  # beyond, the axis of a chart overflows
# What is computed with, of a line of a log and of a start of run.json.
_LINE = {
    "seconds": checked.real(0, 1e12),
    "knn": result_files.TABLE,
    RANKS: checked.list_of(checked.ANY),
}
_START = {
    "method": checked.TEXT,
    **dict.fromkeys(("epochs", "steps"), checked.whole(1)),
    **dict.fromkeys(("data", "versions"), checked.table_of(checked.TEXT)),
    "settings": checked.table_of(checked.ANY),
    "counts": checked.table_of(checked.whole(0)),
}


class RunLog:
    """The log of one run.

    records: its lines, each with "epoch" and "step"; place: those of the last. cut: another was
    half written and is left out. starts: those of `run.json` without what is null, [] without one;
    `about` is the newest, and method, settings, counts and epochs ({} or None: not known) are its.
    steps: of an epoch.
    """

    def __init__(self, path: Path, records: list[dict], starts: list[dict], *, cut: bool) -> None:
        self.path, self.records, self.starts, self.cut = path, records, starts, cut
        self.name = path.resolve().parent.name
        self.about = starts[-1] if starts else {}
        self.method, self.epochs = self.about.get("method"), self.about.get("epochs")
        self.settings, self.counts = (self.about.get(name, {}) for name in ("settings", "counts"))
        # The last step of every epoch is logged.
        self.steps = self.about.get("steps") or max(1, *(record["step"] for record in records))
        self.place = records[-1]["epoch"], records[-1]["step"]

    def curve(self, name: str) -> dict[float, float]:
        """Epochs that have passed -> a figure, nan where it was not finite.

        name: as in the log; "knn_20": accuracy of 20-NN. Step s of S in epoch e is e - 1 + s / S.
        Of two lines of one step the later counts.
        """
        return {self._passed(r): _number(r[name]) for r in self.records if name in r}

    def last(self, name: str) -> float | None:
        """The newest finite figure of this name."""
        return next(filter(np.isfinite, reversed(self.curve(name).values())), None)

    def rank_histograms(self) -> dict[float, list[float]]:
        """Epochs that have passed -> histogram, four of them, evenly taken from first to last.

        Bin i is the share in percent of constrained neighbors that by plain distance have rank
        2^i to 2^(i+1) - 1, up to the last bin that any has.
        """
        found = {self._passed(r): [*map(_number, r[RANKS])] for r in self.records if r.get(RANKS)}
        found = {place: shares for place, shares in found.items() if np.nansum(shares) > 0}
        used = max((np.flatnonzero(shares)[-1] + 1 for shares in found.values()), default=0)
        chosen = np.linspace(0, len(found) - 1, 4).round()
        return {place: found[place][:used] for i, place in enumerate(found) if i in chosen}

    def _passed(self, record: dict) -> float:
        return record["epoch"] - 1 + record["step"] / self.steps


def read(path: str | Path) -> RunLog:
    """The log of a run: its folder, or the log itself.

    A last line that is half written, as a run that goes on or was killed leaves it, is left out.
    Raises InputError for what is missing, empty, damaged or no log.
    """
    path = Path(path)
    log = path / LOG if path.is_dir() else path
    if not log.is_file():
        raise InputError(f"{path}: no run, there is no {LOG}")
    lines = plain_json.read_text(log).rstrip("\n").split("\n")
    records = [record_of(line) for line in lines]
    cut = records[-1] is None and lines[-1] != ""
    records = records[:-1] if records[-1] is None else records
    for number, record in enumerate(records, 1):
        if record is None:
            raise InputError(f"{log}: damaged, line {number} is no record of a run")
        _check(record, _LINE, what=f"{log}, line {number}")
        for k, row in (record.get("knn") or {}).items():
            record |= {f"{KNN}{k}": row["accuracy"]} if "accuracy" in row else {}
    if not records:
        raise InputError(f"{log}: empty, the run has not logged anything yet")
    return RunLog(log, records, _starts(log.parent / ABOUT), cut=cut)


def _check(record: dict, kinds: dict[str, checked.Kind], *, what: str) -> None:
    """InputError for a value that is there and not of its kind."""
    for name, kind in kinds.items():
        checked.take(record, name, checked.or_none(kind), what=what, default=None)


def _starts(path: Path) -> list[dict]:
    """The starts that a run.json tells of, [] without one."""
    if not os.path.lexists(path):
        return []
    kind, record = checked.list_of(checked.TABLE), result_files.read_json(path)
    starts = checked.take(record, "starts", kind, what=str(path))
    for number, start in enumerate(starts, 1):
        _check(start, _START, what=f"{path}, start {number}")
    return [{name: v for name, v in start.items() if v is not None} for start in starts]


def _number(value: object) -> float:
    """A number that can be drawn, nan for any other value."""
    return float(value) if _DRAWN.holds(value) else float("nan")
