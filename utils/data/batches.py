"""Batches: what they hold, which images are in which, and the workers that read them.

Training data are stateless: the order of an epoch is a permutation drawn from (seed, epoch). So any
step of any epoch can be produced on its own.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.data.bad_images import BadImages, read_images
from utils.data.datasets import ImageSet
from utils.runtime import distributed
from utils.runtime.errors import RunError
from utils.runtime.workers import check_room, ignore_signals, share, worker_failure


class Batch(NamedTuple):
    """One training batch, on the training device but for `index`, which the host needs.

    query_view, target_view: (B, 3, S, S) float32, normalized. index: (B,) int64. label: (B,) int64,
    -1 where there is none. small_views: of each smaller size s the crops for the query encoder
    alone, (n, B, 3, s, s). With a symmetric loss B is twice the number of images: each stands there
    twice, one after the other.
    """

    query_view: Tensor
    target_view: Tensor
    index: Tensor
    label: Tensor
    small_views: tuple[Tensor, ...] = ()


class EvalBatch(NamedTuple):
    """One view an image: images (B, 3, S, S) float32, normalized; index, label (B,) int64, host."""

    images: Tensor
    index: Tensor
    label: Tensor


class CropBatch(NamedTuple):
    """What a worker sends: crops (n, ...) uint8, index and label (n,), of the images it could read.

    broken: number of an image -> why it could not be read. Workers send index and label as arrays,
    which are part of the message (for each tensor the main process would ask for a file descriptor,
    and wait); `read_batches` makes tensors of them.
    """

    crops: Tensor
    index: np.ndarray | Tensor
    label: np.ndarray | Tensor
    broken: dict[int, str]


class Wanted(NamedTuple):
    """What a sampler asks for: a batch of images by number, and the places in it to be read."""

    epoch: int
    numbers: list[int]
    own: range


@dataclass(eq=False)
class EpochSampler:
    """Yields each batch of one epoch, with this process' part of it, as a `Wanted`.

    Set `epoch` and `start` first. An epoch has full batches only, or with `whole` every image: then
    the batches are those of `epoch_batches`.
    """

    num_images: int
    batch_size: int
    seed: int
    whole: bool = False
    epoch: int = 1
    start: int = 0

    def __len__(self) -> int:
        if self.whole:
            return len(batch_ends(self.num_images, self.batch_size)) + 1
        return self.num_images // self.batch_size

    def __iter__(self) -> Iterator[Wanted]:
        order = {"seed": self.seed, "epoch": self.epoch, "whole": self.whole}
        batches = epoch_batches(self.num_images, self.batch_size, **order)
        for batch in batches[self.start :]:
            yield Wanted(self.epoch, batch.tolist(), distributed.own_share(len(batch)))


def epoch_batches(
    num_images: int, batch_size: int, *, seed: int, epoch: int, whole: bool = True
) -> list[np.ndarray]:
    """Every image once, in batches (B,) int64 of an order drawn from (seed, epoch).

    They end where `batch_ends` says. Not whole: full batches, without what is left over.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_images)
    if whole:
        return np.split(order, batch_ends(num_images, batch_size))
    return list(order[: num_images // batch_size * batch_size].reshape(-1, batch_size))


def batch_ends(count: int, batch_size: int) -> list[int]:
    """Where each batch of `count` rows ends, but for the last, which holds what is left over.

    A single row left over joins the batch before it, unless all batches are of one: batch norm
    cannot train on one.
    """
    ends = list(range(batch_size, count, batch_size))
    if batch_size > 1 and ends and count - ends[-1] == 1:
        ends.pop()
    return ends


def read_crops(
    images: ImageSet, numbers: list[int], cut: Callable[[int, Tensor], Tensor], **how
) -> CropBatch:
    """The worker part of every loader: cut(number, picture); how: as for `read_images`."""
    crops, broken = read_images(images, numbers, cut, **how)
    index = np.array(list(crops), dtype=np.int64)
    batch = torch.stack(list(crops.values())) if crops else torch.empty(0, dtype=torch.uint8)
    share(batch)
    return CropBatch(batch, index, images.labels[index], broken)


def _as_is(batch):  # the data sets already return whole batches
    return batch


def data_loader(images: Dataset, device: torch.device, **options) -> DataLoader:
    """A DataLoader of whole batches that leaves the global random state alone."""
    # Said once for all loaders, by `workers.too_many`.
    warnings.filterwarnings("ignore", message="This DataLoader will create", module="torch")
    return DataLoader(
        images,
        collate_fn=_as_is,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=ignore_signals,
        **options,
    )


def read_batches(
    loader: Iterable[CropBatch], images: ImageSet, bad_images: BadImages
) -> Iterator[CropBatch]:
    """What workers send, once the broken images have been noted: InputError as `BadImages.add`.

    loader: a `DataLoader`, or the like without workers. (A worker returns what it has to say of an
    image: raised there, it would arrive as a traceback.)
    """
    for batch in _from_workers(loader):
        for number, reason in batch.broken.items():
            bad_images.add(images.path(number), reason)
        index, label = map(torch.as_tensor, (batch.index, batch.label))
        yield batch._replace(index=index, label=label)


def _from_workers(loader: Iterable[CropBatch]) -> Iterator[CropBatch]:
    """The batches of a loader; RunError if its workers cannot be started, fail or die."""
    num_workers = getattr(loader, "num_workers", 0)
    earlier = getattr(loader, "_iterator", None)  # its workers persist
    workers = getattr(earlier, "_workers", [] if num_workers else None)
    try:
        if num_workers:
            check_room(num_workers)
        batches = iter(loader)
        workers = getattr(batches, "_workers", workers)
        yield from batches
    except (RuntimeError, OSError, MemoryError, ImportError, EOFError) as error:
        if reason := worker_failure(error, workers):
            raise RunError(reason) from error
        raise
