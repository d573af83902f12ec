"""The two-view loader for training, a one-view loader for training with labels, one to evaluate.

Training data are stateless: the order of an epoch is a permutation drawn from (seed, epoch), and
the views of an image follow from (seed, epoch, image index). So the number of workers changes no
bit, and any step of any epoch can be produced on its own.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils import augment, distributed
from utils.bad_images import BadImages
from utils.data import ImageSet
from utils.errors import InputError, RunError
from utils.workers import check_room, ignore_signals, share, start_failure, worker_failure


class Batch(NamedTuple):
    """One training batch, on the training device but for `index`, which the host needs.

    query_view, target_view: (B, 3, S, S) float32, normalized. index: (B,) int64. label: (B,) int64,
    -1 where there is none.
    """

    query_view: Tensor
    target_view: Tensor
    index: Tensor
    label: Tensor


class _CropBatch(NamedTuple):
    """What a worker sends: crops (n, ...) uint8, index and label (n,), of the images it could read.

    broken: number of an image -> why it could not be read.
    """

    crops: Tensor
    index: Tensor
    label: Tensor
    broken: dict[int, str]


class _Batch(NamedTuple):
    """What a sampler asks for: a batch of images by number, and the places in it to be read."""

    epoch: int
    numbers: list[int]
    own: range


def _read(
    images: ImageSet,
    numbers: list[int],
    cut: Callable[[int, Tensor], Tensor],
    *,
    tolerated: int,
    own: range | None = None,
) -> _CropBatch:
    """The worker part of every loader: cut(number, decoded image) for a batch of images.

    A broken image is left out. With `own`, the places in the batch that are asked for, the first
    after it in the order of the set (behind the last comes the first) that can be read and is not
    in the batch takes its place: so what a batch holds depends on the images alone. tolerated: with
    more broken images, which end the run, no further ones are looked at.
    """
    replace = own is not None
    own = own if replace else range(len(numbers))
    read, broken = _read_places(images, numbers, own, cut, tolerated=tolerated, replace=replace)
    if broken and len(own) < len(numbers):
        # What replaces an image depends on the broken ones in the places before it.
        whole = range(len(numbers))
        read, broken = _read_places(images, numbers, whole, cut, tolerated=tolerated, replace=True)
    crops = {number: crop for place, (number, crop) in read.items() if place in own}
    index = torch.tensor(list(crops), dtype=torch.int64)
    batch = torch.stack(list(crops.values())) if crops else torch.empty(0, dtype=torch.uint8)
    label = torch.from_numpy(images.labels[index.numpy()])
    share(batch, index, label)
    return _CropBatch(batch, index, label, broken)


def _read_places(
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
                broken[candidate] = _reason(error, images.path(candidate))
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


def _reason(error: Exception, path: str) -> str:
    """One line on why a file cannot be read, without its path."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].replace(f" {path!r}", "")


class _TwoCrops(Dataset):
    """The worker part: decodes an image once and cuts its two crops; keys are a `_Batch`."""

    def __init__(self, images: ImageSet, *, image_size: int, seed: int, tolerated: int) -> None:
        self.images = images
        self.image_size = image_size
        self.seed = seed
        self.tolerated = tolerated

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, batch: _Batch) -> _CropBatch:
        def two_crops(number: int, image: Tensor) -> Tensor:
            draws = augment.uniforms(self.seed, batch.epoch, np.array([number]))[0]
            return augment.two_crops(image, draws, self.image_size)

        return _read(self.images, batch.numbers, two_crops, tolerated=self.tolerated, own=batch.own)


class _EpochSampler:
    """Yields each batch of one epoch, with this process' part of it, as a `_Batch`.

    Set `epoch` and `start` first.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.epoch, self.start = 1, 0

    def __len__(self) -> int:
        return self.num_images // self.batch_size

    def __iter__(self) -> Iterator[_Batch]:
        for batch in self._batches()[self.start :]:
            yield _Batch(self.epoch, batch.tolist(), distributed.own_share(len(batch)))

    def _batches(self) -> list[np.ndarray]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_images)
        return list(order[: len(self) * self.batch_size].reshape(-1, self.batch_size))


def epoch_batches(num_images: int, batch_size: int, *, seed: int, epoch: int) -> list[np.ndarray]:
    """Every image once, in batches (B,) int64 of an order drawn from (seed, epoch).

    The last batch holds what is left over. A single one joins the batch before it, unless all
    batches are of one image: batch norm cannot train on one.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_images)
    ends = list(range(batch_size, num_images, batch_size))
    if batch_size > 1 and ends and num_images - ends[-1] == 1:
        ends.pop()
    return np.split(order, ends)


def _as_is(batch):
    """Collate nothing: the data sets already return whole batches."""
    return batch


def _from_workers(loader: DataLoader) -> Iterator[_CropBatch]:
    """The batches of a loader. RunError if its workers cannot be started, fail or die."""
    try:
        if loader.num_workers:
            check_room(loader.num_workers)
        yield from loader
    except (RuntimeError, OSError, MemoryError) as error:
        reason = worker_failure(error)
        if not reason and isinstance(error, OSError) and loader.num_workers:
            reason = start_failure(error)
        if reason:
            raise RunError(reason) from error
        raise


def _batches(loader: DataLoader, images: ImageSet, bad_images: BadImages) -> Iterator[_CropBatch]:
    """What workers send, once the broken images have been noted: InputError as `BadImages.add`.

    RunError if workers fail. (A worker returns what it has to say of an image: raised there, it
    would arrive as a traceback.)
    """
    for batch in _from_workers(loader):
        for number, reason in batch.broken.items():
            bad_images.add(images.path(number), reason)
        yield batch


def _data_loader(images: Dataset, device: torch.device, **options) -> DataLoader:
    """A DataLoader of whole batches that leaves the global random state alone."""
    return DataLoader(
        images,
        collate_fn=_as_is,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=ignore_signals,
        **options,
    )


class TwoViewLoader:
    """Yields a `Batch` of two views of each image, drawn from (seed, epoch, image index).

    Of several processes each yields its part of every batch of `batch_size`.

    Workers decode and crop to uint8; color, blur, flip and normalization run on `device` for the
    whole batch. An epoch is `len(loader)` full batches of a new permutation; the few images left
    over wait for the next one. weak_strong: the target view is weak; otherwise both are strong.
    blur: probability of blur in a strong view. bad_images: what is done about a broken image; by
    default InputError. Where it is skipped, the next image of the set that can be read and is not
    in the batch takes its place, with its own label and views.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        image_size: int = 224,
        weak_strong: bool = False,
        blur: float = augment.BLUR_PROBABILITY,
        seed: int = 0,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        bad_images: BadImages | None = None,
    ) -> None:
        if len(images) < batch_size:
            raise InputError(f"--batch_size {batch_size}: only {len(images)} training images")
        if batch_size % distributed.world_size():
            count = distributed.world_size()
            raise InputError(f"--batch_size {batch_size}: no multiple of the {count} processes")
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self.bad_images = bad_images or BadImages()
        self._query_view = partial(augment.strong_view, blur=blur)
        self._target_view = augment.weak_view if weak_strong else self._query_view
        self._sampler = _EpochSampler(len(images), batch_size, seed)
        self._loader = _data_loader(
            _TwoCrops(
                images, image_size=image_size, seed=seed, tolerated=self.bad_images.tolerated
            ),
            self.device,
            batch_sampler=self._sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )

    def __len__(self) -> int:
        """Steps in an epoch."""
        return len(self._sampler)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch (from 1), from step `start` (from 0)."""
        self._sampler.epoch, self._sampler.start = epoch, start
        for crops, index, label, _ in _batches(self._loader, self.images, self.bad_images):
            if len(index) < self.batch_size // distributed.world_size():
                raise InputError(
                    f"--batch_size {self.batch_size}: of {len(self.images)} training images only "
                    f"{len(index)} can be read"
                )
            draws = augment.uniforms(self.seed, epoch, index)
            crops = crops.to(self.device, non_blocking=True)
            yield Batch(
                self._query_view(crops[:, 0], draws[:, 0]),
                self._target_view(crops[:, 1], draws[:, 1]),
                index,
                label.to(self.device, non_blocking=True),
            )


class EvalBatch(NamedTuple):
    """One view an image: images (B, 3, S, S) float32, normalized; index, label (B,) int64, host."""

    images: Tensor
    index: Tensor
    label: Tensor


class _OneCrop(Dataset):
    """The worker part of `LabeledLoader`: one random crop; keys are a `_Batch`."""

    def __init__(
        self,
        images: ImageSet,
        *,
        image_size: int,
        seed: int,
        scale: tuple[float, float],
        tolerated: int,
    ) -> None:
        self.images = images
        self.image_size = image_size
        self.seed = seed
        self.scale = scale
        self.tolerated = tolerated

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, batch: _Batch) -> _CropBatch:
        def random_crop(number: int, image: Tensor) -> Tensor:
            draws = augment.uniforms(self.seed, batch.epoch, np.array([number]), views=1)[0, 0]
            box = augment.crop_box(draws, *image.shape[1:], scale=self.scale)
            return augment.resized_crop(image, box, self.image_size)

        return _read(
            self.images, batch.numbers, random_crop, tolerated=self.tolerated, own=batch.own
        )


class _WholeEpochSampler(_EpochSampler):
    """Yields the batches of `epoch_batches`, every image of the epoch."""

    def __len__(self) -> int:
        return len(self._batches())

    def _batches(self) -> list[np.ndarray]:
        return epoch_batches(self.num_images, self.batch_size, seed=self.seed, epoch=self.epoch)


class LabeledLoader:
    """Yields an `EvalBatch` of one random view of each image, for training with labels.

    Of several processes each yields its part of every batch, which can be empty.

    The view is torchvision's RandomResizedCrop and a flip, drawn from (seed, epoch, image index).
    An epoch is every image once, in the batches of `epoch_batches`. scale: share of the area that a
    crop takes, by default as in torchvision, unlike the views of `TwoViewLoader`. bad_images: as
    for `TwoViewLoader`; where no image is left to take a place, the batch is smaller.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        image_size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        seed: int = 0,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        bad_images: BadImages | None = None,
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.image_size = image_size
        self.seed = seed
        self.device = torch.device(device)
        self.bad_images = bad_images or BadImages()
        self._sampler = _WholeEpochSampler(len(images), batch_size, seed)
        self._loader = _data_loader(
            _OneCrop(
                images,
                image_size=image_size,
                seed=seed,
                scale=scale,
                tolerated=self.bad_images.tolerated,
            ),
            self.device,
            batch_sampler=self._sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._sampler)

    def epoch(self, epoch: int) -> Iterator[EvalBatch]:
        """The batches of one epoch (from 1)."""
        self._sampler.epoch = epoch
        for crops, index, label, _ in _batches(self._loader, self.images, self.bad_images):
            readable = int(distributed.add_up(torch.tensor(len(index))))
            if readable < min(2, self.batch_size):  # batch norm cannot train on one
                raise InputError(
                    f"data {self.images.root}: of {len(self.images)} training images only "
                    f"{readable} can be read"
                )
            crops = crops.view(-1, 3, self.image_size, self.image_size)  # also where there is none
            draws = augment.uniforms(self.seed, epoch, index, views=1)[:, 0]
            images = augment.weak_view(crops.to(self.device, non_blocking=True), draws)
            yield EvalBatch(images, index, label)


class _CenterCrops(Dataset):
    """The worker part of evaluation: one central crop of each image."""

    def __init__(self, images: ImageSet, *, image_size: int, tolerated: int) -> None:
        self.images = images
        self.image_size = image_size
        self.tolerated = tolerated

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, numbers: list[int]) -> _CropBatch:
        def center_crop(_: int, image: Tensor) -> Tensor:
            return augment.center_crop(image, self.image_size)

        return _read(self.images, numbers, center_crop, tolerated=self.tolerated)


class EvalLoader:
    """Yields an `EvalBatch` for every image once, in order: resize, central crop, normalize.

    Of several processes each yields its own part of the images, and waits for the others at the end
    of a pass.

    bad_images: what is done about a broken image; by default InputError. Where it is skipped, it is
    left out of its batch and its number is in `left_out`, after a pass for all processes;
    InputError if every image is.
    """

    VIEW = "shorter side to 256/224 of the size, bilinear; central crop; ImageNet mean and spread"

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        image_size: int = 224,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        bad_images: BadImages | None = None,
    ) -> None:
        self.images = images
        self.device = torch.device(device)
        self.bad_images = bad_images or BadImages()
        self.left_out: set[int] = set()
        self._loader = _data_loader(
            _CenterCrops(images, image_size=image_size, tolerated=self.bad_images.tolerated),
            self.device,
            sampler=distributed.own_share(len(images)),
            batch_size=batch_size,
            num_workers=num_workers,
        )

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._loader)

    @property
    def num_readable(self) -> int:
        """How many images the latest pass could read; before the first one, all."""
        return len(self.images) - len(self.left_out)

    def __iter__(self) -> Iterator[EvalBatch]:
        self.left_out.clear()
        known, found = self.bad_images.names, {}
        for crops, index, label, broken in _batches(self._loader, self.images, self.bad_images):
            found |= broken
            if len(index):
                images = augment.normalize(crops.to(self.device, non_blocking=True))
                yield EvalBatch(images, index, label)
        self._note_of_all(known, found)
        if not self.num_readable:
            raise InputError(
                f"data {self.images.root}: none of the {len(self.images)} images can be read"
            )

    def _note_of_all(self, known: list[str], found: dict[int, str]) -> None:
        """Learn which images the other processes knew as broken before the pass and found in it.

        All then know the same, so that if there are too many, all end with the same InputError.
        """
        everyone = distributed.gather_objects((known, found))
        for names, _ in everyone:
            self.bad_images.restore(names)
        for _, broken in everyone:
            self.left_out.update(broken)
            for number, reason in broken.items():
                self.bad_images.add(self.images.path(number), reason)
