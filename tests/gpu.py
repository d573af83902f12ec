"""Everything that wants a GPU, in one call of nine minutes: what holds there, and how fast it is.

    python tests/gpu.py --out DIR [--data FOLDER_OR_TAR] [--minutes 9] [--only step,search]
    python tests/gpu.py --out DIR --tiny

Each part (`PARTS`, in this order) runs in a process of its own and has a time budget of its own.
One that fails, hangs or dies is reported, and the next one runs. DIR/report.json and DIR/report.md
are written anew after each, and every few seconds. The last part has all the time that is left;
what is left after it, the first. --data: images in train/<class>/ and val/<class>/, as a folder or
a tar file of one; without it the demo data. --tiny: toy sizes, on a CPU too, which tell that the
parts work and nothing else.

Exit code 0: all that ran holds (goals may be missed); 1: a part failed, hung or died, or none ran;
2: a mistake in the command; 130: stopped by a signal.
"""

import argparse
import contextlib
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_BEGAN = time.monotonic()  # importing torch takes seconds of a part's time

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_parts import report
from gpu_parts.part import Part, run_module

from utils.cli import arguments
from utils.evaluation.result_files import make_folder
from utils.runtime.errors import InputError, printable

NOMINAL_MINUTES = 9
_LEAST = 5  # seconds under which no part is started
_RESERVE = 5  # seconds for ending a part and writing the report
_GRACE = 3  # seconds between asking a part to end and killing it
_REPORTED = 5  # seconds between reports while a part runs


class Spec(NamedTuple):
    """A part: the module with its `run`, and its seconds of nine minutes."""

    module: str
    seconds: float


PARTS = {
    "tests": Spec("gpu_parts.suite", 90),
    "agreement": Spec("gpu_parts.agreement", 45),
    "no_waiting": Spec("gpu_parts.no_waiting", 35),
    "step": Spec("gpu_parts.step", 135),
    "search": Spec("gpu_parts.search", 20),
    "survival": Spec("gpu_parts.survival", 55),
    "cifar": Spec("gpu_parts.cifar", 155),
}


class Runner:
    """Runs parts one after the other within `minutes`, and reports after each.

    clock: seconds that only grow; time that passes while nothing runs counts too. spent: seconds
    of the minutes that are over.
    """

    def __init__(
        self,
        parts: Mapping[str, Spec],
        *,
        out: Path,
        scratch: Path,
        minutes: float = NOMINAL_MINUTES,
        data: Path | None = None,
        tiny: bool = False,
        spent: float = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.parts, self.out, self.scratch = parts, out, scratch
        self.data, self.tiny, self.clock = data, tiny, clock
        self._scale = minutes / NOMINAL_MINUTES
        self._start = clock() - spent
        self._end = self._start + 60 * minutes - _RESERVE
        self.results: dict[str, dict] = {}
        out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds until all must have ended."""
        return self._end - self.clock()

    def budget(self, name: str) -> float:
        """Seconds that a part which starts now has: its own, the last one all that are left."""
        if name == list(self.parts)[-1]:
            return self.left()
        return min(self.parts[name].seconds * self._scale, self.left())

    def run(self) -> bool:
        """Run them all, and once more what the first left out for time; whether all holds."""
        for name in self.parts:
            print(f"== {name}, {max(self.budget(name), 0):.0f} s", flush=True)
            self._run_part(name, self.budget(name))
        first = next(iter(self.parts))
        if self.results[first]["memory"].get("unfinished") and self.left() >= _LEAST:
            print(f"== {first}, the rest of it, {self.left():.0f} s", flush=True)
            self._run_part(first, self.left())
        print(report.table(self.results), flush=True)
        verdicts = {found["verdict"] for found in self.results.values()}
        ran = any(found["how"] != "left out" for found in self.results.values())
        return ran and verdicts <= {"passed", "missed", "left out"}

    def _run_part(self, name: str, seconds: float) -> None:
        """Run a part; reported now and then too, for a call that is cut off."""
        before, began = self.results.get(name, {}).get("seconds", 0), self.clock()
        (self.scratch / name).mkdir(exist_ok=True)

        def report_it(how: str) -> None:
            spent = before + (0 if how == "left out" else self.clock() - began)
            found = report.result(self.scratch / name, how, seconds=spent, budget=seconds)
            self.results[name] = found
            whole = self.clock() - self._start
            try:
                report.write(self.out, self.results, command=sys.argv, whole=whole)
            except OSError as error:  # a full disk, say: the parts go on, and the table comes
                print(printable(f"no report: {error}"), flush=True)

        if seconds < _LEAST:
            report_it("left out")
            return
        how = "cut off"  # the call, not the part
        try:
            how = self._process(name, seconds, now_and_then=lambda: report_it("running"))
        finally:
            report_it(how)

    def _process(self, name: str, seconds: float, *, now_and_then: Callable[[], None]) -> str:
        """Run a part; how it ended, in words that `report.result` knows."""
        folder = self.scratch / name
        command = [sys.executable, str(Path(__file__).resolve()), "--out", str(self.out), "--part"]
        command += [self.parts[name].module, str(folder), str(seconds)]
        command += ["--tiny"] * self.tiny + (["--data", str(self.data)] if self.data else [])
        with open(folder / report.OUTPUT, "a") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, "TMPDIR": str(self.scratch)},  # nothing is left elsewhere
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            end = self.clock() + seconds
            due = self.clock() + _REPORTED
            try:
                while process.poll() is None and self.clock() < end:
                    time.sleep(0.05)
                    if self.clock() > due:
                        now_and_then()
                        due = self.clock() + _REPORTED
                hangs = process.poll() is None
            finally:
                _end_group(process)
        if hangs:
            return "hung"
        code = process.returncode
        return "ended" if code == 0 else f"exit code {code}" if code > 0 else f"signal {-code}"


def _end_group(process: subprocess.Popen) -> None:
    """End a part and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of this script; --part is what it starts its own processes with."""
    parser = arguments.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=arguments.path, required=True, help="folder for the report")
    parser.add_argument(
        "--data", type=arguments.path, help="train/ and val/ in a folder or a tar file"
    )
    minutes = arguments.number(float, low=0.1, high=1000)
    parser.add_argument("--minutes", type=minutes, default=NOMINAL_MINUTES)
    parser.add_argument("--only", help=f"parts by name, of {','.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on a CPU too")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # module, folder, seconds
    args = parser.parse_args(argv)
    args.chosen = list(PARTS) if args.only is None else args.only.split(",")
    if unknown := [name for name in args.chosen if name not in PARTS]:
        parser.error(f"--only {args.only}: no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: not a folder")
    if args.data and not (args.data.is_dir() or _is_archive(args.data)):
        parser.error(f"--data {args.data}: neither a folder nor a tar file")
    if not (args.tiny or args.part or torch.cuda.is_available()):
        parser.error("no GPU here; --tiny runs all parts at toy sizes without one")
    return args


def _is_archive(path: Path) -> bool:
    return path.is_file() and tarfile.is_tarfile(path)


def find_images(data: Path, scratch: Path) -> Path:
    """The folder with train/ and val/ that `data` is, or that lies in it; a tar file is unpacked.

    InputError, before any part has run, for data without them or a damaged file.
    """
    folder = data
    if not data.is_dir():
        folder = scratch / "data"
        folder.mkdir()
        try:
            with tarfile.open(data) as archive:
                archive.extractall(folder, filter="data")
        except (tarfile.TarError, OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise InputError(f"--data {data}: cannot be unpacked ({error})") from error
    places = [folder, *(sorted(folder.iterdir()) if folder != data else [])]
    for place in places:
        if all((place / split).is_dir() for split in ("train", "val")):
            return place.resolve()
    raise InputError(f"--data {data}: no folders train/ and val/ in it")


def main() -> None:
    """Run the parts; or, in a process of its own, one of them."""
    args = parse_args()
    if args.part:
        module, folder, seconds = args.part
        part = Part(
            scratch=Path(folder),
            out=args.out,
            seconds=float(seconds) - (time.monotonic() - _BEGAN),
            data=args.data,
            tiny=args.tiny,
        )
        run_module(module, part)
        return
    for number in (signal.SIGTERM, signal.SIGHUP):  # they end the part that runs too
        signal.signal(number, signal.default_int_handler)
    try:
        holds = run_parts(args)
    except InputError as error:
        print(printable(f"gpu.py: error: {error}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0 if holds else 1)


def run_parts(args: argparse.Namespace) -> bool:
    """Run the chosen parts; whether all holds."""
    make_folder(args.out, flag="--out")
    with tempfile.TemporaryDirectory(prefix="cmsf_gpu_") as scratch:
        data = args.data and find_images(args.data, Path(scratch))
        runner = Runner(
            {name: PARTS[name] for name in PARTS if name in args.chosen},
            out=args.out.resolve(),
            scratch=Path(scratch),
            minutes=args.minutes,
            data=data,
            tiny=args.tiny,
            spent=time.monotonic() - _BEGAN,
        )
        return runner.run()


if __name__ == "__main__":
    main()
