"""TensorBoard beside the log: its figures as scalars, and now and then a few views as a picture.

TensorBoard is an extra: nothing of it is imported unless it is asked for.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.data.augment import IMAGENET_MEAN, IMAGENET_STD
from utils.data.batches import Batch
from utils.runtime import distributed
from utils.runtime.errors import InputError
from utils.training.log import Log

MOST_PAIRS = 8


class Board:
    """Writes to `folder` for TensorBoard once it is open; if `wanted`, and in the main process.

    Raises InputError if it is wanted and not installed.
    """

    def __init__(self, folder: Path, *, wanted: bool) -> None:
        if wanted:
            check_installed()
        self.folder, self._wanted = folder, wanted and distributed.is_main()
        self._writer: Any = None
        self._steps = 0

    def open(self, log: Log, *, steps: int, after: int = 0) -> None:
        """Write all that is logged from now on.

        steps: of an epoch. after: steps of the run that are done; what an earlier start of it wrote
        of later ones is hidden.
        """
        if not self._wanted:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=after + 1)
        self._steps = steps
        log.also = self.scalars

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

    def views(self, batch: Batch | None, epoch: int) -> None:
        """At an epoch's end: the first query views of a batch, below each its target view."""
        if self._writer is None or batch is None:
            return
        picture = views_picture(batch)
        self._writer.add_image("views/query above target", picture, epoch * self._steps)
        self._writer.flush()

    def close(self) -> None:
        """Nothing is written after it."""
        if self._writer:
            self._writer.close()


def check_installed() -> None:
    """InputError that names --tensorboard where it is not installed."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        reason = "it is not installed (pip install tensorboard)"
        raise InputError(f"--tensorboard: {reason}") from None


def views_picture(batch: Batch, *, most: int = MOST_PAIRS) -> Tensor:
    """(3, 2 S, n S) float32, 0 to 1: n query views in a row, below them their target views.

    The normalization of the views is taken back.
    """
    rows = [_visible(views[:most]) for views in (batch.query_view, batch.target_view)]
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)


def _visible(views: Tensor) -> Tensor:
    """Views (n, 3, S, S) as they look, on the host."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (views.detach().cpu().float() * std + mean).clamp(0, 1)


def _flat(record: dict, prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a record by their path."""
    found = []
    for name, value in record.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((f"{prefix}{name}", float(value)))
    return found
