"""Worker processes: signals pass them by, they end with the main process, a dead one is a line.

Whatever ends them and the main process, nothing stays in the temporary folder.
"""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, start_method, write_image
from tiny import FLAGS

from utils.runtime.workers import worker_failure

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc"),
    pytest.mark.usefixtures("temporary"),
]
SCRIPT = "self_supervised/train_msf_2q.py"
# Reads a folder with two workers, prints their numbers and does what it is told in the middle.
# `keep` has the loader live until the interpreter ends.
READER = """
import os, signal, sys, time
from pathlib import Path
from utils.runtime import script
from utils.data.datasets import read_image_folder
from torch.utils.data import _utils
from utils.data.train_loader import TwoViewLoader

_utils.worker.MP_STATUS_CHECK_INTERVAL = 1  # seconds until a worker misses its main process, not 5
keep = []

def main():
    images = read_image_folder(Path(sys.argv[1]))
    loader = TwoViewLoader(images, batch_size=4, image_size=16, num_workers=2)
    epoch = loader.epoch(1)
    keep.extend([loader, epoch])
    next(epoch), next(epoch)  # one of each worker: both heed signals from here on
    print(*(worker.pid for worker in loader._loader._iterator._workers), flush=True)
    exec(sys.argv[2])
    print(sum(1 for _ in epoch), flush=True)

script.run_script(main)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for number in range(60):
        write_image(root / f"{number:02}.jpg", seed=number)
    return root


def start(*command, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read(folder, deed):
    """Start READER: the process and its workers' numbers."""
    process = start(sys.executable, "-c", READER, folder, deed)
    return process, [int(number) for number in process.stdout.readline().split()]


def finish(process, *, within=30):
    """Exit code, stdout and stderr of a process that has to end by itself."""
    try:
        stdout, stderr = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, stdout, stderr


def assert_gone(workers, *, within):
    deadline = time.monotonic() + within
    while left := [number for number in workers if Path(f"/proc/{number}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def assert_one_line(code, stderr, *words):
    assert code == 1, stderr
    assert stderr.count("\n") == 1 and "Traceback" not in stderr, stderr
    for word in words:
        assert word in stderr, stderr


def test_signals_pass_workers_by(folder):
    """Those of a cluster, from outside; the epoch then ends as if nothing had been."""
    process, workers = read(folder, "sys.stdin.readline()")
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(worker, number)
    time.sleep(0.3)
    code, stdout, stderr = finish_after_line(process)
    assert (code, stdout, stderr) == (0, "13\n", "")
    assert_gone(workers, within=1)


def finish_after_line(process):
    process.stdin.write("go on\n")
    process.stdin.flush()
    return finish(process)


@pytest.mark.parametrize(
    ("deed", "expected"),
    [
        ("sys.exit(3)", 3),
        ("raise ValueError('a mistake')", 1),
    ],
)
def test_workers_end_with_the_main_process(folder, deed, expected):
    process, workers = read(folder, deed)
    begin = time.monotonic()
    assert len(workers) == 2
    assert finish(process)[0] == expected
    assert_gone(workers, within=1)
    assert time.monotonic() - begin < 15


def test_workers_end_when_the_main_process_is_killed(folder, temporary):
    process, workers = read(folder, "sys.stdin.readline(); os.kill(os.getpid(), signal.SIGKILL)")
    assert len(list(temporary.glob("pymp-*"))) == 1  # that of all; the last worker removes it
    process.stdin.write("go on\n")
    process.stdin.flush()
    process.wait(timeout=30)  # its pipes stay open as long as a worker lives
    assert process.returncode == -signal.SIGKILL
    assert_gone(workers, within=20)
    assert process.communicate()[1] == ""


def children(process):
    return [
        int(number)
        for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def test_a_worker_killed_while_the_main_process_is_elsewhere(folder):
    process, workers = read(folder, "time.sleep(100)")
    os.kill(workers[1], signal.SIGKILL)
    code, _, stderr = finish(process, within=30)
    assert_one_line(code, stderr, f"worker (pid {workers[1]})", "Killed", "--num_workers")
    assert_gone(workers, within=1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("told", "expected"),
    [(None, 0), (signal.SIGTERM, 75), (signal.SIGINT, 130), ("--weights", 2), ("--topk", 2)],
)
def test_a_training_run_leaves_nothing(image_tree, tmp_path, workers, told, expected):
    """As the fixture `temporary` checks; of torch's compiler cache too."""
    flags = (*FLAGS, "--num_workers", workers, "--print_freq", 3, "--checkpoint_path", tmp_path)
    wrong = (told, "no/such") if isinstance(told, str) else ()
    epochs = 10_000 if isinstance(told, signal.Signals) else 1
    process = start(sys.executable, SCRIPT, *flags, "--epochs", epochs, *wrong, image_tree)
    if isinstance(told, signal.Signals):
        while "epoch 2" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        process.send_signal(told)
    code, _, stderr = finish(process, within=60)
    assert (code, stderr.count("\n")) == (expected, int(expected != 0)), stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("self_supervised/train_msf_km.py", ("--epochs", 1, "--bad_images", "skip", "--symmetric")),
        (SCRIPT, ("--epochs", 1, "--cache_images", "ram", "--cache_size", 20)),
        ("eval/eval_linear.py", ("--epochs", 1, "--weights", "random")),
    ],
)
def test_workers_that_are_not_forked(image_tree, tmp_path, script, flags, method):
    """Python 3.14 starts them by a server; macOS anew."""
    flags += FLAGS if "train" in script else FLAGS[:6]
    flags += () if "eval" in script else ("--checkpoint_path", tmp_path / "run")
    site = start_method(tmp_path / "site", method)
    process = start(sys.executable, script, *flags, "--num_workers", 2, image_tree, **site)
    code, _, stderr = finish(process, within=300)
    assert (code, stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_script_without_a_guard_is_told_so(image_tree, tmp_path, method):
    """Instead of a second run in the folder of the first, in each worker."""
    text = (ROOT / SCRIPT).read_text().replace('if __name__ == "__main__":', "if True:")
    script = tmp_path / "mine" / "script.py"
    script.parent.mkdir()
    script.write_text(text)
    (tmp_path / "utils").symlink_to(ROOT / "utils")
    flags = (*FLAGS, "--num_workers", 2, "--checkpoint_path", tmp_path / "run")
    site = start_method(tmp_path / "site", method)
    process = start(sys.executable, script, *flags, image_tree, **site)
    code, _, stderr = finish(process, within=120)
    assert code == 1 and "Traceback" not in stderr, stderr
    assert 'worker processes cannot start without an `if __name__ == "__main__":` guard' in stderr
    assert not list((tmp_path / "run").glob("earlier*"))


def test_a_worker_killed_in_a_training_run(image_tree, tmp_path):
    flags = (*FLAGS, "--num_workers", 2, "--epochs", 10_000, "--print_freq", 3)
    process = start(sys.executable, SCRIPT, *flags, "--checkpoint_path", tmp_path, image_tree)
    while "epoch 2" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    workers = children(process)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    code, _, stderr = finish(process)
    assert_one_line(code, stderr, f"worker (pid {workers[0]})", "Killed", "--num_workers")
    assert_gone(workers, within=1)


@pytest.mark.parametrize("size", ["64k", pytest.param("4k", marks=pytest.mark.slow)])
def test_shared_memory_that_is_too_small(image_tree, tmp_path, size):
    """A /dev/shm of its own; the smaller one does not even let workers start."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    try:
        subprocess.run(["unshare", "-m", "sh", "-c", mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount")
    flags = (*FLAGS, "--num_workers", 2, "--checkpoint_path", tmp_path, "--image_size", 64)
    command = [sys.executable, SCRIPT, *flags, image_tree]
    process = start("unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *command)
    code, _, stderr = finish(process)
    assert_one_line(code, stderr, "shared memory", "--num_workers", "/dev/shm")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError(
                "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible"
            ),
            "DataLoader worker (pid 12) is killed by signal: Bus error: try fewer --num_workers",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"),
            "(pid(s) 12, 13) exited",
        ),
        (RuntimeError("Pin memory thread exited unexpectedly"), "--num_workers"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (
            RuntimeError(
                "unable to open shared memory object </torch_1> in read-write mode: "
                "Permission denied (13)"
            ),
            "Permission denied (13): try fewer --num_workers (0: none)",
        ),
        (
            MemoryError("Caught MemoryError in DataLoader worker process 0.\nTraceback\nx: full"),
            "a worker process failed: x: full; try fewer --num_workers",
        ),
        (
            RuntimeError(
                "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback\n"
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            ),
            "you tried to allocate 9 bytes; try",
        ),
        (
            OSError("Caught OSError in DataLoader worker process 0.\nTrace\nOSError: no disk\n"),
            "a worker process failed: OSError: no disk; try",
        ),
    ],
)
def test_what_torch_says_of_workers(error, words):
    line = worker_failure(error)
    assert "\n" not in line and words in line


class Ended:
    """A worker process that has ended."""

    pid = 12

    def __init__(self, exitcode):
        self.exitcode = exitcode


@pytest.mark.parametrize(
    "error", [RuntimeError("worker (pid(s) 12) exited unexpectedly"), ConnectionResetError()]
)
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (1, "worker (pid 12) ended with exit code 1, what it printed"),
        (-signal.SIGKILL, "worker (pid 12) was killed by signal Killed: try fewer --num_workers"),
    ],
)
def test_an_exit_code_tells_more_than_the_error(error, code, words):
    assert words in worker_failure(error, [Ended(None), Ended(0), Ended(code)])


def test_a_system_that_starts_no_worker_is_quoted():
    line = worker_failure(OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), "/some/place"), [])
    assert line.startswith("worker processes cannot run (/some/place: Resource temporarily unava")
    assert "--num_workers" in line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory"),
        RuntimeError("can't allocate memory: you tried 9 bytes"),
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTrace\nshapes differ"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_other_errors_are_no_failure_of_a_worker(error):
    assert worker_failure(error) is None
