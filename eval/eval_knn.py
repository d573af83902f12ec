"""k-nearest-neighbor accuracy of a checkpoint's encoder (CMSF sec. 4).

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import knn, options, setup
from utils.data import check_same_classes, read_split

DEMO = {"weights": "output/demo_2q/ckpt_epoch_30.pth", "num_workers": 1}
PROTOCOL = (
    "backbone features, L2-normalized, exact search, majority vote, ties to the nearer neighbor"
)


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = options.Parser(description="k-NN evaluation of a checkpoint.")
    options.add_data_options(parser)
    options.add_checkpoint_options(parser)
    options.add_split_options(parser, "--train_file", "--train-file")
    parser.add_argument("-k", type=options.positive, help="one more k beside 1, 5, 10 and 20")
    parser.add_argument("-b", "--batch_size", "--batch-size", type=options.positive, default=256)
    parser.add_argument("--save", type=Path, help="folder to write knn.json to")
    return options.parse(parser, demo=DEMO)


def main() -> None:
    """Evaluate, print a table, write knn.json."""
    args = parse_args()
    start = time.monotonic()
    train, val = (read_split(args.data, split, dataset=args.dataset) for split in ("train", "val"))
    check_same_classes(train, val)
    train = train.take(setup.labeled_index(args, train, file=args.train_file, flag="--train_file"))
    ks = knn.ks_for(len(train), also=args.k)
    backbone, state = setup.evaluated_backbone(args)
    train_loader, val_loader = setup.eval_loaders(args, train, val)
    figures = knn.evaluate_knn(backbone.module.to(args.device), train_loader, val_loader, ks=ks)
    print(f"{len(val)} val images among {len(train)} train images, percent")
    print(knn.format_table(figures))
    if args.save:
        counts = {"train": len(train), "val": len(val), "classes": len(train.classes)}
        record = {"k": figures, "protocol": PROTOCOL}
        record |= setup.result_record(args, state, counts=counts)
        record["seconds"] = round(time.monotonic() - start, 1)
        print(options.write_json(args.save, "knn.json", record))


if __name__ == "__main__":
    options.run_script(main)
