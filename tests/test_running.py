"""How a script ends: exit codes, errors in one line, signals."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from utils.runtime import script, workers
from utils.runtime.errors import InputError, RunError


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
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), 1, "smaller --batch"),
        (
            RuntimeError("pool_cuda does not have a deterministic implementation, but you set 'x'"),
            1,
            "error: --deterministic: pool_cuda does not have a deterministic implementation; only",
        ),
        (OSError(28, "No space left on device", "x.pth"), 1, "error: x.pth: No space left"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (InputError("data a\nb\x1b[2J\udcff: é"), 2, r"error: data a\nb\x1b[2J\xff: é"),
        (RunError("a\u2028b"), 1, r"error: a\u2028b"),
        (OSError(5, "Input/output error", "a\nb"), 1, r"error: a\nb: Input/output error"),
    ],
)
def test_exit_codes(capsys, error, code, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit_code:
        script.run_script(main)
    assert exit_code.value.code == code
    printed = capsys.readouterr().err
    assert words in printed and "Traceback" not in printed


def test_what_the_console_cannot_show_is_escaped():
    """Characters that it does not know, bytes that are no text."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from utils.runtime import script\n"
    code += r"script.run_script(lambda: print('\u2713 \xe9 \udcff'))"
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"\\u2713 \xe9 \\udcff\n"


def test_streams_that_are_no_files(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # closed
    with pytest.raises(SystemExit) as end:
        script.run_script(lambda: None)
    assert end.value.code == 0


def test_other_errors_keep_their_traceback():
    def main():
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        script.run_script(main)


@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGUSR2", 75), ("SIGINT", 130)]
)
def test_a_signal_ends_a_script_in_one_line(monkeypatch, capsys, name, code):
    """While it has nothing to save; another one, as it ends, changes nothing."""
    monkeypatch.setattr(sys, "argv", ["dir/script.py"])
    with pytest.raises(SystemExit) as stop:
        script.run_script(lambda: os.kill(os.getpid(), getattr(signal, name)))
    assert stop.value.code == code
    assert capsys.readouterr().err == f"script.py: stopped by {name}\n"
    os.kill(os.getpid(), signal.SIGTERM)


def test_after_an_error_no_other_child_of_the_process_raises(monkeypatch):
    """As torch does for a killed worker each time that a child ends."""

    def fail(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(script, "forget_workers", workers.forget_workers)
    monkeypatch.setattr(sys, "argv", ["dir/script.py"])
    before = signal.signal(signal.SIGCHLD, fail)
    try:
        with pytest.raises(SystemExit) as stop:
            script.run_script(fail)
        subprocess.run(["true"], check=True)  # its end is a SIGCHLD
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert stop.value.code == 1


# What torchrun leaves; that it is followed when it is killed is in `test_distributed`.


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """As torchrun makes it for two processes; this one has rank 0."""
    for rank in "01":
        (tmp_path / "torchelastic_x" / "none_y" / "attempt_0" / rank).mkdir(parents=True)
    attempt = tmp_path / "torchelastic_x" / "none_y" / "attempt_0"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(attempt / "0" / "error.json"))
    monkeypatch.setattr(script, "_end_with", lambda torchrun: None)
    return attempt


def test_the_last_process_removes_what_all_share(folder, tmp_path, monkeypatch):
    script.follow_torchrun()
    assert [path.name for path in folder.iterdir()] == ["1"]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "1" / "error.json"))
    script.follow_torchrun()
    assert not list(tmp_path.iterdir())
    script.follow_torchrun()


def test_logs_stay(folder):
    (folder / "0" / "stderr.log").touch()
    script.follow_torchrun()
    assert (folder / "0" / "stderr.log").exists()


def test_a_folder_of_the_user_stays(folder, tmp_path, monkeypatch):
    own = (tmp_path / "torchelastic_x").rename(tmp_path / "logs")
    file = own / "none_y" / "attempt_0" / "0" / "error.json"
    for text in (str(file), "", "error.json"):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", text)
        script.follow_torchrun()
    assert file.parent.exists()
