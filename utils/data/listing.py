"""Which files below a folder are images, and what lies among them that is none.

Nothing is left out in silence: what is not used is counted, by what it is, with its first names.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from PIL import Image

from utils.runtime.errors import InputError

# Folders that archives made on a Mac, a NAS and file systems bring along.
_NOT_OURS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
_NAMED = 3  # names of each kind that are kept
_ENDINGS = 10  # that are named; a million files can have as many
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # what following a link that is broken gives
_BROKEN_LINK = "links to nowhere"
# Pillow knows files of these by their endings, but has no decoder of its own for them.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


class LeftOut:
    """What is not used: `count` what a thing is, its name; paths are below one folder."""

    def __init__(self) -> None:
        self._found: dict[str, dict] = {}

    def count(self, kind: str, name: str) -> None:
        """Note one thing; kind: a file's ending, or what else it is, such as "hidden"."""
        entry = self._found.setdefault(kind, {"count": 0, "first": []})
        entry["count"] += 1
        if len(entry["first"]) < _NAMED:
            entry["first"] = sorted([*entry["first"], name])

    def record(self) -> dict[str, dict]:
        """Of builtins, for JSON: kind -> {"count": n, "first": [names]}; most frequent first.

        Endings beyond the ten most frequent are one kind, the last, "other endings".
        """
        kinds = sorted(self._found, key=lambda kind: (-self._found[kind]["count"], kind))
        record = {kind: self._found[kind] for kind in kinds}
        rare = [record.pop(kind) for kind in [k for k in kinds if k[0] == "."][_ENDINGS:]]
        if rare:
            names = sorted(name for entry in rare for name in entry["first"])
            count = sum(entry["count"] for entry in rare)
            record["other endings"] = {"count": count, "first": names[:_NAMED]}
        return record

    def __str__(self) -> str:
        """In words, "" for nothing: "2 .txt (a/notes.txt, b/notes.txt), 1 hidden (.thumbnails)"."""
        parts = []
        for kind, entry in self.record().items():
            more = ", ..." if entry["count"] > len(entry["first"]) else ""
            parts.append(f"{entry['count']} {kind} ({', '.join(entry['first'])}{more})")
        return ", ".join(parts)


@cache
def endings() -> frozenset[str]:
    """The endings, in lower case with the dot, of all image files that Pillow reads."""
    Image.preinit()  # common formats come first then, and a file is tried as these first
    Image.init()
    formats = Image.OPEN.keys() - _NOT_DECODED
    return frozenset(e for e, kind in Image.registered_extensions().items() if kind in formats)


@contextmanager
def _errors_of(path: str | Path) -> Iterator[None]:
    """Make an InputError that names the path of an error of the operating system."""
    try:
        yield
    except OSError as error:
        raise InputError(f"data {path}: {error.strerror or error}") from error


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; InputError for a link to nowhere and what may not be seen."""
    with _errors_of(path):
        try:
            return stat.S_ISDIR(os.stat(path).st_mode)
        except OSError as error:
            if error.errno not in _NOWHERE:
                raise
    if os.path.islink(path):
        raise InputError(f"data {path}: a link to what is not there, {os.readlink(path)}")
    return False


class Folder:
    """What lies directly in a folder, or below it: names sorted, hidden things left out.

    Hidden is what begins with a dot, and what archives and systems bring along.
    images, folders: names of what is directly in it. Of what has been looked at so far, left_out:
    what else there is; identities: (device, inode) of each folder -> its path.

    Raises InputError for what cannot be listed, and links to nowhere behind which an image or a
    class would be missing: `check_links`, in which `images_by_folder` ends.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.left_out = root, LeftOut()
        self._dangling: list[str] = []
        if not is_folder(root):
            raise InputError(f"data {root}: no such folder")
        with _errors_of(root):
            self._above = {_identity(path): str(path) for path in root.resolve().parents}
            self.identities = {_identity(root): str(root)}
        self.images, self.folders = self._entries("")

    def images_by_folder(self) -> dict[str, list[str]]:
        """Each of its folders -> paths below the root of the images in it, at any depth.

        In the order of the folders' paths, then of names: that of torchvision's ImageFolder.
        InputError for a folder that is reached twice, by a link or a mount. (A file that is linked
        twice is not looked for: that would cost a look at each file.)
        """
        by_folder = {}
        for top in self.folders:
            found, waiting = {}, [top]
            while waiting:
                name = waiting.pop()
                self._identify(os.path.join(self.root, name))
                found[name], folders = self._entries(name)
                waiting += [os.path.join(name, folder) for folder in reversed(folders)]
            by_folder[top] = [os.path.join(name, i) for name in sorted(found) for i in found[name]]
        self.check_links()
        return by_folder

    def _identify(self, path: str) -> None:
        """Note the folder at a path; InputError if it has been reached before."""
        with _errors_of(path):
            own = _identity(path)
        before = self.identities.get(own) or self._above.get(own)
        if before is None:
            self.identities[own] = path
        elif own in self._above or path.startswith(os.path.join(before, "")):
            raise InputError(f"data {path}: leads back up to {before}; remove this link")
        else:
            same = f"is the same folder as {before}, so its images come twice"
            raise InputError(f"data {path}: {same}; remove one of them")

    def _entries(self, name: str) -> tuple[list[str], list[str]]:
        """Names of the images and of the folders in a folder below the root, sorted."""
        images, folders = [], []
        folder = self.root / name
        with _errors_of(folder), os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            kind, path = _kind(entry), os.path.join(name, entry.name)
            if kind == "folder":
                folders.append(entry.name)
            elif kind in endings():
                images.append(entry.name)
            elif kind == _BROKEN_LINK and (not name or _ending(path) in {"", *endings()}):
                self._dangling.append(path)  # directly in the root it may have been a class
            else:
                self.left_out.count(kind or "without an ending", path)
        return images, folders

    def check_links(self) -> None:
        """InputError for links to what is not there, in what has been looked at so far."""
        if self._dangling:
            first = ", ".join(self._dangling[:5])
            raise InputError(
                f"data {self.root}: {len(self._dangling)} links to what is not there (is a disk "
                f"not mounted?), first {first}"
            )


def _identity(path: str | Path) -> tuple[int, int | str]:
    status = os.stat(path)
    return status.st_dev, status.st_ino or str(path)  # some file systems have no numbers


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _kind(entry: os.DirEntry) -> str:
    """What an entry leads to: "folder", the ending of a file, or what else it is."""
    if entry.name.startswith(".") or entry.name in _NOT_OURS:
        return "hidden"
    with _errors_of(entry.path):
        try:
            if entry.is_dir():  # of what is no link this and is_file cost no look at the disk
                return "folder"
            if entry.is_file():
                return _ending(entry.name)
            if entry.is_symlink():
                os.stat(entry.path)
        except OSError as error:
            if error.errno in _NOWHERE:
                return _BROKEN_LINK
            raise
    return "no regular file"
