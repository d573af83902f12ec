"""Files are written whole or not at all, whatever happens meanwhile."""

import contextlib
import errno
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from utils.method import checkpoint
from utils.runtime import files
from utils.runtime.errors import RunError


def test_failed_save_keeps_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "file.pth"
    files.save(path, {"epoch": 1})

    def disk_full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(RunError, match="file.pth could not be written: No space left on device"):
        files.save(path, {"epoch": 2})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["file.pth"]
    assert checkpoint.load(path, flag="--resume") == {"epoch": 1}


def test_file_size_limit_while_saving(tmp_path):
    """The system refuses bytes in the middle of torch.save, in a process of its own."""
    code = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from utils.method import checkpoint; from utils.runtime import files\n"
        "from utils.runtime.errors import RunError\n"
        "path = Path(sys.argv[1]); files.save(path, {'epoch': 1})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "try: files.save(path, {'a': torch.ones(1_000_000)})\n"
        "except RunError as error: print(error)\n"
        "print(checkpoint.load(path, flag='--resume'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "file.pth"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.splitlines() == [
        f"{tmp_path / 'file.pth'} could not be written: File too large",
        "{'epoch': 1}",
    ]
    assert not done.stderr and os.listdir(tmp_path) == ["file.pth"]


def test_sha256(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert files.sha256(path).startswith("ba7816bf8f01cfea414140de5dae2223")


# Writes half a file, says so, and waits to be killed or, by a line, to be let go on.
HALF = """
import sys
from pathlib import Path
from utils.runtime import files
with files.atomic_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("half", flush=True)
    sys.stdin.readline()
    file.write(b" and whole")
"""


@contextlib.contextmanager
def half_written(path):
    """A process that has written half of a file."""
    process = subprocess.Popen(
        [sys.executable, "-c", HALF, path],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "half\n"
        yield process
        process.kill()


def test_what_a_killed_process_left_is_removed_and_what_one_writes_is_not(tmp_path):
    path = tmp_path / "features.npz"
    path.write_bytes(b"old")
    with half_written(path) as killed:
        killed.kill()
    (left,) = set(os.listdir(tmp_path)) - {path.name}
    assert left == f".features.npz.{killed.pid}.tmp" and path.read_bytes() == b"old"
    of_another = tmp_path / f".labels.npz.{killed.pid}.tmp"
    of_another.touch()
    with half_written(path) as alive:
        held = tmp_path / f".features.npz.{alive.pid}.tmp"
        assert set(tmp_path.iterdir()) == {path, held, of_another}  # it has removed what was left
        files.replace_text(path, "new")
        assert path.read_bytes() == b"new" and of_another.exists()
        files.remove_temporaries(tmp_path)
        assert set(tmp_path.iterdir()) == {path, held}
        alive.communicate("go on\n")
    assert path.read_bytes() == b"half and whole" and os.listdir(tmp_path) == [path.name]


def test_a_file_that_was_removed_before_it_was_held_is_made_anew(tmp_path, monkeypatch):
    """Another process may take it for left between the two steps."""
    path, real, calls = tmp_path / "x", files.fcntl.lockf, []

    def removed_first(file, *flags):
        calls.append(file)
        if len(calls) == 1:
            (temporary,) = tmp_path.glob(".x.*")
            temporary.unlink()
        return real(file, *flags)

    monkeypatch.setattr(files.fcntl, "lockf", removed_first)
    files.replace_text(path, "whole")
    assert path.read_text() == "whole" and len(calls) == 2


def test_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    there, to_come = tmp_path / "there.pth", tmp_path / "to_come.pth"
    for link in (there, to_come):
        link.symlink_to(Path("disk") / link.name)
    (tmp_path / "disk" / "there.pth").write_bytes(b"old")
    for link in (there, to_come):
        files.save(link, {"epoch": 7})
        assert link.is_symlink() and not (tmp_path / "disk" / link.name).is_symlink()
        assert checkpoint.load(tmp_path / "disk" / link.name, flag="x")["epoch"] == 7
    assert sorted(os.listdir(tmp_path / "disk")) == ["there.pth", "to_come.pth"]
    assert sorted(os.listdir(tmp_path)) == ["disk", "there.pth", "to_come.pth"]


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "folder", "link"):
        expected = f"--save {tmp_path / name} could not be written: not a regular file"
        with pytest.raises(RunError, match=f"^{re.escape(expected)}$"):
            files.replace_text(tmp_path / name, "x", flag="--save")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe"]
