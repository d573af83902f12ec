"""TensorBoard beside the log: its figures as scalars, and now and then a few views as a picture.

TensorBoard is an extra: nothing of it is imported unless it is asked for.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from utils.data.augment import IMAGENET_MEAN, IMAGENET_STD
from utils.data.batches import Batch
from utils.runtime.errors import InputError


class Board:
    """Writes to `folder`; steps: of an epoch; after: steps done, later ones there are hidden."""

    def __init__(self, folder: Path, *, steps: int, after: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after + 1)
        self._steps = steps

    def scalars(self, record: dict) -> None:
        """The numbers of a log record, at its step counted from the run's start.

        Those within dicts go by their path, "knn/20/accuracy"; what is not finite, and texts and
        lists, are left out.
        """
        step = (record["epoch"] - 1) * self._steps + record["step"]
        for name, value in _flat(record):
            if name not in ("epoch", "step") and math.isfinite(value):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def views(self, batch: Batch, epoch: int) -> None:
        """At an epoch's end: the first query views of a batch, below each its target view."""
        picture = views_picture(batch)
        self._writer.add_image("views/query above target", picture, epoch * self._steps)
        self._writer.flush()

    def close(self) -> None:
        """Nothing is written after it."""
        self._writer.close()


def check_installed() -> None:
    """InputError that names --tensorboard where it is not installed."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        reason = "it is not installed (pip install tensorboard)"
        raise InputError(f"--tensorboard: {reason}") from None


def views_picture(batch: Batch) -> Tensor:
    """(3, 2 S, n S) float32, 0 to 1: up to 8 query views in a row, below them their target views.

    The normalization of the views is taken back.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    rows = []
    for views in (batch.query_view, batch.target_view):
        visible = (views[:8].detach().cpu().float() * std + mean).clamp(0, 1)
        rows.append(torch.cat(list(visible), dim=2))
    return torch.cat(rows, dim=1)


def _flat(record: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record by their path."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", value
