"""Files that are written whole or not at all."""

import contextlib
import glob
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from utils.runtime.errors import RunError

_TEMPORARY = ".tmp"
_LEFT = 3600  # seconds without a byte after which nobody is still writing


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
    raised, which names the file and, if given, the user's flag. A link stays one: what it leads to
    is written. A pipe, a device or a folder is not replaced: RunError.
    """
    what = f"{flag} {path}".strip()
    path = Path(os.path.realpath(path))
    if os.path.exists(path) and not path.is_file():
        raise RunError(f"{what} could not be written: not a regular file")
    remove_temporaries(path.parent, of=glob.escape(path.name), unchanged=_LEFT)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:
        raise RunError(f"{what} could not be written: {_reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, *, of: str, unchanged: float = 0) -> None:
    """Remove what killed processes have left of files `of` this name, a pattern.

    unchanged: only what nobody has written to for so many seconds, where others may be writing.
    """
    for path in folder.glob(f".{of}.*{_TEMPORARY}"):
        with contextlib.suppress(OSError):
            if path.is_file() and time.time() - path.lstat().st_mtime >= unchanged:
                path.unlink()


def _reason(error: BaseException) -> str:
    """The system's words for what went wrong, also where torch.save has wrapped its error."""
    cause = error
    while cause and not (isinstance(cause, OSError) and cause.strerror):
        cause = cause.__cause__ or cause.__context__
    return cause.strerror if cause else (str(error).splitlines() or ["unknown"])[0]


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
