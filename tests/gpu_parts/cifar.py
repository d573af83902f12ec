"""CIFAR-10 by the commands of a user: how fast it trains, and what comes out in the time there is.

Two epochs tell what a start and an epoch take, compiled, and with CUDA graphs if there is time.
Then CMSF-2Q is trained for as many epochs as fit (at most 200), its cosine over that many, and
evaluated by k-NN; BYOL too, where both have 40 epochs or more. An image is counted once in
images/s, although each of its two views is a query and a target.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from eval import plot_training
from gpu_parts import ROOT
from gpu_parts.part import Part
from utils.runtime import faiss_library, plain_json, workers
from utils.training.run_folder import checkpoints_in

MOST = 200  # epochs, as tables of CIFAR-10 have them
LEAST_OF_TWO = 40  # epochs under which a second method would only take the first one's time
CIFAR = 50_000  # training images of the set that the goals are about
RESERVE = 25  # seconds for an evaluation: its start, 60,000 features, the search, the picture
_COMPILES = 240  # seconds of the part under which nothing is compiled
_TO_STOP = 10  # seconds that a run has to save and end when it is told to

# The network and views of the example for CIFAR-10 in docs/data.md. Batch, learning rate (0.06 for
# 128 images) and weight decay as lightly's benchmark of BYOL on CIFAR-10. Its loss is half of ours,
# which the step size of weights before a batch norm does not depend on once learning rate and
# weight decay balance.
TRAINING = (
    *("--arch", "resnet18", "--small_stem", "--image_size", 32, "--blur", 0, "--weak_strong"),
    *("--batch_size", 256, "--learning_rate", 0.12, "--weight_decay", 5e-4, "--momentum", 0.99),
    *("--mem_bank_size", 16384, "--precision", "bf16", "--channels_last"),
)
TINY = (
    *("--arch", "conv4", "--image_size", 16, "--blur", 0, "--weak_strong", "--batch_size", 50),
    *("--learning_rate", 0.05, "--mem_bank_size", 200, "--proj_dim", 16, "--hidden_dim", 32),
    *("--precision", "bf16", "--channels_last"),
)
ALWAYS = (
    *("--symmetric", "--cos", "--cache_images", "device", "--knn_freq", -1, "--print_freq", 10**6),
    *("--save_freq", 10**6, "--save_minutes", 0),
)
METHODS = {
    "2Q": ("self_supervised/train_msf_2q.py", "--topk", 5, "--topkp", 5),
    "BYOL": ("self_supervised/train_msf.py", "--topk", 1),
}


class Speed(NamedTuple):
    """What a run of two epochs tells: seconds of an epoch and of the rest, images/s in the epoch.

    start: all but the epochs themselves, from the command to its end. compiling: the share of it
    that the first step took.
    """

    images_per_s: float
    epoch: float
    start: float
    compiling: float

    @property
    def again(self) -> float:
        """Seconds of another start, whose compiler finds most of its work done."""
        return self.start - 0.75 * self.compiling

    @property
    def all_epochs(self) -> float:
        """Seconds that the longest training would take."""
        return self.start + MOST * self.epoch


class Ended(NamedTuple):
    """A process that has ended: exit code, seconds, the most GPU memory in use (GiB), last line."""

    code: int
    seconds: float
    memory: float
    said: str


def speed_of(seconds: float, records: Sequence[dict]) -> Speed:
    """The speed of a run of so many seconds that logged one line an epoch.

    The first epoch is not looked at: something is compiled in it.
    """
    ends = [record["seconds"] for record in records]
    epoch = (ends[-1] - ends[0]) / (len(ends) - 1)
    start = seconds - len(ends) * epoch
    rates = [record["images_per_s"] for record in records[1:]]
    compiling = min(max(ends[0] - epoch, 0), max(start, 0))
    return Speed(sum(rates) / len(rates), epoch, start, compiling)


def epochs_that_fit(
    left: float, *, epoch: float, start: float, reserve: float, methods: int = 1, most: int = MOST
) -> int:
    """How many epochs each of some methods can have, one after the other, in `left` seconds.

    epoch, start, reserve: seconds of one epoch, of a start, and of what comes after the training.
    """
    each = left / methods - start - reserve
    return max(0, min(most, int(each / epoch)))


def plan(
    left: float, *, epoch: float, start: float, reserve: float, most: int, least_of_two: int
) -> tuple[int, int]:
    """How many methods are trained (1 or 2), and for how many epochs each."""
    given = {"epoch": epoch, "start": start, "reserve": reserve, "most": most}
    both = epochs_that_fit(left, methods=2, **given)
    return (2, both) if both >= least_of_two else (1, epochs_that_fit(left, **given))


class Bench:
    """Runs scripts as processes within the part's time.

    data: the folder with train/ and val/.
    """

    def __init__(self, part: Part, data: Path) -> None:
        self.part, self.data = part, data
        self.has_faiss = faiss_library.version() != "none"
        self.reserve = (8 if part.tiny else RESERVE) if self.has_faiss else 5
        self._workers = 0 if part.tiny else min(16, workers.cores())
        self._flags = TINY if part.tiny else TRAINING

    def train(
        self, method: str, folder: Path, *flags: object, epochs: int, until: float = 0
    ) -> Ended:
        """Train; told to stop when only `until` seconds of the part are left."""
        script, *own = METHODS[method]
        command = [script, *self._flags, *ALWAYS, *own, *flags, "--epochs", epochs]
        command += ["--num_workers", self._workers, "--checkpoint_path", folder, self.data]
        return self._run(command, folder, until=until)

    def evaluate(self, weights: Path, folder: Path) -> tuple[Ended, dict]:
        """k-NN figures by k, {} where there are none."""
        command = ["eval/eval_knn.py", "--weights", weights, "-k", 200, "--temperature", 0.1]
        command += ["--num_workers", self._workers, "--save", folder, self.data]
        ended = self._run(command, folder, until=2)
        found = folder / "knn.json"
        return ended, json.loads(found.read_text())["k"] if found.exists() else {}

    def _run(self, command: list[object], folder: Path, *, until: float) -> Ended:
        output = folder.with_name(f"{folder.name}.txt")
        # What is compiled stays for the next start.
        kept = {"TORCHINDUCTOR_CACHE_DIR": str(self.part.scratch / "compiled")}
        start, memory, told = time.monotonic(), 0.0, None
        with open(output, "w") as file:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env=os.environ | kept,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            while process.poll() is None:
                memory = max(memory, _memory_in_use(self.part.device))
                if told is None and self.part.left() < until:
                    process.terminate()
                    told = time.monotonic()
                if told and time.monotonic() - told > _TO_STOP:
                    process.kill()
                time.sleep(0.05)
        lines = output.read_text(errors="replace").strip().splitlines()
        seconds = time.monotonic() - start
        return Ended(process.returncode, seconds, memory, (lines or ["no word"])[-1][:300])


def _memory_in_use(device: torch.device) -> float:
    """GiB of a GPU that all processes use."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**30


def records_of(folder: Path) -> list[dict]:
    """The lines of a run's log that stand after an epoch, or after the step that it stopped at."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(plain_json.loads, lines) if "loss" in record]


def subset(images: Path, folder: Path, *, train: int, val: int) -> Path:
    """A folder with the first images of each class."""
    for split, count in (("train", train), ("val", val)):
        for source in sorted((images / split).iterdir()):
            (folder / split / source.name).mkdir(parents=True, exist_ok=True)
            for path in sorted(source.iterdir())[:count]:
                shutil.copy(path, folder / split / source.name)
    return folder


def run(part: Part) -> None:
    """Measure, decide how long to train, train, evaluate."""
    data = part.images()
    if part.tiny:
        data = subset(data, part.scratch / "subset", train=20, val=10)
    bench = Bench(part, data)
    found = measure(bench)
    if not found:
        return
    flags, speed = found
    limits = {"most": 2, "least_of_two": 2} if part.tiny else {}
    methods, epochs = plan(
        part.left(),
        epoch=1.03 * speed.epoch,
        start=speed.again,
        reserve=bench.reserve,
        **({"most": MOST, "least_of_two": LEAST_OF_TWO} | limits),
    )
    names = list(METHODS)[:methods]
    for name in list(METHODS)[methods:]:
        part.leave_out(name, f"both would have had less than {LEAST_OF_TWO} epochs")
    if not epochs:
        part.leave_out("training", f"no time for an epoch of {speed.epoch:.0f} s")
        return
    share = part.left() / methods
    for number, name in enumerate(names, 1):
        with part.attempt(name):
            until = (methods - number) * share + bench.reserve
            train_and_evaluate(bench, name, flags, epochs=epochs, until=until)
    with part.attempt("picture of the curves"):
        _draw(part, [name for name in names if (part.scratch / name / "log.jsonl").exists()])


def measure(bench: Bench) -> tuple[tuple, Speed] | None:
    """The flags that train fastest here, and how fast; None where none of them train at all."""
    part, found = bench.part, {}
    if part.tiny:
        part.leave_out("--compile, --cuda_graphs", "toy sizes")
        return _measured(bench, "as it is", ())
    compiled = ("--compile",)
    began = part.left()
    if began < _COMPILES:  # two starts with a compiler would leave nothing to train in
        part.leave_out("--compile, --cuda_graphs", f"{began:.0f} s left, below {_COMPILES}")
        return _measured(bench, "not compiled", ())
    found[compiled] = _measured(bench, "compiled", compiled)
    left = part.left()
    # It takes what the first took, and pays where most of the time is left for training.
    if found[compiled] and left - (began - left) > 0.6 * left:
        graphs = (*compiled, "--cuda_graphs")
        found[graphs] = _measured(bench, "with CUDA graphs", graphs)
    else:
        part.leave_out("--cuda_graphs", "no time")
    if not any(found.values()):
        found[()] = _measured(bench, "not compiled", ())
    return max(filter(None, found.values()), key=lambda one: one[1].images_per_s, default=None)


def _measured(bench: Bench, name: str, flags: tuple) -> tuple[tuple, Speed] | None:
    """Train two epochs of 2Q; the flags with their speed, or None where that failed."""
    part, folder = bench.part, bench.part.scratch / f"two epochs {name}"
    ended = bench.train("2Q", folder, *flags, epochs=2, until=_TO_STOP)
    part.check(f"two epochs, {name}", ended.code == 0, "" if ended.code == 0 else ended.said)
    if ended.code:
        return None
    speed = speed_of(ended.seconds, records_of(folder))
    part.figure(f"{name}, images/s", speed.images_per_s, "images/s")
    part.figure(f"{name}, a start", speed.start, "s")
    part.figure(f"{name}, first step within the start", speed.compiling, "s")
    part.figure(f"{name}, an epoch", speed.epoch, "s")
    if part.device.type == "cuda":
        part.figure(f"{name}, GPU memory in use", ended.memory, "GiB")
    part.figure(f"{name}, {MOST} epochs would take", speed.all_epochs, "s")
    return flags, speed


def _figure_of_cifar(
    part: Part, folder: Path, name: str, value: float, unit: str, **goal: float
) -> None:
    """A figure whose goal holds for the whole of CIFAR-10 alone."""
    about = json.loads((folder / "run.json").read_text())["starts"][-1]
    is_whole = about["counts"]["train"] == CIFAR
    part.figure(name, value, unit, **(goal if is_whole else {}))


def train_and_evaluate(bench: Bench, name: str, flags: tuple, *, epochs: int, until: float) -> None:
    """Train a method, and note what came out; of one that was cut off too."""
    part, folder = bench.part, bench.part.scratch / name
    ended = bench.train(name, folder, *flags, epochs=epochs, until=until)
    part.check(f"{name}, trains", ended.code in (0, 75), f"exit code {ended.code}: {ended.said}")
    records = records_of(folder) if ended.code in (0, 75) else []
    if not records:
        return
    done = records[-1]["epoch"]
    part.figure(f"{name}, epochs", done if ended.code == 0 else f"cut off after {done} of {epochs}")
    part.figure(f"{name}, from the command to its end", ended.seconds, "s")
    if len(records) > 1:
        speed = speed_of(ended.seconds, records)
        part.figure(f"{name}, images/s", speed.images_per_s, "images/s")
        part.figure(f"{name}, a start", speed.start, "s")
        title, goal = f"{name}, {MOST} epochs would take", {"at_most": 600} if name == "2Q" else {}
        _figure_of_cifar(part, folder, title, speed.all_epochs, "s", **goal)
    for figure in ("loss", "effective_rank", "purity_plain", "purity_constrained"):
        if records[-1].get(figure) is not None:
            part.figure(f"{name}, {figure.replace('_', ' ')}", records[-1][figure])
    columns = ("epoch", "loss", "lr", "effective_rank", "purity_plain", "purity_constrained")
    there = [column for column in columns if column in records[-1]]
    part.series(name, {column: [record[column] for record in records] for column in there})
    _evaluate(bench, name, folder, is_whole=ended.code == 0 and epochs == MOST)


def _evaluate(bench: Bench, name: str, folder: Path, *, is_whole: bool) -> None:
    """Note k-NN figures, votes weighted with temperature 0.1; the goal is that of 200 epochs."""
    part = bench.part
    if not bench.has_faiss:
        part.leave_out(f"{name}, k-NN", "no faiss here")
        return
    weights = checkpoints_in(folder)[0]
    ended, found = bench.evaluate(weights, folder / "knn")
    said = f"{weights.name}, exit code {ended.code}" + (f": {ended.said}" if ended.code else "")
    part.check(f"{name}, is evaluated", ended.code == 0, said)
    for k in ("1", "20", "200") if found else ():
        goal = {"at_least": 87} if k == "200" and is_whole and name == "2Q" else {}
        title = f"{name}, k-NN, k {k}, temperature 0.1"
        _figure_of_cifar(part, folder, title, found[k]["weighted"], "%", **goal)
    if not is_whole:
        part.leave_out(f"{name}, goal of k-NN", f"it is that of {MOST} epochs")
    if found:
        part.figure(f"{name}, evaluation", ended.seconds, "s")


def _draw(part: Part, names: list[str]) -> None:
    """Keep a picture of the curves, where there is matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        part.leave_out("picture of the curves", "no matplotlib here")
        return
    groups = plot_training.build_groups([f"{name}={part.scratch / name}" for name in names])
    picture = part.scratch / "cifar.png"
    plot_training.draw(groups, picture)
    part.keep(picture)
