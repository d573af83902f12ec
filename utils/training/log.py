"""What a run reports: means over an interval, log.jsonl, the console."""

import contextlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.runtime import checked, distributed, files, plain_json
from utils.runtime.errors import RunError

_PLACE = checked.whole(0)  # an epoch, or a step in it


class Means:
    """Means of scalar tensors over an interval; nothing is read from the device before `read`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, stats: dict[str, Tensor]) -> None:
        """Add one step's scalars (0-dim tensors); a nan says that the step has no such figure."""
        for name, value in stats.items():
            value = value.detach()
            there = ~value.isnan()
            one = torch.stack([value.masked_fill(~there, 0), there.to(value)])
            self._sums[name] = self._sums[name].to(one) + one if name in self._sums else one

    def read(self) -> dict[str, float]:
        """The means since the last `read`, over all processes, nan for no figure; start over.

        Waits for the device.
        """
        if not self._sums:
            return {}
        table = torch.stack([value.cpu().double() for value in self._sums.values()])
        distributed.add_up(table)
        sums = dict(zip(self._sums, table.tolist(), strict=True))
        self._sums = {}
        return {name: s / count if count else float("nan") for name, (s, count) in sums.items()}

    def state(self) -> dict:
        """What was added since the last `read`, over all processes, for a checkpoint."""
        return {"sums": {n: distributed.add_up(v.clone()) for n, v in self._sums.items()}}

    def restore(self, state: dict) -> None:
        """Go on from a `state`."""
        self._sums = dict(state["sums"])


class Log:
    """One JSON object a line in `path`, one short line on the console.

    silent: leave the file to another process. also: gets each record that is written.
    """

    def __init__(self, path: Path, *, silent: bool = False) -> None:
        self.path, self.silent = path, silent
        self.also: Callable[[dict], None] | None = None
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time that the run has taken, that before a resume included."""
        return time.monotonic() - self._start

    def resume(self, epoch: int, step: int | None, *, seconds: float) -> None:
        """Go on after a place (step None: the end of the epoch), `seconds` after the start.

        Drops the lines of what came later, which is done again, and those that are no records: the
        last one may be half written, others are said.
        """
        self._start = time.monotonic() - seconds
        if self.silent or not self.path.exists():
            return
        here = (epoch, math.inf if step is None else step)
        lines = list(filter(str.strip, plain_json.read_text(self.path).split("\n")))
        records = list(map(record_of, lines))
        if damaged := records[:-1].count(None):
            self.say(f"WARNING {self.path}: damaged, {damaged} lines are no records: left out")
        pairs = zip(lines, records, strict=True)
        kept = [line for line, r in pairs if r and (r["epoch"], r["step"]) <= here]
        files.replace_text(self.path, "".join(f"{line}\n" for line in kept))

    def find(self, name: str, kind: checked.Kind, *, epoch: int) -> dict | None:
        """The last entry `name` of a kind that was logged for an epoch, None without one."""
        records = filter(None, map(record_of, plain_json.read_text(self.path).split("\n")))
        entries = [r[name] for r in records if r["epoch"] == epoch and kind.holds(r.get(name))]
        return entries[-1] if entries else None

    def write(self, record: dict) -> None:
        """Append a record with the run's `seconds`; what is not finite becomes null."""
        if self.silent:
            return
        record = {**record, "seconds": round(self.seconds, 3)}
        try:
            with open(self.path, "a") as file:
                file.write(plain_json.dumps(record) + "\n")
        except OSError as error:
            raise RunError(f"{self.path} could not be written: {error.strerror}") from error
        if self.also:
            self.also(record)

    @staticmethod
    def say(text: str) -> None:
        """Print one line, above the progress bar on a terminal."""
        with contextlib.suppress(BrokenPipeError):  # nobody reads it any more
            if sys.stderr.isatty():
                tqdm.write(text)
            else:
                print(text, flush=True)


def record_of(line: str) -> dict | None:
    """The record that a line of a log holds; None for what has no place in a run.

    A killed process leaves half a line.
    """
    with contextlib.suppress(ValueError):
        record = plain_json.loads(line)
        if isinstance(record, dict) and all(map(_PLACE.holds, map(record.get, ("epoch", "step")))):
            return record
    return None
