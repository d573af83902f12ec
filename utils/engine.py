"""`Run`: what every training script does around its method.

It owns epochs, learning rate, stopping, logging, evaluation, saving and resuming, and knows nothing
of the method. A script iterates over it:

    for batch in run.batches(loader):
        loss, stats = model(batch)
        run.step(loss, stats)
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import checkpoint
from utils.data import Batch, TwoViewLoader
from utils.errors import InputError, RunError
from utils.meters import Log, Means

# Below these the embeddings hardly tell images apart, however low the loss is.
_LOW_SPREAD = 0.1
_LOW_RANK = 5.0


class Run:
    """A training run in a folder: `log.jsonl` and `ckpt_epoch_N.pth`.

    model: the method's module; `forward(batch)` returns a loss and a dict of scalar tensors,
    `diagnostics()` the figures that tell its health, `spread` and `effective_rank` among them.
    learning_rate: epoch (from 1) -> rate. evaluate: returns k-NN figures, called every `knn_freq`
    epochs (0: only after the last; -1: never). settings: the flags, kept in every checkpoint.
    resume: a checkpoint to continue after; without one, the files of an earlier run in the folder
    are moved aside, never overwritten. debug: two epochs of five steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        folder: Path,
        epochs: int,
        learning_rate: Callable[[int], float],
        settings: dict,
        print_freq: int = 100,
        save_freq: int = 10,
        knn_freq: int = 0,
        evaluate: Callable[[], dict] | None = None,
        resume: str | None = None,
        debug: bool = False,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.folder = Path(folder)
        self.epochs = min(epochs, 2) if debug else epochs
        self.max_steps = 5 if debug else sys.maxsize
        self.settings = settings
        self.print_freq, self.save_freq, self.knn_freq = print_freq, save_freq, knn_freq
        self.knn: dict | None = None
        self._learning_rate, self._evaluate = learning_rate, evaluate
        self._means = Means()
        self._first_rank: float | None = None
        self._epoch, self._step, self._batch = 0, 0, None
        self._make_folder()
        self.log = Log(self.folder / "log.jsonl")
        if resume:
            self._resume(resume)
        else:
            self._move_earlier_run()

    @property
    def last_checkpoint(self) -> Path:
        """The file written after the last epoch."""
        return self._path(self.epochs)

    def batches(self, loader: TwoViewLoader) -> Iterator[Batch]:
        """Yield every remaining batch of every remaining epoch; each must be followed by `step`."""
        for epoch in range(self._epoch + 1, self.epochs + 1):
            self._epoch = epoch
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate(epoch)
            self._interval_start = time.monotonic()
            yield from self._epoch_batches(loader, min(len(loader), self.max_steps))
            self._end_epoch()

    def _epoch_batches(self, loader: TwoViewLoader, steps: int) -> Iterator[Batch]:
        bar = tqdm(
            total=steps, desc=f"epoch {self._epoch}/{self.epochs}", disable=not sys.stderr.isatty()
        )
        with bar:
            for step, batch in enumerate(loader.epoch(self._epoch), 1):
                self._step, self._batch = step, batch
                yield batch
                bar.update()
                if step % self.print_freq == 0 or step == steps:
                    self._report(loader.batch_size)
                if step == steps:
                    return

    def step(self, loss: Tensor, stats: dict[str, Tensor]) -> None:
        """Backward pass and update; RunError before either if the loss is not finite."""
        if not torch.isfinite(loss):  # a sync point on a GPU
            raise RunError(self._not_finite(float(loss)))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._means.add({"loss": loss, **stats})

    def _not_finite(self, loss: float) -> str:
        saved = sorted(self.folder.glob("ckpt_epoch_*.pth"), key=lambda path: path.stat().st_mtime)
        return (
            f"the loss is {loss} in epoch {self._epoch}, step {self._step}, learning rate "
            f"{self.optimizer.param_groups[0]['lr']:.4g}, images {self._batch.index.tolist()}; "
            f"last checkpoint: {saved[-1] if saved else 'none yet'}; try a lower --learning_rate"
        )

    def _report(self, batch_size: int) -> None:
        """One line in the log and on the console for the steps since the last one."""
        steps = self._means.count
        figures = self._means.read()
        seconds = time.monotonic() - self._interval_start
        figures |= {name: float(value) for name, value in self.model.diagnostics().items()}
        figures["lr"] = self.optimizer.param_groups[0]["lr"]
        figures["images_per_s"] = round(steps * batch_size / seconds, 1)
        warning = self._warning(figures)
        record = {"epoch": self._epoch, "step": self._step, **figures}
        self.log.write(record | ({"warning": warning} if warning else {}))
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.log.say(f"epoch {self._epoch}/{self.epochs} step {self._step}  {text}")
        if warning:
            self.log.say(f"WARNING {warning}")
        self._interval_start = time.monotonic()

    def _warning(self, figures: dict[str, float]) -> str | None:
        """What is wrong with the embeddings, if anything: this family fails with a low loss."""
        advice = "try a lower --learning_rate, a --momentum nearer to 1, or --proj_bn"
        rank = figures["effective_rank"]
        if self._first_rank is None:
            self._first_rank = rank
        if figures["spread"] < _LOW_SPREAD:
            return f"the embeddings collapse: spread {figures['spread']:.3f} of 0 to 1; {advice}"
        if rank < min(_LOW_RANK, self._first_rank):
            fall = f"{self._first_rank:.1f} at first, now {rank:.1f}"
            return f"the effective rank of the embeddings is low ({fall}), so is the loss; {advice}"
        return None

    def _end_epoch(self) -> None:
        last = self._epoch == self.epochs
        if last or (self.save_freq > 0 and self._epoch % self.save_freq == 0):
            self._save()
        due = self.knn_freq > 0 and self._epoch % self.knn_freq == 0
        if self._evaluate and self.knn_freq >= 0 and (last or due):
            self.knn = self._evaluate()
            self.log.write({"epoch": self._epoch, "step": self._step, "knn": self.knn})
            text = "  ".join(f"{k}-NN {figures['accuracy']:.1f}" for k, figures in self.knn.items())
            self.log.say(f"epoch {self._epoch}/{self.epochs}  {text}")

    def _path(self, epoch: int) -> Path:
        return self.folder / f"ckpt_epoch_{epoch}.pth"

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--checkpoint_path {self.folder}: {error.strerror}") from error

    def _move_earlier_run(self) -> None:
        """Put the files of a finished or broken-off run into `earlier_N`."""
        earlier = [*self.folder.glob("ckpt_epoch_*.pth"), *self.folder.glob("log.jsonl")]
        if not earlier:
            return
        number = 1
        while (aside := self.folder / f"earlier_{number}").exists():
            number += 1
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        self.log.say(f"an earlier run was in {self.folder}: moved to {aside}")

    def _save(self) -> None:
        state = {
            "format": checkpoint.FORMAT,
            "method": type(self.model).__name__,
            "epoch": self._epoch,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng_state": torch.get_rng_state(),
            "args": self.settings,
        }
        try:
            checkpoint.save(self._path(self._epoch), state)
        except (OSError, RuntimeError) as error:
            raise RunError(f"{self._path(self._epoch)} could not be written: {error}") from error

    def _resume(self, path: str) -> None:
        what = f"--resume {path}"
        state = checkpoint.load(path, flag="--resume")
        if state.get("format") != checkpoint.FORMAT:
            raise InputError(
                f"{what}: not a checkpoint of this repository (to start from it: --weights)"
            )
        if state["method"] != type(self.model).__name__:
            raise InputError(f"{what}: a run of {state['method']}, not {type(self.model).__name__}")
        checkpoint.load_strictly(self.model, state["state_dict"], what=what)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng_state"])
        self._epoch = state["epoch"]
        if self._epoch >= self.epochs:
            raise InputError(
                f"{what}: it has finished epoch {self._epoch} of --epochs {self.epochs}"
            )
        self.log.keep_until(self._epoch)
        self.log.say(f"resumed after epoch {self._epoch} from {path}")
