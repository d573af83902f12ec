"""The folder of a run: its checkpoints by name, which are kept, what is moved aside.

`ckpt_epoch_E.pth` stands after epoch E and holds everything. `ckpt_epoch_E_step_S.pth` stands
within an epoch; the previous embeddings of all images, 2.6 GB on ImageNet, are then not in it but
in `previous_embeddings/`: each such save adds a file of those rows that have changed since the one
before, so that an epoch writes every row once however often it is saved. `run.json` tells what the
run is, once for each time it was started.
"""

import fcntl
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from utils.method import checkpoint
from utils.method.previous_embeddings import PreviousEmbeddings
from utils.runtime import checked, distributed, files, plain_json, torch_file
from utils.runtime.errors import DamagedError, InputError
from utils.runtime.torch_file import is_finite

KEPT = 2  # the newest checkpoints, whatever they are
PARTS = "previous_embeddings"
REQUEUE = "requeue"
ABOUT = "run.json"
ABOUT_FORMAT = "cmsf-run-1"
BOARD = "tensorboard"
_ALONG = ("labeled.txt", "label_noise.txt", ABOUT)  # files that tell what a run was
_NAME = re.compile(r"ckpt_epoch_(\d+)(?:_step_(\d+))?\.pth")
_STARTS = checked.list_of(checked.table_of(checked.ANY))
_PART_FORMAT = "cmsf-previous-1"
# A part of which fewer rows are still current is rewritten with the next one, and can go.
_WORTH_KEEPING = 0.1

# Raises InputError for a state that is not wanted: (state, words that name it, whether parts fit).
Accept = Callable[[dict, str, Callable[[], bool]], None]


class RunFolder:
    """Names, order and lifetime of the files in `path`; say: prints a line for the user."""

    def __init__(self, path: Path, *, say: Callable[[str], None] = print) -> None:
        self.path = Path(path)
        self.log = self.path / "log.jsonl"
        self._say = say
        self._part_rows: dict[int, int] = {}  # number of a part in use -> rows in the file
        self._parts_of: dict[Path, set[int]] = {}  # checkpoint -> numbers of the parts it needs
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.log.exists() and not self.log.is_file():  # opening a pipe would never end
                raise InputError(f"--checkpoint_path {self.path}: {self.log.name} is no file")
            self.log.open("a").close()
        except OSError as error:
            raise InputError(f"--checkpoint_path {self.path}: {error.strerror}") from error
        if distributed.is_main():
            self._give_back = weakref.finalize(self, os.close, _lock(self.path / ".lock"))
            (self.path / REQUEUE).unlink(missing_ok=True)
            files.remove_temporaries(self.path)
            files.remove_temporaries(self.path / PARTS)

    def close(self) -> None:
        """Leave the folder to others; the end of the process does it too."""
        if distributed.is_main():
            self._give_back()

    def checkpoints(self) -> list[Path]:
        """The checkpoints of the run, the one farthest on first."""
        return checkpoints_in(self.path)

    def epoch_path(self, epoch: int) -> Path:
        """The checkpoint after an epoch."""
        return self.path / f"ckpt_epoch_{epoch}.pth"

    def save_epoch(self, state: dict) -> Path:
        """Save a whole state after its epoch; kept for good. All processes call it, one writes."""
        path = self.epoch_path(state["epoch"])
        if distributed.is_main():
            files.save(path, state)
            self._remove_old()
        distributed.wait_for_all()
        return path

    def save_step(self, state: dict, stores: dict[str, PreviousEmbeddings]) -> Path:
        """Save a state within its epoch; the newest `KEPT` checkpoints of any kind stay.

        state: as for `save_epoch`, made with the `stores` apart. stores: by name, the modules whose
        rows go to files of their own, one of each process.
        """
        parts = {name: self._save_changes(store) for name, store in stores.items()}
        path = self.path / f"ckpt_epoch_{state['epoch']}_step_{state['step']}.pth"
        if distributed.is_main():
            files.save(path, state | {"parts": parts})
            self._parts_of[path] = {number for numbers in parts.values() for number in numbers}
            self._remove_old()
        distributed.wait_for_all()
        return path

    def load(
        self,
        path: Path,
        stores: dict[str, PreviousEmbeddings],
        *,
        accept: Accept = lambda state, what, parts_fit: None,
    ) -> dict:
        """The state that a checkpoint (of this run or another) holds.

        stores: as for `save_step`. If the checkpoint has "parts", they are filled from those, and
        `state_dict` is one without them. accept: raises InputError for a state that is not wanted,
        given with the words that name it and a function that tells whether its parts fit. Raises
        InputError for a file that is no run of this repository, or holds what none can hold,
        DamagedError for one that is missing or damaged.
        """
        what = f"--resume {path}"
        state = checkpoint.load(path, flag="--resume")
        if state.get("format") != checkpoint.FORMAT:
            raise InputError(f"{what}: not a run of this repository (to start from it: --weights)")
        if missing := [name for name in ("epoch", "step", "state_dict") if name not in state]:
            raise InputError(f"{what}: {missing[0]} is missing")
        place = _place(state["epoch"], state["step"])
        if _NAME.fullmatch(path.name) and _progress(path) != place:
            raise InputError(f"{what}: holds epoch {state['epoch']}, unlike its name")
        accept(state, what, lambda: self._parts_fit(path, state, stores))
        self._load_parts(path, state, stores)
        return state

    def _parts_fit(self, path: Path, state: dict, stores: dict[str, PreviousEmbeddings]) -> bool:
        """Whether a checkpoint's parts go into the stores, which are filled as far as they do."""
        try:
            self._load_parts(path, state, stores)
        except InputError:
            return False
        return True

    def _load_parts(self, path: Path, state: dict, stores: dict[str, PreviousEmbeddings]) -> None:
        """Fill the stores from a checkpoint's parts, if it has "parts"; InputError as from `load`.

        Notes which parts are in use.
        """
        own = self.holds(path)
        self._part_rows = {}
        for store in stores.values():
            store.saved_in.zero_()
        tables = state.get("parts")
        for name in sorted(set() if tables is None else tables.keys() ^ stores.keys()):
            found = "lacks" if name in stores else "has"
            reason = f"a run that {found} {torch_file.one_line(name)}, unlike this one"
            raise InputError(f"--resume {path}: {reason}")
        for name, store in stores.items() if tables is not None else ():
            store.seen.zero_()
            store.embeddings.zero_()
            for number, rows in sorted(tables[name].items()):
                _load_part(store, _part_path(path.parent / PARTS, number), number, rows=rows)
                self._part_rows[number] = rows
            if not own:  # the files are another run's: everything is yet to be written here
                store.saved_in.zero_()
        self._parts_of = {self.path / path.name: set(self._part_rows)} if own else {}

    def holds(self, path: Path) -> bool:
        """Whether a checkpoint lies in this folder."""
        return path.parent.resolve() == self.path.resolve()

    def newest_good(
        self,
        stores: dict[str, PreviousEmbeddings],
        *,
        accept: Accept = lambda state, what, parts_fit: None,
    ) -> tuple[Path, dict] | tuple[None, None]:
        """The checkpoint farthest on that is whole, and its state; None, None in an empty folder.

        Says which ones are damaged. InputError if all are. accept: as for `load`.
        """
        paths = self.checkpoints()
        for path in paths:
            try:
                return path, self.load(path, stores, accept=accept)
            except DamagedError as error:
                self._say(f"WARNING {error}; falling back to the checkpoint before")
        if paths:
            raise InputError(f"--resume auto: no whole checkpoint in {self.path}, of {len(paths)}")
        return None, None

    def move_aside(self, paths: list[Path]) -> Path:
        """Put checkpoints, what they need and a copy of the log into `earlier_N`; returns that."""
        number = 1
        while (aside := self.path / f"earlier_{number}").exists():
            number += 1
        aside.mkdir()
        # What the checkpoints need is there before them: this may be broken off anywhere.
        for name in (self.log.name, *_ALONG):
            if (self.path / name).exists():
                shutil.copyfile(self.path / name, aside / name)
        if (self.path / PARTS).is_dir():
            shutil.copytree(self.path / PARTS, aside / PARTS, copy_function=_link)
        for path in paths:
            path.rename(aside / path.name)
        self._say(f"an earlier run was in {self.path}: moved to {aside}")
        return aside

    def start_anew(self) -> None:
        """Move a run that is in the folder aside, and empty the log; for the main process only."""
        paths = self.checkpoints()
        if paths or self.log.stat().st_size:
            aside = self.move_aside(paths)
            shutil.rmtree(self.path / PARTS, ignore_errors=True)
            if (self.path / BOARD).is_dir():
                (self.path / BOARD).rename(aside / BOARD)
            self.log.write_bytes(b"")
        (self.path / ABOUT).unlink(missing_ok=True)

    def describe(self, start: dict) -> None:
        """Add to `run.json` what this start of the run is. All processes call it, one writes.

        The file is {"format": `ABOUT_FORMAT`, "starts": [start, ...]}, the newest last, and at any
        moment the old one or the whole new one. start: of builtins; see `origin.of_start`.
        """
        if not distributed.is_main():
            return
        path = self.path / ABOUT
        try:
            starts = plain_json.loads(plain_json.read_text(path))["starts"] if path.exists() else []
            if not _STARTS.holds(starts):
                raise TypeError
        except (InputError, ValueError, KeyError, TypeError):
            self._say(f"WARNING {path} is damaged: it is begun anew")
            starts = []
        about = {"format": ABOUT_FORMAT, "starts": [*starts, start]}
        files.replace_text(path, plain_json.dumps(about, indent=2) + "\n")

    def continue_from(self, epoch: int, step: int | None) -> None:
        """Move checkpoints that are farther on aside: the run that goes on makes them again.

        For the main process only.
        """
        here = _place(epoch, step)
        if later := [path for path in self.checkpoints() if _progress(path) > here]:
            self.move_aside(later)

    def ask_for_requeue(self, wanted: bool = True) -> None:
        """Leave a file that tells of a run that is told to stop and wants to go on, or remove it.

        torchrun ends with code 1 whatever the code of its processes is, and kills what has not
        ended half a minute after SIGTERM.
        """
        if not distributed.is_main():
            return
        if wanted:
            (self.path / REQUEUE).touch()
        else:
            (self.path / REQUEUE).unlink(missing_ok=True)

    def _save_changes(self, store: PreviousEmbeddings) -> dict[int, int]:
        """Write the rows that no file holds yet; the files that now hold the store: number -> rows.

        Files of which little is current are written anew with them, and needed no more.
        """
        folder = self.path / PARTS
        current = torch.bincount(store.saved_in).tolist()  # by number
        there = self._part_numbers()
        for number, rows in self._part_rows.items():
            gone = number not in there
            if number < len(current) and (gone or current[number] < _WORTH_KEEPING * rows):
                store.saved_in[store.saved_in == number] = 0
        known = distributed.gather_objects(max([*there, *self._part_rows], default=0))
        number = 1 + max(known) + distributed.rank()  # no part has it, or has had it
        rows = (store.seen & (store.saved_in == 0)).nonzero().squeeze(1)
        if len(rows):
            index, embeddings = store.images(rows), store.embeddings[rows]
            folder.mkdir(exist_ok=True)
            part = {"format": _PART_FORMAT, "index": index, "embeddings": embeddings}
            files.save(_part_path(folder, number), part)
            self._part_rows[number] = len(rows)
            store.saved_in[rows] = number
        own = {n: self._part_rows[n] for n in store.saved_in.unique().tolist() if n}
        return {n: rows for part in distributed.gather_objects(own) for n, rows in part.items()}

    def _part_numbers(self) -> set[int]:
        """Numbers of the parts that there are, as the main process sees it, who removes them."""
        own = {int(path.stem.removeprefix("part_")) for path in (self.path / PARTS).glob("*.pth")}
        return distributed.gather_objects(own)[0]

    def _remove_old(self) -> None:
        """Remove checkpoints within epochs but for those among the newest `KEPT` of any kind.

        Then the parts that none of the others needs, once it is known what each needs.
        """
        for path in self.checkpoints()[KEPT:]:
            if _is_step(path):
                path.unlink(missing_ok=True)
        kept = [path for path in self.checkpoints() if _is_step(path)]
        if all(path in self._parts_of for path in kept):
            needed = {number for path in kept for number in self._parts_of[path]}
            for path in (self.path / PARTS).glob("part_*.pth"):
                if int(path.stem.removeprefix("part_")) not in needed:
                    path.unlink(missing_ok=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run by their names, the one farthest on first."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_file()]
    return sorted(found, key=_progress, reverse=True)


@contextmanager
def apart(stores: Iterable[PreviousEmbeddings], *, are_apart: bool = True) -> Iterator[None]:
    """Within, a model's state is saved and loaded without its stores, if they `are_apart`."""
    for store in stores:
        store.saved_apart = are_apart
    try:
        yield
    finally:
        for store in stores:
            store.saved_apart = False


def _lock(path: Path) -> int:
    """Hold a folder until the file descriptor returned is closed; InputError if another does.

    A record lock: the system gives it back however the process ends, and workers do not inherit it.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise InputError(f"--checkpoint_path {path.parent}: a run is going on there") from None
    except OSError:
        pass  # a file system without locks
    return descriptor


def _progress(path: Path) -> tuple[float, float]:
    """How far a checkpoint is, by its name: (epoch, step), the step infinite after the epoch."""
    match = _NAME.fullmatch(path.name)
    epoch, step = match.groups() if match else ("inf", None)
    return float(epoch), float(step or "inf")


def _place(epoch: int, step: int | None) -> tuple[float, float]:
    """How far a run is, as `_progress` says it."""
    return epoch, float("inf") if step is None else step


def _is_step(path: Path) -> bool:
    return _progress(path)[1] < float("inf")


def _part_path(folder: Path, number: int) -> Path:
    return folder / f"part_{number}.pth"


def _load_part(store: PreviousEmbeddings, path: Path, number: int, *, rows: int) -> None:
    """Put the rows of one part into a store; parts in the order of their numbers.

    rows: how many there are, by the checkpoint. InputError for a file that is no such part.
    """
    what = f"--resume {path}"
    part = checkpoint.load(path, flag="--resume")
    if part.get("format") != _PART_FORMAT:
        raise InputError(f"{what}: no previous embeddings")
    numbers = torch_file.tensor(f"({rows},)", lambda v: len(v) == rows, dims=1, dtype=torch.int64)
    index = checked.take(part, "index", numbers, what=what)
    dim = store.embeddings.shape[1]
    shape = f"({rows}, {dim}), the finite previous embeddings of this run"
    fits = torch_file.tensor(shape, lambda v: v.shape == (rows, dim) and is_finite(v), dims=2)
    embeddings = checked.take(part, "embeddings", fits, what=what)
    if not torch_file.between(0, store.num_images - 1)(index) or len(index.unique()) < rows:
        raise InputError(
            f"{what}: previous embeddings of other images than 0 to {store.num_images - 1}, or of "
            "one twice"
        )
    store.put(index, embeddings)
    store.mark_saved(index, number)


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
