"""`Run`: what every training script does around its method.

It owns epochs, learning rate, stopping, logging, evaluation, saving and resuming, and knows nothing
of the method. A script iterates over it:

    with Run(args, model, optimizer, ...) as run:
        for batch in run.batches(loader):
            loss, stats = run.forward(batch)
            run.step(loss, stats)
"""

import argparse
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.data.batches import Batch
from utils.data.train_loader import TwoViewLoader
from utils.evaluation.knn import LOGGED, format_comparison
from utils.method import checkpoint, collapse
from utils.method.memory_bank import MemoryBank
from utils.method.previous_embeddings import PreviousEmbeddings
from utils.runtime import checked, distributed
from utils.runtime.errors import InputError, Interrupted, RunError
from utils.runtime.stop_signals import StopSignals, ignore
from utils.runtime.torch_file import is_finite
from utils.runtime.workers import worker_failure
from utils.training import resume_check, tensorboard
from utils.training.log import Log, Means
from utils.training.loss_watch import LossWatch
from utils.training.run_folder import BOARD, RunFolder
from utils.training.schedule import learning_rate


class Run:
    """A training run in a folder: `log.jsonl`, `run.json`, and the checkpoints of `run_folder`.

    args: all of the script's flags, those of `options.add_training_options` among them. model:
    `forward(batch)` returns a loss and a dict of scalar tensors, `diagnostics()` the figures that
    tell its health, `spread` and `effective_rank` among them; low ones are warned of, unless the
    model has `can_collapse = False`. Its `constraint`, if any, is kept in checkpoints. data:
    digests by name of what is trained on, compared when resuming. about: builtins for `run.json`.
    evaluate: returns k-NN figures. compare_with: others by name, for `finish`. num_images,
    num_classes: of the data, for the banks in a checkpoint.

    Without `--resume` an earlier run in the folder is moved aside. Of several processes each makes
    the same run; `forward` is the model's, with gradients that are the mean over all of them.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        data: dict[str, str] | None = None,
        about: dict | None = None,
        evaluate: Callable[[], dict] | None = None,
        compare_with: dict[str, dict] | None = None,
        num_images: int = checked.MOST,
        num_classes: int = checked.MOST,
    ) -> None:
        if args.tensorboard:
            tensorboard.check_installed()
        self.args, self.model, self.optimizer = args, model, optimizer
        self.settings = {name: _builtin(value) for name, value in vars(args).items()}
        self.epochs = min(args.epochs, 2) if args.debug else args.epochs
        self.epoch, self.epoch_step, self.epoch_steps = 1, 0, 0
        self.knn: dict | None = None
        self._method, self._data, self._about = type(model).__name__, data or {}, about or {}
        self._evaluate, self._compare_with = evaluate, compare_with or {}
        self._counts = {"num_images": num_images, "num_classes": num_classes}
        self._start = self._saved_at = self._interval_start = time.monotonic()
        self._interval_steps = 0
        self._means = Means()
        self._shown = ""  # beside the progress bar
        self._board: tensorboard.Board | None = None
        self._batch: Batch | None = None
        self._loader: TwoViewLoader | None = None
        self._bad_images: list[str] = []  # of a run that is resumed
        self._last_saved: Path | None = None
        self._epoch_ended = False  # all that is left of `epoch` is to evaluate
        modules = dict(model.named_modules())
        stores = {n: m for n, m in modules.items() if isinstance(m, PreviousEmbeddings)}
        self._files = RunFolder(args.checkpoint_path, stores, say=Log.say)
        self._signals = StopSignals(noted=self._files.ask_for_requeue)
        self.log = Log(self._files.log, silent=not distributed.is_main())
        self._losses = LossWatch(self.log, advice=self._advice)
        self._banks = {n: m for n, m in modules.items() if isinstance(m, MemoryBank)}
        self._begin(args.resume)
        self.forward = distributed.parallel(model)

    def __enter__(self) -> "Run":
        """From here on the run stops for signals, and errors say what is kept."""
        self._signals.install()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Add to an error that ends the run where the last checkpoint is."""
        self._signals.restore()
        if self._board:
            self._board.close()
        if error is None:
            self._files.ask_for_requeue(False)  # a signal came too late to matter
        if isinstance(error, Interrupted):
            ignore()
        if isinstance(error, OSError):
            error = RunError(f"{error.filename or 'output'}: {error.strerror or error}")
        if isinstance(error, RuntimeError):
            reason = worker_failure(error) or distributed.failure(error)
            error = RunError(reason) if reason else error
        if isinstance(error, (RunError, InputError)):
            last = self._last_saved
            how = f"{last} (--resume {'auto' if self._files.holds(last) else last})" if last else ""
            text = f"{distributed.prefix()}{error}; last checkpoint: {how or 'none yet'}"
            raise type(error)(text) from None

    def batches(self, loader: TwoViewLoader) -> Iterator[Batch]:
        """Yield every remaining batch of every remaining epoch; each must be followed by `step`.

        `epoch` and `epoch_step` count from 1; an epoch has `epoch_steps`. When the loop's body is
        done with a batch, the run may save, or stop for a signal (`Interrupted`).
        """
        self._loader = loader
        loader.bad_images.restore(self._bad_images)
        self._check_same_everywhere()
        if self.epoch_step > len(loader) and not self.args.resume_anyway:
            reason = f"holds step {self.epoch_step} of an epoch of {len(loader)}"
            raise InputError(f"--resume {self._last_saved}: {reason}")
        self.epoch_steps = min(len(loader), 5) if self.args.debug else len(loader)
        self._say_what_it_is()
        while self.epoch <= self.epochs:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.args, self.epoch)
            self._interval_start = time.monotonic()
            if self.epoch_step < self.epoch_steps and not self._epoch_ended:
                yield from self._epoch_batches(loader)
            self._end_epoch()
            self.epoch, self.epoch_step, self._epoch_ended = self.epoch + 1, 0, False

    @property
    def total_steps(self) -> int:
        """Steps that have been begun in the whole run."""
        done = self.epoch_steps if self._epoch_ended else self.epoch_step
        return (self.epoch - 1) * self.epoch_steps + done

    def _say_what_it_is(self) -> None:
        """Write `run.json`, open the board; how long an epoch is, is known now."""
        start = {"method": self._method, "settings": self.settings, "data": self._data}
        start |= {"epochs": self.epochs, "steps": self.epoch_steps, **self._about}
        step = self.epoch_steps if self._epoch_ended else self.epoch_step
        place = {"checkpoint": str(self._last_saved), "epoch": self.epoch, "step": step}
        self._files.describe(start | {"resumed_from": place if self._last_saved else None})
        if self.args.tensorboard and distributed.is_main():
            folder, after = self._files.path / BOARD, self.total_steps
            self._board = tensorboard.Board(folder, steps=self.epoch_steps, after=after)
            self.log.also = self._board.scalars

    def _epoch_batches(self, loader: TwoViewLoader) -> Iterator[Batch]:
        """The batches of an epoch that are left."""
        start = self.epoch_step
        bar = {"desc": f"epoch {self.epoch}/{self.epochs}", "postfix": self._shown}
        bar |= {"total": self.epoch_steps, "initial": start}
        with tqdm(disable=not distributed.shows_bars(), **bar) as bar:
            for step, batch in enumerate(loader.epoch(self.epoch, start=start), start + 1):
                self.epoch_step, self._batch = step, batch
                yield batch
                bar.update()
                if step % self.args.print_freq == 0 or step == self.epoch_steps:
                    self._report(loader.batch_size)
                    bar.set_postfix_str(self._shown)
                self._save_if_due()
                if step == self.epoch_steps:
                    return

    def step(self, loss: Tensor, stats: dict[str, Tensor]) -> None:
        """Backward pass and update; RunError before either if the loss is not finite.

        On a GPU it is seen a little later, see `LossWatch`, but before anything is kept.
        """
        rate = self.optimizer.param_groups[0]["lr"]
        loss = distributed.nan_if_any(loss)  # so that all say and log what one has met
        self._losses.watch(loss, self._place(), rate=rate, index=self._batch.index)
        loss.backward()
        self.optimizer.step()
        # Now: their memory can serve the forward pass, and that of gradients from CUDA graphs does.
        self.optimizer.zero_grad(set_to_none=True)
        self._means.add({"loss": loss, **stats})
        self._interval_steps += 1

    def check_loss(self) -> None:
        """RunError now if the loss of the last step is not finite; waits for a GPU."""
        self._losses.check()

    def note(self, figures: dict[str, float], **texts: str) -> None:
        """Log figures of something that happened within an epoch, and texts; say the figures."""
        self.check_loss()
        self.log.write(self._place() | figures | texts)
        shown = (f"{n} {v:.4g}" for n, v in figures.items() if not isinstance(v, list))
        self.log.say(f"epoch {self.epoch}/{self.epochs} step {self.epoch_step}  {'  '.join(shown)}")

    def _place(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.epoch_step}

    def finish(self, name: str) -> None:
        """Say what came out: the k-NN table, the last checkpoint, the time."""
        if self.knn:
            self.log.say("\nk-NN accuracy on the val images, percent")
            self.log.say(format_comparison(self._compare_with | {name: self.knn}))
        seconds = time.monotonic() - self._start
        self.log.say(f"\n{self._files.epoch_path(self.epochs)} after {seconds:.0f} s")

    def _report(self, batch_size: int) -> None:
        """One line in the log and on the console for the steps since the last one."""
        self._losses.check()
        self._check_same_everywhere()
        for names in distributed.gather_objects(self._loader.bad_images.names):
            self._loader.bad_images.merge(names)  # all processes know of, and count, them
        figures = self._means.read()
        seconds = time.monotonic() - self._interval_start
        figures |= {name: value.tolist() for name, value in self.model.diagnostics().items()}
        figures["lr"] = self.optimizer.param_groups[0]["lr"]
        figures["images_per_s"] = round(self._interval_steps * batch_size / seconds, 1)
        can_collapse = getattr(self.model, "can_collapse", True)
        warning = collapse.warning(figures) if can_collapse else None
        self.note(figures, **({"warning": warning} if warning else {}))
        self._shown = f"loss {figures['loss']:.3f}, {figures['images_per_s']:.0f} images/s"
        if warning:
            self.log.say(f"WARNING {warning}")
        self._interval_start, self._interval_steps = time.monotonic(), 0

    def _check_same_everywhere(self) -> None:
        """RunError if weights, bank or clusters, which all processes have, differ between them."""
        shared = [p for p in self.model.parameters() if p.requires_grad]
        for module in (self.model, *self._banks.values()):
            shared += module.buffers(recurse=False)
        if not distributed.same_everywhere(shared):
            where = f"epoch {self.epoch}, step {self.epoch_step}"
            reason = "a fault of the machine or a bug; resume from a checkpoint"
            raise RunError(f"weights or bank differ between the processes at {where}: {reason}")

    def _save_if_due(self) -> None:
        """Between two steps: save for a signal to any process and stop, or after --save_minutes."""
        due = 0 < self.args.save_minutes <= (time.monotonic() - self._saved_at) / 60
        at_end = self.epoch_step == self.epoch_steps and self._epoch_is_saved()
        due = due and not at_end and distributed.is_main()
        told = torch.tensor([self._signals.received or 0, due])
        number, due = distributed.highest(told).tolist()
        if number:
            self._save_and_stop(signal.Signals(number))
        if due:
            self._save()

    def _epoch_is_saved(self) -> bool:
        """Whether this epoch's end has a checkpoint."""
        return self.epoch == self.epochs or self.epoch % self.args.save_freq == 0

    def _end_epoch(self) -> None:
        """Save and evaluate as far as due after an epoch; not again what was done before."""
        if self._epoch_is_saved() and not self._epoch_ended:
            self._epoch_ended = True
            self._save()
            if self._board and self._batch:
                self._board.views(self._batch, self.epoch)
        every = self.args.knn_freq
        due = self.epoch == self.epochs or (every > 0 and self.epoch % every == 0)
        if self._evaluate and every >= 0 and due:
            self._measure_knn()

    def _measure_knn(self) -> None:
        """k-NN figures of this epoch, from the log if they are there."""
        (logged, *_) = distributed.gather_objects(self.log.find("knn", LOGGED, epoch=self.epoch))
        if logged:
            self.knn = {int(k): figures for k, figures in logged.items()}
            return
        alone = distributed.world_size() == 1  # several broken off would wait for each other
        if not (alone or self._epoch_ended):
            self._save()
        try:
            with self._signals.heeded_at_once() if alone else nullcontext():
                self.knn = self._evaluate()
        except Interrupted:
            self._save_and_stop(self._signals.received)
        if self.knn:
            self.log.write({"epoch": self.epoch, "step": self.epoch_steps, "knn": self.knn})
            parts = (f"{k}-NN {figures['accuracy']:.1f}" for k, figures in self.knn.items())
            self.log.say(f"epoch {self.epoch}/{self.epochs}  {'  '.join(parts)}")

    def _advice(self) -> str:
        """What may help against a loss that is not finite."""
        again = " (with --resume_anyway)" if self._last_saved else ""
        return f"try a lower --learning_rate (or --weight_decay){again}"

    def _save(self) -> None:
        self._last_saved = self._files.save(self._state())
        self._saved_at = time.monotonic()

    def _save_and_stop(self, told: signal.Signals) -> NoReturn:
        # After an epoch all is saved, but for a run resumed from elsewhere, of which nothing is.
        if not self._epoch_ended or not self._files.holds(self._last_saved):
            self._save()
        self._files.ask_for_requeue()
        raise Interrupted(
            f"{told.name} after epoch {self.epoch}, step {self.epoch_step}: saved "
            f"{self._last_saved}; the same command with --resume auto goes on",
            exit_code=130 if told == signal.SIGINT else 75,
        )

    def _state(self) -> dict:
        """All that decides how the run goes on, as of now; the main process' is complete."""
        self._losses.check()
        rng_state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            rng_state["cuda"] = torch.cuda.get_rng_state()
        weights = self.model.state_dict()
        for name, value in weights.items():
            if not value.is_meta and not is_finite(value):
                raise RunError(f"not saved: {name} is not finite; {self._advice()}")
        return {
            "format": checkpoint.FORMAT,
            "method": self._method,
            "constraint": getattr(self.model, "constraint", None),
            "epoch": self.epoch,
            "step": None if self._epoch_ended else self.epoch_step,
            "state_dict": weights,
            "optimizer": self.optimizer.state_dict(),
            "rng_states": distributed.gather_objects(rng_state),
            "means": self._means.state(),
            "bad_images": self._loader.bad_images.names,
            "seconds": self.log.seconds,
            "data": self._data,
            "args": self.settings,
        }

    def _begin(self, resume: str | None) -> None:
        """Go on from the checkpoint that `resume` names or finds, or start anew."""
        path, state = None, None
        if resume == "auto":
            path, state = self._files.newest_good()
            if path is None:
                Log.say(f"--resume auto: no checkpoint in {self._files.path} yet, a new run")
        elif resume:
            path, state = Path(resume), self._files.load(Path(resume))
        if state:
            what = f"--resume {path}"
            known = {"method": self._method, "what": what, "fits": lambda: self._fits(state)}
            resume_check.check(state, self.settings, self._data, **known)
            self._restore(state, what=what)
            done = self.epoch - (not self._epoch_ended)
            if done >= self.epochs and resume != "auto":
                reason = f"it has finished epoch {done} of --epochs {self.epochs}"
                raise InputError(f"{what}: {reason}")
        # All have read what the main process may move now, and the same.
        places = distributed.gather_objects(state and (path.name, state["epoch"], state["step"]))
        if any(place != places[0] for place in places):
            raise RunError(f"--resume {resume}: the processes see different checkpoints: {places}")
        if distributed.is_main() and path and self._files.holds(path):
            self._files.continue_from(state["epoch"], state["step"])
        elif distributed.is_main():
            self._files.start_anew()
        distributed.wait_for_all()
        if state:
            self._last_saved = path
            self.log.resume(state["epoch"], state["step"], seconds=state["seconds"])
            place = f", step {self.epoch_step}" * (not self._epoch_ended)
            Log.say(f"resumed after epoch {self.epoch}{place} from {path}")

    def _fits(self, state: dict) -> bool:
        """Whether a state could be gone on from."""
        try:
            self._restore(state, what="")
        except InputError:
            return False
        return True

    def _restore(self, state: dict, *, what: str) -> None:
        """Take over the state of a run; InputError that begins with `what` if it does not fit."""
        if missing := [name for name in checkpoint.RUN if name not in state]:
            raise InputError(f"{what}: incomplete, without {', '.join(missing)}")
        checkpoint.load_strictly(self.model, state["state_dict"], what=what)
        for name, bank in self._banks.items():
            if fault := bank.fault(**self._counts):
                raise InputError(f"{what}: memory bank {name}: {fault}")
        checkpoint.load_optimizer(self.optimizer, state["optimizer"], what=what)
        try:
            for rng_state in state["rng_states"][distributed.rank() :][:1]:  # else as seeded
                torch.set_rng_state(rng_state["cpu"])
                if "cuda" in rng_state and torch.cuda.is_available():
                    torch.cuda.set_rng_state(rng_state["cuda"])
        except (KeyError, RuntimeError) as error:
            raise InputError(f"{what}: rng_states is none of this torch's") from error
        if distributed.is_main():
            self._means.restore(state["means"])
        self._bad_images = state["bad_images"]
        self.epoch, step = state["epoch"], state["step"]
        self._epoch_ended, self.epoch_step = step is None, step or 0


def _builtin(value: Any) -> Any:
    """Checkpoints hold builtins only."""
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(_builtin, value))
    return str(value) if isinstance(value, (Path, torch.device)) else value
