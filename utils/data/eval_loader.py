"""Loaders of one view of an image: a random one to train with labels, the central to evaluate."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.data import augment, cropping
from utils.data.bad_images import BadImages
from utils.data.batches import CropBatch, EvalBatch, data_loader, read_batches, read_crops
from utils.data.cropping import CropGroup
from utils.data.datasets import ImageSet
from utils.data.train_loader import RandomLoader
from utils.runtime import distributed
from utils.runtime.errors import InputError
from utils.runtime.streams import upload


class LabeledLoader(RandomLoader):
    """Yields an `EvalBatch` of one random view of each image, for training with labels.

    Of several processes each yields its part of every batch, which can be empty.

    The view is torchvision's RandomResizedCrop and a flip, drawn from (seed, epoch, image index).
    An epoch is every image once, in the batches of `epoch_batches`. scale: share of the area that a
    crop takes, by default as in torchvision, unlike the views of `TwoViewLoader`. fewest:
    InputError where fewer images of a batch can be read; batch norm cannot train on one. settings:
    as of `RandomLoader`; where no image is left to take the place of a broken one, the batch is
    smaller.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        image_size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        fewest: int = 2,
        **settings,
    ) -> None:
        self.image_size = image_size
        self.fewest = fewest
        super().__init__(images, [CropGroup(1, image_size, scale)], whole=True, **settings)

    def epoch(self, epoch: int) -> Iterator[EvalBatch]:
        """The batches of one epoch (from 1)."""
        for crops, index, label, _ in self._read(epoch):
            readable = int(distributed.add_up(torch.tensor(len(index))))
            if readable < min(self.fewest, self.batch_size):
                count = f"of {len(self.images)} images only {readable} can be read"
                raise InputError(f"data {self.images.root}: {count}")
            crops = crops.view(-1, 3, self.image_size, self.image_size)  # also where there is none
            draws = self._crops.draws(epoch, index)[:, 0]
            yield EvalBatch(augment.weak_view(upload(crops, self.device), draws), index, label)


@dataclass(eq=False)
class _CenterCrops(Dataset):
    """The worker part of evaluation: one central crop of each image."""

    images: ImageSet
    image_size: int
    tolerated: int  # broken images, see `read_images`

    def __getitems__(self, numbers: list[int]) -> CropBatch:
        def center_crop(_: int, image: Tensor) -> Tensor:
            return cropping.center_crop(image, self.image_size)

        return read_crops(self.images, numbers, center_crop, tolerated=self.tolerated)


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
            _CenterCrops(images, image_size, self.bad_images.tolerated),
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
        # What the others knew before the pass and found in it: all then know the same, so that if
        # there are too many, all end with the same InputError.
        everyone = distributed.gather_objects((known, found))
        for names, _ in everyone:
            self.bad_images.restore(names)
        for number, reason in (item for _, broken in everyone for item in broken.items()):
            self.left_out.add(number)
            self.bad_images.add(self.images.path(number), reason)
        if not self.num_readable:
            raise InputError(
                f"data {self.images.root}: none of the {len(self.images)} images can be read"
            )
