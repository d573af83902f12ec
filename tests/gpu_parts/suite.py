"""The tests marked `gpu`, in this process, as many as the time allows; run again, the rest of them.

What became of a test is noted as it ends, and which one runs, so that one that hangs is known when
the part is killed for it. A part that is run again counts it as failed and goes on after it.
"""

import contextlib
import faulthandler
import importlib.util
import os
import time

import pytest

from gpu_parts import ROOT
from gpu_parts.part import Part

FOLDER = ROOT / "tests"
_ENOUGH = 10  # seconds for a test, where none has taken longer
_COMPILES = 45  # seconds for one that waits for a compiler
_SHOWN_LINES = 3  # of a failure
_FLAGS = (
    *("-m", "gpu", "-v", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider"),
    "--continue-on-collection-errors",
)
_MAY_END_WITH = {
    pytest.ExitCode.OK,
    pytest.ExitCode.TESTS_FAILED,
    pytest.ExitCode.NO_TESTS_COLLECTED,  # all were done before
}


class Watch:
    """A plugin of pytest that notes each test in `part`, and stops while there is time.

    tests: what became of each by its name, "passed", "failed" or "skipped", and what was said.
    broken: files that could not be imported, and why. waiting: how many tests have not begun.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self.tests: dict[str, list[str]] = part.recall("tests") or {}
        self.broken: dict[str, str] = {}
        self.waiting = 0
        self._longest, self._began = float(_ENOUGH), 0.0
        self._long: set[str] = set()
        self._order: list[str] = []
        self._session: pytest.Session | None = None
        self._stderr = os.fdopen(os.dup(2), "w")  # pytest takes the descriptor itself
        if hanging := part.recall("running"):
            self.tests[hanging] = ["failed", "did not end, or ended the process"]

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Keep what can be told to stop."""
        self._session = session

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a file that cannot be imported."""
        if report.failed:
            self.broken[report.nodeid] = _last_lines(report)

    @pytest.hookimpl(trylast=True)  # those without the mark have been left out by then
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]):
        """Leave out what was done before."""
        done = [item for item in items if item.nodeid in self.tests]
        items[:] = [item for item in items if item.nodeid not in self.tests]
        config.hook.pytest_deselected(items=done)
        items.sort(key=_compiles)  # the long ones last
        self.waiting = len(items)
        self._long = {item.nodeid for item in items if _compiles(item)}
        self._order = [item.nodeid for item in items]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note which test runs, and how many wait."""
        self._began = time.monotonic()
        self.waiting -= 1
        # Where it hangs, if it does; anew for each test, as pytest cancels it when one fails.
        faulthandler.dump_traceback_later(max(self.part.left() - 1, 1), file=self._stderr)
        self.part.remember("unfinished", self.waiting)
        self.part.remember("running", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One of a test's phases: it has passed if none failed and none was skipped."""
        if report.passed:
            self.tests.setdefault(report.nodeid, ["passed", ""])
        else:
            self.tests[report.nodeid] = [report.outcome, _last_lines(report)]

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Keep what became of a test; stop where the next one might not end in time."""
        self._longest = max(self._longest, time.monotonic() - self._began)
        self.part.remember("tests", self.tests)
        self.part.remember("running", None)
        self.note()
        if not self.waiting:
            return
        following = self._order[-self.waiting]
        if self.part.left() < (max(self._longest, _COMPILES * (following in self._long))):
            self._session.shouldstop = "no time for another test"

    def named(self, outcome: str) -> list[str]:
        """The tests of an outcome, each with what was said."""
        chosen = {name: said for name, (found, said) in self.tests.items() if found == outcome}
        return [f"{name}: {said}" if said else name for name, said in chosen.items()]

    def note(self) -> None:
        """Note whether all tests pass, as far as they have run; a CPU's are none but failures."""
        passed, failed, skipped = (self.named(how) for how in ("passed", "failed", "skipped"))
        if self.part.device.type != "cuda" and not (passed or failed):
            return
        self.part.check("all GPU tests pass", not failed, "; ".join(failed))
        for name, count in (("passed", len(passed)), ("skipped", len(skipped))):
            self.part.figure(name, count)
        self.part.figure("not run for time", self.waiting)


def _compiles(item: pytest.Item) -> bool:
    return "compiler" in getattr(item, "fixturenames", ())


def _last_lines(report: pytest.CollectReport | pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # file, line and reason of a test that was skipped
        return report.longrepr[2]
    lines = [line.strip() for line in report.longreprtext.splitlines() if line.strip()]
    return " | ".join(lines[-_SHOWN_LINES:])


def run(part: Part) -> None:
    """Run the tests; on a GPU it is a failure if all of them are skipped."""
    watch, start = Watch(part), time.monotonic()
    flags = [*_FLAGS, f"--basetemp={part.scratch / 'pytest'}", f"--rootdir={ROOT}"]
    with contextlib.chdir(ROOT):
        code = pytest.main([*flags, str(FOLDER)], plugins=[watch])
    faulthandler.cancel_dump_traceback_later()
    part.remember("unfinished", watch.waiting)
    stopped = code == pytest.ExitCode.INTERRUPTED and watch.waiting > 0
    if not (stopped or code in _MAY_END_WITH):
        part.check("pytest runs to its end", False, f"exit code {int(code)}")
    if importlib.util.find_spec("hypothesis") is None:
        part.leave_out("GPU tests in files that import hypothesis", "it is not installed")
    if watch.broken:
        named = "; ".join(f"{name}: {said}" for name, said in watch.broken.items())
        part.check("all test files can be imported", False, named)
    seconds = (part.recall("seconds") or 0) + time.monotonic() - start
    part.remember("seconds", seconds)
    _note(part, watch, seconds)


def _note(part: Part, watch: Watch, seconds: float) -> None:
    """Figures and checks; a CPU's are none but failures."""
    passed, failed, skipped = (watch.named(how) for how in ("passed", "failed", "skipped"))
    ran = len(passed) + len(failed)
    if part.device.type != "cuda" and not ran:
        part.leave_out("GPU tests", f"no GPU here, {len(skipped)} skipped")
        return
    watch.note()
    part.check("GPU tests run", ran > 0, f"{ran} did, {len(skipped)} were skipped")
    part.figure("seconds", seconds, "s")
    if skipped:
        part.leave_out("skipped tests", "; ".join(skipped))
