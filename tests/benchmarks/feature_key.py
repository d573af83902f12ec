"""What the key of kept features costs: the digest of all image files, beside decoding and cropping.

    python tests/benchmarks/feature_key.py [--images 1000] [--rounds 5]

Both read the same JPEG files: the demo's (32 pixels), and larger ones drawn here (500 x 375). The
sides alternate; medians. Seconds are the process' own, over all its threads, and the files are in
the system's memory: a disk that gives them more slowly than the digest takes them is what counts
then. The encoder's own time, which the features cost too, is left out.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from loader import draw_picture

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.data import cropping, demo_data
from utils.data.datasets import ImageSet, read_image_folder
from utils.evaluation.feature_cache import image_digest


def digest(images: ImageSet, size: int) -> None:
    """The part of the key that reads the files."""
    image_digest(images)


def decode_and_crop(images: ImageSet, size: int) -> None:
    """What workers do for the features."""
    for number in range(len(images)):
        cropping.center_crop(images.image(number), size)


def compare(name: str, images: ImageSet, size: int, *, rounds: int) -> None:
    """Time both sides and print medians, spread and the share of the digest."""
    sides = {"digest": digest, "decode and crop": decode_and_crop}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, work in sides.items():
            start = time.process_time()
            work(images, size)
            seconds[side].append(time.process_time() - start)
    megabytes = sum(Path(images.path(i)).stat().st_size for i in range(len(images))) / 1e6
    print(f"{name}: {len(images)} files, {1000 * megabytes / len(images):.1f} kB each")
    for side, times in seconds.items():
        rates = sorted(len(images) / taken for taken in times)
        median = statistics.median(rates)
        print(
            f"  {side:15} {median:8.0f} images/s ({rates[0]:.0f} to {rates[-1]:.0f}), "
            f"{median * megabytes / len(images):7.1f} MB/s"
        )
    one, two = (statistics.median(times) for times in seconds.values())
    print(f"  the digest takes {100 * one / two:.1f}% of decoding and cropping, n {rounds}")


def main() -> None:
    """Draw the images, and compare on both kinds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1000, help="most files of a kind")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        demo = read_image_folder(demo_data.draw_data_set(Path(folder, "demo")) / "train")
        chosen = np.arange(min(args.images, len(demo)))
        compare("demo", demo.take(chosen), 32, rounds=args.rounds)
        large = Path(folder, "large")
        large.mkdir()
        rng = np.random.default_rng(0)
        for number in range(args.images):
            draw_picture(rng).save(large / f"{number}.jpg", quality=90)
        compare("500 x 375", read_image_folder(large), 224, rounds=args.rounds)


if __name__ == "__main__":
    main()
