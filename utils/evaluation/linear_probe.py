"""The linear probe: standardized features, linear classifiers for several learning rates, accuracy.

B images in a batch, F feature size, C classes, L learning rates.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.runtime.errors import RunError

EPS = 1e-5  # added to the variance
TOP_CLASSES = 5  # top-5 accuracy


class Standardize(nn.Module):
    """L2-normalize features (B, F), then (x - mean) / sqrt(var + EPS) in each dimension.

    mean and var (F,) are measured once, by `measure`, and are no parameters.
    """

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("var", torch.ones(feature_dim))

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, F)."""
        unit = F.normalize(features, dim=1)
        return (unit - self.mean) / (self.var + EPS).sqrt()

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor]) -> int:
        """Set mean and unbiased variance to those of all L2-normalized rows of batches (b, F).

        One pass in float64 that keeps no features: batches are merged as by Chan, Golub and
        LeVeque, "Updating formulae", 1979. Returns the number of rows. Raises ValueError below two
        rows, RunError for features that are not finite.
        """
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for features in batches:
            unit = F.normalize(features.cpu().double(), dim=1)
            center, total = unit.mean(dim=0), count + len(unit)
            between = (center - mean).square() * (count * len(unit) / total)
            squares = squares + (unit - center).square().sum(dim=0) + between
            mean = mean + (center - mean) * (len(unit) / total)
            count = total
        if count < 2:
            raise ValueError(f"a variance needs two rows, not {count}")
        if not mean.isfinite().all():
            raise RunError("features that are not finite; are the network's weights finite?")
        self.mean.copy_(mean)
        self.var.copy_(squares / (count - 1))
        return count


class LinearProbe(nn.Module):
    """Linear classifiers on standardized features, one for each learning rate, in one pass.

    feature_dim: F. num_classes: C. num_rates: L; all classifiers start from the same weights.
    hidden: a layer Linear-BN-ReLU of F units before the classifier, for one learning rate only,
    since classifiers would share it.
    """

    def __init__(
        self, feature_dim: int, num_classes: int, *, num_rates: int = 1, hidden: bool = False
    ) -> None:
        super().__init__()
        assert num_rates == 1 or not hidden
        self.standardize = Standardize(feature_dim)
        self.hidden = nn.Identity()
        if hidden:
            self.hidden = nn.Sequential(
                nn.Linear(feature_dim, feature_dim),
                nn.BatchNorm1d(feature_dim),
                nn.ReLU(inplace=True),
            )
        self.heads = nn.ModuleList(nn.Linear(feature_dim, num_classes) for _ in range(num_rates))
        for head in self.heads[1:]:
            head.load_state_dict(self.heads[0].state_dict())

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, F), not normalized -> logits (B, L, C)."""
        x = self.hidden(self.standardize(features))
        weight = torch.stack([head.weight for head in self.heads])  # (L, C, F)
        bias = torch.stack([head.bias for head in self.heads])  # (L, C)
        logits = F.linear(x, weight.flatten(0, 1), bias.flatten())
        return logits.unflatten(1, bias.shape)


def build_optimizer(
    probe: LinearProbe,
    rates: Sequence[float],
    *,
    momentum: float,
    weight_decay: float,
    also: Iterable[nn.Parameter] = (),
) -> torch.optim.SGD:
    """SGD with one parameter group for each learning rate, in the order of the probe's heads.

    also: further parameters (an encoder's), which, as the hidden layer, are in the first group.
    """
    groups = [
        {"params": list(head.parameters()), "lr": rate}
        for head, rate in zip(probe.heads, rates, strict=True)
    ]
    groups[0]["params"] += [*probe.hidden.parameters(), *also]
    fused = True if probe.heads[0].weight.is_cuda else None  # one kernel for a group
    return torch.optim.SGD(
        groups, lr=rates[0], momentum=momentum, weight_decay=weight_decay, fused=fused
    )


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each learning rate: logits (B, L, C), labels (B,) int64 -> (L,).

    A gradient of the sum is each classifier's own: no loss depends on another's weights.
    """
    batch, rates, _ = logits.shape
    each = labels.unsqueeze(1).expand(batch, rates).flatten()
    losses = F.cross_entropy(logits.flatten(0, 1), each, reduction="none")
    return losses.view(batch, rates).mean(dim=0)


def train_epoch(
    probe: LinearProbe, batches: Iterable[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer
) -> Tensor:
    """One epoch of steps over batches of features (b, F) and labels (b,), where the probe is.

    Returns each learning rate's mean loss over the images (L,), nan where it diverged; nothing is
    read from the device in between.
    """
    probe.train()
    total, count = torch.zeros(()), 0
    for features, labels in batches:
        losses = cross_entropies(probe(features), labels)
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        optimizer.step()
        total = total.to(losses) + losses.detach() * len(labels)
        count += len(labels)
    return (total / count).cpu()


def true_class_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """How many wrong classes are no less likely than the true one: (B, L, C), (B,) -> (B, L).

    0 to C - 1, int64; 0 is a hit of top-1. Equal logits and nan count against the probe.
    """
    true = labels.view(-1, 1, 1).expand(-1, logits.shape[1], 1)
    return (~(logits < logits.gather(2, true))).sum(dim=2) - 1


@torch.no_grad()
def accuracy(
    probe: LinearProbe, features: Tensor, labels: Tensor, *, chunk: int = 1024
) -> list[dict[str, float | None]]:
    """Accuracy of each learning rate's classifier, probe in eval mode: top1 and top5, percent.

    features: (N, F), labels: (N,) int64, on any device; they go to the probe's in chunks of rows.
    top5 is None where there are no more than five classes, and both are None where a classifier's
    logits are not finite. Raises RunError if no classifier's are.
    """
    device = probe.heads[0].weight.device
    probe.eval()
    hits = torch.zeros(2, len(probe.heads), dtype=torch.int64, device=device)
    finite = torch.ones(len(probe.heads), dtype=torch.bool, device=device)
    for x, y in zip(features.split(chunk), labels.split(chunk), strict=True):
        logits = probe(x.to(device))
        rank = true_class_rank(logits, y.to(device))
        hits += torch.stack([(rank < 1).sum(dim=0), (rank < TOP_CLASSES).sum(dim=0)])
        finite &= logits.isfinite().all(dim=2).all(dim=0)
    if not finite.any():
        raise RunError("the classifier's outputs are not finite; try a lower --lr (or --wd)")
    top1, top5 = (100 * hits.cpu().double() / len(labels)).tolist()
    has_top5 = probe.heads[0].out_features > TOP_CLASSES
    return [
        {"top1": one if good else None, "top5": five if good and has_top5 else None}
        for one, five, good in zip(top1, top5, finite.tolist(), strict=True)
    ]


def summarize(
    rates: Sequence[float], history: Sequence[dict[str, list]]
) -> dict[str, dict[str, float | int | None]]:
    """What a run found for each learning rate, by the rate as text; history: an epoch's loss,
    top1 and top5 of each rate.

    The figures are those of the last epoch; best_top1 is the highest of all measured, best_epoch
    the first that reached it; None without any.
    """
    summary = {}
    for i, rate in enumerate(rates):
        top1 = [row["top1"][i] for row in history]
        best = max((figure for figure in top1 if figure is not None), default=None)
        summary[str(rate)] = {
            "top1": top1[-1],
            "top5": history[-1]["top5"][i],
            "best_top1": best,
            "best_epoch": None if best is None else 1 + top1.index(best),
            "loss": history[-1]["loss"][i],
        }
    return summary


def best_rate(summary: dict[str, dict[str, float | int | None]]) -> str:
    """The learning rate of the highest top1 in a `summarize`, the first of equal ones.

    A rate that diverged has none; one at least has.
    """
    top1 = {rate: row["top1"] for rate, row in summary.items() if row["top1"] is not None}
    return max(top1, key=top1.get)


def format_table(summary: dict[str, dict[str, float | int | None]]) -> str:
    """A text table: a line for each learning rate, percent; columns for what the summary holds."""
    rows = summary.values()
    with_top5 = any(row["top5"] is not None for row in rows)
    with_best = any("best_top1" in row for row in rows)
    lines = ["      lr   top-1" + "   top-5" * with_top5 + "   best top-1 (epoch)" * with_best]
    for rate, row in summary.items():
        line = f"{rate:>8}{percent(row['top1']):>8}"
        line += f"{percent(row['top5']):>8}" if with_top5 else ""
        line += f"{percent(row['best_top1']):>13} ({row['best_epoch'] or '-'})" if with_best else ""
        lines.append(line)
    return "\n".join(lines)


def percent(figure: float | None) -> str:
    """A figure with two decimals; a dash where there is none."""
    return "-" if figure is None else f"{figure:.2f}"
