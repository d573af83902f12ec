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
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments, build_evaluation, options
from utils.data.bad_images import BadImages
from utils.data.datasets import ImageSet, check_classes, read_split
from utils.data.eval_loader import EvalLoader, LabeledLoader
from utils.data.splits import check_every_class, labeled_index, unreadable_classes
from utils.evaluation import feature_cache, linear_probe, result_files
from utils.evaluation.labeled_features import FromFeatures, FromImages
from utils.method import batch_norm, checkpoint
from utils.method.encoders import Backbone
from utils.runtime import checked, distributed, files, script, torch_file
from utils.runtime.errors import InputError, RunError, printable
from utils.training.log import Log

DEMO = {
    "weights": options.DEMO_CHECKPOINT,
    "num_workers": 1,
    "lr": [0.3],
}
FORMAT = "cmsf-linear-2"  # 1 knew images by their sizes and times
ENCODER = "encoders.query_encoder.backbone."  # a fine-tuned encoder's names in linear.pth
# What a resumed run must have in common with its beginning.
SETTINGS = (
    *("lr", "lr_schedule", "momentum", "wd", "batch_size", "seed"),
    *("cached", "fine_tune", "mlp"),
)
# And what makes its result the same one.
DECIDING = (*SETTINGS, "epochs", "eval_freq", "bad_images")
AUTO = Path("auto")  # of --resume


# What is in linear.pth beside what every checkpoint has.
_PERCENT = checked.list_of(checked.or_none(checked.real(0, 100)))
_ROW = {
    "loss": checked.list_of(checked.or_none(checked.real())),
    "top1": _PERCENT,
    "top5": _PERCENT,
}
_FIELDS = {
    "epoch": checked.whole(1),
    "probe": checked.TABLE,
    "optimizer": checked.TABLE,
    "history": checked.list_of(checked.TABLE),
    "key": checked.table_of(checked.TEXT),
    "classes": checked.list_of(checked.TEXT),
    "num_images": checked.whole(1),
    "protocol": checked.TEXT,
    "settings": checked.table_of(checked.PLAIN),
}


def add_classifier_options(parser: argparse.ArgumentParser) -> None:
    """What is trained, and how."""
    group = parser.add_argument_group("classifier")
    group.add_argument(
        *("--lr", "--learning_rate"),
        type=arguments.rate_list,
        default="0.01",
        help="one, or several with commas: a classifier for each in one pass over the data",
    )
    group.add_argument("--epochs", type=arguments.positive, default=40)
    group.add_argument(
        *("--lr_schedule", "--lr-schedule"),
        type=arguments.epoch_list,
        default="15,30,40",
        help="after these numbers of epochs the learning rate is divided by ten",
    )
    group.add_argument("--momentum", type=arguments.share, default=0.9)
    group.add_argument(
        *("--wd", "--weight_decay", "--weight-decay"), type=arguments.not_negative, default=1e-4
    )
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


def read_images(args: argparse.Namespace) -> tuple[ImageSet, ImageSet]:
    """The labeled training images and the val images; InputError if one cannot learn from them."""
    train, val = (read_split(args.data, split, dataset=args.dataset) for split in ("train", "val"))
    check_classes(train, val)
    if not args.evaluate:
        index = labeled_index(
            train,
            file=args.train_file,
            flag="--train_file",
            fraction=args.label_fraction,
            seed=args.split_seed,
        )
        train = train.take(index)
    return train, val


def build_data(
    args: argparse.Namespace,
    backbone: Backbone,
    train: ImageSet,
    val: ImageSet,
    *,
    key: dict[str, str],
    bad_images: BadImages,
) -> FromImages | FromFeatures | None:
    """Where features come from; key: of their cache. None: another process trains on them."""
    loaders = build_evaluation.eval_loaders(args, train, val, bad_images=bad_images)
    if args.cached and not args.evaluate:
        features = cached_features(args, backbone, *loaders, key=key)
        return features and FromFeatures(
            features, batch_size=args.batch_size, seed=args.seed, device=args.device
        )
    views = LabeledLoader(
        train,
        batch_size=args.batch_size,
        image_size=args.image_size,
        seed=args.seed,
        num_workers=args.num_workers,
        device=args.device,
        bad_images=bad_images,
    )
    return FromImages(backbone.module, views, *loaders, fine_tune=args.fine_tune)


def cached_features(
    args: argparse.Namespace,
    backbone: Backbone,
    train: EvalLoader,
    val: EvalLoader,
    *,
    key: dict[str, str],
) -> feature_cache.Features | None:
    """The features of a cache that has this key; extracted, and kept there, where it has not.

    None but on the main process.
    """
    folder = args.cache_dir or args.save
    path = folder and folder / feature_cache.NAME
    bad_images, features = train.bad_images, None
    if distributed.is_main() and path and path.exists():
        try:
            features = feature_cache.load(
                path,
                key,
                flag="--cached",
                bad_images=bad_images,
                feature_dim=backbone.feature_dim,
                num_classes=len(train.images.classes),
            )
        except InputError as error:
            print(printable(f"{error}: extracted anew"), flush=True)
    if distributed.any_true(features is not None):
        return features
    features = feature_cache.extract(backbone.module, train, val)
    if distributed.is_main() and path:
        feature_cache.save(path, key, features, bad_images=bad_images.names)
    return features


def find_run(args: argparse.Namespace, key: dict[str, str], classes: list[str]) -> dict | None:
    """What to go on from by --resume, None to begin; "auto" becomes the file in args, or None.

    With "auto" a file of another run, or none that can be read, is said to be replaced.
    """
    if args.resume != AUTO:
        return load_run(args, key, classes) if args.resume else None
    args.resume = args.save / "linear.pth"
    try:
        if args.resume.exists():
            return load_run(args, key, classes, also_finished=True)
    except InputError as error:
        print(printable(f"{error}: replaced"), flush=True)
    args.resume = None
    return None


def load_run(
    args: argparse.Namespace,
    key: dict[str, str],
    classes: list[str],
    *,
    also_finished: bool = False,
) -> dict:
    """The linear.pth that --resume names; InputError unless it goes with the flags and the data.

    key: of the features; the saved run must have the same parts. With --evaluate, --lr, --mlp and
    --fine-tune are as in the file, and written into args. also_finished: one with all --epochs too.
    """
    what = f"--resume {args.resume}"
    saved = checkpoint.load(args.resume, flag="--resume")
    if saved.get("format") != FORMAT:
        raise InputError(f"{what}: no linear.pth of this version")
    for name, kind in _FIELDS.items():
        checked.take(saved, name, kind, what=what)
    saved.setdefault("bad_images", [])
    checked.take(saved, "bad_images", checked.list_of(checked.TEXT), what=what)
    differing = [name for name in key if saved["key"].get(name) != key[name]]
    if differing:
        raise InputError(f"{what}: a run with another {', '.join(differing)}")
    if list(saved["classes"]) != classes:
        raise InputError(f"{what}: a run on other classes than those of {args.data}")
    take_settings(args, saved["settings"], what=what)
    check_history(saved, num_rates=len(args.lr), what=what)
    if saved["epoch"] >= args.epochs + also_finished and not args.evaluate:
        raise InputError(
            f"{what}: it has finished epoch {saved['epoch']} of --epochs {args.epochs}"
        )
    return saved


def take_settings(args: argparse.Namespace, saved: dict, *, what: str) -> None:
    """InputError unless a saved run's settings are the flags; with --evaluate some become them."""
    kinds = {name: checked.ANY for name in SETTINGS}
    kinds |= {"lr": checked.list_of(checked.real(0)), "mlp": checked.FLAG}
    kinds["fine_tune"] = checked.FLAG
    for name, kind in kinds.items():
        value = checked.take(saved, name, kind, what=f"{what}: settings")
        if args.evaluate and kind is not checked.ANY:
            setattr(args, name, value)
        elif value != getattr(args, name) and not args.evaluate:
            text = f"--{name} {torch_file.one_line(str(value))}, not {getattr(args, name)}"
            raise InputError(f"{what}: a run with {text}")
    if not args.lr or (len(args.lr) > 1 and (args.mlp or args.fine_tune)):
        raise InputError(f"{what}: settings has {len(args.lr)} learning rates")


def check_history(saved: dict, *, num_rates: int, what: str) -> None:
    """InputError unless a saved run has the figures of each of its epochs, measured in the last.

    A learning rate that diverged has none.
    """
    rows, epoch = saved["history"], saved["epoch"]
    if len(rows) != epoch:
        raise InputError(f"{what}: history has {len(rows)} epochs, not {epoch}")
    for number, row in enumerate(rows, 1):
        for name, kind in _ROW.items():
            values = checked.take(row, name, kind, what=f"{what}: history of epoch {number}")
            unmeasured = name == "top1" and number == epoch and values.count(None) == num_rates
            if len(values) != num_rates or unmeasured:
                raise InputError(f"{what}: history of epoch {number}: {name} is incomplete")


def save_run(
    args: argparse.Namespace,
    probe: linear_probe.LinearProbe,
    optimizer: torch.optim.Optimizer,
    encoder: nn.Module,
    history: list[dict],
    origin: dict,
) -> None:
    """Write linear.pth to the folder of --save, if there is one; a RunError if that fails.

    A fine-tuned encoder is in it under the names of this repository's checkpoints, so that both
    evaluations read it as --weights.
    """
    if not (args.save and distributed.is_main()):
        return
    state = {
        "format": FORMAT,
        "epoch": len(history),
        "probe": probe.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
        **origin,
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "args": {name: getattr(args, name) for name in ("arch", "image_size", "small_stem")},
    }
    if args.fine_tune:
        weights = encoder.state_dict()
        state["state_dict"] = {ENCODER + name: value for name, value in weights.items()}
    files.save(args.save / "linear.pth", state, flag="--save")


def trained_backbone(args: argparse.Namespace, backbone: Backbone, saved: dict | None) -> Backbone:
    """The backbone to fine-tune: as saved, with batch norm over all processes."""
    if saved:
        checkpoint.load_backbone(backbone, saved, what=f"--resume {args.resume}")
    return backbone._replace(module=batch_norm.synchronized(backbone.module, args.device))


def train_epoch(
    probe: linear_probe.LinearProbe,
    data: FromImages | FromFeatures,
    optimizer: torch.optim.Optimizer,
    *,
    epoch: int,
    seed: int,
) -> list[float]:
    """One epoch's mean loss of each learning rate; RunError if none of them is finite."""
    # Only dropout in a fine-tuned encoder draws from here; so resuming changes no bit of it.
    entropy = [seed, epoch, distributed.rank()]
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
    losses = linear_probe.train_epoch(probe, data.epoch(epoch), optimizer)
    for value in (losses, *probe.state_dict().values()):  # each GPU may round differently
        distributed.from_main(value)
    losses = losses.tolist()
    if not any(map(math.isfinite, losses)):
        raise RunError(f"the loss is {losses[0]} in epoch {epoch}; try a lower --lr (or --wd)")
    return losses


def train_probe(
    probe: linear_probe.LinearProbe,
    data: FromImages | FromFeatures,
    optimizer: torch.optim.Optimizer,
    history: list[dict],
    *,
    rates: list[float],
    schedule: list[int],
    epochs: int,
    eval_freq: int,
    seed: int,
    save: Callable[[], None],
) -> None:
    """Train up to the last epoch; each adds its figures to history.

    A run that has had its last epoch is measured again: its figures are those of val as it is now.
    Every `eval_freq` epochs and after the last, val is measured, a line printed and the run saved;
    in between top1 and top5 are None. RunError if no learning rate has a finite loss. Of several
    processes all train, and the main one measures.
    """
    if len(history) >= epochs and (figures := measure(probe, data)):
        history[-1] |= {name: [row[name] for row in figures] for name in ("top1", "top5")}
    unmeasured = [{"top1": None, "top5": None}] * len(rates)
    for epoch in range(len(history) + 1, epochs + 1):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.1 ** sum(epoch > decay_epoch for decay_epoch in schedule)
        losses = train_epoch(probe, data, optimizer, epoch=epoch, seed=seed)
        due = epoch % eval_freq == 0 or epoch == epochs
        figures = (measure(probe, data) if due else None) or unmeasured
        history.append(linear_probe.history_row(losses, figures))
        if due and distributed.is_main():
            parts = (
                f"lr {rate}: loss {loss:.4f} top-1 {linear_probe.percent(row['top1'])}"
                for rate, loss, row in zip(rates, losses, figures, strict=True)
            )
            Log.say(f"epoch {epoch}/{epochs}  {'  '.join(parts)}")
            save()


def measure(
    probe: linear_probe.LinearProbe, data: FromImages | FromFeatures
) -> list[dict[str, float | None]] | None:
    """Accuracy on val of each learning rate's classifier; None but on the main process."""
    val = data.val()
    return linear_probe.accuracy(probe, *val) if val else None


def protocol(args: argparse.Namespace) -> str:
    """In words what was done."""
    crops = "random resized crops (scale 0.08 to 1) and flips"
    parts = (
        f"backbone features, {'encoder trained too' if args.fine_tune else 'frozen encoder'}",
        "L2-normalized, standardized with the training features' mean and unbiased variance",
        "Linear-BN-ReLU and a linear layer" if args.mlp else "linear layer",
        f"trained on {'central crops, extracted once' if args.cached else crops}",
        f"cross-entropy, SGD with momentum {args.momentum}, weight decay {args.wd}, "
        f"batch {args.batch_size}, a tenth of the learning rate after {args.lr_schedule} epochs",
        "top-1 and top-5 of val's central crops after the last epoch",
        "best_lr and best_top1 chosen on val",
    )
    return "; ".join(parts)


def build_probe(
    args: argparse.Namespace,
    backbone: Backbone,
    data: FromImages | FromFeatures,
    *,
    classes: list[str],
    saved: dict | None,
) -> tuple[linear_probe.LinearProbe, torch.optim.SGD]:
    """Probe and optimizer: seeded by --seed, the statistics measured now, or as saved.

    InputError for a class of which no image can be read.
    """
    torch.manual_seed(args.seed)
    probe = linear_probe.LinearProbe(
        backbone.feature_dim, len(classes), num_rates=len(args.lr), hidden=args.mlp
    ).to(args.device)
    optimizer = linear_probe.build_optimizer(
        probe,
        args.lr,
        momentum=args.momentum,
        weight_decay=args.wd,
        also=backbone.module.parameters() if args.fine_tune else (),
    )
    if args.fine_tune:
        optimizer.register_step_pre_hook(
            lambda *_: distributed.sum_gradients(backbone.module.parameters())
        )
    if saved:
        what = f"--resume {args.resume}"
        # Of several learning rates one may have diverged; the others' classifiers go on.
        checkpoint.load_strictly(probe, saved["probe"], what=what, finite=False)
        checkpoint.load_optimizer(optimizer, saved["optimizer"], what=what, finite=False)
    else:
        probe.standardize.measure(data.for_statistics())
        what = f"data {args.data}, as far as it can be read"
        check_every_class(data.labels, classes, what=what)
    return probe, optimizer


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
    train, val = read_images(args)
    backbone, state = build_evaluation.evaluated_backbone(args)
    if build_evaluation.is_check(args, train, val):
        return
    keeps = (args.save or args.cache_dir or args.resume) and not args.evaluate
    digests = build_evaluation.image_digests(args, train=train, val=val) if keeps else {}
    wanted = build_evaluation.identity(args, state, DECIDING, digests)
    if build_evaluation.is_done(args, "linear.json", wanted, table="lr"):
        return
    key = build_evaluation.feature_key(args, state, digests)
    saved = find_run(args, key, train.classes)
    if args.fine_tune:
        backbone = trained_backbone(args, backbone, saved)
    build_evaluation.place(args, backbone.module)
    bad_images = build_evaluation.build_bad_images(args)
    if saved and not args.evaluate:
        bad_images.restore(saved["bad_images"])
    data = build_data(args, backbone, train, val, key=key, bad_images=bad_images)
    if args.cached and not args.evaluate:
        distributed.stop()  # the rest is quick
    if data is None:
        return
    probe, optimizer = build_probe(args, backbone, data, classes=train.classes, saved=saved)
    history = saved["history"] if saved else []
    num_train = saved["num_images"] if saved else data.num_images["train"]
    if args.evaluate:
        what_was_done, rows = saved["protocol"], measure(probe, data)
        summary = dict(zip(map(str, args.lr), rows, strict=True)) if rows else {}
    else:
        what_was_done = protocol(args)
        origin = {"key": key, "classes": train.classes, "num_images": num_train}
        origin |= {"protocol": what_was_done, "bad_images": bad_images.names}
        train_probe(
            probe,
            data,
            optimizer,
            history,
            rates=args.lr,
            schedule=args.lr_schedule,
            epochs=args.epochs,
            eval_freq=args.eval_freq,
            seed=args.seed,
            save=partial(save_run, args, probe, optimizer, backbone.module, history, origin),
        )
        summary = linear_probe.summarize(args.lr, history)
    if not distributed.is_main():
        return
    counts = {"train": num_train, "val": data.num_images["val"], "classes": len(train.classes)}
    absent = unreadable_classes(data.val_labels, val.classes, what=f"data {val.root}")
    about = {"counts": counts, "bad_images": bad_images, "images": {"train": train, "val": val}}
    record = {"epochs": len(history), "protocol": what_was_done}
    record |= {"classes_without_images": {"val": absent}}
    record |= build_evaluation.result_record(args, state, **about)
    record |= {} if args.evaluate else wanted
    report(args, summary, record | {"seconds": round(time.monotonic() - start, 1)})


if __name__ == "__main__":
    script.run_script(main)
