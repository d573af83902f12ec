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

HIDDEN = "hidden"
# Folders that archives made on a Mac, a NAS and file systems bring along.
_NOT_OURS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
_NAMED = 3  # names of each kind that are kept
_ENDINGS = 10  # that are named; a million files can have as many
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # what following a link that is broken gives
# Pillow knows files of these by their endings, but has no decoder of its own for them.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


class LeftOut:
    """What is not used: `count` what a thing is, its name; paths are below one folder."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}

    def count(self, kind: str, name: str) -> None:
        """Note one thing; kind: a file's ending, or what else it is, such as "hidden"."""
        self._counts[kind] = self._counts.get(kind, 0) + 1
        names = self._names.setdefault(kind, [])
        if len(names) < _NAMED:
            names.append(name)

    def record(self) -> dict[str, dict]:
        """Of builtins, for JSON: kind -> {"count": n, "first": [names]}; most frequent first.

        Endings beyond the ten most frequent are one kind, the last, "other endings".
        """
        kinds = sorted(self._counts, key=lambda kind: (-self._counts[kind], kind))
        rare = [kind for kind in kinds if kind.startswith(".")][_ENDINGS:]
        found = {
            kind: {"count": self._counts[kind], "first": sorted(self._names[kind])}
            for kind in kinds
            if kind not in set(rare)
        }
        if rare:
            names = sorted(name for kind in rare for name in self._names[kind])
            count = sum(self._counts[kind] for kind in rare)
            found["other endings"] = {"count": count, "first": names[:_NAMED]}
        return found

    def __str__(self) -> str:
        """In words, "" for nothing: "2 .txt (a/notes.txt, b/notes.txt), 1 hidden (.thumbnails)"."""
        parts = []
        for kind, found in self.record().items():
            more = ", ..." if found["count"] > len(found["first"]) else ""
            parts.append(f"{found['count']} {kind} ({', '.join(found['first'])}{more})")
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
        raise InputError(
            f"data {path}: a link to what is not there, {os.readlink(path)} (is a disk not "
            "mounted?)"
        )
    return False


class Folder:
    """What lies directly in a folder, or below it: names sorted, hidden things left out.

    Hidden is what begins with a dot, and what archives and systems bring along: `__MACOSX`,
    `@eaDir`, `lost+found`, `$RECYCLE.BIN`, `System Volume Information`.
    images: names of image files directly in it. folders: names of the folders in it.
    left_out: what else there is in what has been looked at so far.
    identities: (device, inode) of each folder looked at so far -> its path, in order.

    Raises InputError for what cannot be listed. Links to what is not there, behind which an image
    or a class would be missing, are for `check_links`; `images_by_folder` ends in it. Such a link
    within a class whose ending is that of another file is left out.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out = LeftOut()
        self._dangling: list[str] = []
        if not is_folder(root):
            raise InputError(f"data {root}: no such folder")
        with _errors_of(root):
            real = root.resolve()
            self._above = {_identity(path): str(path) for path in real.parents}
            self.identities = {_identity(root): str(root)}
        self.images, self.folders = self._entries("")

    def images_by_folder(self) -> dict[str, list[str]]:
        """Each of its folders -> paths below the root of the images in it, at any depth.

        In the order of the folders' paths, then of names: that of torchvision's ImageFolder.
        InputError for a folder that is reached twice, by a link or a mount, so that each image in
        it would come twice, or without end. A single file that is linked twice is not looked for:
        that would cost a look at each file.
        """
        by_folder = {}
        for name in self.folders:
            found = dict(self._walk(name))
            by_folder[name] = [
                os.path.join(folder, image) for folder in sorted(found) for image in found[folder]
            ]
        self.check_links()
        return by_folder

    def _walk(self, name: str) -> Iterator[tuple[str, list[str]]]:
        """Folders below the root from one on, and the names of the images in each."""
        waiting = [name]
        while waiting:
            name = waiting.pop()
            self._identify(os.path.join(self.root, name))
            images, folders = self._entries(name)
            yield name, images
            waiting += [os.path.join(name, folder) for folder in reversed(folders)]

    def _identify(self, path: str) -> None:
        """Note the folder at a path; InputError if it has been reached before."""
        with _errors_of(path):
            own = _identity(path)
        before = self.identities.get(own) or self._above.get(own)
        if before is None:
            self.identities[own] = path
        elif own in self._above or path.startswith(os.path.join(before, "")):
            raise InputError(
                f"data {path}: leads back up to {before}, so that images would come again and "
                "again; remove this link"
            )
        else:
            raise InputError(
                f"data {path}: is the same folder as {before}, so its images come twice; remove "
                "one of them"
            )

    def _entries(self, name: str) -> tuple[list[str], list[str]]:
        """Names of the images and of the folders in a folder below the root, sorted."""
        images, folders = [], []
        folder = self.root / name
        with _errors_of(folder), os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            path = os.path.join(name, entry.name)
            if entry.name.startswith(".") or entry.name in _NOT_OURS:
                self.left_out.count(HIDDEN, path)
                continue
            kind = _kind(entry)
            if kind == "folder":
                folders.append(entry.name)
            elif kind == "file":
                self._sort_file(entry.name, path, images)
            elif kind == "links to nowhere" and (not name or _ending(path) in {"", *endings()}):
                self._dangling.append(path)  # directly in the root it may have been a class
            else:
                self.left_out.count(kind, path)
        return images, folders

    def _sort_file(self, name: str, path: str, images: list[str]) -> None:
        ending = _ending(name)
        if ending in endings():
            images.append(name)
        else:
            self.left_out.count(ending or "without an ending", path)

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
    """ "folder", "file", "links to nowhere" or "no regular file", of what an entry leads to."""
    try:
        if entry.is_dir():  # of what is no link this and is_file cost no look at the disk
            return "folder"
        if entry.is_file():
            return "file"
        if entry.is_symlink():
            os.stat(entry.path)
    except OSError as error:
        if error.errno in _NOWHERE:
            return "links to nowhere"
        raise InputError(f"data {entry.path}: {error.strerror}") from error
    return "no regular file"
