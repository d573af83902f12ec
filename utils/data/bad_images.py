"""Image files that cannot be read: whether one ends the run, and which were found."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

from utils.runtime.errors import InputError, printable


class BadImages:
    """Image files that could not be read, and what is done about one; several loaders can share it.

    skip: they are left out, each with one line of warning, up to `most` files; otherwise the first
    one ends the run. names: files that are known already, from a checkpoint.
    """

    def __init__(self, *, skip: bool = False, most: int = 100, names: Iterable[str] = ()) -> None:
        self.skip, self.most = skip, most
        self._names = set(names)

    @property
    def names(self) -> list[str]:
        """The files found so far, sorted."""
        return sorted(self._names)

    @property
    def tolerated(self) -> int:
        """The number of files that can be bad without an error from `add`."""
        return self.most if self.skip else 0

    def restore(self, names: Iterable[str]) -> None:
        """Add files found before: they count, and are not announced again."""
        self._names.update(names)

    def merge(self, names: Iterable[str]) -> None:
        """Take over what other processes have found; InputError as from `add`."""
        for path in sorted(set(names) - self._names):
            self.add(path, "as another process found")

    def add(self, path: str, reason: str) -> None:
        """Note a file. InputError if files are not skipped, or too many are bad."""
        what = f"data {path}: cannot be read as an image ({reason})"
        if not self.skip:
            raise InputError(f"{what} (--bad_images skip leaves such files out)")
        if path not in self._names:
            self._names.add(path)
            _say(printable(f"WARNING {what}: left out"))
        if len(self._names) > self.most:
            raise InputError(
                f"--max_bad_images {self.most}: {len(self._names)} files cannot be read as images, "
                f"the last is {path} ({reason})"
            )


def reason_of(error: Exception, path: str) -> str:
    """One line on why a file cannot be read, without its path."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].replace(f" {path!r}", "")


def _say(text: str) -> None:
    """Print one line, above the progress bar if there is one."""
    if sys.stderr.isatty():
        tqdm.write(text)
    else:
        print(text, flush=True)
