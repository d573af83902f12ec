"""The folder of a run: its checkpoints by name, which are kept, what is moved aside.

`ckpt_epoch_E.pth` stands after epoch E, `ckpt_epoch_E_step_S.pth` within an epoch; each holds all
that the run needs to go on. `run.json` tells what the run is, once for each time it was started.
"""

import fcntl
import os
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

from utils.method import checkpoint
from utils.method.previous_embeddings import PreviousEmbeddings
from utils.runtime import checked, distributed, files, plain_json
from utils.runtime.errors import DamagedError, InputError

KEPT = 2  # the newest checkpoints, whatever they are
REQUEUE = "requeue"
ABOUT = "run.json"
ABOUT_FORMAT = "cmsf-run-1"
BOARD = "tensorboard"
_ALONG = ("labeled.txt", "label_noise.txt", ABOUT)  # files that tell what a run was
_NAME = re.compile(r"ckpt_epoch_(\d+)(?:_step_(\d+))?\.pth")
_STARTS = checked.list_of(checked.table_of(checked.ANY))
_PARTS = "previous_embeddings"  # see `_with_parts`


class RunFolder:
    """Names, order and lifetime of the files in `path`.

    stores: by name in the model, for checkpoints of older versions (see `_with_parts`). say: prints
    a line for the user.
    """

    def __init__(
        self,
        path: Path,
        stores: dict[str, PreviousEmbeddings] | None = None,
        *,
        say: Callable[[str], None] = print,
    ) -> None:
        self.path, self._stores, self._say = Path(path), stores or {}, say
        self.log = self.path / "log.jsonl"
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

    def save(self, state: dict) -> Path:
        """Save a state after its epoch, for good, or within it ("step"), while among the newest.

        All processes call it, one writes.
        """
        path = self.epoch_path(state["epoch"])
        if state["step"] is not None:
            path = path.with_stem(f"{path.stem}_step_{state['step']}")
        if distributed.is_main():
            files.save(path, state)
            for old in self.checkpoints()[KEPT:]:
                if "_step_" in old.stem:
                    old.unlink(missing_ok=True)
        distributed.wait_for_all()
        return path

    def load(self, path: Path) -> dict:
        """The state that a checkpoint (of this run or another) holds.

        InputError for a file that is no run of this repository, or holds what none can hold,
        DamagedError for one that is missing or damaged.
        """
        what = f"--resume {path}"
        state = checkpoint.load(path, flag="--resume")
        if state.get("format") != checkpoint.FORMAT:
            raise InputError(f"{what}: not a run of this repository (to start from it: --weights)")
        if missing := [name for name in ("epoch", "step", "state_dict") if name not in state]:
            raise InputError(f"{what}: {missing[0]} is missing")
        if _NAME.fullmatch(path.name) and _progress(path) != _place(state["epoch"], state["step"]):
            raise InputError(f"{what}: holds epoch {state['epoch']}, unlike its name")
        return _with_parts(state, path, self._stores)

    def holds(self, path: Path) -> bool:
        """Whether a checkpoint lies in this folder."""
        return path.parent.resolve() == self.path.resolve()

    def newest_good(self) -> tuple[Path, dict] | tuple[None, None]:
        """The checkpoint farthest on that is whole, and its state; None, None in an empty folder.

        Says which ones are damaged. InputError if all are.
        """
        paths = self.checkpoints()
        for path in paths:
            try:
                return path, self.load(path)
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
        if (self.path / _PARTS).is_dir():
            shutil.copytree(self.path / _PARTS, aside / _PARTS)
        for path in paths:
            path.rename(aside / path.name)
        self._say(f"an earlier run was in {self.path}: moved to {aside}")
        return aside

    def start_anew(self) -> None:
        """Move a run that is in the folder aside, and empty the log; for the main process only."""
        paths = self.checkpoints()
        if paths or self.log.stat().st_size:
            aside = self.move_aside(paths)
            if (self.path / BOARD).is_dir():
                (self.path / BOARD).rename(aside / BOARD)
            shutil.rmtree(self.path / _PARTS, ignore_errors=True)
            self.log.write_bytes(b"")
        (self.path / ABOUT).unlink(missing_ok=True)

    def continue_from(self, epoch: int, step: int | None) -> None:
        """Move checkpoints aside that the run makes again; for the main process only."""
        if later := [p for p in self.checkpoints() if _progress(p) > _place(epoch, step)]:
            self.move_aside(later)

    def describe(self, start: dict) -> None:
        """Add to `run.json` what this start of the run is. All processes call it, one writes.

        The file is {"format": `ABOUT_FORMAT`, "starts": [start, ...]}, the newest last. start: of
        builtins; see `origin.of_start`.
        """
        if not distributed.is_main():
            return
        path, starts = self.path / ABOUT, []
        try:
            if path.exists():
                about = plain_json.loads(plain_json.read_text(path))
                starts = checked.take(about, "starts", _STARTS, what=str(path))
        except (InputError, ValueError, TypeError, AttributeError):
            self._say(f"WARNING {path} is damaged: it is begun anew")
        about = {"format": ABOUT_FORMAT, "starts": [*starts, start]}
        files.replace_text(path, plain_json.dumps(about, indent=2) + "\n")

    def ask_for_requeue(self, wanted: bool = True) -> None:
        """Leave a file that tells of a run that wants to go on (torchrun's exit code does not)."""
        if distributed.is_main():
            path = self.path / REQUEUE
            path.touch() if wanted else path.unlink(missing_ok=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run by their names, the one farthest on first."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_file()]
    return sorted(found, key=_progress, reverse=True)


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


def _place(epoch: int, step: int | None) -> tuple[float, float]:
    """How far a run is, for comparison: after an epoch the step is infinite."""
    return float(epoch), float("inf") if step is None else float(step)


def _progress(path: Path) -> tuple[float, float]:
    """How far a checkpoint is, by its name."""
    epoch, step = _NAME.fullmatch(path.name).groups()
    return _place(int(epoch), step and int(step))


def _with_parts(state: dict, path: Path, stores: dict[str, PreviousEmbeddings]) -> dict:
    """A state with its previous embeddings in it.

    Older versions kept those of checkpoints within an epoch in files beside them: "parts" has, by
    the store's name, the numbers of the files, of which a later one holds newer rows.
    """
    for name, numbers in state.pop("parts", {}).items():
        try:
            store = stores[name]
            embeddings = store.embeddings.new_zeros(store.num_images, store.embeddings.shape[1])
            seen = torch.zeros(store.num_images, dtype=torch.bool)
            for number in sorted(numbers):
                part = checkpoint.load(path.parent / _PARTS / f"part_{number}.pth", flag="--resume")
                embeddings.index_copy_(0, part["index"], part["embeddings"])
                seen[part["index"]] = True
        except (LookupError, RuntimeError, TypeError) as error:
            reason = "holds previous embeddings that are none of this run's"
            raise InputError(f"--resume {path}: {reason}") from error
        state["state_dict"] |= {f"{name}.embeddings": embeddings, f"{name}.seen": seen}
    return state
