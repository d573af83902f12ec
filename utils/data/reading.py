"""What loaders have in common: the order of an epoch, and reading a batch of images in workers.

Training data are stateless: the order of an epoch is a permutation drawn from (seed, epoch). So any
step of any epoch can be produced on its own.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.data.bad_images import BadImages, reason_of
from utils.data.datasets import ImageSet
from utils.runtime import distributed
from utils.runtime.errors import RunError
from utils.runtime.workers import check_room, ignore_signals, share, worker_failure


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


def read(
    images: ImageSet,
    numbers: list[int],
    cut: Callable[[int, Tensor], Tensor],
    *,
    tolerated: int,
    own: range | None = None,
) -> CropBatch:
    """The worker part of every loader: cut(number, decoded image) for a batch of images.

    A broken image is left out. With `own`, the places in the batch that are asked for, the first
    after it in the order of the set (behind the last comes the first) that can be read and is not
    in the batch takes its place: so what a batch holds depends on the images alone. tolerated: with
    more broken images, which end the run, no further ones are looked at.
    """
    replace = own is not None
    own = own if replace else range(len(numbers))
    read, broken = read_places(images, numbers, own, cut, tolerated=tolerated, replace=replace)
    if broken and len(own) < len(numbers):
        # What replaces an image depends on the broken ones in the places before it.
        whole = range(len(numbers))
        read, broken = read_places(images, numbers, whole, cut, tolerated=tolerated, replace=True)
    crops = {number: crop for place, (number, crop) in read.items() if place in own}
    index = np.array(list(crops), dtype=np.int64)
    batch = torch.stack(list(crops.values())) if crops else torch.empty(0, dtype=torch.uint8)
    share(batch)
    return CropBatch(batch, index, images.labels[index], broken)


def read_places(
    images: ImageSet,
    numbers: list[int],
    places: range,
    cut: Callable[[int, Tensor], Tensor],
    *,
    tolerated: int,
    replace: bool,
) -> tuple[dict[int, tuple[int, Tensor]], dict[int, str]]:
    """What these places of a batch hold, place -> (number, crop), and the broken images met."""
    read: dict[int, tuple[int, Tensor]] = {}  # in the order of the batch
    broken: dict[int, str] = {}
    taken = set(numbers)
    for place in places:
        number = numbers[place]
        for candidate in _candidates(number, len(images) if replace else 1, taken):
            if len(broken) > tolerated:
                break
            if candidate in broken:
                continue
            try:
                image = images.image(candidate)
            except MemoryError:
                raise
            except Exception as error:  # a damaged file can raise about anything
                broken[candidate] = reason_of(error, images.path(candidate))
                continue
            read[place] = candidate, cut(candidate, image)
            taken.add(candidate)
            break
    return read, broken


def _candidates(number: int, count: int, taken: set[int]) -> Iterator[int]:
    """An image, then those that may replace it; count: of the images to choose from."""
    yield number
    for offset in range(1, count):
        if (other := (number + offset) % count) not in taken:
            yield other


class EpochSampler:
    """Yields each batch of one epoch, with this process' part of it, as a `Wanted`.

    Set `epoch` and `start` first.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.epoch, self.start = 1, 0

    def __len__(self) -> int:
        return self.num_images // self.batch_size

    def __iter__(self) -> Iterator[Wanted]:
        for batch in self._batches()[self.start :]:
            yield Wanted(self.epoch, batch.tolist(), distributed.own_share(len(batch)))

    def _batches(self) -> list[np.ndarray]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_images)
        return list(order[: len(self) * self.batch_size].reshape(-1, self.batch_size))


def epoch_batches(num_images: int, batch_size: int, *, seed: int, epoch: int) -> list[np.ndarray]:
    """Every image once, in batches (B,) int64 of an order drawn from (seed, epoch).

    They end where `batch_ends` says.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_images)
    return np.split(order, batch_ends(num_images, batch_size))


def batch_ends(count: int, batch_size: int) -> list[int]:
    """Where each batch of `count` rows ends, but for the last, which holds what is left over.

    A single row left over joins the batch before it, unless all batches are of one: batch norm
    cannot train on one.
    """
    ends = list(range(batch_size, count, batch_size))
    if batch_size > 1 and ends and count - ends[-1] == 1:
        ends.pop()
    return ends


def _as_is(batch):
    """Collate nothing: the data sets already return whole batches."""
    return batch


class Source(Protocol):
    """What batches of crops come from: a `DataLoader`, or the like."""

    num_workers: int

    def __iter__(self) -> Iterator[CropBatch]: ...


def _from_workers(loader: Source) -> Iterator[CropBatch]:
    """The batches of a loader. RunError if its workers cannot be started, fail or die."""
    earlier = getattr(loader, "_iterator", None)  # its workers persist
    workers = getattr(earlier, "_workers", [] if loader.num_workers else None)
    try:
        if loader.num_workers:
            check_room(loader.num_workers)
        batches = iter(loader)
        workers = getattr(batches, "_workers", workers)
        yield from batches
    except (RuntimeError, OSError, MemoryError, ImportError, EOFError) as error:
        if reason := worker_failure(error, workers):
            raise RunError(reason) from error
        raise


def read_batches(loader: Source, images: ImageSet, bad_images: BadImages) -> Iterator[CropBatch]:
    """What workers send, once the broken images have been noted: InputError as `BadImages.add`.

    RunError if workers fail. (A worker returns what it has to say of an image: raised there, it
    would arrive as a traceback.)
    """
    for batch in _from_workers(loader):
        for number, reason in batch.broken.items():
            bad_images.add(images.path(number), reason)
        names = {"index", "label"} & set(batch._fields)  # an image cache asks for no labels
        yield batch._replace(**{name: torch.as_tensor(getattr(batch, name)) for name in names})


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
