"""Files that are written whole or not at all."""

import contextlib
import fcntl
import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from utils.runtime.errors import RunError

_TEMPORARY = ".tmp"


def save(path: Path, state: dict, *, flag: str = "") -> None:
    """Write a checkpoint by torch.save; RunError if that fails. See `atomic_file`."""
    with atomic_file(path, flag=flag) as file:
        torch.save(state, file)


def replace_text(path: Path, text: str, *, flag: str = "") -> None:
    """Write a text file: whole, or not at all with RunError; see `atomic_file`.

    What UTF-8 cannot hold, as in a name that is no text, is escaped.
    """
    with atomic_file(path, flag=flag) as file:
        file.write(text.encode(errors="backslashreplace"))


@contextlib.contextmanager
def atomic_file(path: Path, *, flag: str = "") -> Iterator[BinaryIO]:
    """A file to write to so that `path` is at any moment the old file or the whole new one.

    The bytes go to a temporary file in the same folder, reach the disk, and take the name in one
    step, which reaches the disk too. Whatever fails, the temporary file is gone and RunError is
    raised, which names the file and, if given, the user's flag. A process killed meanwhile leaves
    its temporary file behind: the next that writes the same file removes it, here. A link stays
    one: what it leads to is written. A pipe, a device or a folder is not replaced: RunError.
    """
    what = f"{flag} {path}".strip()
    path = Path(os.path.realpath(path))
    if os.path.exists(path) and not path.is_file():
        raise RunError(f"{what} could not be written: not a regular file")
    remove_temporaries(path.parent, of=glob.escape(path.name))
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with _open_held(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # before the lock is given back
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise RunError(f"{what} could not be written: {_reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, *, of: str = "*") -> None:
    """Remove what processes that were killed while they wrote files `of` this name have left.

    What a process still holds stays, and everything where there are no locks.
    """
    for path in folder.glob(f".{of}.*{_TEMPORARY}"):
        if path.is_symlink() or not path.is_file():  # none of ours; a pipe would be waited for
            continue
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _open_held(path: Path) -> BinaryIO:
    """An empty file that this process holds by a record lock until it closes it, or ends.

    Whoever had it before may have renamed or removed it before it was held: then once more.
    """
    while True:
        file = open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb")  # noqa: SIM115
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate()
                return file
        file.close()


def _flush_folder(path: Path) -> None:
    """Have the names in a folder reach the disk."""
    folder = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some network file systems cannot
        os.fsync(folder)
    os.close(folder)


def _reason(error: BaseException | None) -> str:
    """The system's words for what went wrong, also where torch.save has wrapped its error."""
    text = (str(error).splitlines() or ["unknown"])[0]
    while error:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        error = error.__cause__ or error.__context__
    return text


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
