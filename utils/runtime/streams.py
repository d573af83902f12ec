"""What keeps the host and a GPU from waiting for each other: copies, and work ahead of time.

On a CPU all of it is as if it were not there.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item", bound=tuple)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for either; one of the device as it is.

    A GPU copies from pinned memory only without the host: a tensor that lies elsewhere is copied
    there first. Where the device is the CPU, the tensor itself.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # itself, if it is pinned already
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """A tensor on its way to the host, copied as the GPU comes to it; on a CPU itself."""

    def __init__(self, tensor: Tensor) -> None:
        self._there, self._event = tensor, None
        if tensor.device.type == "cuda":
            self._there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._there.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))  # where the copy is queued

    def get(self) -> Tensor:
        """The tensor on the host; waits for it, and for nothing that the GPU has to do after it."""
        if self._event is not None:
            self._event.synchronize()
        return self._there.cpu()


@lru_cache
def _side_stream(device: torch.device) -> Any:
    """One for a device: memory that was used on a stream is kept for it, and serves no other."""
    return torch.cuda.Stream(device)


def ahead(items: Iterator[Item], device: torch.device) -> Iterator[Item]:
    """Yield items, tuples of tensors; on a GPU each is made before the one before it is handed out.

    So a GPU makes the next item on a stream of its own while it works on the present one. The host
    waits for neither. An error in making an item is raised in its place, after the items before it.
    On other devices the items come as they are, each made when it is asked for.
    """
    if device.type != "cuda":
        yield from items
        return
    side = _side_stream(device)
    # What has been put on the GPU before is there for the side stream too.
    side.wait_stream(torch.cuda.current_stream(device))

    def make() -> tuple[Item | None, Any]:
        """The next item, its work queued on the side stream, and the event of its end."""
        with torch.cuda.stream(side):
            return next(items, None), side.record_event()

    item, done = make()
    while item is not None:
        following, failure = (None, None), None
        try:
            following = make()
        except Exception as error:
            failure = error
        _hand_over(item, done, torch.cuda.current_stream(device))
        yield item
        if failure is not None:
            raise failure
        item, done = following


def _hand_over(item: tuple, done: Any, current: Any) -> None:
    """Let the current stream go on when the item is done, and keep its memory till then.

    The memory belongs to the side stream, which would fill it anew as soon as the host lets go of
    it, though the current stream may still have to read it.
    """
    current.wait_event(done)
    for part in item:
        if isinstance(part, tuple):
            _hand_over(part, done, current)
        elif part.is_cuda:
            part.record_stream(current)
