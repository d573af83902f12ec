"""`Part`: what a part of `tests/gpu.py` knows, and where it puts what it finds.

A part is a module with `run(part)`. It runs in a process of its own, which may be killed at any
moment: whatever is noted is on disk at once.
"""

import contextlib
import importlib
import json
import math
import shutil
import statistics
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from utils.cli import options
from utils.data import demo_data
from utils.runtime import workers

RECORD = "record.json"


class Part:
    """One part as it runs.

    scratch: a folder for its files, gone when all is over. out: where the report goes; files of
    lasting worth are put there by `keep`. seconds: what it has until it is killed. data: a folder
    with train/ and val/, or None for the demo data. tiny: toy sizes, which
    tell that the part works and nothing else; then there may be no GPU.
    """

    def __init__(
        self, *, scratch: Path, out: Path, seconds: float, data: Path | None, tiny: bool
    ) -> None:
        self.scratch, self.out, self.data, self.tiny = scratch, out, data, tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._end = time.monotonic() + seconds
        before = scratch / RECORD  # of a part that is run again
        self._record = json.loads(before.read_text()) if before.exists() else _empty()
        self._record["machine"] = machine(self.device)
        self._write()

    def left(self) -> float:
        """Seconds until this part is killed."""
        return self._end - time.monotonic()

    def say(self, text: str) -> None:
        """Print a line at once, for the log of the part."""
        print(text, flush=True)

    def figure(
        self,
        name: str,
        value: float | Sequence[float] | str,
        unit: str = "",
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Note a figure; of several values (rounds) the median, with n, lowest and highest.

        at_least, at_most: the goal. One that is missed is reported as that, and is no failure; with
        toy sizes there are no goals.
        """
        entry: dict[str, Any] = {"name": name, "unit": unit}
        if isinstance(value, (str, int, float)):
            entry["value"] = value
        else:
            entry |= {"value": statistics.median(value), "n": len(value)}
            entry |= {"lowest": min(value), "highest": max(value)}
        if not self.tiny and (at_least is not None or at_most is not None):
            low, high = (-math.inf if at_least is None else at_least), at_most
            entry["goal"] = f"at least {at_least}" if high is None else f"at most {high}"
            entry["reached"] = low <= entry["value"] <= (math.inf if high is None else high)
        self._add("figures", entry)

    def check(self, name: str, holds: bool, said: str = "") -> None:
        """Note whether something that must hold does; said: what was seen."""
        self._add("checks", {"name": name, "holds": bool(holds), "said": said})

    def leave_out(self, name: str, why: str) -> None:
        """Note something that was not done, and why."""
        self._add("left_out", {"name": name, "why": why})

    def series(self, name: str, values: dict[str, list]) -> None:
        """Keep columns of numbers (a curve), in report.json alone."""
        self._record["series"][name] = values
        self._write()

    def remember(self, name: str, value: Any) -> None:
        """Keep something for the case that this part is run again (`recall`)."""
        self._record["memory"][name] = value
        self._write()

    def recall(self, name: str) -> Any:
        """What an earlier run of this part remembered, or None."""
        return self._record["memory"].get(name)

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """An error in the body is noted as a check that failed; the part goes on after it."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            self.check(name, False, f"{type(error).__name__}: {reason}")

    def keep(self, path: Path) -> None:
        """Copy a file to where the report is."""
        shutil.copyfile(path, self.out / path.name)

    def images(self) -> Path:
        """The folder with train/ and val/: that of --data, or the demo data."""
        return self.data or demo_data.draw_data_set(options.DEMO_FOLDER)

    def _add(self, kind: str, entry: dict) -> None:
        self._record[kind] = [e for e in self._record[kind] if e["name"] != entry["name"]]
        self._record[kind].append(entry)
        self.say(f"{kind}: {entry}")
        self._write()

    def _write(self) -> None:
        new = self.scratch / f"{RECORD}.new"
        new.write_text(json.dumps(self._record))
        new.rename(self.scratch / RECORD)


def _empty() -> dict[str, Any]:
    lists, tables = ("figures", "checks", "left_out"), ("series", "memory", "machine")
    return {name: [] for name in lists} | {name: {} for name in tables}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {"device": "CPU", "cores": workers.cores()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    for package in ("torch", "torchvision", "triton", "numpy", "faiss-gpu", "faiss-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def run_module(module: str, part: Part) -> None:
    """Run a part; what it raises is noted, and raised."""
    try:
        importlib.import_module(module).run(part)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        part.check("runs to its end", False, f"{type(error).__name__}: {reason}")
        raise
