"""Copies between host and device that no step of training waits for."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; the host goes on at once.

    For a GPU by way of pinned memory: from ordinary memory the host would wait for all that the GPU
    has been given to do before.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """A tensor on its way to the host: the copy is made as the GPU comes to it.

    On the CPU it is the tensor itself, not a copy.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._there, self._event = tensor, None
        if tensor.device.type == "cuda":
            self._there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._there.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> Tensor:
        """The tensor on the host; waits for it, and for nothing that the GPU has to do after it."""
        if self._event is not None:
            self._event.synchronize()
        return self._there.cpu()
