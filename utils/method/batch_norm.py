"""Batch norm whose statistics are those of the whole batch, over all processes."""

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from utils.runtime import distributed


class HostSyncBatchNorm(_BatchNorm):
    """What torch's SyncBatchNorm does on GPUs, for processes without one: (B, C) or (B, C, H, W).

    A process can have any number of rows. Running statistics as in nn.BatchNorm: those of the whole
    batch, the variance unbiased.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions from two up."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by the statistics of all processes' rows, in eval mode by the running ones."""
        if not self.training:
            return super().forward(x)
        given, x = x.dtype, x if x.dtype == torch.float64 else x.float()  # bf16 sums badly
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        places = [0, *range(2, x.dim())]
        count = int(distributed.add_up(torch.tensor(x.numel() // x.shape[1])))
        mean = all_reduce(x.sum(places)) / count
        centered = x - mean.view(shape)
        variance = all_reduce(centered.square().sum(places)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = self.momentum or 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * count / (count - 1), share)
        normalized = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalized = normalized * self.weight.view(shape) + self.bias.view(shape)
        return normalized.to(given)


def is_in(module: nn.Module) -> bool:
    """Whether any of the module's layers is a batch norm."""
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


def synchronized(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with every batch norm over all processes, its names and values unchanged."""
    if distributed.world_size() == 1:
        return module
    with_activation = [layer for layer in module.modules() if _has_activation(layer)]
    if device.type == "cuda" and with_activation:
        from timm.layers import convert_sync_batchnorm  # torch's loses the activation

        return convert_sync_batchnorm(module)
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for layer in with_activation:
        layer.register_forward_hook(_activate)
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.__class__ = HostSyncBatchNorm  # which has the same parameters and statistics
    return module


def _has_activation(layer: nn.Module) -> bool:
    """Whether it is a batch norm of timm's that has its activation in it."""
    return isinstance(layer, _BatchNorm) and hasattr(layer, "act")


def _activate(layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """What such a layer does behind the batch norm, as a forward hook."""
    return layer.act(layer.drop(output))
