"""Linear evaluation of a checkpoint's encoder, or fine-tuning of it with labels (CMSF sec. 4).

    python eval/eval_linear.py --weights <CHECKPOINT> --arch resnet50 <DATASET PATH>

A linear classifier on frozen features, trained from random crops and measured on val/. `--cached`
takes features extracted once instead of crops, `--lr 0.01,0.03,0.1` trains one classifier for each
learning rate in the same pass, `--fine-tune` trains the encoder too (the published code's trained
no weight of it), and `--train-file` or `--label_fraction` leave only some images their labels.
Reads the checkpoints that eval_knn.py does. Under torchrun several processes share the work on
images, with the results of one.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments, build_evaluation, options
from utils.data.bad_images import BadImages
from utils.data.datasets import ImageSet
from utils.data.eval_loader import LabeledLoader
from utils.data.splits import check_every_class, unreadable_classes
from utils.evaluation import feature_cache, linear_probe, linear_run, result_files
from utils.evaluation.linear_run import FromFeatures, FromImages, LinearRun, Recipe
from utils.method import batch_norm, checkpoint
from utils.method.encoders import Backbone
from utils.runtime import distributed, files, script
from utils.runtime.errors import InputError, printable
from utils.training.log import Log

DEMO = {"weights": options.DEMO_CHECKPOINT, "num_workers": 1, "lr": [0.3]}
DECIDING = (*linear_run.SETTINGS, "epochs", "eval_freq", "bad_images")  # what makes a result
AUTO = Path("auto")  # of --resume


def add_classifier_options(parser: argparse.ArgumentParser) -> None:
    """What is trained, and how."""
    group = parser.add_argument_group("classifier")
    options.add_recipe_options(group, lr="0.01")
    group.add_argument(
        *("--eval_freq", "--eval-freq"),
        type=arguments.positive,
        default=1,
        help="epochs between val figures and saves",
    )
    group.add_argument("--mlp", action="store_true", help="a hidden layer before the classifier")
    group.add_argument(
        *("--fine_tune", "--fine-tune"), action="store_true", help="train the encoder too"
    )
    group.add_argument(
        "--cached", action="store_true", help="train on features extracted once, without crops"
    )


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="Linear evaluation or fine-tuning of a checkpoint.")
    options.add_data_options(parser)
    options.add_checkpoint_options(parser)
    options.add_split_options(parser, "--train_file", "--train-file")
    add_classifier_options(parser)
    group = parser.add_argument_group("files")
    group.add_argument(
        "--save", type=arguments.path, help="folder to write linear.json and linear.pth to"
    )
    group.add_argument(
        *("--cache_dir", "--cache-dir"),
        type=arguments.path,
        help="folder of --cached's features.pth; default: that of --save, else it is not kept",
    )
    group.add_argument(
        "--resume",
        type=arguments.path,
        help='linear.pth to continue after, on the same images; "auto": that of --save, if it is '
        "of the same run",
    )
    group.add_argument(
        *("--evaluate",),
        action="store_true",
        help="only measure --resume on val/; --save gets evaluate.json, its linear.json stays",
    )
    options.add_stage_options(group)
    args = options.parse(parser, demo=DEMO)
    if args.demo and not args.fine_tune:
        args.cached = True
    return args


def check_flags(args: argparse.Namespace) -> None:
    """InputError for flags that do not go together; makes the folders to write to."""
    if args.evaluate and (args.resume in (None, AUTO) or args.keep_done):
        raise InputError("--evaluate: name the linear.pth to measure with --resume")
    for flag, given in (("--resume auto", args.resume == AUTO), ("--keep_done", args.keep_done)):
        if given and not args.save:
            raise InputError(f"{flag}: name the folder with --save")
    several = f"--lr {','.join(map(str, args.lr))}: one learning rate only with"
    if len(args.lr) > 1 and (args.fine_tune or args.mlp):
        raise InputError(f"{several} {'--fine-tune' if args.fine_tune else '--mlp'}")
    if args.fine_tune and args.cached:
        raise InputError("--cached: with --fine-tune the features change in every step")
    if args.fine_tune and args.weights == "pixels":
        raise InputError("--fine-tune: --weights pixels has no weight to train")
    if args.batch_size == 1 and (args.fine_tune or args.mlp):
        raise InputError("--batch_size 1: batch norm cannot train on one image")
    if args.cache_dir and not args.cached:
        raise InputError(f"--cache_dir {args.cache_dir}: only with --cached")
    for flag in ("save", "cache_dir"):
        if folder := getattr(args, flag):
            result_files.make_folder(folder, flag=f"--{flag}")


def build_data(
    args: argparse.Namespace,
    backbone: Backbone,
    train: ImageSet,
    val: ImageSet,
    *,
    key: dict[str, str],
    bad_images: BadImages,
    fine_tune: bool,
) -> FromImages | FromFeatures | None:
    """Where features come from; key: of their cache. None: another process trains on them."""
    loaders = build_evaluation.eval_loaders(args, train, val, bad_images=bad_images)
    common = {"batch_size": args.batch_size, "seed": args.seed, "device": args.device}
    if args.cached and not args.evaluate:
        folder = args.cache_dir or args.save
        path = folder and folder / feature_cache.NAME
        features = feature_cache.load_or_extract(path, key, backbone, *loaders)
        distributed.stop()  # the rest is quick
        return features and FromFeatures(features, **common)
    common |= {"image_size": args.image_size, "num_workers": args.num_workers}
    views = LabeledLoader(train, bad_images=bad_images, **common)
    return FromImages(backbone.module, views, *loaders, fine_tune=fine_tune)


def find_run(
    args: argparse.Namespace, recipe: Recipe, key: dict[str, str], classes: list[str]
) -> dict | None:
    """What to go on from by --resume, None to begin; "auto" becomes the file in args.

    With "auto" a file of another run, or none that can be read, is said to be replaced; it may have
    had all epochs, and is measured again.
    """
    auto = args.resume == AUTO
    if auto:
        args.resume = args.save / "linear.pth"
    if not args.resume or (auto and not args.resume.exists()):
        return None
    try:
        saved = linear_run.load(
            args.resume, recipe, key=key, classes=classes, measure_only=args.evaluate
        )
        if saved["epoch"] < args.epochs + auto or args.evaluate:
            return saved
        said = f"it has finished epoch {saved['epoch']} of --epochs {args.epochs}"
        raise InputError(f"--resume {args.resume}: {said}")
    except InputError as error:
        if not auto:
            raise
        print(printable(f"{error}: replaced"), flush=True)
    return None


def place(
    args: argparse.Namespace, recipe: Recipe, backbone: Backbone, saved: dict | None
) -> Backbone:
    """The backbone on its device; to fine-tune as saved, with batch norm over all processes."""
    if recipe.fine_tune:
        if saved:
            checkpoint.load_backbone(backbone, saved, what=f"--resume {args.resume}")
        backbone = backbone._replace(module=batch_norm.synchronized(backbone.module, args.device))
    build_evaluation.place(args, backbone.module)
    return backbone


def summary_of(
    args: argparse.Namespace, run: LinearRun, data: FromImages | FromFeatures, origin: dict
) -> dict[str, dict]:
    """What was found for each learning rate, after the last epoch or by --evaluate.

    Whenever val has been measured, says so and writes linear.pth, with its origin.
    """
    if args.evaluate:
        return dict(zip(map(str, run.recipe.lr), run.measure(data) or [], strict=False))
    origin |= {"args": {name: getattr(args, name) for name in ("arch", "image_size", "small_stem")}}
    for line in run.train(data, epochs=args.epochs, eval_freq=args.eval_freq):
        if distributed.is_main():
            Log.say(line)
            if args.save:
                files.save(args.save / "linear.pth", run.state() | origin, flag="--save")
    return linear_probe.summarize(run.recipe.lr, run.history)


def report(args: argparse.Namespace, summary: dict[str, dict], record: dict) -> None:
    """Print the table of each learning rate's figures; write it and the record to --save."""
    counts = record["counts"]
    print(f"{counts['val']} val images, probe trained on {counts['train']} images, percent")
    print(linear_probe.format_table(summary))
    if args.save:
        best = linear_probe.best_rate(summary)
        figures = {name: summary[best][name] for name in ("top1", "top5")}
        record = {"lr": summary, "best_lr": best} | figures | record
        # Apart from the record of the training, which says more.
        name = "evaluate.json" if args.evaluate else "linear.json"
        print(result_files.write_json(args.save, name, record))


def main() -> None:
    """Train a probe or measure a saved one, print a table, write it."""
    args = parse_args()
    start = time.monotonic()
    check_flags(args)
    train, val = build_evaluation.read_labeled(args, only_labeled=not args.evaluate)
    backbone, state = build_evaluation.evaluated_backbone(args)
    if args.check:
        build_evaluation.eval_loaders(args, train, val)
        return
    splits = {"train": train, "val": val}
    keeps = bool(args.save or args.cache_dir or args.resume) and not args.evaluate
    wanted, key = build_evaluation.identity(args, state, DECIDING, digests=keeps, **splits)
    if build_evaluation.is_done(args, "linear.json", wanted, table="lr"):
        return
    recipe = Recipe(**{name: getattr(args, name) for name in linear_run.SETTINGS})
    saved = find_run(args, recipe, key, train.classes)
    backbone = place(args, recipe, backbone, saved)
    bad_images = build_evaluation.build_bad_images(args)
    if saved and not args.evaluate:
        bad_images.restore(saved["bad_images"])
    data = build_data(
        *(args, backbone, train, val), key=key, bad_images=bad_images, fine_tune=recipe.fine_tune
    )
    if data is None:
        return
    about = {"saved": saved, "what": f"--resume {args.resume}"}
    run = LinearRun(recipe, backbone, num_classes=len(train.classes), device=args.device, **about)
    if not saved:
        run.probe.standardize.measure(data.for_statistics())
        what = f"data {args.data}, as far as it can be read"
        check_every_class(data.labels, train.classes, what=what)
    num_train = saved["num_images"] if saved else len(data.labels)
    protocol = saved["protocol"] if args.evaluate else recipe.protocol
    origin = {"key": key, "classes": train.classes, "num_images": num_train}
    origin |= {"protocol": protocol, "bad_images": bad_images.names}
    summary = summary_of(args, run, data, origin)
    if not distributed.is_main():
        return
    counts = {"train": num_train, "val": len(data.val_labels), "classes": len(train.classes)}
    absent = unreadable_classes(data.val_labels, val.classes, what=f"data {val.root}")
    record = {"epochs": len(run.history), "protocol": protocol}
    record |= {"classes_without_images": {"val": absent}}
    record |= build_evaluation.result_record(
        args, state, counts=counts, bad_images=bad_images, images=splits
    )
    record |= {} if args.evaluate else wanted
    report(args, summary, record | {"seconds": round(time.monotonic() - start, 1)})


if __name__ == "__main__":
    script.run_script(main)
