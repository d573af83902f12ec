"""Files: written whole or not at all, and sealed; see `save`."""

import contextlib
import fcntl
import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from utils.runtime.errors import RunError

_SEAL = b"cmsf sha256 "
_SEAL_SIZE = len(_SEAL) + 2 * hashlib.sha256().digest_size
_TEMPORARY = ".tmp"


class _Sealing:
    """A file for torch.save to write to that hashes what passes and ends in the seal."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._held = b""  # the last two bytes: at the end the archive's length of comment, 0

    def write(self, data: bytes | memoryview) -> int:
        """Write all but the last two bytes so far."""
        view = memoryview(data).cast("B")
        if len(view) < 2:
            view = memoryview(self._held + bytes(view))
        else:
            self._pass_on(self._held)
        self._pass_on(view[:-2])
        self._held = bytes(view[-2:])
        return len(data)

    def seal(self) -> None:
        """End the archive with the comment that seals it."""
        assert self._held == b"\0\0", "torch.save wrote no zip archive"
        self._pass_on(_SEAL_SIZE.to_bytes(2, "little"))
        self._file.write(_SEAL + self._digest.hexdigest().encode())

    def flush(self) -> None:
        """Nothing is kept back here that could be flushed."""

    def _pass_on(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)


def save(path: Path, state: dict, *, flag: str = "") -> None:
    """Write a sealed checkpoint; RunError if that fails. See `atomic_file`."""
    with atomic_file(path, flag=flag) as file:
        sealing = _Sealing(file)
        torch.save(state, sealing)
        sealing.seal()


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
    name = re.escape(path.name)
    _remove_abandoned(path.parent, re.compile(rf"\.{name}\.\d+{re.escape(_TEMPORARY)}"))
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with _open_held(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # before the lock is given back
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{what} could not be written: {_reason(error)}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str, *, flag: str = "") -> None:
    """Write a text file as `save` writes a checkpoint: whole, or not at all with RunError.

    What UTF-8 cannot hold, as in a name that is no text, is escaped.
    """
    with atomic_file(path, flag=flag) as file:
        file.write(text.encode(errors="backslashreplace"))


def remove_temporaries(folder: Path) -> None:
    """Remove what processes that were killed while they wrote to this folder have left."""
    _remove_abandoned(folder, re.compile(rf"\..*{re.escape(_TEMPORARY)}", re.DOTALL))


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


def _remove_abandoned(folder: Path, names: re.Pattern[str]) -> None:
    """Remove the files of these names that no process holds; none where there are no locks."""
    with contextlib.suppress(OSError):  # no such folder: whoever writes to it will say so
        for entry in os.scandir(folder):
            if not names.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError), open(entry.path, "r+b") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry.path)


def _flush_folder(path: Path) -> None:
    """Have the names in a folder reach the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(folder)
    finally:
        os.close(folder)


def _reason(error: BaseException) -> str:
    """The system's words for what went wrong, also where torch.save has wrapped its error."""
    while error:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        text, error = str(error), error.__cause__ or error.__context__
    return (text.splitlines() or ["unknown"])[0]


def is_intact(path: str | Path) -> bool:
    """Whether a file is sealed; ValueError if it is and the seal, or else a checksum, is wrong."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _SEAL_SIZE))
        seal = file.read()
        if seal.startswith(_SEAL):
            if seal != _SEAL + _sha256_of_first(size - _SEAL_SIZE, file):
                raise ValueError("damaged: its bytes are not those that were sealed")
            return True
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"damaged: wrong checksum of {broken}")
    return False


def _sha256_of_first(count: int, file: BinaryIO) -> bytes:
    """Hexadecimal SHA-256 of the first `count` bytes of a file."""
    digest = hashlib.sha256()
    file.seek(0)
    while count > 0 and (block := file.read(min(count, 2**20))):
        digest.update(block)
        count -= len(block)
    return digest.hexdigest().encode()


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
