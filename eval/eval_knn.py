"""k-nearest-neighbor accuracy of a checkpoint's encoder (CMSF sec. 4).

    python eval/eval_knn.py --weights <CHECKPOINT> --arch resnet50 -k 1 <DATASET PATH>
    python eval/eval_knn.py --weights <CHECKPOINT> --protocol dino <DATASET PATH>

Under torchrun several processes extract the features, and one searches.

Features before the projector, encoder in eval mode, L2-normalized; exact search of every val image
among the train images; majority vote, and beside it the vote weighted by exp(similarity /
temperature). --protocol says which of them, which k and which temperature: those of CMSF, DINO or
lightly. All k, and that of -k, come out of one search. Reads checkpoints of this repository and the
backbone in those of others (docs/evaluate.md says which).
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments, build_evaluation, options
from utils.data.bad_images import BadImages
from utils.data.datasets import ImageSet
from utils.data.splits import check_every_class, unreadable_classes
from utils.evaluation import feature_cache, knn, result_files
from utils.evaluation.knn import PROTOCOLS, Protocol
from utils.method.encoders import Backbone
from utils.runtime import distributed, faiss_library, script
from utils.runtime.errors import InputError

DEMO = {"weights": options.DEMO_CHECKPOINT, "num_workers": 1}
DECIDING = ("protocol", "k", "temperature", "bad_images")
SHARED = (
    "backbone features, L2-normalized, exact search, ties to the nearer neighbor; weighted: votes "
    "exp(similarity / temperature)"
)


def add_knn_options(parser: argparse.ArgumentParser) -> None:
    """Which k, and how the neighbors vote."""
    known = "; ".join(f"{p.name}: k {', '.join(map(str, p.ks))}" for p in PROTOCOLS.values())
    group = parser.add_argument_group("k-NN")
    group.add_argument("--protocol", choices=list(PROTOCOLS), default="cmsf", help=known)
    group.add_argument("-k", type=arguments.positive, help="one more k beside the protocol's")
    group.add_argument(
        "--temperature",
        type=arguments.number(float, low=1e-6),
        help="of the weighted vote; default: as the protocol says",
    )


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="k-NN evaluation of a checkpoint.")
    options.add_data_options(parser)
    options.add_checkpoint_options(parser)
    options.add_split_options(parser, "--train_file", "--train-file")
    add_knn_options(parser)
    group = parser.add_argument_group("files")
    group.add_argument("--save", type=arguments.path, help="folder to write knn.json to")
    group.add_argument(
        *("--save_features", "--save-features"),
        action="store_true",
        help=f"write {feature_cache.NAME} there too",
    )
    group.add_argument(
        *("--load_cache", "--load-cache"),
        type=arguments.path,
        help=f"{feature_cache.NAME} of the same checkpoint and data, to extract nothing",
    )
    group.add_argument(
        *("--save_acc", "--save-acc"),
        type=arguments.path,
        help="file to append a line to: the epoch, then the protocol's accuracy for each k, with "
        "commas",
    )
    group.add_argument(
        *("--epoch",),
        type=arguments.number(int, low=0),
        help="the epoch in that line; default: as the checkpoint says",
    )
    options.add_stage_options(group)
    args = options.parse(parser, demo=DEMO)
    if args.temperature is None:
        args.temperature = PROTOCOLS[args.protocol].temperature
    return args


def check_flags(args: argparse.Namespace, state: dict) -> None:
    """InputError for flags that do not go together; makes the folder to write to."""
    if args.save_features and not args.save:
        raise InputError("--save_features: name the folder with --save")
    if args.keep_done and (not args.save or args.save_features or args.save_acc):
        raise InputError("--keep_done: with --save, and without --save_features and --save_acc")
    if args.save_acc:
        args.epoch = state.get("epoch") if args.epoch is None else args.epoch
        if args.epoch is None:
            raise InputError(f"--save_acc {args.save_acc}: name the --epoch, the weights have none")
        own = {"kind": "list of figures", "is_own": result_files.has_figures}
        result_files.check_own(args.save_acc, flag="--save_acc", **own)
        result_files.append_line(args.save_acc, "", flag="--save_acc")
    if args.save:
        result_files.make_folder(args.save, flag="--save")


def get_features(
    args: argparse.Namespace,
    backbone: Backbone,
    train: ImageSet,
    val: ImageSet,
    *,
    key: dict[str, str],
    bad_images: BadImages,
) -> feature_cache.Features | None:
    """Read from --load_cache, whose key is this one, or extracted; None but on the main process."""
    if not args.load_cache:
        loaders = build_evaluation.eval_loaders(args, train, val, bad_images=bad_images)
        return feature_cache.extract(build_evaluation.place(args, backbone.module), *loaders)
    if not distributed.is_main():
        return None
    sizes = {"feature_dim": backbone.feature_dim, "num_classes": len(train.classes)}
    return feature_cache.load(
        args.load_cache, key, flag="--load_cache", bad_images=bad_images, **sizes
    )


def report(figures: dict[int, dict], protocol: Protocol, counts: dict[str, int]) -> None:
    """Print the table, of what it is, and which column and k the protocol's own are."""
    print(f"{counts['val']} val images among {counts['train']} train images, percent")
    if left_out := ", ".join(str(k) for k in protocol.ks if k not in figures):
        print(f"k {left_out} of protocol {protocol.name} left out: more than train images")
    print(f"protocol {protocol.name}: its own column is {protocol.vote}, the {protocol.words}")
    print(knn.format_table(figures))


def main() -> None:
    """Evaluate, print a table, write knn.json."""
    args = parse_args()
    start = time.monotonic()
    faiss_library.load("k-NN")  # not after the features are extracted
    train, val = build_evaluation.read_labeled(args, only_labeled=True)
    protocol = PROTOCOLS[args.protocol]
    knn.ks_for(len(train), protocol=protocol, also=args.k)  # refuses before the work
    backbone, state = build_evaluation.evaluated_backbone(args)
    check_flags(args, state)
    if args.check:
        build_evaluation.eval_loaders(args, train, val)
        return
    keeps, splits = bool(args.save or args.load_cache), {"train": train, "val": val}
    wanted, key = build_evaluation.identity(args, state, DECIDING, digests=keeps, **splits)
    if build_evaluation.is_done(args, "knn.json", wanted, table="k"):
        return
    bad_images = build_evaluation.build_bad_images(args)
    features = get_features(args, backbone, train, val, key=key, bad_images=bad_images)
    if not distributed.is_main():
        return
    if args.save_features:
        path = args.save / feature_cache.NAME
        feature_cache.save(path, key, features, bad_images=bad_images.names)
    what = f"data {args.data}, as far as it can be read"
    check_every_class(features["train"][1], train.classes, what=what)
    absent = unreadable_classes(features["val"][1], val.classes, what=f"data {val.root}")
    counts = {split: len(labels) for split, (_, labels) in features.items()}
    figures = knn.knn_figures(
        *(features["train"], features["val"]),
        ks=knn.ks_for(counts["train"], protocol=protocol, also=args.k),
        num_classes=len(train.classes),
        temperature=args.temperature,
    )
    report(figures, protocol, counts)
    if args.save_acc:
        accuracies = [row[protocol.vote] for row in figures.values()]
        line = ",".join(map(str, [args.epoch, *accuracies]))
        result_files.append_line(args.save_acc, line, flag="--save_acc")
    if args.save:
        counts["classes"] = len(train.classes)
        record = {"k": figures, "protocol": f"{protocol.name}: {protocol.words}; {SHARED}"}
        record |= {"temperature": args.temperature}
        record |= build_evaluation.result_record(
            args, state, counts=counts, bad_images=bad_images, images=splits
        )
        record |= {"classes_without_images": {"val": absent}} | wanted
        record["seconds"] = round(time.monotonic() - start, 1)
        print(result_files.write_json(args.save, "knn.json", record))


if __name__ == "__main__":
    script.run_script(main)
