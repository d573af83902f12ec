"""Every image of a set decoded once and kept in memory, for data sets that fit there."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from utils.data.bad_images import BadImages, read_images
from utils.data.batches import CropBatch, data_loader, read_batches, read_crops
from utils.data.cropping import resize
from utils.data.datasets import CachedSet, ImageSet, PixelSet
from utils.runtime import distributed
from utils.runtime.errors import InputError

_AT_ONCE = 64  # images that a worker sends together
_CGROUP = Path("/sys/fs/cgroup")
_CPU = torch.device("cpu")


@dataclass(eq=False)
class _Pictures(Dataset):
    """The worker part: whole pictures (n, 3, H, W) of one size, and the sizes they are stored in.

    The sizes (n, 2) are sent in the place of labels. may_resize: otherwise a picture of another
    size is sent as zeros.
    """

    images: ImageSet
    size: tuple[int, int]
    may_resize: bool
    tolerated: int

    def __getitems__(self, numbers: list[int]) -> CropBatch:
        sizes = []

        def picture(_: int, image: Tensor) -> Tensor:
            sizes.append(tuple(image.shape[1:]))
            if sizes[-1] == self.size:
                return image
            if self.may_resize:
                return resize(image, self.size)
            return torch.zeros(3, *self.size, dtype=torch.uint8)

        batch = read_crops(self.images, numbers, picture, tolerated=self.tolerated)
        return batch._replace(label=np.array(sizes, dtype=np.int64).reshape(-1, 2))


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
    looked at here. size: pictures are resized to size x size, their aspect ratio not kept; without
    it all must have one size. Of several processes each has its own pictures. InputError for too
    little memory, before anything is decoded, for images of several sizes, and for broken images as
    `bad_images` says.
    """
    ready = isinstance(images, PixelSet) and size is None
    shape = (size, size)
    if size is None:  # that of the first image that can be read
        found = read_images(
            *(images, [0], lambda _, image: tuple(image.shape[1:])),
            **{"tolerated": bad_images.tolerated, "own": range(1)},
        )
        (shape,) = found[0].values() or [(1, 1)]
    needed = 3 * len(images) * shape[0] * shape[1]
    what = f"{len(images)} images of {shape[1]}x{shape[0]} pixels, {needed} bytes"
    if not ready:
        check_memory(needed, flags=f"--cache_images {where}")
    if where == "device":
        check_memory(needed, flags=f"--cache_images {where}", device=device)
    if ready:
        return images
    place = f"in memory and on {device}" if where == "device" else "in memory"
    print(f"--cache_images {where}: {what}, {place}", flush=True)
    pictures = _Pictures(images, shape, size is not None, bad_images.tolerated)
    order = {"sampler": range(len(images)), "batch_size": _AT_ONCE}
    loader = data_loader(pictures, _CPU, **order, num_workers=num_workers)
    return _filled(loader, images, bad_images, where=where)


def _filled(loader, images: ImageSet, bad_images: BadImages, *, where: str) -> CachedSet:
    """The pictures that a loader of `_Pictures` sends, with a bar on a terminal, lines in a log."""
    shape, count, broken = loader.dataset.size, len(images), {}
    done = told = 0
    pixels = torch.empty(count, *shape, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    sizes = torch.ones(count, 2, dtype=torch.int64)
    with tqdm(total=count, desc="decoding", disable=not distributed.shows_bars()) as bar:
        for batch in read_batches(loader, images, bad_images):
            broken |= batch.broken
            for number, (height, width) in zip(batch.index, batch.label.tolist(), strict=True):
                if (height, width) != shape and not loader.dataset.may_resize:
                    raise InputError(
                        f"--cache_images {where}: {images.path(number)} has {width}x{height} "
                        f"pixels, others {shape[1]}x{shape[0]}; --cache_size S keeps all as S x S"
                    )
            if len(batch.index):
                pixels[batch.index], sizes[batch.index] = batch.crops, batch.label
            done += len(batch.index) + len(batch.broken)
            bar.update(done - bar.n)
            if bar.disable and 10 * done // count > told:
                told = 10 * done // count
                print(f"decoded {done} of {count} images", flush=True)
    originals = sizes.numpy() if loader.dataset.may_resize else None
    return CachedSet(images, pixels, broken=broken, originals=originals)


def check_memory(needed: int, *, flags: str, device: torch.device = _CPU) -> None:
    """InputError that begins with `flags` if so many bytes do not fit into a device's memory.

    Otherwise Linux would kill some process later, without a word.
    """
    free, where = available_memory(), ""
    if device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], f" of {device}"
    if free is not None and needed > free:
        raise InputError(
            f"{flags}: needs at least {needed} bytes of memory{where}, {free} are free"
        )


def available_memory() -> int | None:
    """Bytes of the host's memory that this process can have; None where the system does not say.

    Of several processes on a machine each gets an equal part. What a container may take counts.
    """
    found = []
    with suppress(OSError, StopIteration):  # no Linux
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvail"))
        found.append(1024 * int(kilobytes))
    with suppress(OSError, KeyError, ValueError):  # no container, another kind, or without a limit
        most, used = ((_CGROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        kinds = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        files = int(kinds["inactive_file"]) + int(kinds["active_file"])
        found.append(int(most) - int(used) + files)  # files are given up for programs
    return min(found) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if found else None
