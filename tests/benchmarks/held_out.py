"""Hold images out of a training set, so that settings are chosen without its test set.

    python tests/benchmarks/held_out.py <DATASET PATH> <FOLDER> [--dataset fashion_mnist]
        [--train 2500] [--held_out 500]

Makes two folders that any script takes: <FOLDER>/choose with train/ and val/, the images held out,
and <FOLDER>/test with the same train/ and the published test set as val/. Of each class the first
images by name are held out, and the next ones are trained on. Image files are linked; those of an
archive are written as PNG.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.data import archives
from utils.data.datasets import ImageSet, read_split


def place(images: ImageSet, number: int, folder: Path) -> None:
    """Put an image of a set below a folder, by its name there."""
    path = folder / images.name(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    source = Path(images.path(number))
    if source.is_file():
        path.symlink_to(source.resolve())
    else:
        Image.fromarray(images.image(number).permute(1, 2, 0).numpy()).save(path)


def main() -> None:
    """Make the two folders."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset", choices=["imagenet", *archives.NAMES], default="imagenet")
    parser.add_argument("--train", type=int, default=2500, help="images of each class")
    parser.add_argument("--held_out", type=int, default=500, help="images of each class")
    args = parser.parse_args()
    train, test = (read_split(args.data, split, dataset=args.dataset) for split in ("train", "val"))
    choose, final = (args.folder / name for name in ("choose", "test"))
    for label in range(len(train.classes)):
        of_class = sorted((train.labels == label).nonzero()[0].tolist(), key=train.name)
        if len(of_class) < args.held_out + args.train:
            sys.exit(f"{train.classes[label]} has {len(of_class)} images only")
        for rank, number in enumerate(of_class[: args.held_out + args.train]):
            place(train, number, choose / ("val" if rank < args.held_out else "train"))
    for number in range(len(test)):
        place(test, number, final / "val")
    (final / "train").symlink_to((choose / "train").resolve())


if __name__ == "__main__":
    main()
