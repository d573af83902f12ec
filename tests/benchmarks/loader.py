"""Two views of an image on one CPU core: the published pipeline against ours, files against memory.

    python tests/benchmarks/loader.py

Large JPEGs. Published: per image one PIL decode and two strong views by torchvision's transforms on
PIL images, all in the worker. Ours: the worker's part alone (`decode`, `random_crops`), and
everything, with the device part on the CPU in batches of 64.

Small images, JPEGs as the demo's and PNGs of CIFAR's size: from files, with --cache_images ram, and
with --cache_images device, here on the CPU. First the crops alone, then everything.

The sides alternate; the first round is not counted. Seconds are the process' own on its core, so
that other work on the machine is left out as far as it can be. With a GPU: the device part alone,
and how much of the copies and of the views' work there happens while another stream computes.
"""

import argparse
import contextlib
import io
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import spans
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.data.augment import IMAGENET_MEAN, IMAGENET_STD, strong_view
from utils.data.bad_images import BadImages
from utils.data.batches import EpochSampler
from utils.data.cropping import CropGroup, decode, random_crops
from utils.data.datasets import ImageSet, PixelSet, read_image_folder
from utils.data.image_cache import cache_images
from utils.data.random_draws import uniforms
from utils.data.train_loader import DeviceCrops, RandomCrops, TwoViewLoader

SIZE = 224
SMALL = 32
BATCH = 64
GOALS = {"ours, worker part": 4.5, "ours, everything": 1.5}


def draw_picture(rng: np.random.Generator, height: int = 375, width: int = 500) -> Image.Image:
    """Smooth random fields of several scales, discs with sharp edges, and noise."""
    pixels = torch.full((3, height, width), 128.0)
    for cells, strength in ((3, 60), (9, 30), (30, 14), (90, 7)):
        field = torch.from_numpy(rng.normal(0, strength, (1, 3, cells, cells)).astype(np.float32))
        pixels += F.interpolate(field, (height, width), mode="bicubic")[0]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for _ in range(10):
        top, left, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(15, 90)
        inside = (y - top) ** 2 + (x - left) ** 2 < radius**2
        pixels[:, inside] = pixels[:, inside] / 2 + float(rng.uniform(0, 128))
    pixels += torch.from_numpy(rng.normal(0, 4, (1, height, width)).astype(np.float32))
    return Image.fromarray(pixels.clamp(0, 255).byte().permute(1, 2, 0).numpy())


def write_pictures(folder: Path, count: int) -> list[Path]:
    """JPEGs of photo size, drawn into the folder."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for path in paths:
        draw_picture(rng).save(path, quality=90)
    return paths


class PublishedBlur:
    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def published_view() -> T.Compose:
    """The strong view of the published code, of torchvision's parts."""
    return T.Compose(
        [
            T.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([PublishedBlur()], p=0.5),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def published(paths: list[Path], epoch: int) -> None:
    view = published_view()
    for path in paths:
        with Image.open(path) as image:
            image = image.convert("RGB")
        _ = view(image), view(image)


def worker_part(paths: list[Path], epoch: int) -> None:
    for start in range(0, len(paths), BATCH):
        cut_batch(paths, epoch, start)


def everything(paths: list[Path], epoch: int) -> None:
    for start in range(0, len(paths), BATCH):
        crops, draws = cut_batch(paths, epoch, start)
        _ = strong_view(crops[:, 0], draws[:, 0]), strong_view(crops[:, 1], draws[:, 1])


def cut_batch(paths: list[Path], epoch: int, start: int) -> tuple[torch.Tensor, np.ndarray]:
    """What a worker does for one batch: crops (B, 2, 3, S, S) uint8 and the draws behind them."""
    index = np.arange(start, min(start + BATCH, len(paths)))
    draws = uniforms(0, epoch, index)
    crops = torch.empty(len(index), 2, 3, SIZE, SIZE, dtype=torch.uint8)
    for row, i in enumerate(index):
        crops[row].view(-1).copy_(random_crops(decode(paths[i]), draws[row], [CropGroup(2, SIZE)]))
    return crops, draws


def cached(images: ImageSet, where: str) -> PixelSet:
    return cache_images(images, where, device=torch.device("cpu"), bad_images=BadImages())


def crop_sides(images: ImageSet) -> dict[str, Callable[[int], None]]:
    """Epochs of the crops alone: what workers do, or the device instead."""
    sampler = EpochSampler(len(images), BATCH, 0)
    crops = RandomCrops(cached(images, "device"), [CropGroup(2, SMALL)], seed=0, tolerated=0)
    device = DeviceCrops(crops, sampler, torch.device("cpu"))

    def one_at_a_time(images: ImageSet, epoch: int) -> None:
        for start in range(0, len(images), BATCH):
            index = np.arange(start, start + BATCH)
            for number, draws in zip(index, uniforms(0, epoch, index), strict=True):
                random_crops(images.image(number), draws, [CropGroup(2, SMALL)])

    def at_once(epoch: int) -> None:
        sampler.epoch = epoch
        for _ in device:
            pass

    kept = cached(images, "ram")
    return {
        "files": partial(one_at_a_time, images),
        "ram": partial(one_at_a_time, kept),
        "device (CPU)": at_once,
    }


def loader_sides(images: ImageSet) -> dict[str, Callable[[int], None]]:
    """Epochs of the whole loader, strong views of crops."""
    loaders = {
        name: TwoViewLoader(part, batch_size=BATCH, image_size=SMALL, cut_on_device=cut)
        for name, part, cut in (
            ("files", images, False),
            ("ram", cached(images, "ram"), False),
            ("device (CPU)", cached(images, "device"), True),
        )
    }

    def run_epoch(loader: TwoViewLoader, epoch: int) -> None:
        for _ in loader.epoch(epoch):
            pass

    return {name: partial(run_epoch, loader) for name, loader in loaders.items()}


def measure(
    sides: dict[str, Callable[[int], None]], count: int, rounds: int
) -> dict[str, list[float]]:
    """Images a second of each side in each round, a warm-up round left out."""
    speeds = {name: [] for name in sides}
    for epoch in range(1, rounds + 2):
        for name, side in sides.items():
            start = time.process_time()
            side(epoch)
            if epoch > 1:
                speeds[name].append(count / (time.process_time() - start))
    return speeds


def print_speeds(title: str, speeds: dict[str, list[float]]) -> None:
    """A table with ratios to the first side, round by round."""
    print(f"\n{title}")
    base = next(iter(speeds.values()))
    for name, values in speeds.items():
        median = f"{statistics.median(values):6.0f} [{min(values):.0f}, {max(values):.0f}]"
        ratios = [ours / theirs for ours, theirs in zip(values, base, strict=True)]
        ratio = f"{statistics.median(ratios):5.2f}x [{min(ratios):.2f}, {max(ratios):.2f}]"
        goal = f"goal {GOALS[name]}x" if name in GOALS else ""
        print(f"{name:18} {median:24} {ratio:22} {goal}".rstrip())


def measure_large(folder: Path, count: int, rounds: int) -> None:
    """Images of photo size, `count` of them drawn into the folder."""
    paths = write_pictures(folder, count)
    kilobytes = statistics.mean(path.stat().st_size for path in paths) / 1000
    functions = (published, worker_part, everything)
    sides = {
        name: partial(function, paths)
        for name, function in zip(("published", *GOALS), functions, strict=True)
    }
    title = f"{count} JPEGs of 500x375, {kilobytes:.0f} kB each"
    print_speeds(title, measure(sides, count, rounds))


def measure_small(folder: Path, side: int, suffix: str, count: int, rounds: int) -> None:
    """Images of side x side pixels, `count` of them written into the folder as `suffix`."""
    rng = np.random.default_rng(0)
    for number in range(count):
        picture = draw_picture(rng, 120, 120).resize((side, side), Image.Resampling.BOX)
        picture.save(folder / f"{number:05}{suffix}")
    images = read_image_folder(folder)
    for what, sides in (("crops", crop_sides), ("everything", loader_sides)):
        with contextlib.redirect_stdout(io.StringIO()):
            chosen = sides(images)
        title = f"{count} files *{suffix} of {side}x{side}, crops of {SMALL}: {what}"
        print_speeds(title, measure(chosen, count, rounds))


def measure_device_part(rounds: int) -> None:
    """On a GPU: both views of a batch of crops that is there, in images a second."""
    draws = uniforms(0, 1, np.arange(256))
    crops = torch.randint(0, 256, (256, 2, 3, SIZE, SIZE), dtype=torch.uint8, device="cuda")
    speeds = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            _ = strong_view(crops[:, 0], draws[:, 0]), strong_view(crops[:, 1], draws[:, 1])
        torch.cuda.synchronize()
        speeds.append(2560 / (time.perf_counter() - start))
    title = f"device part on {torch.cuda.get_device_name()}, batch 256 at {SIZE} pixels"
    print_speeds(title, {"two strong views": speeds[1:]})


def measure_overlap(folder: Path) -> None:
    """On a GPU: the share of the loader's work there that lies beside a stand-in for training."""
    loader = TwoViewLoader(
        read_image_folder(folder), batch_size=BATCH, image_size=SIZE, device="cuda"
    )
    matrix = torch.randn(8192, 8192, device="cuda")
    with torch.profiler.profile() as profile:
        for _ in loader.epoch(1):
            for _ in range(50):
                matrix = torch.nn.functional.normalize(matrix @ matrix)
        torch.cuda.synchronize()
    work = spans.spans_of(profile, folder).device
    training = spans.busiest(work)  # the stand-in's stream
    total = spans.total(span for span in work if span.stream != training)
    share = spans.beside(work, training)
    print(
        f"\ncopies and views: {total / 1000:.1f} ms on side streams, {share:.0f}% beside training"
    )


def main() -> None:
    """Measure, and print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--small_images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"images/s on one core, median [lowest, highest] of {options.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        large, *small = (Path(folder) / name for name in ("large", "48", "32"))
        for part in (large, *small):
            part.mkdir()
        measure_large(large, options.images, options.rounds)
        for part, suffix in zip(small, (".jpg", ".png"), strict=True):
            measure_small(part, int(part.name), suffix, options.small_images, options.rounds)
        if torch.cuda.is_available():
            measure_device_part(options.rounds)
            measure_overlap(large)


if __name__ == "__main__":
    main()
