"""The runner of `gpu.py`: parts that fail, hang and die, its time budgets, its report.

The parts here are modules that the tests write; the real ones run as toys in the slow test.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import gpu
import pytest
from conftest import ROOT, write_image
from gpu_parts import report
from gpu_parts.part import Part

from utils.runtime.errors import InputError

GOOD = """
def run(part):
    part.figure("speed", [3.0, 1.0, 2.0], "images/s")
    part.check("equal", True)
"""
FAILS = """
def run(part):
    part.figure("before", 1)
    print("what it printed")
    raise ValueError("a reason\\nand more")
"""
# Hangs together with a process of its own, and lets nobody tell it to end.
HANGS = """
import signal, subprocess, sys, time
def run(part):
    part.figure("before", 1)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    part.remember("child", child.pid)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (part.scratch / "hanging").touch()
    time.sleep(1000)
"""
DIES = """
import os, signal
def run(part):
    part.figure("before", 1)
    os.kill(os.getpid(), signal.SIGKILL)
"""
# As GOOD, and finds the report of the parts before.
LOOKS = """
import json
def run(part):
    part.figure("speed", [3.0, 1.0, 2.0], "images/s")
    found = json.loads((part.out / "report.json").read_text())
    before = list(found["parts"])[:4]  # it is there itself if it takes long
    part.check("the parts before are reported", before == ["fails", "hangs", "dies", "wrong"])
"""
DOES_NOT_HOLD = """
def run(part):
    with part.attempt("first"):
        raise RuntimeError("no kernel")
    part.check("second", True)
"""


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Parts from texts: (name=text) -> their specs, of four seconds each unless it hangs."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def write(**texts: str) -> dict[str, gpu.Spec]:
        for name, text in texts.items():
            (folder / f"made_{name}.py").write_text(text)
        return {name: gpu.Spec(f"made_{name}", 60) for name in texts}

    return write


@pytest.fixture
def runner(tmp_path):
    """(specs, **settings) -> a runner that reports into tmp_path / "out"."""

    def make(specs: dict[str, gpu.Spec], **settings) -> gpu.Runner:
        (tmp_path / "scratch").mkdir(exist_ok=True)
        settings = {"tiny": True} | settings
        return gpu.Runner(specs, out=tmp_path / "out", scratch=tmp_path / "scratch", **settings)

    return make


def reported(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "report.json").read_text())["parts"]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


class Clock:
    """Real time, and what it jumped."""

    def __init__(self) -> None:
        self.jumped = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.jumped

    def jumps(self, seconds: float, *, once_there: Path) -> Callable[[float], None]:
        """A sleep after which the clock has jumped, once the file is there."""
        real = time.sleep

        def sleep(nap: float) -> None:
            real(nap)
            if once_there.exists():
                self.jumped = seconds

        return sleep


def hanging(tmp_path: Path) -> Path:
    """The file that the part which hangs leaves when it begins to."""
    return tmp_path / "scratch" / "hangs" / "hanging"


def test_parts_that_go_wrong_are_reported_and_the_others_run(
    parts, runner, tmp_path, monkeypatch, capsys
):
    clock = Clock()
    monkeypatch.setattr(gpu.time, "sleep", clock.jumps(60, once_there=hanging(tmp_path)))
    specs = parts(fails=FAILS, hangs=HANGS, dies=DIES, wrong=DOES_NOT_HOLD, good=LOOKS)
    assert not runner(specs, clock=clock).run()
    found = reported(tmp_path)
    verdicts = {name: part["verdict"] for name, part in found.items()}
    assert verdicts == {
        **{"fails": "failed", "hangs": "hung", "dies": "died", "wrong": "failed"},
        "good": "passed",
    }
    for name in ("fails", "hangs", "dies"):  # what was noted before stays
        assert [f["name"] for f in found[name]["figures"]] == ["before"]
    assert {"what it printed", "ValueError: a reason"} <= set(found["fails"]["output"])
    assert found["fails"]["checks"][0]["said"] == "ValueError: a reason"
    assert not is_running(found["hangs"]["memory"]["child"])
    assert 60 <= found["hangs"]["seconds"] < 120
    assert [(c["name"], c["holds"]) for c in found["wrong"]["checks"]] == [
        ("first", False),
        ("second", True),
    ]
    assert "RuntimeError: no kernel" in found["wrong"]["output"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "ended with signal 9" in text and "DOES NOT HOLD: first: RuntimeError: no" in text
    assert "| speed | 2 images/s | 1 to 3, n 3 |  |" in text and "what it printed" in text
    last = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(last) if line.startswith("part "))
    rows = [line.split()[:2] for line in last[start + 1 :] if not line.startswith(" ")]
    assert rows == [[name, verdict] for name, verdict in verdicts.items()]


def test_each_part_has_its_own_time_and_the_last_one_the_rest(runner):
    clock = Clock()
    specs = {name: gpu.Spec(name, 90) for name in ("first", "second", "last")}
    run = runner(specs, clock=clock, minutes=9)
    whole = 9 * 60 - gpu._RESERVE
    budgets = [run.budget(name) for name in specs]
    assert budgets == pytest.approx([90, 90, whole], abs=1)
    clock.jumped = 400  # the first took as long as that
    assert run.budget("second") == pytest.approx(90, abs=1)
    assert run.budget("last") == pytest.approx(whole - 400, abs=1)
    clock.jumped = whole - 20
    assert run.budget("second") == run.budget("last") or run.budget("second") < 21
    half = runner(specs, clock=clock, minutes=4.5)
    assert half.budget("first") == pytest.approx(45, abs=1)


def test_a_clock_that_jumps_ends_the_part_and_leaves_the_next_ones_out(
    parts, runner, tmp_path, monkeypatch
):
    """As of a machine that slept: what is over is over, and the report is whole."""
    clock = Clock()
    monkeypatch.setattr(gpu.time, "sleep", clock.jumps(3600, once_there=hanging(tmp_path)))
    assert not runner(parts(hangs=HANGS, good=GOOD), clock=clock).run()
    found = reported(tmp_path)
    assert (found["hangs"]["verdict"], found["good"]["verdict"]) == ("hung", "left out")
    assert found["hangs"]["seconds"] > 3600


def test_the_first_part_has_what_is_left_after_the_last(parts, runner, tmp_path):
    twice = """
def run(part):
    done = part.recall("runs") or 0
    part.remember("runs", done + 1)
    part.remember("unfinished", 1 - done)
    part.check("run", True)
"""
    assert runner(parts(twice=twice, good=GOOD)).run()
    assert reported(tmp_path)["twice"]["memory"] == {"runs": 2, "unfinished": 0}


def test_a_call_that_is_cut_off_leaves_what_it_had(parts, tmp_path):
    """Ctrl-C or SIGTERM in the middle of a part; kill -9 a few seconds after what it noted."""
    parts(hangs=HANGS)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import gpu; gpu._REPORTED = 0\n"
        "gpu.PARTS = {'hangs': gpu.Spec('made_hangs', 60)}; gpu.main()"
    )
    flags = ["--out", str(tmp_path / "out"), "--tiny"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    for number, verdict in ((signal.SIGKILL, "running"), (signal.SIGTERM, "cut off")):
        process = subprocess.Popen([sys.executable, "-c", code, *flags], env=environment)
        while not list(tmp_path.glob("cmsf_gpu_*/hangs/hanging")):
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.5)
        process.send_signal(number)
        assert process.wait(30) == (130 if verdict == "cut off" else -number)
        found = reported(tmp_path)["hangs"]
        assert (found["verdict"], found["figures"][0]["name"]) == (verdict, "before")
        if verdict == "running":  # nobody could end its part
            os.killpg(os.getpgid(found["memory"]["child"]), signal.SIGKILL)
            shutil.rmtree(next(tmp_path.glob("cmsf_gpu_*")))
        else:
            assert not is_running(found["memory"]["child"])
    assert not list(tmp_path.glob("cmsf_gpu_*"))


def test_goals_and_spreads(tmp_path):
    part = Part(scratch=tmp_path, out=tmp_path, seconds=10, data=None, tiny=False)
    part.figure("share", [96.0, 98.0, 95.0], "%", at_least=97)
    assert report.result(tmp_path, "ended", seconds=1, budget=2)["verdict"] == "missed"
    part.figure("share", [96.0, 98.0, 97.5], "%", at_least=97)  # anew, instead of the first
    part.figure("memory", 160, "MB", at_most=160)
    part.figure("nothing beside", float("nan"), "%")
    found = report.result(tmp_path, "ended", seconds=1, budget=2)
    assert found["verdict"] == "passed"
    assert [f.get("reached") for f in found["figures"]] == [True, True, None]
    report.write(tmp_path, {"a": found}, command=["gpu.py", "odd \udcff name"], whole=1)
    written = (tmp_path / "report.json").read_text()
    assert "NaN" not in written and json.loads(written)["parts"]["a"]["figures"][2]["value"] is None
    text = report.markdown({"machine": {}, "command": [], "seconds": 1}, {"a": found})
    assert "| share | 97.5 % | 96 to 98, n 3 | at least 97 (reached) |" in text
    part.figure("memory", 161, "MB", at_most=160)
    found = report.result(tmp_path, "ended", seconds=1, budget=2)
    text = report.markdown({"machine": {}, "command": [], "seconds": 1}, {"a": found})
    assert found["verdict"] == "missed" and "at most 160 (MISSED)" in text


def test_a_part_that_notes_nothing_has_not_passed(tmp_path):
    Part(scratch=tmp_path, out=tmp_path, seconds=10, data=None, tiny=False)
    assert report.result(tmp_path, "ended", seconds=1, budget=2)["verdict"] == "failed"


def test_data_from_a_folder_and_from_a_tar_file(tmp_path):
    for split in ("train", "val"):
        write_image(tmp_path / "images" / split / "a" / "0.jpg", seed=0)
    assert gpu.find_images(tmp_path / "images", tmp_path) == tmp_path / "images"
    archive = tmp_path / "images.tar.xz"
    for top in (".", "cifar"):  # train/ at the top, and in a folder
        with tarfile.open(archive, "w:xz") as tar:
            tar.add(tmp_path / "images", arcname=top)
        scratch = tmp_path / f"scratch {top}"
        scratch.mkdir()
        found = gpu.find_images(archive, scratch)
        assert (found / "train" / "a" / "0.jpg").is_file() and found.is_relative_to(scratch)


@pytest.mark.parametrize("how", ["cut", "empty", "no val", "folder"])
def test_data_that_will_not_do_are_refused_before_any_part(tmp_path, how):
    write_image(tmp_path / "images" / "train" / "a" / "0.jpg", seed=0)
    data = tmp_path / "images"
    if how != "folder":
        data = tmp_path / "images.tar.xz"
        with tarfile.open(data, "w:xz") as tar:
            if how != "empty":
                tar.add(tmp_path / "images", arcname=".")
        if how == "cut":
            data.write_bytes(data.read_bytes()[:-40])
    with pytest.raises(InputError, match=f"^--data {data}: "):
        gpu.find_images(data, tmp_path)


def test_a_folder_that_holds_no_report_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(InputError, match=f"^--out {out}: "):
            gpu.make_folder(out, flag="--out")


def test_a_report_that_cannot_be_written_ends_nothing(parts, runner, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write", full)
    assert runner(parts(good=GOOD)).run()
    printed = capsys.readouterr().out
    assert "no report: [Errno 28] No space left" in printed and "good        passed" in printed


def test_where_nothing_ran_nothing_holds(parts, runner, tmp_path):
    assert not runner(parts(good=GOOD), minutes=0.1).run()
    text = (tmp_path / "out" / "report.md").read_text()
    assert "left out: 1 s of all the time were left" in text


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--tiny", "--only", "step,serach"), "'serach'; there are tests, agreement"),
        (("--tiny", "--only", ""), "no part ''"),
        (("--tiny", "--minutes", "0"), "--minutes: 0 is out of range"),
        (("--tiny", "--minutes", "nan"), "--minutes: nan is out of range"),
        (("--tiny", "--out", __file__), f"--out {__file__}: not a folder"),
        (("--tiny", "--data", "nowhere.tar"), "--data nowhere.tar: neither"),
        (("--tiny", "--data", __file__), "neither a folder nor a tar file"),
    ],
)
def test_mistakes_in_the_command(flags, named, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        gpu.parse_args(["--out", str(tmp_path / "out"), *flags])
    assert error.value.code == 2 and named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_only_toys(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.parse_args(["--out", str(tmp_path)])
    assert "no GPU here; --tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_all_parts_as_toys(tmp_path):
    """In under four minutes on two cores, each of them."""
    began = time.monotonic()
    command = [sys.executable, "tests/gpu.py", "--out", str(tmp_path / "out"), "--tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = reported(tmp_path)
    assert list(found) == list(gpu.PARTS)
    assert {part["verdict"] for part in found.values()} <= {"passed", "left out"}
    assert time.monotonic() - began < 240
