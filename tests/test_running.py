"""How a script ends: exit codes, errors in one line, signals."""

import os
import signal
import subprocess
import sys

import pytest

from utils import running, workers
from utils.errors import InputError, RunError


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("--topk 0: too few"), 2, "error: --topk 0: too few"),
        (RunError("the loss is nan"), 1, "error: the loss is nan"),
        (RuntimeError("[enforce fail] can't allocate memory: you tried 9 bytes\nmore"), 1, "alloc"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            1,
            "--num_workers",
        ),
        (MemoryError(), 1, "no memory left"),
        (OSError(28, "No space left on device", "x.pth"), 1, "error: x.pth: No space left"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(capsys, error, code, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit_code:
        running.run_script(main)
    assert exit_code.value.code == code
    printed = capsys.readouterr().err
    assert words in printed and "Traceback" not in printed


def test_other_errors_keep_their_traceback():
    def main():
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        running.run_script(main)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_ends_a_script_in_one_line(monkeypatch, capsys, name):
    """While it has nothing to save; another one, as it ends, changes nothing."""
    monkeypatch.setattr(sys, "argv", ["dir/script.py"])
    with pytest.raises(SystemExit) as stop:
        running.run_script(lambda: os.kill(os.getpid(), getattr(signal, name)))
    assert stop.value.code == 75
    assert capsys.readouterr().err == f"script.py: stopped by {name}\n"
    os.kill(os.getpid(), signal.SIGTERM)


def test_after_an_error_no_other_child_of_the_process_raises(monkeypatch):
    """As torch does for a killed worker each time that a child ends."""

    def fail(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(running, "forget_workers", workers.forget_workers)
    monkeypatch.setattr(sys, "argv", ["dir/script.py"])
    before = signal.signal(signal.SIGCHLD, fail)
    try:
        with pytest.raises(SystemExit) as stop:
            running.run_script(fail)
        subprocess.run(["true"], check=True)  # its end is a SIGCHLD
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert stop.value.code == 1
