"""One table of several encoders under one protocol: accuracies, how features lie, speed and size.

    python eval/compare.py --weights CMSF=<CHECKPOINT> other=<CHECKPOINT> <DATASET PATH>
    python eval/compare.py --save <DIR> --results "random network=<DIR>" "CMSF=<DIR>"

--weights names rows and checkpoints, which are measured: k-NN, a linear classifier on features
extracted once, the effective rank of the features, alignment and uniformity (arXiv 2005.10242),
images that pass the network in a second, its parameters. Raw pixels and random networks are rows
too. Features are kept in --save, and used again for the same checkpoint, settings and images. Under
torchrun several processes extract them.

--results names rows and folders with what eval_knn.py and eval_linear.py wrote: knn.json,
linear/linear.json (frozen encoder), finetune/linear.json (fine-tuned). What is not there stays
empty, and so does, which is said, what is of another checkpoint or other val images than the first.
"""

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments, build_comparison, build_evaluation, options
from utils.evaluation import comparison_table, linear_run, result_files
from utils.evaluation.comparison_table import Row
from utils.evaluation.linear_run import Recipe
from utils.runtime import distributed, faiss_library, files, script
from utils.runtime.errors import InputError, printable

DEMO = {"num_workers": 1}
FOLDER = Path("output/compare")


def add_row_options(parser: argparse.ArgumentParser) -> None:
    """Which rows there are, and what is their own."""
    group = parser.add_argument_group("rows")
    several = {"nargs": "+", "action": "extend"}
    file = "a row that is measured, and its checkpoint"
    named = several | {"type": arguments.named_path}
    group.add_argument("--weights", **named, metavar="NAME=FILE", help=file)
    folder = "a row of what eval_knn.py and eval_linear.py have written there"
    group.add_argument("--results", **named, metavar="NAME=DIR", help=folder, default=[])
    more = "rows beside --weights; without a name: none"
    both = ["random", "pixels"]
    group.add_argument("--baselines", nargs="*", choices=both, default=both, help=more)
    group = parser.add_argument_group("settings of rows of --weights")
    said = "for all rows or for one; default: as its checkpoint says"
    for flag in ("--arch", "--image_size"):
        group.add_argument(flag, **several, metavar="[NAME=]VALUE", help=said)
    prefix = f"{options.PREFIX}; for all rows or for one"
    group.add_argument("--prefix", **several, metavar="[NAME=]VALUE", help=prefix)
    names = {"nargs": "*", "action": "extend", "metavar": "NAME"}
    target = "rows of which the target encoder is measured; without a name: all"
    group.add_argument("--use_target", "--use-target", **names, help=target)
    stem = "rows that have a ResNet's small stem, where the checkpoint does not say so"
    group.add_argument("--small_stem", **names, help=stem)


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="One table of several encoders.")
    options.add_data_options(parser)
    add_row_options(parser)
    options.add_network_options(parser.add_argument_group("measuring"))
    options.add_split_options(parser, "--train_file", "--train-file")
    options.add_recipe_options(
        parser.add_argument_group("linear classifier, the best learning rate counts"),
        lr="0.01,0.03,0.1,0.3,1",
    )
    parser.set_defaults(cached=True, fine_tune=False, mlp=False)  # the rest of a `Recipe`
    text = f"folder of results.json, results.md and features; with --weights by default {FOLDER}"
    parser.add_argument_group("files").add_argument("--save", type=arguments.path, help=text)
    args = options.parse(parser, demo=DEMO, needs_data="weights")
    if args.demo and not (args.weights or args.results):
        args.weights = [f"CMSF-2Q={options.DEMO_CHECKPOINT}"]
    if args.data and not args.weights:
        hint = "nothing is measured without --weights; what is measured already: --results NAME=DIR"
        raise InputError(f"data {args.data}: {hint}")
    if not (args.weights or args.results):
        raise InputError("--weights: name rows to measure, or by --results rows that are measured")
    if args.weights:
        args.save = args.save or FOLDER
    return args


def measure_rows(args: argparse.Namespace, *, taken: Iterable[str]) -> dict[str, Row] | None:
    """The rows of --weights and --baselines; None: another process has them.

    taken: names of other rows. All rows are opened first, then all have their features kept, which
    processes share, then each is measured, which is quick.
    """
    faiss_library.load("k-NN")  # not after the features are extracted
    train, val = build_evaluation.read_labeled(args, only_labeled=True)
    rows = build_comparison.open_rows(args, taken=taken, images=max(len(train), len(val)))
    digests = build_evaluation.image_digests(args, train=train, val=val)
    bad_images = build_evaluation.build_bad_images(args)
    data = build_comparison.Data(train, val, digests, bad_images)
    for row in rows:
        start = time.monotonic()
        build_comparison.keep_features(row, data, check=row is rows[0])
        say(f"{row.name}: features in {row.folder}", start)
    is_main = distributed.is_main()
    distributed.stop()
    if not is_main:
        return None
    recipe = Recipe(**{name: getattr(args, name) for name in linear_run.SETTINGS})
    measured = {}
    for row in rows:
        start = time.monotonic()
        measured[row.name] = build_comparison.measure(row, data, recipe, epochs=args.epochs)
        say(f"{row.name}: measured", start)
    return measured


def say(text: str, start: float) -> None:
    """Print a line on what was done since `start`."""
    print(printable(f"{text} ({time.monotonic() - start:.1f} s)"), flush=True)


def main() -> None:
    """Measure rows, read others, print the table and write it."""
    args = parse_args()
    rows = comparison_table.read_rows(args.results)
    if args.save:
        result_files.make_folder(args.save, flag="--save")
        for name, is_own in comparison_table.WRITTEN.items():
            own = {"kind": "table of this script", "is_own": is_own}
            result_files.check_own(args.save / name, flag="--save", **own)
    if args.weights:
        measured = measure_rows(args, taken=rows)
        if measured is None:
            return
        rows = measured | rows
    for line in comparison_table.notes(rows):
        print(line)
    print(comparison_table.as_text(rows))
    if args.save:
        path = result_files.write_json(args.save, "results.json", comparison_table.record(rows))
        table = args.save / "results.md"
        files.replace_text(table, comparison_table.as_markdown(rows), flag="--save")
        print(f"{path}\n{table}")


if __name__ == "__main__":
    script.run_script(main)
