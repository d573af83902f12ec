"""Runs on the GPU that are killed, stopped, or made to diverge: what must hold is in docs/gpu.md.

Real scripts as processes, several at a time. "The same bits" means all tensors of the last
checkpoint and all logged figures, with `--deterministic`.
"""

import random
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import reliability
import torch

from gpu_parts.part import Part
from utils.cli import options
from utils.data import demo_data
from utils.method import checkpoint
from utils.runtime import torch_file, workers
from utils.training.run_folder import checkpoints_in

_FLAGS = ("--deterministic", "--num_workers", 2)
_PLACES = range(1, 11)  # lines of the log, of 15 in all, after which a run is killed or stopped
_AT_ONCE = 6  # processes, where there are cores for them
_START = 15  # seconds that a process needs at least to be worth its start
_MARGIN = 4  # seconds before the end of the part by which all processes have ended


class Setting(NamedTuple):
    """What is killed how often, with which flags; stopped: SIGTERM too."""

    name: str
    regime: str
    flags: tuple = ()
    kills: int = 1
    stopped: bool = False


SETTINGS = (
    Setting("2Q", "2Q", kills=2, stopped=True),
    Setting("2Q, bf16", "2Q", ("--precision", "bf16")),
    Setting("supervised", "supervised"),
    Setting("semi-supervised", "semi-supervised"),
)
TINY = (Setting("2Q", "2Q", kills=1, stopped=True),)


class NoTime(Exception):
    """The part would end before what is to be done."""


class Lab:
    """Starts runs of `reliability` on the part's device, and sees that they end before it does."""

    def __init__(self, part: Part, scratch: Path, data: Path) -> None:
        self.part, self.scratch, self.data = part, scratch, data

    def start(self, setting: Setting, folder: Path, *flags: object) -> subprocess.Popen:
        """Start a run; NoTime where that is not worth it."""
        if self.part.left() < _START:
            raise NoTime
        flags = (*_FLAGS, *setting.flags, *flags)
        return reliability.start(setting.regime, folder, self.data, *flags, gpu=True)

    def end(self, process: subprocess.Popen, folder: Path, *, code: int) -> None:
        """Wait for a run's end, RuntimeError for another exit code; ended for NoTime."""
        try:
            found = process.wait(max(self.part.left() - _MARGIN, 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise NoTime from None
        if found != code:
            said = Path(f"{folder}.err").read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"exit code {found}, not {code}: {(said or ['no word'])[-1]}")

    def undisturbed(self, setting: Setting, number: int) -> Path:
        """The folder of a run that nothing happens to."""
        folder = self.scratch / f"{setting.name}_{number}"
        self.end(self.start(setting, folder), folder, code=0)
        return folder

    def killed(self, setting: Setting) -> Path:
        """... of one that is killed at random moments of its training, and goes on each time."""
        folder, chance = self.scratch / f"{setting.name}_killed", random.Random(setting.name)
        for place in sorted(chance.sample(_PLACES, setting.kills)):
            process = self.start(setting, folder, "--resume", "auto")
            self._wait_for_line(process, folder, place, chance)
            process.kill()
            self.end(process, folder, code=-signal.SIGKILL)
        self.end(self.start(setting, folder, "--resume", "auto"), folder, code=0)
        return folder

    def stopped(self, setting: Setting) -> tuple[Path, Path, float]:
        """... of one that SIGTERM stops and that goes on; a copy as it stopped; seconds to stop."""
        folder, chance = self.scratch / f"{setting.name}_stopped", random.Random("stop")
        process = self.start(setting, folder)
        self._wait_for_line(process, folder, chance.choice(_PLACES), chance)
        process.terminate()
        since = time.monotonic()
        self.end(process, folder, code=75)
        seconds = time.monotonic() - since
        copy = shutil.copytree(folder, f"{folder}_copy")
        self.end(self.start(setting, folder, "--resume", "auto"), folder, code=0)
        return folder, Path(copy), seconds

    def on_the_cpu(self, setting: Setting, folder: Path) -> str:
        """What a run of the GPU says that goes on on the CPU."""
        process = self.start(setting, folder, "--resume", "auto", "--device", "cpu")
        self.end(process, folder, code=0)
        return Path(f"{folder}.out").read_text() + Path(f"{folder}.err").read_text()

    def diverging(self, setting: Setting) -> Path:
        """... of one whose learning rate is beyond all bounds, and that saves after each step."""
        folder = self.scratch / "diverging"
        flags = ("--learning_rate", 1e30, "--save_minutes", 1e-6)
        self.end(self.start(setting, folder, *flags), folder, code=1)
        return folder

    def _wait_for_line(
        self, process: subprocess.Popen, folder: Path, place: int, chance: random.Random
    ) -> None:
        """Return when the log has so many lines, and a random moment later."""
        while process.poll() is None and reliability.count_lines(folder) < place:
            if self.part.left() < _MARGIN:
                break
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.05))


def differing(one: Path, other: Path) -> str:
    """What two finished runs do not have in common, in words; "" for nothing."""
    if reliability.digest(one) == reliability.digest(other):
        return "" if reliability.figures(one) == reliability.figures(other) else "logged figures"
    states = [
        reliability.tensors(
            checkpoint.load(folder / f"ckpt_epoch_{reliability.EPOCHS}.pth", flag="--resume")
        )
        for folder in (one, other)
    ]
    names = [n for n, value in states[0].items() if not torch.equal(value, states[1][n])]
    return f"{len(names)} of {len(states[0])} tensors, {names[0]} the first"


def kept(folder: Path) -> tuple[int, list[str]]:
    """How many files of tensors a run's folder holds, and what in them is not finite."""
    paths = checkpoints_in(folder)
    bad = []
    for path in paths:
        state = reliability.tensors(torch_file.read(path, what=str(path)))
        bad += [f"{path.name}: {n}" for n, v in state.items() if not torch_file.is_finite(v)]
    return len(paths), bad


def run(part: Part) -> None:
    """Start everything in the order of its weight, and compare what comes back."""
    lab = Lab(part, part.scratch, demo_data.draw_data_set(options.DEMO_FOLDER))
    first, *others = TINY if part.tiny else SETTINGS
    at_once = 2 if part.tiny else max(2, min(_AT_ONCE, workers.cores() // 2))
    with ThreadPoolExecutor(at_once) as pool:
        diverging = pool.submit(lab.diverging, first)  # the shortest
        jobs = {first: _submit(pool, lab, first)}
        jobs |= {setting: _submit(pool, lab, setting) for setting in others}
        copy = None
        with part.attempt(f"{first.name}: what is compared"):
            copy = _note_runs(part, first, jobs[first])
        if copy and part.device.type == "cuda":
            on_the_cpu = pool.submit(lab.on_the_cpu, first, copy)
        with part.attempt("what a loss that is not finite leaves"):
            _note_diverging(part, diverging)
        for setting in others:
            with part.attempt(f"{setting.name}: what is compared"):
                _note_runs(part, setting, jobs[setting])
        if copy and part.device.type == "cuda":
            name = f"{first.name}: a checkpoint of the GPU goes on on the CPU"
            if said := _result(part, name, on_the_cpu):
                complaints = [line for line in said.splitlines() if "warning" in line.lower()]
                part.check(name, not complaints, "; ".join(complaints))


def _submit(pool: ThreadPoolExecutor, lab: Lab, setting: Setting) -> dict[str, Future]:
    """The jobs of a setting by name."""
    jobs = {f"undisturbed {n}": pool.submit(lab.undisturbed, setting, n) for n in (1, 2)}
    jobs["killed"] = pool.submit(lab.killed, setting)
    if setting.stopped:
        jobs["stopped"] = pool.submit(lab.stopped, setting)
    return jobs


def _result(part: Part, name: str, job: Future) -> Any:
    """What a job gives; None where it failed or had no time, which is noted."""
    with part.attempt(name):
        try:
            return job.result()
        except NoTime:
            part.leave_out(name, "no time")
    return None


def _note_runs(part: Part, setting: Setting, jobs: dict[str, Future]) -> Path | None:
    """Compare a setting's runs; the copy of the one that was stopped, as it stopped."""
    found = {name: _result(part, f"{setting.name}, {name}", job) for name, job in jobs.items()}
    whole, again = found["undisturbed 1"], found["undisturbed 2"]
    folder, copy, seconds = found.get("stopped") or (None, None, None)
    if copy:
        part.figure(f"{setting.name}, SIGTERM to the end of the process", seconds, "s")
    if not whole:
        part.leave_out(f"{setting.name}: comparisons", "undisturbed 1 did not end well")
        return copy
    repeats = None
    if again:
        said = differing(whole, again)
        repeats = not said
        part.check(f"{setting.name}: two undisturbed runs have the same bits", repeats, said)
    resumed = {f"{setting.kills} times kill -9": found["killed"], "SIGTERM, exit code 75": folder}
    for what, other in resumed.items():
        if other:
            said = differing(whole, other)
            if said and repeats is False:
                said += "; but undisturbed runs differ too"
            part.check(f"{setting.name}: {what}, then the same bits", not said, said)
    return copy


def _note_diverging(part: Part, job: Future) -> None:
    """A loss that is not finite: one line, an entry in the log, and nothing of it is kept."""
    folder = _result(part, "a loss that is not finite ends the run", job)
    if not folder:
        return
    errors = [x for x in Path(f"{folder}.err").read_text().splitlines() if "error:" in x]
    pattern = (
        r"error: the loss is (nan|inf) in epoch 1, step \d+, learning rate 1e\+30, images \[\d"
    )
    line = "; ".join(errors)
    part.check("one line tells of it", len(errors) == 1 and re.search(pattern, line), line[:120])
    last = reliability.figures(folder)[-1]
    part.check("so does the log", {"error", "lr", "images"} <= last.keys(), str(last)[:120])
    count, bad = kept(folder)
    said = f"{count} files {'; '.join(bad)[:200]}"
    part.check("all that it kept is finite", count > 0 and not bad, said)
