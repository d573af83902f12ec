"""Which files below a folder are images, and what lies among them that is none.

Nothing is left out in silence: what is not used is counted, by what it is, with its first names.
"""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from utils.errors import InputError

HIDDEN = "hidden"
_NAMED = 3  # names of each kind that are kept
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
        """Of builtins, for JSON: kind -> {"count": n, "first": [names]}; most frequent first."""
        kinds = sorted(self._counts, key=lambda kind: (-self._counts[kind], kind))
        return {
            kind: {"count": self._counts[kind], "first": sorted(self._names[kind])}
            for kind in kinds
        }

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
    Image.init()
    formats = Image.OPEN.keys() - _NOT_DECODED
    return frozenset(e for e, kind in Image.registered_extensions().items() if kind in formats)


class Folder:
    """What lies directly in a folder, or below it: names sorted, hidden things left out.

    Hidden is what begins with a dot, and `__MACOSX`, which archives made on a Mac bring along.
    images: names of image files directly in it. folders: names of the folders in it.
    left_out: what else there is in what has been looked at so far.

    Raises InputError for what cannot be listed. Links to what is not there, behind which an image
    or a class would be missing, are for `check_links`; `images_by_folder` ends in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out = LeftOut()
        self._dangling: list[str] = []
        if not root.is_dir():
            raise InputError(f"data {root}: no such folder")
        self.images, self.folders = self._entries("")

    def images_by_folder(self) -> dict[str, list[str]]:
        """Each of its folders -> paths below the root of the images in it, at any depth.

        In the order of the folders' paths, then of names: that of torchvision's ImageFolder.
        InputError for a link that leads back up, which would give each image again and again.
        """
        by_folder, above = {}, self._above()
        for name in self.folders:
            found = dict(self._walk(name, above))
            by_folder[name] = [
                os.path.join(folder, image) for folder in sorted(found) for image in found[folder]
            ]
        self.check_links()
        return by_folder

    def _walk(
        self, name: str, above: dict[tuple[int, int], str]
    ) -> Iterator[tuple[str, list[str]]]:
        """Folders below the root from one on, and the names of the images in each.

        above: identity of each folder that this one lies in -> its path.
        """
        status = os.stat(self.root / name)
        own = status.st_dev, status.st_ino
        if own in above:
            raise InputError(
                f"data {self.root / name}: leads back up to {above[own]}, so that images would "
                "come again and again; remove this link"
            )
        images, folders = self._entries(name)
        yield name, images
        for folder in folders:
            path = os.path.join(name, folder)
            yield from self._walk(path, above | {own: str(self.root / name)})

    def _above(self) -> dict[tuple[int, int], str]:
        """The root and all folders that it lies in, by identity."""
        real = self.root.resolve()
        stats = ((path, os.stat(path)) for path in (real, *real.parents))
        return {(status.st_dev, status.st_ino): str(path) for path, status in stats}

    def _entries(self, name: str) -> tuple[list[str], list[str]]:
        """Names of the images and of the folders in a folder below the root, sorted."""
        images, folders = [], []
        try:
            with os.scandir(self.root / name) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"data {self.root / name}: {error.strerror}") from error
        for entry in entries:
            path = os.path.join(name, entry.name)
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                self.left_out.count(HIDDEN, path)
            elif entry.is_dir():
                folders.append(entry.name)
            elif entry.is_file():
                self._sort_file(entry.name, path, images)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                self._dangling.append(path)
            else:
                self.left_out.count("no regular file", path)
        return images, folders

    def _sort_file(self, name: str, path: str, images: list[str]) -> None:
        ending = os.path.splitext(name)[1].lower()
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
