"""The learning rate as a pure function of the epoch."""

import math
from collections.abc import Sequence


def learning_rate(
    base: float,
    epoch: int,
    *,
    epochs: int,
    cosine: bool,
    decay_epochs: Sequence[int],
    decay_rate: float,
) -> float:
    """Learning rate of an epoch; epochs count from 1.

    Cosine: base / 2 * (1 + cos(pi * (epoch - 1) / epochs)): `base` in the first epoch, nearly 0 in
    the last. Otherwise `base` times `decay_rate` for each of `decay_epochs` that lies before this
    epoch.
    """
    if cosine:
        return base / 2 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
    return base * decay_rate ** sum(epoch > decay_epoch for decay_epoch in decay_epochs)
