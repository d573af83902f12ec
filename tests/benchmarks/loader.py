"""Two views of a JPEG on one CPU core: the published pipeline against ours.

    python tests/benchmarks/loader.py

Published: per image one PIL decode and two strong views by torchvision's transforms on PIL images,
all in the worker. Ours: the worker's part alone (`decode`, `random_crops`), and everything, with
the device part on the CPU in batches of 64. The sides alternate; the first round is not counted.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CropGroup,
    decode,
    random_crops,
    strong_view,
    uniforms,
)

SIZE = 224
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


class PublishedBlur:
    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def published_view() -> T.Compose:
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


def measure(
    sides: dict[str, Callable[[list[Path], int], None]], paths: list[Path], rounds: int
) -> dict[str, list[float]]:
    """Images a second of each side in each round, a warm-up round left out."""
    speeds = {name: [] for name in sides}
    for epoch in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side(paths, epoch)
            if epoch > 0:
                speeds[name].append(len(paths) / (time.perf_counter() - start))
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.jpg" for number in range(options.images)]
        for path in paths:
            draw_picture(rng).save(path, quality=90)
        kilobytes = statistics.mean(path.stat().st_size for path in paths) / 1000
        print(f"{len(paths)} JPEGs of 500x375, {kilobytes:.0f} kB each; one thread")
        sides = dict(zip(("published", *GOALS), (published, worker_part, everything), strict=True))
        speeds = measure(sides, paths, options.rounds)
    print(f"images/s on one core, median [lowest, highest] of {options.rounds} rounds")
    for name, values in speeds.items():
        median = f"{statistics.median(values):6.0f} [{min(values):.0f}, {max(values):.0f}]"
        ratios = [ours / theirs for ours, theirs in zip(values, speeds["published"], strict=True)]
        ratio = f"{statistics.median(ratios):5.2f}x [{min(ratios):.2f}, {max(ratios):.2f}]"
        goal = f"goal {GOALS[name]}x" if name in GOALS else ""
        print(f"{name:18} {median:20} {ratio:22} {goal}".rstrip())


if __name__ == "__main__":
    main()
