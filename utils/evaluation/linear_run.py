"""A run of linear evaluation or fine-tuning: its recipe, its epochs, and what linear.pth holds."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.evaluation import linear_probe
from utils.evaluation.labeled_features import FromFeatures, FromImages
from utils.method import checkpoint
from utils.method.encoders import Backbone
from utils.runtime import checked, distributed, torch_file
from utils.runtime.errors import InputError, RunError

FORMAT = "cmsf-linear-2"  # 1 knew images by their sizes and times
ENCODER = "encoders.query_encoder.backbone."  # a fine-tuned encoder's names in linear.pth


@dataclass
class Recipe:
    """How a probe is trained, by the names of the flags: what a resumed run may not change."""

    lr: list[float]
    lr_schedule: list[int]
    momentum: float
    wd: float
    batch_size: int
    seed: int
    cached: bool
    fine_tune: bool
    mlp: bool

    def rate(self, base: float, epoch: int) -> float:
        """The learning rate in an epoch from 1: a tenth after each epoch of the schedule."""
        return base * 0.1 ** sum(epoch > last for last in self.lr_schedule)

    @property
    def protocol(self) -> str:
        """In words what is done."""
        crops = "random resized crops (scale 0.08 to 1) and flips"
        parts = (
            f"backbone features, {'encoder trained too' if self.fine_tune else 'frozen encoder'}",
            "L2-normalized, standardized with the training features' mean and unbiased variance",
            "Linear-BN-ReLU and a linear layer" if self.mlp else "linear layer",
            f"trained on {'central crops, extracted once' if self.cached else crops}",
            f"cross-entropy, SGD with momentum {self.momentum}, weight decay {self.wd}, batch "
            f"{self.batch_size}, a tenth of the learning rate after {self.lr_schedule} epochs",
            "top-1 and top-5 of val's central crops after the last epoch",
            "best_lr and best_top1 chosen on val",
        )
        return "; ".join(parts)


SETTINGS = tuple(field.name for field in fields(Recipe))

_PERCENT = checked.list_of(checked.or_none(checked.real(0, 100)))
_ROW = {
    "loss": checked.list_of(checked.or_none(checked.real())),
    "top1": _PERCENT,
    "top5": _PERCENT,
}
# What is in linear.pth beside what every checkpoint has.
_FIELDS = {
    "epoch": checked.whole(1),
    "probe": checked.TABLE,
    "optimizer": checked.TABLE,
    "history": checked.list_of(checked.TABLE),
    "key": checked.table_of(checked.TEXT),
    "classes": checked.list_of(checked.TEXT),
    "num_images": checked.whole(1),
    "protocol": checked.TEXT,
    "settings": checked.table_of(checked.PLAIN),
    "bad_images": checked.list_of(checked.TEXT),
}
# Settings that a saved probe is measured with, whatever the flags say.
_OF_PROBE = {
    "lr": checked.list_of(checked.real(0)),
    "mlp": checked.FLAG,
    "fine_tune": checked.FLAG,
}


def load(
    path: Path,
    recipe: Recipe,
    *,
    key: dict[str, str],
    classes: list[str],
    measure_only: bool,
) -> dict:
    """The linear.pth that --resume names; InputError unless it is of this recipe and these data.

    key: of the features; the saved run must have the same parts. measure_only: `recipe` need
    not be the same, and gets the settings of the saved probe.
    """
    what = f"--resume {path}"
    saved = checkpoint.load(path, flag="--resume")
    if saved.get("format") != FORMAT:
        raise InputError(f"{what}: no linear.pth of this version")
    saved.setdefault("bad_images", [])
    for name, kind in _FIELDS.items():
        checked.take(saved, name, kind, what=what)
    if differing := [name for name in key if saved["key"].get(name) != key[name]]:
        raise InputError(f"{what}: a run with another {', '.join(differing)}")
    if list(saved["classes"]) != classes:
        raise InputError(f"{what}: a run on other classes than those of the data")
    for name in SETTINGS:
        kind = _OF_PROBE.get(name, checked.ANY)
        value = checked.take(saved["settings"], name, kind, what=f"{what}: settings")
        if measure_only and name in _OF_PROBE:
            setattr(recipe, name, value)
        elif not measure_only and value != getattr(recipe, name):
            text = f"--{name} {torch_file.one_line(str(value))}, not {getattr(recipe, name)}"
            raise InputError(f"{what}: a run with {text}")
    if not recipe.lr or (len(recipe.lr) > 1 and (recipe.mlp or recipe.fine_tune)):
        raise InputError(f"{what}: settings has {len(recipe.lr)} learning rates")
    _check_history(saved, num_rates=len(recipe.lr), what=what)
    return saved


def _check_history(saved: dict, *, num_rates: int, what: str) -> None:
    """InputError unless a saved run has the figures of each of its epochs, measured in the last.

    A learning rate that diverged has none.
    """
    rows, epoch = saved["history"], saved["epoch"]
    if len(rows) != epoch:
        raise InputError(f"{what}: history has {len(rows)} epochs, not {epoch}")
    for number, row in enumerate(rows, 1):
        for name, kind in _ROW.items():
            values = checked.take(row, name, kind, what=f"{what}: history of epoch {number}")
            unmeasured = name == "top1" and number == epoch and values.count(None) == num_rates
            if len(values) != num_rates or unmeasured:
                raise InputError(f"{what}: history of epoch {number}: {name} is incomplete")


class LinearRun:
    """A probe with its optimizer and the figures of its epochs, new or as a linear.pth has them.

    backbone: on the device; with `recipe.fine_tune` the optimizer has its parameters too. saved:
    what `load` gave, None for a new probe, seeded by the recipe, whose statistics are to be
    measured. what: names the saved file.
    """

    def __init__(
        self,
        recipe: Recipe,
        backbone: Backbone,
        *,
        num_classes: int,
        device: torch.device,
        saved: dict | None = None,
        what: str = "",
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.encoder = recipe, backbone.module
        self.probe = linear_probe.LinearProbe(
            backbone.feature_dim, num_classes, num_rates=len(recipe.lr), hidden=recipe.mlp
        ).to(device)
        self.optimizer = linear_probe.build_optimizer(
            self.probe,
            recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.wd,
            also=self.encoder.parameters() if recipe.fine_tune else (),
        )
        if recipe.fine_tune:
            self.optimizer.register_step_pre_hook(
                lambda *_: distributed.sum_gradients(self.encoder.parameters())
            )
        # For each epoch the loss, top1 and top5 of every rate; None: diverged, or not measured.
        self.history: list[dict[str, list[float | None]]] = saved["history"] if saved else []
        if saved:
            # Of several learning rates one may have diverged; the others' classifiers go on.
            checkpoint.load_strictly(self.probe, saved["probe"], what=what, finite=False)
            checkpoint.load_optimizer(self.optimizer, saved["optimizer"], what=what, finite=False)

    def train(
        self, data: FromImages | FromFeatures, *, epochs: int, eval_freq: int
    ) -> Iterator[str]:
        """Train up to the last epoch; yields a line whenever val has been measured.

        That is every `eval_freq` epochs and after the last; in between top1 and top5 are None. A
        run that has had its last epoch is measured again: its figures are those of val as it is
        now. RunError if no learning rate has a finite loss. Of several processes all train, and the
        main one measures.
        """
        rates = self.recipe.lr
        if len(self.history) >= epochs:
            self._note(self.measure(data), self.history[-1])
        for epoch in range(len(self.history) + 1, epochs + 1):
            losses = self._train_epoch(data, epoch)
            row = {"loss": [loss if math.isfinite(loss) else None for loss in losses]}
            self.history.append(row | dict.fromkeys(("top1", "top5"), [None] * len(rates)))
            if epoch % eval_freq and epoch < epochs:
                continue
            self._note(self.measure(data), self.history[-1])
            parts = (
                f"lr {rate}: loss {loss:.4f} top-1 {linear_probe.percent(top1)}"
                for rate, loss, top1 in zip(rates, losses, self.history[-1]["top1"], strict=True)
            )
            yield f"epoch {epoch}/{epochs}  {'  '.join(parts)}"

    @staticmethod
    def _note(figures: list[dict[str, float | None]] | None, row: dict[str, list]) -> None:
        """Put what val gave into an epoch's row, where this process has it."""
        for name in ("top1", "top5") if figures else ():
            row[name] = [of_rate[name] for of_rate in figures]

    def _train_epoch(self, data: FromImages | FromFeatures, epoch: int) -> list[float]:
        """One epoch's mean loss of each learning rate; RunError if none of them is finite."""
        for group, rate in zip(self.optimizer.param_groups, self.recipe.lr, strict=True):
            group["lr"] = self.recipe.rate(rate, epoch)
        # Only dropout in a fine-tuned encoder draws from here; so resuming changes no bit of it.
        entropy = [self.recipe.seed, epoch, distributed.rank()]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        losses = linear_probe.train_epoch(self.probe, data.epoch(epoch), self.optimizer)
        for value in (losses, *self.probe.state_dict().values()):  # each GPU may round differently
            distributed.from_main(value)
        losses = losses.tolist()
        if not any(map(math.isfinite, losses)):
            raise RunError(f"the loss is {losses[0]} in epoch {epoch}; try a lower --lr (or --wd)")
        return losses

    def measure(self, data: FromImages | FromFeatures) -> list[dict[str, float | None]] | None:
        """Accuracy on val of each learning rate's classifier; None but on the main process."""
        val = data.val()
        return linear_probe.accuracy(self.probe, *val) if val else None

    def state(self) -> dict[str, Any]:
        """What linear.pth holds of the run.

        A fine-tuned encoder is in it under the names of this repository's checkpoints, so that both
        evaluations read it as --weights.
        """
        state = {
            "format": FORMAT,
            "epoch": len(self.history),
            "probe": self.probe.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "settings": asdict(self.recipe),
        }
        if self.recipe.fine_tune:
            weights = self.encoder.state_dict()
            state["state_dict"] = {ENCODER + name: value for name, value in weights.items()}
        return state
