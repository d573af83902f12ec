"""Stops a run whose loss is not finite, without making the host wait for a GPU."""

import math
from collections.abc import Callable

from torch import Tensor

from utils.runtime.errors import RunError
from utils.runtime.streams import HostCopy
from utils.training.log import Log


def _is_read_later(loss: Tensor) -> bool:
    """Whether a loss is on a device that works on while the host goes ahead."""
    return loss.device.type == "cuda"


class LossWatch:
    """Looks at the loss of every step: that of a GPU when the next step comes, or when asked to.

    advice: what the error is to say last.
    """

    def __init__(self, log: Log, *, advice: Callable[[], str]) -> None:
        self._log, self._advice = log, advice
        self._last: tuple | None = None  # what `watch` got of a step that is still to be looked at

    def watch(self, loss: Tensor, place: dict[str, int], *, rate: float, index: Tensor) -> None:
        """Check the step before, and on the CPU this one; place: "epoch" and "step", from 1.

        loss: a scalar. rate: the learning rate. index: (B,) int64, the batch's images, on the host.
        """
        self.check()
        self._last = HostCopy(loss.detach()), place, rate, index
        if not _is_read_later(loss):
            self.check()

    def check(self) -> None:
        """RunError, and a line in the log, if the loss of the last step is not finite; waits."""
        if self._last is None:
            return
        (copy, place, rate, index), self._last = self._last, None
        if math.isfinite(loss := copy.get().item()):
            return
        images = index.tolist()
        self._log.write(place | {"error": f"loss {loss}", "lr": rate, "images": images})
        raise RunError(
            f"the loss is {loss} in epoch {place['epoch']}, step {place['step']}, learning rate "
            f"{rate:.4g}, images {images}; {self._advice()}"
        )
