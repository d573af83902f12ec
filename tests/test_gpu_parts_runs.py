"""Parts of `tests/gpu.py` that start other things: the GPU tests, killed runs, CIFAR-10."""

import json
import multiprocessing
import subprocess
import sys
import time

import logs
import pytest
import reliability
import torch
from gpu_parts import cifar, suite, survival
from gpu_parts.part import RECORD, Part

from utils.method import checkpoint
from utils.runtime import files

GPU_TESTS = """
import time

import pytest

pytestmark = pytest.mark.gpu


def test_good():
    pass


@pytest.mark.skip(reason="needs two GPUs")
def test_left_out():
    pass


def test_bad():
    assert 1 + 1 == 3


def test_hangs():
    time.sleep({seconds})


def test_last():
    pass
"""

FOUR_TESTS = """
import pytest


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(4))
def test_one(number):
    pass


def test_for_any_machine():
    assert False
"""


def make_part(folder, *, seconds=60.0, tiny=True, device="cpu"):
    (folder / "out").mkdir(exist_ok=True)
    part = Part(scratch=folder, out=folder / "out", seconds=seconds, data=None, tiny=tiny)
    part.device = torch.device(device)
    return part


def record(folder):
    return json.loads((folder / RECORD).read_text())


def checks(folder):
    return {check["name"]: check["holds"] for check in record(folder)["checks"]}


def run_suite(folder, *, device="cuda", seconds=60.0, killed_in=None):
    """Run the part in a process of its own; killed_in: a test during which that is killed."""

    def child():
        suite.run(make_part(folder, device=device, seconds=seconds))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    while killed_in and process.is_alive():
        if (folder / RECORD).exists() and killed_in in str(record(folder)["memory"].get("running")):
            process.kill()
        time.sleep(0.05)
    process.join(60)
    assert process.exitcode is not None


@pytest.fixture
def gpu_tests(tmp_path, monkeypatch):
    """A folder of tests to run; what writes tests/test_it.py anew."""
    folder = tmp_path / "tests"
    folder.mkdir()
    monkeypatch.setattr(suite, "FOLDER", folder)

    def write(text):
        (folder / "test_it.py").write_text(text)

    return write


def test_what_gpu_tests_came_to_outlives_one_that_hangs(gpu_tests, tmp_path):
    gpu_tests(GPU_TESTS.format(seconds=100))
    (tmp_path / "tests" / "test_broken.py").write_text("import no_such_module")
    run_suite(tmp_path, killed_in="::test_hangs")
    memory = record(tmp_path)["memory"]
    outcomes = {name.split("::")[1]: found for name, (found, _) in memory["tests"].items()}
    assert outcomes == {"test_good": "passed", "test_left_out": "skipped", "test_bad": "failed"}
    assert memory["running"].endswith("::test_hangs") and memory["unfinished"] == 1
    assert checks(tmp_path) == {"all GPU tests pass": False}

    gpu_tests(
        GPU_TESTS.format(seconds=0).replace("assert 1 + 1 == 3", "pass")
    )  # nothing is run twice
    run_suite(tmp_path)
    found = record(tmp_path)
    said = {check["name"]: check["said"] for check in found["checks"] if not check["holds"]}
    assert said.keys() == {"all GPU tests pass", "all test files can be imported"}
    bad, hangs = said["all GPU tests pass"].split("; ")
    assert "::test_bad: " in bad and "assert (1 + 1) == 3" in bad
    assert "::test_hangs: did not end" in hangs
    assert "test_broken.py" in said["all test files can be imported"]
    assert "no_such_module" in said["all test files can be imported"]
    figures = {figure["name"]: figure["value"] for figure in found["figures"]}
    assert (figures["passed"], figures["skipped"], figures["not run for time"]) == (2, 1, 0)
    assert "needs two GPUs" in found["left_out"][0]["why"]
    assert found["memory"]["unfinished"] == 0


def test_gpu_tests_stop_between_two_when_little_time_is_left(gpu_tests, tmp_path):
    gpu_tests(FOUR_TESTS)
    for waiting in (3, 2):
        run_suite(tmp_path, seconds=suite._ENOUGH / 2)
        assert record(tmp_path)["memory"]["unfinished"] == waiting
    assert checks(tmp_path) == {"all GPU tests pass": True, "GPU tests run": True}


COMPILING_TESTS = """
import pytest
import time

pytestmark = pytest.mark.gpu


@pytest.fixture
def compiler():
    pass


def test_compiles(compiler):
    pass


def test_first():
    pass


def test_hangs():
    time.sleep({seconds})
"""


def test_gpu_tests_that_compile_come_last_and_are_not_begun_late(gpu_tests, tmp_path):
    gpu_tests(COMPILING_TESTS.format(seconds=0))
    run_suite(tmp_path, seconds=suite._COMPILES)  # a little less, once pytest has begun
    memory = record(tmp_path)["memory"]
    assert [name.split("::")[1] for name in memory["tests"]] == ["test_first", "test_hangs"]
    assert memory["unfinished"] == 1
    run_suite(tmp_path, seconds=2 * suite._COMPILES)
    assert record(tmp_path)["memory"]["unfinished"] == 0


def test_it_is_told_where_a_gpu_test_hangs(gpu_tests, tmp_path, capfd):
    gpu_tests(COMPILING_TESTS.format(seconds=4))
    run_suite(tmp_path, seconds=suite._ENOUGH)  # so the test is not begun with less
    assert "in test_hangs" not in capfd.readouterr().err
    gpu_tests(COMPILING_TESTS.format(seconds=4).replace("def test_first", "def not_a_test"))
    other = tmp_path / "other"
    other.mkdir()
    run_suite(other, seconds=2)
    assert "in test_hangs" in capfd.readouterr().err


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_gpu_tests_that_are_all_skipped_are_a_failure_on_a_gpu(gpu_tests, tmp_path, device):
    gpu_tests("import pytest\n\n\n@pytest.mark.gpu\ndef test_one():\n    pytest.skip('none')\n")
    run_suite(tmp_path, device=device)
    found = record(tmp_path)
    if device == "cuda":
        assert checks(tmp_path)["GPU tests run"] is False
    else:
        assert not (found["checks"] or found["figures"]) and len(found["left_out"]) == 1


@pytest.fixture
def lab(tmp_path):
    return survival.Lab(make_part(tmp_path, seconds=20), tmp_path, tmp_path)


def test_runs_that_end_otherwise_or_not_in_time_are_told_apart(lab, tmp_path, monkeypatch):
    def started(code):
        (tmp_path / "a.err").write_text("first\nthe reason\n")
        return subprocess.Popen([sys.executable, "-c", code])

    lab.end(started("raise SystemExit(75)"), tmp_path / "a", code=75)
    with pytest.raises(RuntimeError, match="exit code 1, not 0: the reason"):
        lab.end(started("raise SystemExit(1)"), tmp_path / "a", code=0)
    monkeypatch.setattr(lab.part, "left", lambda: survival._MARGIN + 0.5)
    sleeps = started("import time; time.sleep(60)")
    with pytest.raises(survival.NoTime):
        lab.end(sleeps, tmp_path / "a", code=0)
    assert sleeps.poll() is not None
    with pytest.raises(survival.NoTime):
        lab.start(survival.SETTINGS[0], tmp_path / "a")


def finished_run(folder, *, lr=0.5, **weights):
    """A folder as a finished run leaves it, as far as it is compared."""
    logs.write(folder, [logs.record(1, 2, lr=lr, seconds=time.monotonic())])
    path = folder / f"ckpt_epoch_{reliability.EPOCHS}.pth"
    files.save(path, {"format": checkpoint.FORMAT, "epoch": 3, "state_dict": weights})
    return folder


def test_runs_are_compared_by_all_tensors_and_figures(tmp_path):
    one, two = torch.ones(3), torch.full((2,), 2.0)
    whole = finished_run(tmp_path / "a", a=one, b=two)
    assert survival.differing(whole, finished_run(tmp_path / "b", a=one, b=two)) == ""
    other = finished_run(tmp_path / "c", a=one, b=two, lr=0.25)
    assert survival.differing(whole, other) == "logged figures"
    other = finished_run(tmp_path / "d", a=one, b=two + 2**-20)
    assert survival.differing(whole, other) == "1 of 2 tensors, /state_dict/b the first"


def test_what_is_not_finite_is_found_in_checkpoints(tmp_path):
    folder = finished_run(tmp_path / "a", a=torch.ones(2))
    assert survival.kept(folder) == (1, [])
    torch.save({"rows": torch.tensor([1.0, torch.inf])}, folder / "ckpt_epoch_9.pth")
    assert survival.kept(folder) == (2, ["ckpt_epoch_9.pth: /rows"])


@pytest.mark.parametrize(
    ("left", "methods", "expected"),
    [
        # 100 s less a start of 20 and 35 after it: 45 s, 11 epochs of 4 s; for two of them 50 s
        # each, which does not last for one.
        (100, 1, 11),
        (100, 2, 0),
        (55 + 4, 1, 1),
        (55 + 3.9, 1, 0),
        (20, 1, 0),
        (2 * 55 + 8 * 40, 2, 40),
        (55 + 4 * 200, 1, 200),
        (10_000, 1, 200),
    ],
)
def test_epochs_that_fit(left, methods, expected):
    times = {"epoch": 4, "start": 20, "reserve": 35}
    assert cifar.epochs_that_fit(left, **times, methods=methods) == expected


def test_a_second_method_is_trained_where_both_have_enough_epochs():
    times = {"epoch": 4, "start": 20, "reserve": 35, "most": 200, "least_of_two": 40}
    assert cifar.plan(2 * (55 + 160), **times) == (2, 40)
    assert cifar.plan(2 * (55 + 160) - 1, **times) == (1, 93)  # 374 s of 4 s
    assert cifar.plan(30, **times) == (1, 0)


def test_speed_of_a_run():
    """Epochs end 34 s and 38 s after the run's begin, 50 s after the command all is over."""
    lines = [
        logs.record(e, 195, seconds=s, images_per_s=r) for e, s, r in ((1, 34, 9), (2, 38, 12))
    ]
    speed = cifar.speed_of(50, lines)
    assert speed == (12, 4, 42, 30)
    assert speed.again == pytest.approx(42 - 22.5)
    assert speed.all_epochs == 42 + 800


def test_goals_are_those_of_the_whole_of_cifar(tmp_path):
    part = make_part(tmp_path, tiny=False)
    for name, count in (("whole", cifar.CIFAR), ("less", 200)):
        about = logs.start(counts={"train": count})
        folder = logs.write(tmp_path / name, [], starts=[about])
        cifar._figure_of_cifar(part, folder, name, 86.5, "%", at_least=87)
    reached = {figure["name"]: figure.get("reached") for figure in record(tmp_path)["figures"]}
    assert reached == {"whole": False, "less": None}


@pytest.mark.slow
def test_a_training_that_does_not_end_in_time_is_stopped_and_evaluated(tmp_path):
    part = make_part(tmp_path, seconds=300)
    data = cifar.subset(part.images(), tmp_path / "images", train=20, val=10)
    bench = cifar.Bench(part, data)
    run = tmp_path / "run"
    part.left = lambda: 1.0 if reliability.count_lines(run) else 100.0  # after the first epoch
    ended = bench.train("2Q", run, epochs=10**6, until=2)
    assert ended.code == 75 and "SIGTERM after epoch" in ended.said
    (weights,) = cifar.checkpoints_in(run)
    assert "_step_" in weights.name
    part.left = lambda: 100.0
    ended, found = bench.evaluate(weights, tmp_path / "knn")
    assert ended.code == 0 and {"1", "20", "200"} <= found.keys()


@pytest.mark.slow
@pytest.mark.parametrize("module", [survival, cifar])
def test_parts_at_toy_sizes(tmp_path, module):
    module.run(make_part(tmp_path, seconds=300))
    found = record(tmp_path)
    assert len(found["checks"]) >= 5 and all(check["holds"] for check in found["checks"])
