"""The two-view loader for training, a one-view loader for training with labels, one to evaluate.

Training data are stateless: the order of an epoch is a permutation drawn from (seed, epoch), and
the views of an image follow from (seed, epoch, image index). So the number of workers changes no
bit, and any step of any epoch can be produced on its own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils import augment
from utils.data import ImageSet
from utils.errors import InputError


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
    """What a worker sends: crops (B, 2, 3, S, S) uint8, draws (B, 2, n), index and label (B,)."""

    crops: Tensor
    draws: Tensor
    index: Tensor
    label: Tensor


class _TwoCrops(Dataset):
    """The worker part: decodes an image once and cuts its two crops. Keys are (epoch, index)."""

    def __init__(self, images: ImageSet, *, image_size: int, seed: int) -> None:
        self.images = images
        self.image_size = image_size
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[tuple[int, int]]) -> _CropBatch | InputError:
        epoch = keys[0][0]
        index = np.array([index for _, index in keys])
        draws = augment.uniforms(self.seed, epoch, index)
        crops = _cut(
            self.images,
            index,
            lambda row, image: augment.two_crops(image, draws[row], self.image_size),
        )
        if isinstance(crops, InputError):
            return crops
        label = torch.from_numpy(self.images.labels[index])
        return _CropBatch(crops, torch.from_numpy(draws), torch.from_numpy(index), label)


def _cut(
    images: ImageSet, index: Sequence[int], cut: Callable[[int, Tensor], Tensor]
) -> Tensor | InputError:
    """Stack cut(row, decoded image) of the images `index`; the error of the first broken file."""
    try:
        return torch.stack([cut(row, _decode(images.path(i))) for row, i in enumerate(index)])
    except InputError as error:
        return error


def _decode(path: str) -> Tensor:
    """Decode an image file; an InputError that names the file if that fails."""
    try:
        return augment.decode(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"data {path}: cannot be read as an image ({error})") from error


class _EpochSampler:
    """Yields each batch of one epoch as a list of (epoch, index); set `epoch` and `start` first."""

    def __init__(self, num_images: int, batch_size: int, seed: int) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.epoch, self.start = 1, 0

    def __len__(self) -> int:
        return self.num_images // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_images)
        for step in range(self.start, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, int(index)) for index in batch]


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


def _raise_errors(batches: Iterable) -> Iterator:
    """Pass batches on. A worker returns its error: raised there, it would arrive as a traceback."""
    for batch in batches:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _data_loader(images: Dataset, device: torch.device, **options) -> DataLoader:
    """A DataLoader of whole batches that leaves the global random state alone."""
    return DataLoader(
        images,
        collate_fn=_as_is,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
        **options,
    )


class TwoViewLoader:
    """Yields a `Batch` of two views of each image, drawn from (seed, epoch, image index).

    Workers decode and crop to uint8; color, blur, flip and normalization run on `device` for the
    whole batch. An epoch is `len(loader)` full batches of a new permutation; the few images left
    over wait for the next one. weak_strong: the target view is weak; otherwise both are strong.
    blur: probability of blur in a strong view.
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
    ) -> None:
        if len(images) < batch_size:
            raise InputError(f"--batch_size {batch_size}: only {len(images)} training images")
        self.images = images
        self.batch_size = batch_size
        self.device = torch.device(device)
        self._query_view = partial(augment.strong_view, blur=blur)
        self._target_view = augment.weak_view if weak_strong else self._query_view
        self._sampler = _EpochSampler(len(images), batch_size, seed)
        self._loader = _data_loader(
            _TwoCrops(images, image_size=image_size, seed=seed),
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
        for crops, draws, index, label in _raise_errors(self._loader):
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
    """The worker part of `LabeledLoader`: one random crop. Keys are (epoch, index)."""

    def __init__(
        self, images: ImageSet, *, image_size: int, seed: int, scale: tuple[float, float]
    ) -> None:
        self.images = images
        self.image_size = image_size
        self.seed = seed
        self.scale = scale

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[tuple[int, int]]) -> EvalBatch | InputError:
        index = np.array([index for _, index in keys])
        draws = augment.uniforms(self.seed, keys[0][0], index, views=1)[:, 0]

        def random_crop(row: int, image: Tensor) -> Tensor:
            box = augment.crop_box(draws[row], *image.shape[1:], scale=self.scale)
            return augment.resized_crop(image, box, self.image_size)

        crops = _cut(self.images, index, random_crop)
        if isinstance(crops, InputError):
            return crops
        label = torch.from_numpy(self.images.labels[index])
        return EvalBatch(crops, torch.from_numpy(index), label)


class _WholeEpochSampler(_EpochSampler):
    """Yields the batches of `epoch_batches`, every image of the epoch, as lists of keys."""

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self._batches()[self.start :]:
            yield [(self.epoch, int(index)) for index in batch]

    def _batches(self) -> list[np.ndarray]:
        return epoch_batches(self.num_images, self.batch_size, seed=self.seed, epoch=self.epoch)


class LabeledLoader:
    """Yields an `EvalBatch` of one random view of each image, for training with labels.

    The view is torchvision's RandomResizedCrop and a flip, drawn from (seed, epoch, image index).
    An epoch is every image once, in the batches of `epoch_batches`. scale: share of the area that a
    crop takes, by default as in torchvision, unlike the views of `TwoViewLoader`.
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
    ) -> None:
        self.images = images
        self.seed = seed
        self.device = torch.device(device)
        self._sampler = _WholeEpochSampler(len(images), batch_size, seed)
        self._loader = _data_loader(
            _OneCrop(images, image_size=image_size, seed=seed, scale=scale),
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
        for crops, index, label in _raise_errors(self._loader):
            draws = augment.uniforms(self.seed, epoch, index, views=1)[:, 0]
            images = augment.weak_view(crops.to(self.device, non_blocking=True), draws)
            yield EvalBatch(images, index, label)


class _CenterCrops(Dataset):
    """The worker part of evaluation: one central crop of each image."""

    def __init__(self, images: ImageSet, image_size: int) -> None:
        self.images = images
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, index: list[int]) -> EvalBatch | InputError:
        crops = _cut(
            self.images, index, lambda row, image: augment.center_crop(image, self.image_size)
        )
        if isinstance(crops, InputError):
            return crops
        label = torch.from_numpy(self.images.labels[index])
        return EvalBatch(crops, torch.tensor(index), label)


class EvalLoader:
    """Yields an `EvalBatch` for every image once, in order: resize, central crop, normalize."""

    VIEW = "shorter side to 256/224 of the size, bilinear; central crop; ImageNet mean and spread"

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        image_size: int = 224,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.images = images
        self.device = torch.device(device)
        self._loader = _data_loader(
            _CenterCrops(images, image_size),
            self.device,
            batch_size=batch_size,
            num_workers=num_workers,
        )

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._loader)

    def __iter__(self) -> Iterator[EvalBatch]:
        for crops, index, label in _raise_errors(self._loader):
            images = augment.normalize(crops.to(self.device, non_blocking=True))
            yield EvalBatch(images, index, label)
