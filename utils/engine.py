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
from utils.errors import InputError, RunError
from utils.knn import format_comparison
from utils.loaders import Batch, TwoViewLoader
from utils.meters import Log, Means

# Below these the embeddings hardly tell images apart, however low the loss is.
_LOW_SPREAD = 0.1
_LOW_RANK = 5.0

# Flags that a resumed run may have otherwise without becoming another experiment.
_MAY_DIFFER = {"resume", "checkpoint_path", "num_workers", "print_freq", "save_freq", "knn_freq"}


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
        compare_with: dict[str, dict] | None = None,
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
        self.epoch, self.epoch_step, self.epoch_steps, self.total_steps = 0, 0, 0, 0
        self._learning_rate, self._evaluate = learning_rate, evaluate
        self._compare_with = compare_with or {}
        self._start = time.monotonic()
        self._means = Means()
        self._batch: Batch | None = None
        self._make_folder()
        self.log = Log(self.folder / "log.jsonl")
        if not resume or Path(resume).resolve().parent != self.folder.resolve():
            self._move_earlier_run()
        if resume:
            self._resume(resume)

    def batches(self, loader: TwoViewLoader) -> Iterator[Batch]:
        """Yield every remaining batch of every remaining epoch; each must be followed by `step`.

        `epoch` and `epoch_step` count from 1; an epoch has `epoch_steps`.
        """
        for epoch in range(self.epoch + 1, self.epochs + 1):
            self.epoch = epoch
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate(epoch)
            self._interval_start = time.monotonic()
            yield from self._epoch_batches(loader, min(len(loader), self.max_steps))
            self._end_epoch()

    def _epoch_batches(self, loader: TwoViewLoader, steps: int) -> Iterator[Batch]:
        bar = tqdm(
            total=steps, desc=f"epoch {self.epoch}/{self.epochs}", disable=not sys.stderr.isatty()
        )
        with bar:
            for step, batch in enumerate(loader.epoch(self.epoch), 1):
                self.epoch_step, self.epoch_steps, self._batch = step, steps, batch
                self.total_steps = (self.epoch - 1) * steps + step
                yield batch
                bar.update()
                if step % self.print_freq == 0 or step == steps:
                    self._report(loader.batch_size)
                if step == steps:
                    return

    def step(self, loss: Tensor, stats: dict[str, Tensor]) -> None:
        """Backward pass and update; RunError before either if the loss is not finite."""
        if not torch.isfinite(loss):  # a sync point on a GPU
            raise RunError(self._not_finite(loss.item()))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._means.add({"loss": loss, **stats})

    def note(self, figures: dict[str, float]) -> None:
        """Log figures of something that happened within an epoch."""
        self.log.write({"epoch": self.epoch, "step": self.epoch_step, **figures})
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.log.say(f"epoch {self.epoch}/{self.epochs} step {self.epoch_step}  {text}")

    def finish(self, name: str) -> None:
        """Say what came out: the k-NN table, the last checkpoint, the time."""
        if self.knn:
            self.log.say("\nk-NN accuracy on the val images, percent")
            self.log.say(format_comparison(self._compare_with | {name: self.knn}))
        seconds = time.monotonic() - self._start
        self.log.say(f"\n{self._path(self.epochs)} after {seconds:.0f} s")

    def _not_finite(self, loss: float) -> str:
        saved = sorted(self.folder.glob("ckpt_epoch_*.pth"), key=lambda path: path.stat().st_mtime)
        return (
            f"the loss is {loss} in epoch {self.epoch}, step {self.epoch_step}, learning rate "
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
        record = {"epoch": self.epoch, "step": self.epoch_step, **figures}
        self.log.write(record | ({"warning": warning} if warning else {}))
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.log.say(f"epoch {self.epoch}/{self.epochs} step {self.epoch_step}  {text}")
        if warning:
            self.log.say(f"WARNING {warning}")
        self._interval_start = time.monotonic()

    def _warning(self, figures: dict[str, float]) -> str | None:
        """What is wrong with the embeddings, if anything: this family fails with a low loss."""
        advice = "try a lower --learning_rate, a --momentum nearer to 1, or --proj_bn"
        if figures["spread"] < _LOW_SPREAD:
            return f"the embeddings collapse: spread {figures['spread']:.3f} of 0 to 1; {advice}"
        if figures["effective_rank"] < _LOW_RANK:
            rank = f"{figures['effective_rank']:.1f}"
            return (
                f"the embeddings have an effective rank of {rank} only: a low loss then means "
                f"that images look alike, not that they are understood; {advice}"
            )
        return None

    def _end_epoch(self) -> None:
        last = self.epoch == self.epochs
        if last or self.epoch % self.save_freq == 0:
            self._save()
        due = self.knn_freq > 0 and self.epoch % self.knn_freq == 0
        if self._evaluate and self.knn_freq >= 0 and (last or due):
            self.knn = self._evaluate()
            self.log.write({"epoch": self.epoch, "step": self.epoch_step, "knn": self.knn})
            text = "  ".join(f"{k}-NN {figures['accuracy']:.1f}" for k, figures in self.knn.items())
            self.log.say(f"epoch {self.epoch}/{self.epochs}  {text}")

    def _path(self, epoch: int) -> Path:
        return self.folder / f"ckpt_epoch_{epoch}.pth"

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "log.jsonl").open("a").close()
        except OSError as error:
            raise InputError(f"--checkpoint_path {self.folder}: {error.strerror}") from error

    def _move_earlier_run(self) -> None:
        """Put the files of a finished or broken-off run into `earlier_N`."""
        earlier = [*self.folder.glob("ckpt_epoch_*.pth"), self.log.path]
        if earlier == [self.log.path] and not self.log.path.stat().st_size:
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
            "epoch": self.epoch,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng_state": torch.get_rng_state(),
            "args": self.settings,
        }
        try:
            checkpoint.save(self._path(self.epoch), state)
        except (OSError, RuntimeError) as error:
            raise RunError(f"{self._path(self.epoch)} could not be written: {error}") from error

    def _resume(self, path: str) -> None:
        what = f"--resume {path}"
        state = checkpoint.load(path, flag="--resume")
        if state.get("format") != checkpoint.FORMAT:
            raise InputError(f"{what}: not a run of this repository (to start from it: --weights)")
        if state.get("method") != type(self.model).__name__:
            raise InputError(f"{what}: a run of {state.get('method')}, not of this script")
        self._say_differences(checkpoint.settings(state))
        try:
            checkpoint.load_strictly(self.model, state["state_dict"], what=what)
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng_state"])
            self.epoch = int(state["epoch"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{what}: incomplete or damaged ({error!r})") from error
        if self.epoch >= self.epochs:
            raise InputError(
                f"{what}: it has finished epoch {self.epoch} of --epochs {self.epochs}"
            )
        self.log.keep_until(self.epoch)
        self.log.say(f"resumed after epoch {self.epoch} from {path}")

    def _say_differences(self, before: dict) -> None:
        """Name the flags that differ from those of the run that is resumed."""
        for name, value in self.settings.items():
            if name in before and before[name] != value and name not in _MAY_DIFFER:
                self.log.say(f"WARNING --{name} was {before[name]} in the run that is resumed")
