"""Several processes under torchrun, by torch.distributed alone; for one all is the identity.

Rank r of W works on rows [r B/W, (r + 1) B/W) of each global batch of B images, so what `gather`
returns, in the order of the ranks, is the batch that one process would have.
"""

import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.runtime.errors import InputError
from utils.runtime.streams import upload

# A process that waits this long for another gives up: longer than an evaluation by one of them.
_PATIENCE = timedelta(hours=1)
# In errors of torch.distributed.
_CONNECTION = (
    r"[Cc]onnection (?:was )?(?:reset|closed|refused)|[Tt]imed? ?out|remote process|Broken pipe"
)
_CHECKED_AT_ONCE = 2**22  # numbers
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return os.environ.keys() >= {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"}


def start(device: torch.device) -> torch.device:
    """Join the others if torchrun started this process; returns the device of this one.

    GPUs speak nccl and everything on the host gloo. Only the main process prints from then on.
    InputError for a process without a GPU of its own.
    """
    on_gpu, launched = device.type == "cuda", is_launched()
    if on_gpu and launched:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= (count := torch.cuda.device_count()):
            raise InputError(f"--nproc_per_node: more processes than the {count} GPUs here")
    if on_gpu and device.index is not None:
        torch.cuda.set_device(device)  # what is said of no GPU, random states too, is of this
    if launched:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    if not is_main():  # for the life of the process; names of files may be no text
        sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: SIM115
    return device


def stop() -> None:
    """Leave the others when all have come here: connections that close under one end it."""
    wait_for_all()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, 0 to W - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are: W."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return rank() == 0


def shows_bars() -> bool:
    """Whether this process draws progress bars: the main one, on a terminal."""
    return is_main() and sys.stderr.isatty()


def prefix() -> str:
    """What messages of one of several processes begin with."""
    return f"process {rank()} of {world_size()}: " if world_size() > 1 else ""


def failure(error: BaseException) -> str | None:
    """One line for an error of the connection to other processes; None for any other error."""
    if not isinstance(error, RuntimeError) or not re.search(_CONNECTION, str(error)):
        return None
    reason = str(error).splitlines()[0].split(". ")[0].split("] ")[-1][:100]
    return f"another process of the run has ended, or cannot be reached ({reason})"


def own_share(count: int) -> range:
    """The part of `count` things that this process takes: contiguous, in the order of the ranks."""
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


def own_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """This process' rows of tensors that are the same everywhere: (W n, ...) -> (n, ...)."""
    if world_size() == 1:
        return tensors
    own = own_share(len(tensors[0]))
    return tuple(tensor[own.start : own.stop] for tensor in tensors)


def gather(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of all processes, (n, ...) each -> (W n, ...), in the order of the ranks.

    Every process has the same number of rows. No gradient.
    """
    return tuple(map(_gather, tensors)) if world_size() > 1 else tensors


def _gather(tensor: Tensor) -> Tensor:
    sent = _as_bytes(tensor.detach().contiguous())
    parts = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(parts, sent)
    return torch.cat(parts).view(tensor.dtype)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor  # bool is not sent


def gather_uneven(rows: Tensor) -> Tensor:
    """The rows of all processes in the order of the ranks, any number each, none too.

    rows: (n, ...); without rows (0,) will do. Where all processes make the same of the result, as
    one would, the gradient of the rows is right.
    """
    return _GatherUneven.apply(rows) if world_size() > 1 else rows


class _GatherUneven(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        shapes = gather_objects(tuple(rows.shape))
        counts = [count for count, *_ in shapes]
        if not any(counts):
            return rows.clone()
        ctx.own = slice(sum(counts[: rank()]), sum(counts[: rank() + 1]))
        padded = rows.new_zeros(max(shapes))
        padded[: len(rows)] = rows.reshape(len(rows), *padded.shape[1:])
        parts = gather(padded)[0].split(max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient[ctx.own]


def gather_objects(value: object) -> list:
    """Every process' value (anything that can be pickled), in the order of the ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def on_main(rows: Tensor, place: slice, count: int) -> Tensor:
    """On the main process `count` rows, each process' own in its place; on others without memory.

    rows: (own, ...), on the host.
    """
    if world_size() == 1:
        return rows
    places = gather_objects(place)
    if not is_main():
        dist.send(_as_bytes(rows.contiguous()), dst=0)
        return rows.new_empty(count, *rows.shape[1:], device="meta")
    whole = rows.new_empty(count, *rows.shape[1:])
    whole[place] = rows
    for other, theirs in enumerate(places[1:], 1):
        held = whole[theirs].contiguous()  # no copy of a place that is one piece
        dist.recv(_as_bytes(held), src=other)
        whole[theirs] = held
    return whole


def from_main(tensor: Tensor) -> Tensor:
    """The main process' values, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def add_up(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place; no gradient."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give each parameter the sum of its gradients in all processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world_size() > 1 and gradients:
        total = add_up(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = total.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def highest(values: Tensor) -> Tensor:
    """The highest of each of the values (n,), on the host, over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def any_true(flag: bool) -> bool:
    """Whether any process has it true; all must ask."""
    return bool(add_up(torch.tensor(int(flag))))


def wait_for_all() -> None:
    """Return when every process has come here."""
    any_true(False)


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the body before the others do."""
    if not is_main():
        wait_for_all()
    yield
    if is_main():
        wait_for_all()


def same_everywhere(tensors: list[Tensor]) -> bool:
    """Whether tensors have the same values in every process, by a checksum of their bytes."""
    if world_size() == 1:
        return True
    sums = torch.stack([_checksum(tensor) for tensor in tensors]).cpu()
    return all(torch.equal(sums, others) for others in gather(sums)[0].chunk(world_size()))


def _checksum(tensor: Tensor) -> Tensor:
    """A sum of the bits, weighted by their place, in wrapping int64: any single change shows.

    Where they lie: a bank on a GPU would take longer to come to the host than a step.
    """
    data = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for number, part in enumerate(data.split(_CHECKED_AT_ONCE)):
        place = torch.arange(len(part), device=data.device) + number * _CHECKED_AT_ONCE
        total += (part * (2 * place + 1)).sum()
    return total


def nan_if_any(loss: Tensor) -> Tensor:
    """The loss () of this process, nan where that of any is not finite; waits for no GPU."""
    if world_size() == 1:
        return loss
    bad = add_up((~loss.detach().isfinite()).int())
    return loss.where(bad == 0, torch.nan)


def shuffled(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Rows dealt out anew among all processes, and the order that `unshuffled` takes back.

    As in MoCo: batch norm over the rows that a process then has tells it nothing about its own. The
    order is drawn by the main process' random numbers.
    """
    order = from_main(torch.randperm(len(batch) * world_size()))
    return _dealt(batch, order), order


def unshuffled(batch: Tensor, order: Tensor) -> Tensor:
    """The rows of this process again, from what came of those that `shuffled` dealt out."""
    return _dealt(batch, order.argsort())


def _dealt(batch: Tensor, order: Tensor) -> Tensor:
    """This process' part of all rows in this order."""
    (whole,) = gather(batch)
    return whole[upload(own_rows(order)[0], whole.device)]


def parallel(model: nn.Module) -> nn.Module:
    """The model to call in training: its gradients are the mean over all processes.

    Buffers stay each process' own: a bank is the same everywhere because all enqueue the same rows.
    """
    if world_size() == 1:
        return model
    # The older name of the flag warns from torch 2.14 on.
    arguments = inspect.signature(DistributedDataParallel.__init__).parameters
    flag = "forward_sync_buffers" if "forward_sync_buffers" in arguments else "broadcast_buffers"
    return DistributedDataParallel(model, init_sync=False, **{flag: False})
