"""Files are written whole or not at all, whatever happens meanwhile."""

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


def test_what_a_killed_process_left_is_removed_and_what_one_writes_is_not(tmp_path):
    path = tmp_path / "features.npz"
    left, of_another = tmp_path / ".features.npz.1.tmp", tmp_path / ".labels.npz.1.tmp"
    for old in (left, of_another):
        old.touch()
        os.utime(old, (0, 0))
    with files.atomic_file(path) as file:
        file.write(b"half")
        (held,) = set(tmp_path.iterdir()) - {left, of_another}
        assert not left.exists()
        files.replace_text(path, "new")
        assert path.read_bytes() == b"new" and {held, of_another} <= set(tmp_path.iterdir())
        file.write(b" and whole")
    assert path.read_bytes() == b"half and whole"
    assert set(tmp_path.iterdir()) == {path, of_another}
    files.remove_temporaries(tmp_path, of="*")
    assert os.listdir(tmp_path) == [path.name]


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
