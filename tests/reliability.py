"""What is done to runs and checkpoints, how often, and how many survive: prints one table.

    python tests/reliability.py

Real scripts on the demo data with a tiny network, killed, stopped, starved of disk, their files
flipped and truncated. `test_reliability.py` runs the same: all of it when slow tests are asked for,
a little of each by default.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tiny import tensors

from utils.data.demo_data import draw_data_set
from utils.method import checkpoint
from utils.training.run_folder import RunFolder

torch.set_num_threads(1)  # also so that processes can be forked

EPOCHS = 3
COMMON = (
    *("--arch", "conv4", "--image_size", 16, "--batch_size", 64, "--proj_dim", 16),
    *("--hidden_dim", 32, "--mem_bank_size", 300, "--blur", 0, "--weak_strong", "--knn_freq", -1),
    *("--epochs", EPOCHS, "--save_freq", 2, "--save_minutes", 0.002, "--print_freq", 7),
)
REGIMES = {
    "2Q": ("self_supervised/train_msf_2q.py", "--topk", 3, "--topkp", 3),
    "supervised": ("supervised/train_sup_msf.py", "--topk", 3),
    "semi-supervised": (
        *("semi_supervised/train_pseudo_cmsf.py", "--topk", 3, "--label_fraction", 0.1),
        *("--use_conf", "--conf_th", 0.3, "--cache_sup", "--sup_mem_bank_size", 100),
        *("--pseudo_lbl_epochs", 2, "--mlp_xent", "mlp"),
    ),
}


class Row(NamedTuple):
    """One line of the table."""

    what: str
    times: int
    survived: int
    note: str = ""


def start(
    regime: str, folder: Path, data: Path, *flags: object, gpu: bool = False
) -> subprocess.Popen:
    """Start a script on one thread, `gpu`: on a GPU; its output goes to files beside the folder."""
    script, *own = REGIMES[regime]
    command = [script, *own, *COMMON, "--checkpoint_path", folder, *flags, data]
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    with open(f"{folder}.out", "a") as out, open(f"{folder}.err", "a") as errors:
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | hidden,
            stdout=out,
            stderr=errors,
        )


def finish(process: subprocess.Popen, *, timeout: float = 300) -> int:
    """The exit code of a process."""
    return process.wait(timeout=timeout)


def digest(folder: Path) -> str:
    """SHA-256 over all tensors of a finished run's last checkpoint, in the order of their names."""
    state = checkpoint.load(folder / f"ckpt_epoch_{EPOCHS}.pth", flag="--resume")
    total = hashlib.sha256()
    for name, value in sorted(tensors(state).items()):
        total.update(name.encode() + value.contiguous().numpy().tobytes())
    return total.hexdigest()


def figures(folder: Path) -> list[dict]:
    """What a run logged, without its times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").open()]
    times = ("seconds", "images_per_s")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def undisturbed(regime: str, scratch: Path, data: Path) -> Path:
    """The folder of a run that nothing happens to, made once."""
    folder = scratch / f"{regime}_undisturbed"
    if not folder.exists():
        assert finish(start(regime, folder, data, "--num_workers", 0)) == 0
    return folder


def wait_for_save(process: subprocess.Popen, folder: Path) -> None:
    """Return while a checkpoint is being written."""
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if any(name.endswith(".tmp") for name in os.listdir(folder)):
                return
        time.sleep(0.0005)


def wait_for_edge(process: subprocess.Popen, folder: Path) -> None:
    """Return as soon as an epoch has its checkpoint that was not there before."""

    def ends() -> set[str]:
        with contextlib.suppress(FileNotFoundError):
            return {n for n in os.listdir(folder) if n.endswith(".pth") and "_step_" not in n}
        return set()

    before = ends()
    while process.poll() is None and ends() <= before:
        time.sleep(0.0005)


def wait_a_while(process: subprocess.Popen, chance: random.Random) -> None:
    """Return at a random moment from a second after the start, while torch is still imported."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=chance.uniform(1, 6))


def kill_and_resume(
    regime: str, scratch: Path, data: Path, *, kills: int, workers: int, seed: int = 0
) -> Row:
    """Kill a run again and again, going on each time, until it ends; more runs up to `kills`."""
    chance = random.Random(f"{regime} {workers} {seed}")
    whole = undisturbed(regime, scratch, data)
    expected, done, runs, equal, places = digest(whole), 0, 0, 0, []
    while done < kills:
        runs += 1
        folder, code, within = scratch / f"{regime}_{workers}_{seed}_{runs}", None, 0
        while code != 0:
            process = start(regime, folder, data, "--num_workers", workers, "--resume", "auto")
            kind = (
                chance.choice(["random", "random", "save", "edge"]) if done + within < kills else ""
            )
            if kind == "save":
                wait_for_save(process, folder)
            elif kind == "edge":
                wait_for_edge(process, folder)
            elif kind:
                wait_a_while(process, chance)
            if kind:
                process.kill()
            code = finish(process)
            assert code in (0, -signal.SIGKILL), Path(f"{folder}.err").read_text()
            within += code != 0
            places += [kind] if code else []
        done += within
        equal += within * (digest(folder) == expected and figures(folder) == figures(whole))
    kinds = ", ".join(f"{places.count(kind)} {kind}" for kind in ("random", "save", "edge"))
    return Row(f"kill -9, {regime}, {workers} workers", done, equal, f"{kinds}; {runs} runs")


def stop_and_resume(regime: str, scratch: Path, data: Path, *, times: int) -> Row:
    """SIGTERM, SIGUSR1 and SIGUSR2 in turn, `times` each, to a run that trains."""
    whole, good = undisturbed(regime, scratch, data), 0
    chance = random.Random(regime)
    for number in range(times):
        folder = scratch / f"{regime}_signals_{number}"
        codes = []
        for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
            process = start(regime, folder, data, "--num_workers", 2, "--resume", "auto")
            lines = count_lines(folder)
            while process.poll() is None and count_lines(folder) == lines:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.3))
            process.send_signal(getattr(signal, name))
            codes.append(finish(process, timeout=30))
        codes.append(finish(start(regime, folder, data, "--resume", "auto")))
        same = digest(folder) == digest(whole) and figures(folder) == figures(whole)
        good += 3 * (codes == [75, 75, 75, 0] and same)
    return Row(f"SIGTERM, SIGUSR1, SIGUSR2, {regime}", 3 * times, good)


def count_lines(folder: Path) -> int:
    """Lines in a run's log, 0 before there is one."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "log.jsonl").read_bytes().count(b"\n")
    return 0


def _save_for_ever(path: Path) -> None:
    """What the killed process of `kill_while_saving` does."""
    folder = RunFolder(path, say=lambda text: None)
    found, state = folder.newest_good()
    step = state["step"] if found else 0
    while True:
        step += 1
        weights = {"weight": torch.full((1_000_000,), float(step))}
        state = {"format": checkpoint.FORMAT, "epoch": 1, "step": step, "state_dict": weights}
        folder.save(state)


def kill_while_saving(scratch: Path, *, kills: int) -> Row:
    """A process that only saves, killed: two whole checkpoints stay and nothing half written."""
    path, chance = scratch / "saving", random.Random(0)
    context, good, torn, last = multiprocessing.get_context("fork"), 0, 0, 0
    for _ in range(kills):
        process = context.Process(target=_save_for_ever, args=(path,))
        before = {found.name for found in path.glob("*.pth")}
        process.start()
        while len(names := {found.name for found in path.glob("*.pth")}) < 2 or names <= before:
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(chance.uniform(0.02, 0.2))
        process.kill()
        process.join()
        torn += any(name.endswith(".tmp") for _, _, files in os.walk(path) for name in files)
        folder = RunFolder(path, say=lambda text: None)
        states = [folder.load(found) for found in folder.checkpoints()]
        left = [name for _, _, files in os.walk(path) for name in files if name.endswith(".tmp")]
        steps = [state["step"] for state in states]
        whole = all((s["state_dict"]["weight"] == s["step"]).all() for s in states)
        good += not left and len(steps) in (2, 3) and whole and steps[0] > last
        last = steps[0]
        folder.close()
    return Row("kill -9 while saving", kills, good, f"{torn} left a half-written file")


@contextlib.contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of this size at `path`; PermissionError where none can be mounted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise PermissionError("no file system can be mounted")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill_disk(scratch: Path, data: Path, *, times: int) -> Row:
    """A run on a disk that gets full, then goes on when there is room again."""
    whole, good = undisturbed("2Q", scratch, data), 0
    one = sum(path.stat().st_size for path in (whole / f"ckpt_epoch_{EPOCHS}.pth",))
    for number in range(times):
        kilobytes = int(one / 1024 * (2.2 + 2 * number / times))
        with small_disk(scratch / f"disk_{number}", kilobytes) as disk:
            folder = disk / "run"
            errors = Path(f"{folder}.err")
            code = finish(start("2Q", folder, data, "--num_workers", 0))
            message = errors.read_text() if errors.exists() else ""
            files = RunFolder(folder, say=lambda text: None)
            left = [name for name in os.listdir(folder) if name.endswith(".tmp")]
            found, _ = files.newest_good()
            files.close()
            named = found is not None and f"last checkpoint: {found}" in message
            clear = message.count("\n") == 1 and "No space left on device" in message
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            after = finish(start("2Q", folder, data, "--resume", "auto"))
            good += (
                (code, after, left) == (1, 0, [])
                and named
                and clear
                and (digest(folder) == digest(whole))
            )
    return Row("disk full while saving", times, good, "one line, then resumed with the same bits")


def damage(scratch: Path, data: Path, *, flips: int) -> list[Row]:
    """Flipped bits and missing ends of a run's newest checkpoint.

    Survived: the file is refused by its name, and the checkpoint before is found instead; or, where
    the bit is one of a header that nobody reads, all that is loaded is as it was.
    """
    folder = scratch / "damaged"
    shutil.copytree(undisturbed("2Q", scratch, data), folder)
    chance, rows = random.Random(0), []
    last = folder / f"ckpt_epoch_{EPOCHS}.pth"
    step = next(folder.glob("*_step_*.pth"))
    for what, path in (("checkpoint of an epoch", last), ("checkpoint within one", step)):
        original, whole = path.read_bytes(), tensors(checkpoint.load(path, flag="--resume"))
        harmless = 0

        def survives(
            content: bytes, path: Path = path, whole: dict[str, torch.Tensor] = whole
        ) -> tuple[bool, bool]:
            """Whether it is, and whether nothing had changed."""
            path.write_bytes(content)
            said: list[str] = []
            found, state = RunFolder(folder, say=said.append).newest_good()
            if found != path:
                return found is not None and str(path) in said[0], False
            there = tensors(state)
            same = [name for name, value in there.items() if torch.equal(value, whole[name])]
            return len(same) == len(there) == len(whole), True

        found = 0
        for _ in range(flips):
            changed, place = bytearray(original), chance.randrange(len(original))
            changed[place] ^= 1 << chance.randrange(8)
            good, unchanged = survives(bytes(changed))
            found, harmless = found + good, harmless + unchanged
        note = f"refused, fell back; {harmless} changed nothing that is loaded"
        rows.append(Row(f"one bit flipped: {what}", flips, found, note))
        shares = (0, 0.3, 0.9, 0.999)
        cut = [survives(original[: int(len(original) * share)]) for share in shares]
        found = sum(good and not unchanged for good, unchanged in cut)
        rows.append(Row(f"cut to 0, 30, 90, 99.9%: {what}", 4, found, "refused, fell back"))
        path.write_bytes(original)
        last.unlink(missing_ok=True)  # from here on the newest is the one within the epoch
    return rows


def kill_workers(scratch: Path, data: Path, *, times: int) -> Row:
    """kill -9 to a worker of a run that trains: the run ends within 30 s and says why."""
    good, longest, failures = 0, 0.0, ""
    for number in range(times):
        folder = scratch / f"workers_{number}"
        # So many epochs that the run does not end before its worker is killed.
        process = start("2Q", folder, data, "--num_workers", 2, "--epochs", 1000)
        while count_lines(folder) < 2:
            assert process.poll() is None, Path(f"{folder}.err").read_text()
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[number % len(children)]), signal.SIGKILL)
        since = time.monotonic()
        code = finish(process, timeout=60)
        longest = max(longest, time.monotonic() - since)
        message = Path(f"{folder}.err").read_text()
        clear = message.count("\n") == 1 and "worker" in message and "last checkpoint" in message
        survived = code == 1 and clear and longest < 30
        good += survived
        failures += "" if survived else f"; exit code {code}: {message}"
    return Row("kill -9 to a data worker", times, good, f"ended within {longest:.1f} s{failures}")


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    width = max(len(row.what) for row in rows)
    lines = [f"{'what was done':<{width}}  times  survived"]
    lines += [f"{row.what:<{width}}{row.times:>7}{row.survived:>10}  {row.note}" for row in rows]
    return "\n".join(lines)


# Everything in the full counts: name -> what makes the rows from (scratch folder, demo data).
FULL_COUNTS: dict[str, Callable[[Path, Path], Row | list[Row]]] = {
    "saving": lambda scratch, data: kill_while_saving(scratch, kills=50),
    "damage": partial(damage, flips=100),
    **{
        f"kill {regime} {workers}": partial(kill_and_resume, regime, kills=20, workers=workers)
        for regime in REGIMES
        for workers in (0, 2)
    },
    **{f"stop {regime}": partial(stop_and_resume, regime, times=3) for regime in REGIMES},
    "workers": partial(kill_workers, times=5),
    "disk": partial(fill_disk, times=5),
}


def rows_of(name: str, scratch: Path, data: Path) -> list[Row]:
    """The rows of one of FULL_COUNTS; none where no file system can be mounted."""
    with contextlib.suppress(PermissionError):
        rows = FULL_COUNTS[name](scratch, data)
        return rows if isinstance(rows, list) else [rows]
    return []


def everything(scratch: Path) -> list[Row]:
    """All of it; what takes processes of its own two at a time."""
    data = draw_data_set(ROOT / "data" / "demo")
    for regime in REGIMES:
        undisturbed(regime, scratch, data)
    with ThreadPoolExecutor(2) as pool:
        together = [name for name in FULL_COUNTS if name.startswith(("kill", "stop"))]
        rows = pool.map(lambda name: rows_of(name, scratch, data), together)
        found = dict(zip(together, rows, strict=True))
    found |= {name: rows_of(name, scratch, data) for name in FULL_COUNTS if name not in found}
    return [row for name in FULL_COUNTS for row in found[name]]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(table(everything(Path(scratch))))
