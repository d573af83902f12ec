"""The loader for training: two views of each image, and more crops if asked for.

The views of an image follow from (seed, epoch, image index). So the number of workers changes no
bit, and any step of any epoch can be produced on its own. A batch goes from `EpochSampler` to
`RandomCrops` in a worker, or to `DeviceCrops`; its crops come back as one row of bytes an image,
and `augment` makes views of them on the device.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.data import augment, cropping, random_draws
from utils.data.bad_images import BadImages, read_images
from utils.data.batches import (
    Batch,
    CropBatch,
    EpochSampler,
    Wanted,
    data_loader,
    read_batches,
    read_crops,
)
from utils.data.cropping import CropGroup
from utils.data.datasets import ImageSet
from utils.runtime import distributed
from utils.runtime.errors import InputError
from utils.runtime.streams import ahead, upload


@dataclass(eq=False)
class RandomCrops(Dataset):
    """The worker part: decodes an image once and cuts its crops; keys are a `Wanted`."""

    images: ImageSet
    groups: Sequence[CropGroup]
    seed: int
    tolerated: int  # broken images, see `read_images`

    def draws(self, epoch: int, numbers: Sequence[int] | Tensor) -> np.ndarray:
        """The random numbers (n, V, NUM_DRAWS) of images' crops."""
        views = sum(group.count for group in self.groups)
        index = np.asarray(numbers, dtype=np.int64)  # can be empty
        return random_draws.uniforms(self.seed, epoch, index, views=views)

    def __getitems__(self, wanted: Wanted) -> CropBatch:
        # Those of the batch are made together, which is much faster.
        own = [wanted.numbers[place] for place in wanted.own]
        together = dict(zip(own, self.draws(wanted.epoch, own), strict=True))

        def crops(number: int, image: Tensor) -> Tensor:
            draws = together.get(number)
            if draws is None:  # it replaces a broken image
                (draws,) = self.draws(wanted.epoch, [number])
            original = self.images.original_size(number)
            return cropping.random_crops(image, draws, self.groups, original=original)

        return read_crops(
            self.images, wanted.numbers, crops, tolerated=self.tolerated, own=wanted.own
        )


class DeviceCrops:
    """Yields what workers with `RandomCrops` would send, but cut on the device.

    The images, a `PixelSet`, are copied there; those known as broken are replaced as in a worker.
    """

    def __init__(self, crops: RandomCrops, sampler: EpochSampler, device: torch.device) -> None:
        self._crops, self._sampler, self._images = crops, sampler, crops.images
        self._pixels = self._images.pixels.to(device)

    def __iter__(self) -> Iterator[CropBatch]:
        for wanted in self._sampler:
            numbers, broken = wanted.numbers[wanted.own.start : wanted.own.stop], {}
            if self._images.broken:
                numbers, broken = read_images(
                    *(self._images, wanted.numbers, lambda number, _: number),
                    **{"tolerated": self._crops.tolerated, "own": wanted.own},
                )
            index = np.array(list(numbers), dtype=np.int64)
            crops = self._cut(index, self._crops.draws(wanted.epoch, index))
            yield CropBatch(crops, index, self._images.labels[index], broken)

    def _cut(self, index: np.ndarray, draws: np.ndarray) -> Tensor:
        """The crops of images (B,) as rows of bytes; draws: (B, V, NUM_DRAWS)."""
        rows, sizes = self._images.rows[index], np.array(self._pixels.shape[-2:])
        if self._images.originals is not None:
            sizes = self._images.originals[rows][:, None]  # (B, 1, 2)
        rows = upload(torch.from_numpy(rows), self._pixels.device)
        pictures = self._pixels.index_select(0, rows)
        crops, first = [], 0
        for group in self._crops.groups:
            own = draws[:, first : first + group.count]
            boxes = cropping.crop_boxes(own, sizes, scale=group.scale)
            boxes = cropping.scaled_boxes(boxes, sizes, self._pixels.shape[-2:])
            crops.append(cropping.cut_crops(pictures, boxes, group.size).flatten(1))
            first += group.count
        return torch.cat(crops, dim=1)


class RandomLoader:
    """What loaders of random crops share: the order of an epoch, crops by workers or the device.

    groups: the crops of an image. whole: see `EpochSampler`. bad_images: what is done about a
    broken image, by default InputError; where it is skipped, another takes its place in the batch,
    with its own label and views (`read_images`). cut_on_device: a `PixelSet` is copied to the
    device and cropped there, without workers: the same order and views, but for a gray level here
    and there in a crop (`cropping.cut_crops`).
    """

    def __init__(
        self,
        images: ImageSet,
        groups: Sequence[CropGroup],
        *,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        bad_images: BadImages | None = None,
        whole: bool = False,
        cut_on_device: bool = False,
    ) -> None:
        self.images, self.batch_size = images, batch_size
        self.device = torch.device(device)
        self.bad_images = bad_images or BadImages()
        self._sampler = EpochSampler(len(images), batch_size, seed, whole=whole)
        self._crops = RandomCrops(images, groups, seed, self.bad_images.tolerated)
        if cut_on_device:
            self._loader = DeviceCrops(self._crops, self._sampler, self.device)
        else:
            self._loader = data_loader(
                self._crops,
                self.device,
                batch_sampler=self._sampler,
                num_workers=num_workers,
                persistent_workers=num_workers > 0,
            )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._sampler)

    def _read(self, epoch: int, start: int = 0) -> Iterator[CropBatch]:
        """The crops of one epoch (from 1), from batch `start` (from 0), on the host."""
        self._sampler.epoch, self._sampler.start = epoch, start
        yield from read_batches(self._loader, self.images, self.bad_images)


class TwoViewLoader(RandomLoader):
    """Yields a `Batch` of two views of each image, drawn from (seed, epoch, image index).

    Of several processes each yields its part of every batch of `batch_size`. A GPU makes the views
    of the next batch on a stream of its own while the present one is trained on. An epoch is
    `len(loader)` full batches; the few images left over wait for the next one.

    weak_strong: the target view is weak; otherwise both are strong. blur: probability of blur in a
    strong view. scale: share of the image's area that the two views take. small: groups of smaller
    crops, strong views for the query encoder alone (multi-crop, arXiv 2006.09882). symmetric: each
    of the two crops is once in the query view and once in the target view (BYOL). single: "strong"
    or "weak": only one view is made of an image, and stands for both. settings: as of
    `RandomLoader`.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        image_size: int = 224,
        weak_strong: bool = False,
        blur: float = augment.BLUR_PROBABILITY,
        scale: tuple[float, float] = (0.2, 1.0),
        small: Sequence[CropGroup] = (),
        symmetric: bool = False,
        single: str | None = None,
        **settings,
    ) -> None:
        assert not (single and (small or symmetric))
        if len(images) < batch_size:
            raise InputError(f"--batch_size {batch_size}: only {len(images)} training images")
        if batch_size % distributed.world_size():
            count = distributed.world_size()
            raise InputError(f"--batch_size {batch_size}: no multiple of the {count} processes")
        groups = [CropGroup(1 if single else 2, image_size, scale), *small]
        super().__init__(images, groups, batch_size=batch_size, **settings)
        self.symmetric, self.single = symmetric, single
        self._strong_view = partial(augment.strong_view, blur=blur)
        self._target_view = augment.weak_view if weak_strong else self._strong_view

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch (from 1), from step `start` (from 0)."""
        yield from ahead(self._views(epoch, start), self.device)

    def _views(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch. Nothing here makes the host wait for a GPU."""
        for crops, index, label, _ in self._read(epoch, start):
            if len(index) < self.batch_size // distributed.world_size():
                raise InputError(
                    f"--batch_size {self.batch_size}: of {len(self.images)} training images only "
                    f"{len(index)} can be read"
                )
            draws = self._crops.draws(epoch, index)
            large, *small = cropping.split_crops(upload(crops, self.device), self._crops.groups)
            yield self._batch(large, small, draws, index, upload(label, self.device))

    def _batch(
        self, large: Tensor, small: list[Tensor], draws: np.ndarray, index: Tensor, label: Tensor
    ) -> Batch:
        """What the device makes of crops (B, n, 3, s, s) uint8 and of draws (B, V, NUM_DRAWS)."""
        if self.single:
            render = augment.weak_view if self.single == "weak" else self._strong_view
            view = render(large[:, 0], draws[:, 0])
            return Batch(view, view, index, label)
        alike = self._target_view is self._strong_view
        if not (self.symmetric or alike):
            query = self._strong_view(large[:, 0], draws[:, 0])
            target = self._target_view(large[:, 1], draws[:, 1])
        else:
            query, target = views = _of_both(self._strong_view, large, draws)
        if self.symmetric:
            others = views if alike else _of_both(self._target_view, large, draws)
            query, target = _interleaved(*views), _interleaved(*reversed(others))
            index, label = index.repeat_interleave(2), label.repeat_interleave(2)
        return Batch(query, target, index, label, tuple(self._small_views(small, draws[:, 2:])))

    def _small_views(self, small: list[Tensor], draws: np.ndarray) -> Iterator[Tensor]:
        """Strong views (n, B, 3, s, s) of each group's crops (B, n, 3, s, s)."""
        for crops in small:
            count = crops.shape[1]
            own, draws = draws[:, :count], draws[:, count:]
            flat = crops.transpose(0, 1).flatten(0, 1)
            views = self._strong_view(flat, own.swapaxes(0, 1).reshape(len(flat), -1))
            yield views.unflatten(0, (count, -1))


def _of_both(
    render: Callable[..., Tensor], large: Tensor, draws: np.ndarray
) -> tuple[Tensor, Tensor]:
    """A view of either crop, (B, 3, S, S) each, of crops (B, 2, 3, S, S) and draws (B, V, ...).

    A GPU makes both at once: with small images the launches take longer than what they launch.
    """
    if large.device.type == "cpu":
        return render(large[:, 0], draws[:, 0]), render(large[:, 1], draws[:, 1])
    both = np.concatenate((draws[:, 0], draws[:, 1]))
    return render(large.transpose(0, 1).flatten(0, 1), both).chunk(2)


def _interleaved(one: Tensor, other: Tensor) -> Tensor:
    """Rows of both, (B, ...) each, in turn: (2 B, ...)."""
    return torch.stack([one, other], dim=1).flatten(0, 1)
