"""Transfer of a checkpoint's encoder: a linear classifier on ten data sets (CMSF, transfer table).

    python eval/eval_transfer.py --weights <CHECKPOINT> --arch resnet50 --root <FOLDER>
    python eval/eval_transfer.py --weights <CHECKPOINT> --arch resnet50 <DATASET PATH>

The sets lie below --root as torchvision lays them out (`--download` fetches what is not there); one
that is not there is named and left out. Of an image folder, beside them or alone, val/ is the test
set. The protocol is that of utils/evaluation/transfer.py; `--shots 5` fits on 5 images of every
class, several draws. Under torchrun several processes extract the features.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments, build_evaluation, options
from utils.data.datasets import check_classes, read_split
from utils.data.eval_loader import EvalLoader
from utils.data.splits import check_every_class, unreadable_classes
from utils.evaluation import logistic, result_files, transfer, transfer_data
from utils.evaluation.features import extract_features
from utils.evaluation.transfer import Protocol
from utils.evaluation.transfer_data import Splits, TransferSet
from utils.runtime import distributed, script
from utils.runtime.errors import InputError, printable

DEMO = {"weights": options.DEMO_CHECKPOINT, "num_workers": 1}
FOLDER = "folder"  # the image folder's name among the sets
SETS = transfer_data.SETS | {FOLDER: TransferSet("", origin="train/ and, as test, val/")}
COUNTS = (*Splits._fields, "classes")


def set_names(text: str) -> list[str]:
    """An argparse type: "dtd,pets" -> ["dtd", "pets"], each a name of the ten and once."""
    names = text.split(",")
    for name in names:
        if name not in transfer_data.SETS:
            raise arguments.wrong(name, f"is none of {', '.join(transfer_data.SETS)}")
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
    add = parser.add_argument_group("transfer").add_argument
    folders = ", ".join(entry.folder for entry in transfer_data.SETS.values())
    add("--root", type=arguments.path, help=f"folder that holds {folders}")
    names = ",".join(transfer_data.SETS)
    add("--sets", type=set_names, help=f"of {names}; default: all with --root")
    grid = f"45 from 1e-6 to 1e5, {transfer.FEW_SHOT_L2:g} with --shots"
    add("--l2", type=strengths, help=f"strengths to choose from, with commas; default: {grid}")
    add("--shots", type=arguments.positive, help="fit on this number of images of every class")
    add("--draws", type=arguments.positive, help="of --shots; default: 5")
    text = "of all that is drawn: splits, shots"
    add("--split_seed", type=arguments.seed, default=0, help=text)
    add("--save", type=arguments.path, help="folder to write transfer.json to")
    return options.parse(parser, demo=DEMO, needs_data=False)


def check_flags(args: argparse.Namespace) -> None:
    """InputError for flags that do not go together; fills in defaults; makes the folders."""
    if args.root is None and (args.sets or args.download):
        flag = f"--sets {','.join(args.sets)}" if args.sets else "--download"
        raise InputError(f"{flag}: name the folder of the data sets with --root")
    if args.root is None and args.data is None:
        raise InputError("--root: name the folder of the data sets, or an image folder as data")
    if args.draws and not args.shots:
        raise InputError(f"--draws {args.draws}: only with --shots")
    if args.shots and args.l2 and len(args.l2) > 1:
        raise InputError("--l2: one value with --shots, there are no val images to choose it on")
    args.l2 = args.l2 or ([transfer.FEW_SHOT_L2] if args.shots else list(logistic.STRENGTHS))
    args.sets = args.sets or (list(transfer_data.SETS) if args.root else [])
    if args.download:
        result_files.make_folder(args.root, flag="--root")
    elif args.root and not args.root.is_dir():
        raise InputError(f"--root {args.root}: no such folder")
    if args.save:
        result_files.make_folder(args.save, flag="--save")


def open_sets(args: argparse.Namespace) -> tuple[dict[str, Splits], dict[str, str]]:
    """The images of each set that can be had, and why the others cannot; InputError if none can."""
    found, missing = {}, {}
    for name in args.sets:
        with distributed.main_first():  # it downloads; the others find the set there
            download = args.download and distributed.is_main()
            try:
                found[name] = transfer_data.open_set(
                    name, args.root, seed=args.split_seed, download=download
                )
            except transfer_data.Unavailable as error:
                missing[name] = str(error)
                print(printable(f"{name}: left out: {error}"), flush=True)
                continue
        parts = ", ".join(f"{len(part)} {split}" for split, part in found[name]._asdict().items())
        print(f"{name}: {parts} images in {len(found[name].test.classes)} classes", flush=True)
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


def evaluate(
    protocol: Protocol, network: nn.Module, name: str, loaders: dict[str, EvalLoader]
) -> dict | None:
    """The row of one set in table and result file; None but on the main process."""
    start = time.monotonic()
    features = {
        split: extract_features(network, loader, f"{name}: {split}")
        for split, loader in loaders.items()
        if len(loader.images)
    }
    if not distributed.is_main():
        return None
    extracted = time.monotonic()
    metric, classes = SETS[name].metric, loaders["test"].images.classes
    labels = {split: y for split, (_, y) in features.items()}
    fitted_on = torch.cat([y for split, y in labels.items() if split != "test"])
    check_every_class(fitted_on, classes, what=f"{name}: train images, as far as they can be read")
    absent = unreadable_classes(labels["test"], classes, what=f"{name}: test images")
    row = protocol.figures(features, classes, metric=metric)
    print(f"{name}: {row[metric]:.2f}", flush=True)
    return row | {
        "metric": metric,
        "counts": {split: len(y) for split, y in labels.items()} | {"classes": len(classes)},
        "classes_without_images": {"test": absent},
        "splits": SETS[name].protocol,
        "seconds": {
            "features": round(extracted - start, 1),
            "classifier": round(time.monotonic() - extracted, 1),
        },
    }


def mean(rows: dict[str, dict]) -> float | None:
    """Over the data sets, of the accuracy that each is reported by, percent; None without one."""
    figures = [row[row["metric"]] for name, row in rows.items() if name != FOLDER]
    return sum(figures) / len(figures) if figures else None


def format_table(rows: dict[str, dict], *, missing: dict[str, str], folder: str) -> str:
    """A text table, percent: a line for each data set, then the mean, then what lacks and why.

    rows: by name what `evaluate` returned. folder: the image folder's title.
    """
    head = f"{'':<12}{'accuracy':>14}  {'':<14}{'l2':>8}"
    lines = [head + "".join(f"{name:>9}" for name in COUNTS)]
    for name, row in rows.items():
        std = row.get(f"{row['metric']}_std")
        accuracy = f"{row[row['metric']]:.2f}" + ("" if std is None else f" ± {std:.2f}")
        line = f"{SETS[name].title or folder:<12}{accuracy:>14}  "
        line += f"{transfer.METRICS[row['metric']]:<14}{row['l2']:>8.2g}"
        line += "".join(f"{row['counts'].get(split, 0):>9}" for split in COUNTS)
        lines.append(line + ("" if row["converged"] else "  (not converged)"))
    if (count := len(rows) - (FOLDER in rows)) > 1:
        lines.append(f"{f'mean of {count}':<12}{mean(rows):>14.2f}")
    lines += [f"{SETS[name].title:<12}{'-':>14}  {reason}" for name, reason in missing.items()]
    return "\n".join(lines)


def result(protocol: Protocol, rows: dict[str, dict], missing: dict[str, str]) -> dict:
    """What the result file says beside its origin."""
    record = {
        "sets": rows,
        "missing": missing,
        "mean": mean(rows),
        "mean_of": [name for name in rows if name != FOLDER],
        "protocol": str(protocol),
        "solver": transfer.SOLVER,
        "l2": protocol.strengths,
        "split_seed": protocol.seed,
    }
    drawn = {"shots": protocol.shots, "draws": protocol.draws}
    return record | drawn if protocol.shots else record


def main() -> None:
    """Evaluate set by set, print a table, write transfer.json after each."""
    args = parse_args()
    check_flags(args)
    device = "cpu" if args.device.type == "mps" else args.device  # it needs float64
    protocol = Protocol(args.l2, args.shots, args.draws or 5, args.split_seed, device)
    backbone, state = build_evaluation.evaluated_backbone(args)
    found, missing = open_sets(args)
    network = build_evaluation.place(args, backbone.module)
    bad_images = build_evaluation.build_bad_images(args)
    folder = found[FOLDER]._asdict() if FOLDER in found else {}
    rows, path = {}, None
    for name, images in found.items():
        loaders = build_evaluation.eval_loaders(args, *images, bad_images=bad_images)
        row = evaluate(protocol, network, name, dict(zip(Splits._fields, loaders, strict=True)))
        if row is None:
            continue
        rows[name] = row
        if args.save:
            record = build_evaluation.result_record(
                args, state, counts={"sets": len(rows)}, bad_images=bad_images, images=folder
            )
            record = result(protocol, rows, missing) | record
            path = result_files.write_json(args.save, "transfer.json", record)
    if distributed.is_main():
        print(format_table(rows, missing=missing, folder=args.data.name if args.data else ""))
        if path:
            print(path)


if __name__ == "__main__":
    script.run_script(main)
