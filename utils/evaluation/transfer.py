"""The linear protocol of transfer tables on extracted features, and its few-shot variant.

N images, F feature size, C classes. As in Kornblith et al., "Do better ImageNet models transfer
better?", 2019, which BYOL and SimCLR follow: logistic regression on features as they are, the l2 by
val accuracy, the classifier then fitted again on train and val. Few-shot as in Tian et al.,
"Rethinking few-shot image classification", 2020: L2-normalized features and a fixed l2, since there
are no val images to choose it on.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from utils.data.splits import draw_per_class
from utils.evaluation.logistic import MAX_ITERATIONS, TOLERANCE, Fit, Problem
from utils.runtime import distributed
from utils.runtime.errors import InputError

FEW_SHOT_L2 = 1.0
METRICS = {"top1": "top-1", "mean_per_class": "mean per class"}
_OBJECTIVE = (
    "multinomial logistic regression, objective: sum of cross-entropies + l2/2 |W|^2, bias free"
)
PROTOCOLS = {
    "chosen": f"features before the projector, as they are; {_OBJECTIVE}; l2 with the best val "
    "accuracy, the larger of equal ones; then fitted on train and val",
    "fixed": f"features before the projector, as they are; {_OBJECTIVE}; l2 as given; fitted on "
    "train and val",
    "few-shot": f"features before the projector, L2-normalized; {_OBJECTIVE}; l2 as given; fitted "
    "on images drawn from train and val, as many of every class; mean and standard deviation over "
    "the draws",
}
SOLVER = (
    f"L-BFGS in float64, from strong to weak l2, until the largest component of the gradient is at "
    f"most {TOLERANCE:g} of that at weights 0 (principal axes, each in the unit of its second "
    f"derivative); at most {MAX_ITERATIONS} iterations for one l2"
)

# By split: features (N, F) float32 and labels (N,) int64. "train", "val" (where there is one) and
# "test".
Features = dict[str, tuple[Tensor, Tensor]]


def accuracies(predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """top1 and mean_per_class in percent, of predictions and labels (N,) int64, N > 0.

    mean_per_class: the mean over the classes that occur in labels.
    """
    hits = (predictions == labels).double()
    sizes = labels.bincount()
    of_classes = labels.bincount(weights=hits)[sizes > 0] / sizes[sizes > 0]
    return {
        "top1": 100 * hits.mean().item(),
        "mean_per_class": 100 * of_classes.mean().item(),
    }


def linear_figures(
    features: Features,
    *,
    strengths: Sequence[float],
    num_classes: int,
    metric: str,
    device: torch.device | str,
) -> dict:
    """Test accuracy of the classifier on train and val, its l2 the best of strengths on val.

    Returns "top1", "mean_per_class" (percent); "l2"; "converged"; "path": what each strength gave
    on val, from strong to weak, empty where there is one strength and so nothing to choose.
    metric: which of the accuracies the choice goes by. device: where to compute. Raises InputError
    if there is something to choose and no val image.
    """
    path = []
    if len(strengths) > 1:
        if "val" not in features:
            raise InputError("--l2: no val image to choose it on; name a single value")
        path = _val_path(
            *(features["train"], features["val"], sorted(strengths, reverse=True)),
            num_classes=num_classes,
            metric=metric,
            device=device,
        )
        # max takes the first of equal ones, which is the most regularized.
        strengths = [max(path, key=lambda row: row["val"])["l2"]]
    x, y = (rows.to(device) for rows in _train_and_val(features))
    (fit,) = Problem(x, y, num_classes=num_classes).path(strengths)
    figures = accuracies(_predict(fit, features["test"][0]), features["test"][1])
    return figures | {"l2": fit.l2, "converged": fit.converged, "path": path}


def _val_path(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    strengths: Sequence[float],
    *,
    num_classes: int,
    metric: str,
    device: torch.device | str,
) -> list[dict]:
    """What each strength gives on val when fitted on train."""
    x, y = (rows.to(device) for rows in train)
    fits = Problem(x, y, num_classes=num_classes).path(strengths)
    hidden = not distributed.shows_bars()
    return [
        {
            "l2": fit.l2,
            "val": accuracies(_predict(fit, val[0]), val[1])[metric],
            "converged": fit.converged,
            "iterations": fit.iterations,
        }
        for fit in tqdm(fits, "l2", total=len(strengths), leave=False, disable=hidden)
    ]


def _train_and_val(features: Features) -> tuple[Tensor, Tensor]:
    """Features and labels of both."""
    parts = [features[split] for split in ("train", "val") if split in features]
    rows, labels = zip(*parts, strict=True)
    return torch.cat(rows), torch.cat(labels)


def _predict(fit: Fit, features: Tensor, *, chunk: int = 65536) -> Tensor:
    """Predictions (N,) for features on the CPU, there; in chunks, as they become float64."""
    device = fit.weight.device
    return torch.cat([fit.predict(rows.to(device)).cpu() for rows in features.split(chunk)])


def few_shot_figures(
    features: Features,
    *,
    shots: int,
    draws: int,
    l2: float,
    classes: Sequence[str],
    seed: int,
    device: torch.device | str,
) -> dict:
    """Test accuracy with `shots` images of every class, drawn from train and val `draws` times.

    Returns for "top1" and "mean_per_class" the mean over the draws, for top1_std and
    mean_per_class_std the standard deviation (n - 1; None for one draw), in percent; "draws": the
    accuracies of each; "l2"; "converged": whether all did. Each draw depends on seed, its number,
    the class and the order of the images. Raises InputError where a class has too few images.
    """
    x, y = _train_and_val(features)
    check_shots(shots, y.numpy(), classes)
    x, (test_x, test_y) = F.normalize(x, dim=1), features["test"]
    test_x = F.normalize(test_x, dim=1)
    rows, converged = [], True
    for draw in range(draws):
        index = draw_per_class(y.numpy(), [shots] * len(classes), seed=[seed, draw])
        part = Problem(x[index].to(device), y[index], num_classes=len(classes))
        (fit,) = part.path([l2])
        rows.append(accuracies(_predict(fit, test_x), test_y))
        converged &= fit.converged
    figures = {"draws": rows, "l2": l2, "converged": converged}
    for metric in METRICS:
        values = np.array([row[metric] for row in rows])
        figures[metric] = values.mean().item()
        figures[f"{metric}_std"] = values.std(ddof=1).item() if draws > 1 else None
    return figures


def check_shots(shots: int, labels: np.ndarray, classes: Sequence[str]) -> None:
    """InputError if a class has fewer than `shots` of the images with these labels (N,) int64."""
    sizes = np.bincount(labels, minlength=len(classes))
    if sizes.min() < shots:
        label = int(sizes.argmin())
        raise InputError(
            f"--shots {shots}: class {classes[label]} has {sizes[label]} training images"
        )


def mean_figure(rows: dict[str, dict]) -> float:
    """The mean over data sets of the accuracy that each is reported by, percent."""
    return sum(row[row["metric"]] for row in rows.values()) / len(rows)


def format_table(
    rows: dict[str, dict], *, titles: dict[str, str], missing: dict[str, str], in_mean: list[str]
) -> str:
    """A text table, percent: a line for each data set, then the mean, then what lacks and why.

    rows: by name, "metric" (of METRICS), "counts" (train, val, test, classes) and what
    `linear_figures` or `few_shot_figures` returned. titles: by name. in_mean: names of the rows
    that the mean is over; from two on it is shown.
    """
    counts = ("train", "val", "test", "classes")
    head = f"{'':<12}{'accuracy':>14}  {'':<14}{'l2':>8}"
    lines = [head + "".join(f"{name:>9}" for name in counts)]
    for name, row in rows.items():
        std = row.get(f"{row['metric']}_std")
        accuracy = f"{row[row['metric']]:.2f}" + ("" if std is None else f" ± {std:.2f}")
        line = f"{titles[name]:<12}{accuracy:>14}  {METRICS[row['metric']]:<14}{row['l2']:>8.2g}"
        line += "".join(f"{row['counts'].get(split, 0):>9}" for split in counts)
        lines.append(line + ("" if row["converged"] else "  (not converged)"))
    if len(in_mean) > 1:
        mean = mean_figure({name: rows[name] for name in in_mean})
        lines.append(f"{f'mean of {len(in_mean)}':<12}{mean:>14.2f}")
    lines += [f"{titles[name]:<12}{'-':>14}  {reason}" for name, reason in missing.items()]
    return "\n".join(lines)
