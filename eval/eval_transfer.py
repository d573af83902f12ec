"""Transfer of a checkpoint's encoder: a linear classifier on ten data sets (CMSF, transfer table).

    python eval/eval_transfer.py --weights <CHECKPOINT> --arch resnet50 --root <FOLDER>
    python eval/eval_transfer.py --weights <CHECKPOINT> --arch resnet50 <DATASET PATH>

Regularized logistic regression on frozen features, the regularization chosen on val images and the
classifier then fitted on train and val: Food101, CIFAR-10, CIFAR-100, SUN397, Cars196, Aircraft,
DTD, Pets, Caltech101 and Flowers102, below --root as torchvision lays them out (`--download`
fetches what is not there), or those of `--sets`; and, or only, an image folder with train/ and
val/, whose val/ is the test set. A set that is not there is named and left out. `--shots 5` fits on
5 images of every class, several draws. Reads the checkpoints that eval_knn.py does; under torchrun
several processes extract the features.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments, build_evaluation, options
from utils.data.bad_images import BadImages
from utils.data.batches import EvalLoader
from utils.data.datasets import check_classes, read_split
from utils.data.splits import check_every_class, unreadable_classes
from utils.evaluation import logistic, result_files, transfer, transfer_data
from utils.evaluation.features import extract_features
from utils.evaluation.transfer_data import Splits
from utils.runtime import distributed, script
from utils.runtime.errors import InputError, printable

DEMO = {"weights": options.DEMO_CHECKPOINT, "num_workers": 1}
FOLDER = "folder"  # the image folder's name among the sets


def set_names(text: str) -> list[str]:
    """An argparse type: "dtd,pets" -> ["dtd", "pets"], each a name of the ten and once."""
    names = text.split(",")
    for name in names:
        if name not in transfer_data.NAMES:
            known = ", ".join(transfer_data.NAMES)
            raise arguments.wrong(name, f"is none of {known}")
    if len(set(names)) < len(names):
        raise arguments.wrong(text, "names a set twice")
    return names


def strengths(text: str) -> list[float]:
    """An argparse type: "0.1,1,10" -> [0.1, 1.0, 10.0]; positive."""
    return [arguments.number(float, low=1e-12, high=1e12)(part) for part in text.split(",")]


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="Linear transfer of a checkpoint to other data sets.")
    options.add_data_options(parser)
    options.add_checkpoint_options(parser)
    group = parser.add_argument_group("transfer")
    folders = ", ".join(transfer_data.FOLDERS.values())
    group.add_argument("--root", type=arguments.path, help=f"folder that holds {folders}")
    group.add_argument(
        "--sets",
        type=set_names,
        help=f"of {','.join(transfer_data.NAMES)}; default: all with --root",
    )
    group.add_argument(
        "--l2",
        type=strengths,
        help="strengths to choose from, with commas, or one; default: 45 from 1e-6 to 1e5, "
        f"{transfer.FEW_SHOT_L2:g} with --shots",
    )
    group.add_argument(
        "--shots", type=arguments.positive, help="fit on this number of images of every class"
    )
    group.add_argument("--draws", type=arguments.positive, help="of --shots; default: 5")
    group.add_argument(
        "--split_seed", type=arguments.seed, default=0, help="of all that is drawn: splits, shots"
    )
    group.add_argument("--save", type=arguments.path, help="folder to write transfer.json to")
    return options.parse(parser, demo=DEMO, needs_data=False)


def check_flags(args: argparse.Namespace) -> None:
    """InputError for flags that do not go together; fills in defaults; makes the folders."""
    if args.root is None and args.sets:
        raise InputError(f"--sets {','.join(args.sets)}: name the folder they lie in with --root")
    if args.root is None and args.download:
        raise InputError("--download: name the folder to write to with --root")
    if args.root is None and args.data is None:
        raise InputError("--root: name the folder of the data sets, or an image folder as data")
    if args.draws and not args.shots:
        raise InputError(f"--draws {args.draws}: only with --shots")
    if args.shots and args.l2 and len(args.l2) > 1:
        raise InputError("--l2: one value with --shots, there are no val images to choose it on")
    args.draws = args.draws or 5
    args.l2 = args.l2 or ([transfer.FEW_SHOT_L2] if args.shots else list(logistic.STRENGTHS))
    if args.root:
        args.sets = args.sets or list(transfer_data.NAMES)
        if args.download:
            result_files.make_folder(args.root, flag="--root")
        elif not args.root.is_dir():
            raise InputError(f"--root {args.root}: no such folder")
    if args.save:
        result_files.make_folder(args.save, flag="--save")


def open_sets(args: argparse.Namespace) -> tuple[dict[str, Splits], dict[str, str]]:
    """The images of each set that can be had, and why the others cannot; InputError if none can."""
    found, missing = {}, {}
    for name in args.sets or []:
        with distributed.main_first():  # it downloads; the others find the set there
            download = args.download and distributed.is_main()
            try:
                found[name] = transfer_data.open_set(
                    name, args.root, seed=args.split_seed, download=download
                )
            except transfer_data.Unavailable as error:
                missing[name] = str(error)
                print(printable(f"{name}: left out: {error}"), flush=True)
            else:
                sizes = found[name]._asdict().items()
                parts = ", ".join(f"{len(part)} {split}" for split, part in sizes)
                classes = len(found[name].test.classes)
                print(f"{name}: {parts} images in {classes} classes", flush=True)
    if args.data:
        train, test = (read_split(args.data, s, dataset=args.dataset) for s in ("train", "val"))
        check_classes(train, test)
        found[FOLDER] = transfer_data.hold_out(train, test, seed=args.split_seed)
    if not found:
        name, reason = next(iter(missing.items()))
        raise InputError(f"--root {args.root}: none of {', '.join(missing)} ({name}: {reason})")
    for images in found.values() if args.shots else ():
        labels = np.concatenate([images.train.labels, images.val.labels])
        transfer.check_shots(args.shots, labels, images.test.classes)
    return found, missing


def extract(backbone: nn.Module, name: str, loaders: list[EvalLoader]) -> transfer.Features | None:
    """Features of train, val (unless empty) and test; None but on the main process."""
    features = {}
    for split, loader in zip(Splits._fields, loaders, strict=True):
        if not len(loader.images):
            continue
        features[split] = extract_features(backbone, loader, f"{name}: {split}")
    return features if distributed.is_main() else None


def evaluate(
    args: argparse.Namespace, backbone: nn.Module, name: str, images: Splits, bad: BadImages
) -> dict | None:
    """The row of one set in table and result file; None but on the main process."""
    start = time.monotonic()
    features = extract(backbone, name, build_evaluation.eval_loaders(args, *images, bad_images=bad))
    if features is None:
        return None
    labels = np.concatenate([features[split][1] for split in features if split != "test"])
    what = f"{name}: train images, as far as they can be read"
    check_every_class(labels, images.test.classes, what=what)
    classes = images.test.classes
    absent = unreadable_classes(features["test"][1], classes, what=f"{name}: test images")
    extracted = time.monotonic()
    device = "cpu" if args.device.type == "mps" else args.device  # it needs float64
    metric = "top1" if name == FOLDER else transfer_data.metric(name)
    if args.shots:
        row = transfer.few_shot_figures(
            features,
            shots=args.shots,
            draws=args.draws,
            l2=args.l2[0],
            classes=classes,
            seed=args.split_seed,
            device=device,
        )
    else:
        row = transfer.linear_figures(
            features, strengths=args.l2, num_classes=len(classes), metric=metric, device=device
        )
    counts = {split: len(labels) for split, (_, labels) in features.items()}
    origin = f"train/ and, as test, val/; {transfer_data.HELD_OUT}"
    print(f"{name}: {row[metric]:.2f}", flush=True)
    return row | {
        "metric": metric,
        "counts": counts | {"classes": len(classes)},
        "classes_without_images": {"test": absent},
        "splits": origin if name == FOLDER else transfer_data.protocol(name),
        "seconds": {
            "features": round(extracted - start, 1),
            "classifier": round(time.monotonic() - extracted, 1),
        },
    }


def result(args: argparse.Namespace, rows: dict[str, dict], missing: dict[str, str]) -> dict:
    """What the result file says beside its origin."""
    kind = "few-shot" if args.shots else "chosen" if len(args.l2) > 1 else "fixed"
    in_mean = [name for name in rows if name != FOLDER]
    record = {
        "sets": rows,
        "missing": missing,
        "mean": transfer.mean_figure({name: rows[name] for name in in_mean}) if in_mean else None,
        "mean_of": in_mean,
        "protocol": transfer.PROTOCOLS[kind],
        "solver": transfer.SOLVER,
        "l2": args.l2,
        "split_seed": args.split_seed,
    }
    return record | ({"shots": args.shots, "draws": args.draws} if args.shots else {})


def main() -> None:
    """Evaluate set by set, print a table, write transfer.json after each."""
    args = parse_args()
    check_flags(args)
    backbone, state = build_evaluation.evaluated_backbone(args)
    found, missing = open_sets(args)
    network = build_evaluation.place(args, backbone.module)
    bad_images = build_evaluation.build_bad_images(args)
    rows, path = {}, None
    for name, images in found.items():
        row = evaluate(args, network, name, images, bad_images)
        if not distributed.is_main():
            continue
        rows[name] = row
        if args.save:
            counts = {"sets": len(rows)}
            folder = found[FOLDER]._asdict() if FOLDER in found else {}
            record = build_evaluation.result_record(
                args, state, counts=counts, bad_images=bad_images, images=folder
            )
            path = result_files.write_json(
                args.save, "transfer.json", result(args, rows, missing) | record
            )
    if distributed.is_main():
        titles = transfer_data.TITLES | {FOLDER: args.data.name if args.data else ""}
        in_mean = [name for name in rows if name != FOLDER]
        print(transfer.format_table(rows, titles=titles, missing=missing, in_mean=in_mean))
        if path:
            print(path)


if __name__ == "__main__":
    script.run_script(main)
