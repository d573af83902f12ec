"""The linear protocol of transfer tables on extracted features, and its few-shot variant.

N images, F feature size, C classes. As in Kornblith et al., "Do better ImageNet models transfer
better?", 2019, which BYOL and SimCLR follow: logistic regression on features as they are, the l2 by
val accuracy, the classifier then fitted again on train and val. Few-shot as in Tian et al.,
"Rethinking few-shot image classification", 2020: L2-normalized features and a fixed l2, since there
are no val images to choose it on.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from utils.data.splits import draw_per_class
from utils.evaluation.logistic import MAX_ITERATIONS, STRENGTHS, TOLERANCE, Fit, fit_path
from utils.runtime import distributed
from utils.runtime.errors import InputError

FEW_SHOT_L2 = 1.0
METRICS = {"top1": "top-1", "mean_per_class": "mean per class"}
_OBJECTIVE = (
    "multinomial logistic regression, objective: sum of cross-entropies + l2/2 |W|^2, bias free"
)
SOLVER = (
    f"L-BFGS in float64, from strong to weak l2, until the largest component of the gradient is at "
    f"most {TOLERANCE:g} of that at weights 0 (principal axes, each in the unit of its second "
    f"derivative); at most {MAX_ITERATIONS} iterations for one l2"
)

# By split: features (N, F) float32 and labels (N,) int64. "train", "val" (where there is one) and
# "test".
Features = dict[str, tuple[Tensor, Tensor]]


class Protocol(NamedTuple):
    """How features are measured, on a device that has float64.

    strengths: the l2 to choose from, or one. shots: the number of images of every class to fit on,
    drawn `draws` times by the seed; None: fit on all.
    """

    strengths: Sequence[float] = STRENGTHS
    shots: int | None = None
    draws: int = 5
    seed: int = 0
    device: torch.device | str = "cpu"

    def __str__(self) -> str:
        """In words, for the result file."""
        if self.shots:
            features, choice = "L2-normalized", "l2 as given;"
            images = "images drawn from train and val, as many of every class; mean and standard "
            images += "deviation over the draws"
        else:
            features, images = "as they are", "train and val"
            chosen = "l2 with the best val accuracy, the larger of equal ones; then"
            choice = chosen if len(self.strengths) > 1 else "l2 as given;"
        return (
            f"features before the projector, {features}; {_OBJECTIVE}; {choice} fitted on {images}"
        )

    def figures(self, features: Features, classes: Sequence[str], *, metric: str) -> dict:
        """Test accuracy of a classifier on train and val, or of several on images out of them.

        Returns "top1" and "mean_per_class", percent; "l2"; "converged". "path": what each strength
        gave on val by the metric, from strong to weak, empty where there is nothing to choose. With
        shots the accuracies are means, top1_std and mean_per_class_std standard deviations (n - 1;
        None for one draw), and "draws" has those of each; a draw depends on seed, its number, the
        class and the order of the images. InputError without a val image to choose on, and where a
        class has fewer images than shots.
        """
        if self.shots:
            return self._few_shot_figures(features, classes)
        path, strengths = [], sorted(self.strengths, reverse=True)
        if len(strengths) > 1:
            if "val" not in features:
                raise InputError("--l2: no val image to choose it on; name a single value")
            fits = self._fits(*features["train"], strengths, classes)
            hidden = not distributed.shows_bars()
            for fit in tqdm(fits, "l2", total=len(strengths), leave=False, disable=hidden):
                row = {"l2": fit.l2, "val": _accuracies_of(fit, *features["val"])[metric]}
                path.append(row | {"converged": fit.converged, "iterations": fit.iterations})
            # max takes the first of equal ones, which is the most regularized.
            strengths = [max(path, key=lambda row: row["val"])["l2"]]
        (fit,) = self._fits(*_train_and_val(features), strengths, classes)
        figures = _accuracies_of(fit, *features["test"])
        return figures | {"l2": fit.l2, "converged": fit.converged, "path": path}

    def _few_shot_figures(self, features: Features, classes: Sequence[str]) -> dict:
        x, y = _train_and_val(features)
        check_shots(self.shots, y.numpy(), classes)
        x, test_x = F.normalize(x, dim=1), F.normalize(features["test"][0], dim=1)
        rows, converged = [], True
        for draw in range(self.draws):
            counts = [self.shots] * len(classes)
            index = draw_per_class(y.numpy(), counts, seed=[self.seed, draw])
            (fit,) = self._fits(x[index], y[index], self.strengths, classes)
            rows.append(_accuracies_of(fit, test_x, features["test"][1]))
            converged &= fit.converged
        figures = {"draws": rows, "l2": fit.l2, "converged": converged}
        for metric in METRICS:
            values = np.array([row[metric] for row in rows])
            figures[metric] = values.mean().item()
            figures[f"{metric}_std"] = values.std(ddof=1).item() if self.draws > 1 else None
        return figures

    def _fits(
        self, x: Tensor, y: Tensor, strengths: Sequence[float], classes: Sequence[str]
    ) -> Iterator[Fit]:
        return fit_path(x.to(self.device), y, strengths, num_classes=len(classes))


def accuracies(predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """top1 and mean_per_class in percent, of predictions and labels (N,) int64, N > 0.

    mean_per_class: the mean over the classes that occur in labels.
    """
    hits = (predictions == labels).double()
    sizes = labels.bincount()
    of_classes = labels.bincount(weights=hits)[sizes > 0] / sizes[sizes > 0]
    return {"top1": 100 * hits.mean().item(), "mean_per_class": 100 * of_classes.mean().item()}


def _accuracies_of(fit: Fit, rows: Tensor, labels: Tensor) -> dict[str, float]:
    """Those of a classifier on features on the CPU; in chunks, as they become float64."""
    parts = [fit.predict(part.to(fit.weight.device)).cpu() for part in rows.split(65536)]
    return accuracies(torch.cat(parts), labels)


def _train_and_val(features: Features) -> tuple[Tensor, Tensor]:
    """Features and labels of both."""
    parts = [features[split] for split in ("train", "val") if split in features]
    rows, labels = zip(*parts, strict=True)
    return torch.cat(rows), torch.cat(labels)


def check_shots(shots: int, labels: np.ndarray, classes: Sequence[str]) -> None:
    """InputError if a class has fewer than `shots` of the images with these labels (N,) int64."""
    sizes = np.bincount(labels, minlength=len(classes))
    if sizes.min() < shots:
        label = int(sizes.argmin())
        raise InputError(
            f"--shots {shots}: class {classes[label]} has {sizes[label]} training images"
        )
