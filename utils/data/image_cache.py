"""Every image of a set decoded once and kept in memory, for data sets that fit there."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from utils.data.bad_images import BadImages
from utils.data.datasets import CachedSet, ImageSet, PixelSet
from utils.data.reading import CropBatch, data_loader, read, read_batches
from utils.runtime import distributed
from utils.runtime.errors import InputError

_AT_ONCE = 64  # images that a worker sends together
_CGROUP = Path("/sys/fs/cgroup")


class _PictureBatch(NamedTuple):
    """Pictures (n, 3, H, W) uint8 and their numbers; sizes: (n, 2), those they were stored in."""

    pictures: Tensor
    index: Tensor
    sizes: np.ndarray
    broken: dict[int, str]


class _Pictures(Dataset):
    """The worker part: whole pictures of one size; one of another is sent as zeros, or resized."""

    def __init__(
        self, images: ImageSet, size: tuple[int, int], *, resize: bool, tolerated: int
    ) -> None:
        self.images, self.size, self.resize, self.tolerated = images, size, resize, tolerated

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, numbers: list[int]) -> _PictureBatch:
        sizes = []

        def picture(_: int, image: Tensor) -> Tensor:
            """The image in the cache's size; zeros where it may not be resized."""
            sizes.append(tuple(image.shape[1:]))
            if sizes[-1] == self.size:
                return image
            if not self.resize:
                return torch.zeros(3, *self.size, dtype=torch.uint8)
            return F.interpolate(image[None], self.size, mode="bilinear", antialias=True)[0]

        batch: CropBatch = read(self.images, numbers, picture, tolerated=self.tolerated)
        sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        return _PictureBatch(batch.crops, batch.index, sizes, batch.broken)


def cache_images(
    images: ImageSet,
    where: str,
    *,
    size: int | None = None,
    num_workers: int = 0,
    device: torch.device,
    bad_images: BadImages,
) -> PixelSet:
    """The set with its pictures in memory; one that has them there is returned as it is.

    where: "ram", or "device" if they will be copied to the device too, of which only the room is
    looked at here. size: pictures are resized to size x size, with antialiasing, their aspect ratio
    not kept; without it all must have one size. Of several processes each has its own pictures.
    Raises InputError for too little memory, before anything is decoded, for images of several
    sizes, and for broken images as `bad_images` says.
    """
    ready = isinstance(images, PixelSet) and size is None
    shape = _shape(images, size, tolerated=bad_images.tolerated)
    needed = 3 * len(images) * shape[0] * shape[1]
    what = f"{len(images)} images of {shape[1]}x{shape[0]} pixels, {needed} bytes"
    _check_room(where, what, needed, ready=ready, device=device)
    if ready:
        return images
    place = f"in memory and on {device}" if where == "device" else "in memory"
    print(f"--cache_images {where}: {what}, {place}", flush=True)
    pixels = torch.empty(len(images), *shape, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    sizes = np.ones((len(images), 2), dtype=np.int64)
    pictures = _Pictures(images, shape, resize=size is not None, tolerated=bad_images.tolerated)
    broken = {}
    for batch in _decoded(pictures, num_workers, bad_images):
        broken |= batch.broken
        rows = batch.index.numpy()
        if not len(rows):
            continue
        if size is None:
            _check_sizes(images, batch, shape, where=where)
        pixels[batch.index], sizes[rows] = batch.pictures, batch.sizes
    return CachedSet(images, pixels, broken=broken, originals=None if size is None else sizes)


def _shape(images: ImageSet, size: int | None, *, tolerated: int) -> tuple[int, int]:
    """The size of all pictures: as asked for, or that of the first image that can be read."""
    if size is not None:
        return size, size
    for number in range(min(len(images), tolerated + 1)):
        try:
            return tuple(images.image(number).shape[1:])
        except MemoryError:
            raise
        except Exception:  # what is to be said of it is said when all are decoded
            continue
    return 1, 1


def _check_sizes(
    images: ImageSet, batch: _PictureBatch, shape: tuple[int, int], *, where: str
) -> None:
    """InputError for an image of another size than the others."""
    for number, (height, width) in zip(batch.index.tolist(), batch.sizes, strict=True):
        if (height, width) != shape:
            raise InputError(
                f"--cache_images {where}: {images.path(number)} has {width}x{height} pixels, "
                f"others {shape[1]}x{shape[0]}; --cache_size S keeps all as S x S"
            )


def _decoded(
    pictures: _Pictures, num_workers: int, bad_images: BadImages
) -> Iterator[_PictureBatch]:
    """All pictures by workers, with a bar on a terminal and lines in a log."""
    loader = data_loader(
        pictures, torch.device("cpu"), batch_size=_AT_ONCE, num_workers=num_workers
    )
    count, done, told = len(pictures), 0, 0
    with tqdm(total=count, desc="decoding", disable=not distributed.shows_bars()) as bar:
        for batch in read_batches(loader, pictures.images, bad_images):
            yield batch
            done = min(count, done + _AT_ONCE)
            bar.update(done - bar.n)
            if bar.disable and 10 * done // count > told:
                told = 10 * done // count
                print(f"decoded {done} of {count} images", flush=True)


def _check_room(where: str, what: str, needed: int, *, ready: bool, device: torch.device) -> None:
    """InputError if the pictures do not fit: into the host's memory, unless ready, or the GPU's."""
    room = {}
    if not ready:
        room["the host's memory"] = available_memory()
    if where == "device" and device.type == "cuda":
        room[f"the memory of {device}"] = torch.cuda.mem_get_info(device)[0]
    for name, free in room.items():
        if free is not None and needed > free:
            raise InputError(
                f"--cache_images {where}: {what}, do not fit into {name}, {free} bytes free"
            )


def check_memory(needed: int, *, flags: str) -> None:
    """InputError that begins with `flags` if so many bytes do not fit into the host's memory.

    Of what is asked for far too much Linux kills some process later, without a word.
    """
    free = available_memory()
    if free is not None and needed > free:
        raise InputError(f"{flags}: needs at least {needed} bytes of memory, {free} are free")


def available_memory() -> int | None:
    """Bytes of the host's memory that this process can have; None where the system does not say.

    Of several processes on a machine each gets an equal part. What a container may take counts.
    """
    found = [free for free in (_of_system(), _of_container()) if free is not None]
    return min(found) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if found else None


def _of_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):  # no Linux
        return None


def _of_container() -> int | None:
    try:
        most, used = ((_CGROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        kinds = dict(line.split() for line in lines)
        files = int(kinds["inactive_file"]) + int(kinds["active_file"])
        return int(most) - int(used) + files  # files are given up for programs
    except (OSError, KeyError, ValueError):  # none, of another kind, or without a limit
        return None
