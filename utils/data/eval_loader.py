"""Loaders of one view of an image: a random one to train with labels, the central to evaluate."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.data import augment, cropping, random_draws
from utils.data.bad_images import BadImages
from utils.data.datasets import ImageSet
from utils.data.reading import (
    CropBatch,
    EpochSampler,
    Wanted,
    data_loader,
    epoch_batches,
    read,
    read_batches,
)
from utils.runtime import distributed
from utils.runtime.errors import InputError
from utils.runtime.streams import upload


class EvalBatch(NamedTuple):
    """One view an image: images (B, 3, S, S) float32, normalized; index, label (B,) int64, host."""

    images: Tensor
    index: Tensor
    label: Tensor


@dataclass(eq=False)
class _OneCrop(Dataset):
    """The worker part of `LabeledLoader`: one random crop; keys are a `Wanted`."""

    images: ImageSet
    image_size: int
    seed: int
    scale: tuple[float, float]
    tolerated: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, batch: Wanted) -> CropBatch:
        own = [batch.numbers[place] for place in batch.own]
        draws = random_draws.by_image(self.seed, batch.epoch, own, views=1)

        def random_crop(number: int, image: Tensor) -> Tensor:
            original = self.images.original_size(number)
            box = cropping.random_box(image, draws(number)[0], original, scale=self.scale)
            return cropping.resized_crop(image, box, self.image_size)

        return read(
            self.images, batch.numbers, random_crop, tolerated=self.tolerated, own=batch.own
        )


class _WholeEpochSampler(EpochSampler):
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
        self._loader = data_loader(
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
        for crops, index, label, _ in read_batches(self._loader, self.images, self.bad_images):
            readable = int(distributed.add_up(torch.tensor(len(index))))
            if readable < min(2, self.batch_size):  # batch norm cannot train on one
                raise InputError(
                    f"data {self.images.root}: of {len(self.images)} training images only "
                    f"{readable} can be read"
                )
            crops = crops.view(-1, 3, self.image_size, self.image_size)  # also where there is none
            draws = random_draws.uniforms(self.seed, epoch, index, views=1)[:, 0]
            images = augment.weak_view(upload(crops, self.device), draws)
            yield EvalBatch(images, index, label)


@dataclass(eq=False)
class _CenterCrops(Dataset):
    """The worker part of evaluation: one central crop of each image."""

    images: ImageSet
    image_size: int
    tolerated: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, numbers: list[int]) -> CropBatch:
        def center_crop(_: int, image: Tensor) -> Tensor:
            return cropping.center_crop(image, self.image_size)

        return read(self.images, numbers, center_crop, tolerated=self.tolerated)


class EvalLoader:
    """Yields an `EvalBatch` for every image once, in order: resize, central crop, normalize.

    Of several processes each yields its own part of the images, and waits for the others at the end
    of a pass. Images of a cache in another size are read from their files.

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
        self.images = images = images.as_stored()
        self.device = torch.device(device)
        self.bad_images = bad_images or BadImages()
        self.left_out: set[int] = set()
        self._loader = data_loader(
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
        for crops, index, label, broken in read_batches(self._loader, self.images, self.bad_images):
            found |= broken
            if len(index):
                images = augment.normalize(upload(crops, self.device))
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
