"""A run of linear evaluation or fine-tuning: recipe, features, epochs, and what linear.pth holds.

Features come from images read anew in each epoch, or were kept. F is the feature size.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.data.batches import epoch_batches
from utils.data.eval_loader import EvalLoader, LabeledLoader
from utils.evaluation import linear_probe
from utils.evaluation.feature_cache import Features
from utils.evaluation.features import extract_features
from utils.method import checkpoint
from utils.method.encoders import Backbone
from utils.runtime import checked, distributed, torch_file
from utils.runtime.errors import InputError, RunError
from utils.runtime.streams import upload

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


def _readable(loader: EvalLoader) -> np.ndarray:
    """Labels (N,) of the images that could be read, as far as known."""
    return np.delete(loader.images.labels, sorted(loader.left_out))


class FromImages:
    """Labeled features of images that are read anew in every epoch.

    views: the random crops to train on; train and val: the evaluation views. With fine_tune the
    encoder trains: it is in train mode and features of `epoch` have gradients. Otherwise it is in
    eval mode, nothing of it changes, and val features are computed once.

    Of several processes each passes its part of the images through; all get the features of
    `for_statistics` and `epoch`, the main one those of `val`. To train, the encoder's batch norm is
    that of `batch_norm.synchronized`, and its gradients are to be summed over the processes.
    """

    def __init__(
        self,
        encoder: nn.Module,
        views: LabeledLoader,
        train: EvalLoader,
        val: EvalLoader,
        *,
        fine_tune: bool,
    ) -> None:
        self.encoder = encoder.requires_grad_(fine_tune)
        self.views, self._train, self._val = views, train, val
        self.fine_tune = fine_tune
        self._val_features: tuple[Tensor, Tensor] | None = None
        self._val_is_known = False

    @property
    def labels(self) -> np.ndarray:
        """Labels (N,) of the training images that could be read in the evaluation view."""
        return _readable(self._train)

    @property
    def val_labels(self) -> np.ndarray:
        """Labels (N,) of the val images that could be read."""
        return _readable(self._val)

    def for_statistics(self) -> Iterator[Tensor]:
        """Features (b, F) of all training images in the evaluation view."""
        self.encoder.eval()
        hidden = not distributed.shows_bars()
        batches = iter(tqdm(self._train, "statistics", leave=False, disable=hidden))
        none = torch.empty(0, device=self._train.device)
        while True:
            with torch.no_grad():
                batch = next(batches, None)
                features = none if batch is None else self.encoder(batch.images)
                features = distributed.gather_uneven(features)
            if not len(features):
                return
            yield features

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (b, F) and labels (b,) of every training image once, on the device."""
        self.encoder.train(self.fine_tune)
        hidden = not distributed.shows_bars()
        bar = {"total": len(self.views), "leave": False, "disable": hidden}
        for images, _, label in tqdm(self.views.epoch(epoch), f"epoch {epoch}", **bar):
            with torch.set_grad_enabled(self.fine_tune):
                features = distributed.gather_uneven(self.encoder(images))
            label = distributed.gather_uneven(label)
            yield features, upload(label, images.device)

    def val(self) -> tuple[Tensor, Tensor] | None:
        """Features (N, F) and labels (N,) of the val images in the evaluation view."""
        if self.fine_tune or not self._val_is_known:
            self._val_is_known = True
            self._val_features = extract_features(self.encoder, self._val, "val")
        return self._val_features


class FromFeatures:
    """Labeled features extracted once; batches are taken from one tensor on the device."""

    def __init__(
        self, features: Features, *, batch_size: int, seed: int, device: torch.device
    ) -> None:
        self._features, self._labels = (part.to(device) for part in features["train"])
        self._val = features["val"]
        self.labels, self.val_labels = (features[split][1].numpy() for split in ("train", "val"))
        self.batch_size, self.seed = batch_size, seed

    def for_statistics(self) -> Iterator[Tensor]:
        """Features (b, F) of all training images."""
        yield from self._features.split(self.batch_size)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (b, F) and labels (b,) of every training image once, on the device."""
        for batch in epoch_batches(len(self._labels), self.batch_size, seed=self.seed, epoch=epoch):
            index = upload(torch.from_numpy(batch), self._labels.device)
            yield self._features[index], self._labels[index]

    def val(self) -> tuple[Tensor, Tensor]:
        """Features (N, F) and labels (N,) of the val images."""
        return self._val


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
