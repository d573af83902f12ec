"""k-nearest-neighbor accuracy of a checkpoint's query encoder (CMSF sec. 4).

    python eval/eval_knn.py --weights <CHECKPOINT> --arch resnet50 -k 1 <DATASET PATH>

Features before the projector, encoder in eval mode, L2-normalized; exact search of every val image
among the train images; majority vote. k = 1, 5, 10, 20 and -k come out of one search. Reads
checkpoints of this repository, of the published CMSF and MSF code, and plain torchvision state
dicts.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import checkpoint, knn, options
from utils.data import EvalLoader, check_same_classes, read_split
from utils.encoders import Backbone, build_backbone, check_image_size
from utils.errors import InputError

DEMO = {"weights": "output/demo_2q/ckpt_epoch_30.pth", "num_workers": 1}


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = options.Parser(description="k-NN evaluation of a checkpoint.")
    options.add_data_options(parser)
    options.add_checkpoint_options(parser)
    parser.add_argument("-k", type=options.positive, help="one more k beside 1, 5, 10 and 20")
    parser.add_argument("-b", "--batch_size", "--batch-size", type=options.positive, default=256)
    parser.add_argument("--save", type=Path, help="folder to write knn.json to")
    return options.parse(parser, demo=DEMO)


def load_query_backbone(args: argparse.Namespace) -> tuple[Backbone, dict]:
    """The backbone with its weights, and the checkpoint they came from.

    What the flags leave open (arch, image size, stem) is taken from the checkpoint where it says
    so.
    """
    state = checkpoint.load(args.weights, flag="--weights")
    trained = checkpoint.settings(state)
    args.arch = args.arch or trained.get("arch") or "resnet50"
    args.image_size = args.image_size or trained.get("image_size") or 224
    args.small_stem = args.small_stem or bool(trained.get("small_stem"))
    backbone = build_backbone(args.arch, small_stem=args.small_stem)
    check_image_size(backbone, args.arch, args.image_size)
    what = f"--weights {args.weights} (--arch {args.arch})"
    checkpoint.load_backbone(backbone, state, what=what)
    return backbone, state


def main() -> None:
    """Evaluate, print a table, write knn.json."""
    args = parse_args()
    start = time.monotonic()
    if not args.weights:
        raise InputError("--weights: name the checkpoint to evaluate")
    train, val = (read_split(args.data, split, dataset=args.dataset) for split in ("train", "val"))
    if not train.classes:
        raise InputError(f"data {args.data}: k-NN needs class folders in train/")
    check_same_classes(train, val)
    ks = knn.ks_for(len(train), also=args.k)
    backbone, state = load_query_backbone(args)
    module = backbone.module.to(args.device)
    train_loader, val_loader = (
        EvalLoader(
            images,
            batch_size=args.batch_size,
            image_size=args.image_size,
            num_workers=args.num_workers,
            device=args.device,
        )
        for images in (train, val)
    )
    figures = knn.evaluate_knn(module, train_loader, val_loader, ks=ks)

    print(f"{len(val)} val images among {len(train)} train images, percent")
    print(knn.format_table(figures))
    if args.save:
        record = {
            "k": figures,
            "protocol": "backbone features, L2-normalized, exact search, majority vote, "
            "ties to the nearer neighbor",
            "checkpoint": args.weights,
            "sha256": checkpoint.sha256(args.weights),
            "epoch": state.get("epoch"),
            "arch": args.arch,
            "image_size": args.image_size,
            "counts": {"train": len(train), "val": len(val), "classes": len(train.classes)},
            "command": options.command(),
            "torch": torch.__version__,
            "seconds": round(time.monotonic() - start, 1),
        }
        print(options.write_json(args.save, "knn.json", record))


if __name__ == "__main__":
    options.run_script(main)
