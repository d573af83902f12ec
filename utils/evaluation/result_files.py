"""The files that evaluation scripts write: checks before the work, JSON records after it."""

import argparse
import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from utils.runtime import checked, files, plain_json
from utils.runtime.errors import InputError, printable

PNG = b"\x89PNG\r\n\x1a\n"  # how such files begin
NAMED = ("random", "pixels")  # what --weights can be beside a file
# In a row of results.json: its `Encoder`, file -> why not, and what is no figure.
OF, LEFT_OUT, MORE = "of", "left_out", "more"
FIGURE = checked.or_none(checked.real())  # null: not measured, or not finite
# Row -> column -> figure.
TABLE = checked.table_of(checked.table_of(FIGURE))._replace(words="a table of rows of figures")


def check_output(args: argparse.Namespace, *, endings: tuple[str, ...]) -> None:
    """InputError unless --output can be written: its ending, its folder, nothing to be lost.

    Not even --force replaces the checkpoint that --weights names.
    """
    path, what = args.output, f"--output {args.output}"
    if path.suffix.lower() not in endings:
        raise InputError(f"{what}: ends in none of {', '.join(endings)}")
    if not path.parent.is_dir():
        raise InputError(f"{what}: no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise InputError(f"{what}: {'is a folder' if path.is_dir() else 'not a regular file'}")
    make_folder(path.parent, flag="--output")
    if not path.exists():
        return
    if args.weights and os.path.exists(args.weights) and path.samefile(args.weights):
        raise InputError(f"{what}: is the file of --weights itself")
    if not args.force:
        raise InputError(f"{what}: there is such a file already (--force replaces it)")


def check_own(path: Path, *, flag: str, kind: str, is_own: Callable[[Path], bool]) -> None:
    """InputError where a file is there that `is_own` does not take for one of this kind.

    So a script replaces what it wrote itself and nothing else, told by content. Whatever is_own
    raises counts as no. An empty file has nothing to lose.
    """
    if not os.path.exists(path):
        return
    if not path.is_file():
        raise InputError(f"{flag} {path}: not a regular file")
    try:
        own = not path.stat().st_size or is_own(path)
    except Exception:  # a file of another kind can raise about anything
        own = False
    if not own:
        raise InputError(f"{flag} {path}: is there already and no {kind}")


def check_picture(
    path: Path, *, ending: str, of: str, key: str, is_own: Callable[[Path], bool]
) -> None:
    """InputError where --output, a picture, or the JSON beside it would replace another file.

    of: what it shows. key: what such a record has. is_own: whether a file is such a picture.
    """
    if path.suffix.lower() != ending:
        raise InputError(f"--output {path}: name a file that ends in {ending}")
    beside = path.with_suffix(".json")
    check_own(beside, flag="--output", kind=f"record of {of}", is_own=lambda p: key in read_json(p))
    check_own(path, flag="--output", kind=f"picture of {of}", is_own=is_own)


def is_png_of(path: Path, program: str) -> bool:
    """Whether it is a PNG file that says that a program of this name, or one so begun, wrote it."""
    with path.open("rb") as file:
        head = file.read(4096)
    return head.startswith(PNG) and f"tEXtSoftware\0{program}".encode() in head


def picture_format(path: Path) -> str | None:
    """What a file is by how it begins: "png", "svg", or None for any other."""
    with path.open("rb") as file:
        head = file.read(4096).lstrip()
    is_svg = head.startswith((b"<?xml", b"<!--", b"<svg")) and b"<svg" in head
    return "png" if head.startswith(PNG) else "svg" if is_svg else None


def has_figures(path: Path) -> bool:
    """True if each line of a text file is numbers with commas; ValueError otherwise."""
    with path.open(encoding="ascii") as file:
        for line in file:
            for part in line.split(","):
                float(part)
    return True


def make_folder(folder: Path, *, flag: str) -> None:
    """Make a folder to write to, and try; InputError that names the flag if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{flag} {folder}: {error.strerror}") from error


def write_json(folder: Path, name: str, record: dict[str, Any], *, flag: str = "--save") -> Path:
    """Write a result to folder/name, whole or not at all, and return its path.

    InputError or RunError that names the flag if that fails.
    """
    make_folder(folder, flag=flag)
    files.replace_text(folder / name, plain_json.dumps(record, indent=2) + "\n", flag=flag)
    return folder / name


def append_line(path: Path, line: str, *, flag: str) -> None:
    """Append a line to a text file, or nothing at all: no half of it stays on a full disk.

    Several processes may do so at once. InputError that names the flag if it fails. "" only tries.
    """
    try:
        with open(path, "a+b", buffering=0) as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.lockf(file, fcntl.LOCK_EX)
            end, data = file.seek(0, os.SEEK_END), f"{line}\n".encode() if line else b""
            if end and data and os.pread(file.fileno(), 1, end - 1) != b"\n":
                data = b"\n" + data  # of a line that somebody else wrote
            if file.write(data) < len(data):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror}") from error


def read_json(path: Path) -> dict:
    """A result file, {} where there is none; InputError if it cannot be read."""
    if not os.path.lexists(path):
        return {}
    try:
        record = plain_json.loads(plain_json.read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: no result file ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f"{path}: no result file (it holds no object)")
    return record


def format_rows(rows: dict[str, dict[str, float | None]]) -> str:
    """The rows of a result as text, a line each; a dash for what was not measured."""
    lines = []
    for name, row in rows.items():
        cells = (f"{column} {'-' if v is None else f'{v:g}'}" for column, v in row.items())
        lines.append(printable(f"{name:>8}: {', '.join(cells)}"))
    return "\n".join(lines)


class Encoder(NamedTuple):
    """Which encoder a result is of, as far as its file says; None: it does not.

    checkpoint: the file, "random" or "pixels". sha256: of the file. seed: of random weights.
    backbone: its prefix in the file.
    """

    checkpoint: str | None = None
    sha256: str | None = None
    epoch: int | None = None
    encoder: str | None = None
    arch: str | None = None
    image_size: int | None = None
    small_stem: bool | None = None
    seed: int | None = None
    backbone: str | None = None

    @property
    def is_known(self) -> bool:
        """Whether the file says which weights they were."""
        return self.sha256 is not None or self.checkpoint in NAMED

    def is_same(self, other: "Encoder") -> bool:
        """Whether two results are of one encoder; what one of them does not say is not asked.

        One that says nothing of its weights is of no other's.
        """
        asked = ["encoder", "backbone", "arch", "image_size", "small_stem"]
        if self.sha256 is None:
            asked += ["checkpoint", "seed"]
        same_weights = self.is_known == other.is_known and self.sha256 == other.sha256
        return same_weights and _agree(self, other, asked)

    def __str__(self) -> str:
        """In words, in one line."""
        if not self.is_known:
            return "an encoder that it does not name"
        named = {"sha256": self.sha256 and self.sha256[:12], "epoch": self.epoch}
        named = named if self.sha256 else {"seed": self.seed}
        named |= {"arch": self.arch, "encoder": self.encoder}
        named = {} if self.checkpoint == "pixels" else named
        named |= {"image size": self.image_size}
        parts = ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)
        name = Path(self.checkpoint or "a checkpoint").name
        return printable(f"{name} ({parts})" if parts else name)


_KINDS = {str | None: checked.TEXT, int | None: checked.whole(0), bool | None: checked.FLAG}


def _agree(one: tuple, other: tuple, names: Iterable[str]) -> bool:
    """Whether two have the same in every field of these names that both know."""
    pairs = ((getattr(one, name), getattr(other, name)) for name in names)
    return all(a == b for a, b in pairs if a is not None and b is not None)


def _said(record: dict, name: str, kind: checked.Kind, *, what: str) -> Any:
    """record[name], None where it has none; InputError that begins with `what` for odd types."""
    return checked.take(record, name, checked.or_none(kind), what=what, default=None)


def encoder_of(record: dict, *, what: str) -> Encoder:
    """The encoder that a result file tells of; InputError that begins with `what` for odd types."""
    types = Encoder.__annotations__.items()
    return Encoder(*(_said(record, name, _KINDS[type_], what=what) for name, type_ in types))


class ValImages(NamedTuple):
    """Which val images a result was measured on, as far as its file says; None: it does not.

    digest: of all the files. count and classes: how many there were.
    """

    digest: str | None = None
    count: int | None = None
    classes: int | None = None

    def is_same(self, other: "ValImages") -> bool:
        """Whether they are the same: by digest, or where one has none by what both say."""
        if self.digest and other.digest:
            return self.digest == other.digest
        return _agree(self, other, ("count", "classes"))

    def __str__(self) -> str:
        """In words, in one line."""
        count = "unknown" if self.count is None else self.count
        of = "" if self.classes is None else f" of {self.classes} classes"
        digest = f" (digest {self.digest[:12]})" if self.digest else ""
        return printable(f"{count} val images{of}{digest}")


def val_images_of(record: dict, *, what: str) -> ValImages:
    """The val images that a result file tells of; InputError that begins with `what` as above."""
    digests, counts = (
        checked.take(record, name, checked.TABLE, what=what, default={})
        for name in ("images", "counts")
    )
    numbers = (_said(counts, name, checked.whole(0), what=what) for name in ("val", "classes"))
    return ValImages(_said(digests, "val", checked.TEXT, what=what), *numbers)


def is_fine_tuned(record: dict, *, what: str) -> bool | None:
    """Whether a linear.json is of an encoder that was trained too; None: it does not say.

    Its settings tell, or, in older files, its protocol in words. InputError as above.
    """
    settings = checked.take(record, "settings", checked.TABLE, what=what, default={})
    tuned = _said(settings, "fine_tune", checked.FLAG, what=what)
    words = _said(record, "protocol", checked.TEXT, what=what) or ""
    if tuned is None and "encoder trained too" in words:
        return True
    return False if tuned is None and "frozen encoder" in words else tuned
