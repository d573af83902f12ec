"""Command-line flags that scripts share, each with its default.

Published flags keep their names and defaults, but for those that docs/deviations.md names; new
ones use underscores.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from utils.cli import arguments as kind
from utils.data import archives, demo_data
from utils.data.augment import BLUR_PROBABILITY
from utils.runtime import distributed, workers
from utils.runtime.origin import ROOT

# What training scripts do with --demo where they have such a flag: a small network and bank.
DEMO = {
    "arch": "conv4",
    "image_size": 32,
    "epochs": 60,
    "batch_size": 32,
    "learning_rate": 0.05,
    "cos": True,
    "blur": 0.0,
    "num_workers": 1,
    "save_freq": 60,
    "weak_strong": True,
    "momentum": 0.99,
    "mem_bank_size": 512,
    "proj_dim": 128,
    "hidden_dim": 512,
    "proj_bn": True,
}
DEMO_CHECKPOINT = str(ROOT / "output" / "demo_2q" / f"ckpt_epoch_{DEMO['epochs']}.pth")
DEMO_FOLDER = ROOT / "data" / "demo"

PREFIX = "of several backbones in the checkpoint the one under these names, or under a part of them"
# What --precision may be, and the dtype that the encoders compute in instead of float32.
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
# What --bank_precision may be.
BANK_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}


def demo(folder: str, **settings: Any) -> dict[str, Any]:
    """A training script's settings with --demo: those of all, its own, and output/<folder>."""
    return DEMO | settings | {"checkpoint_path": ROOT / "output" / folder}


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Where the images are and how they are read; training and evaluation."""
    add = parser.add_argument_group("data").add_argument
    add("data", nargs="?", type=kind.path, help="folder with train/<class>/ and val/<class>/")
    sets = ["imagenet", "imagenet100", *archives.NAMES]
    trees = "imagenet: any folder tree; imagenet100: 100 of its classes; others: torchvision's"
    add("--dataset", choices=sets, default="imagenet", help=trees)
    add("--download", action="store_true", help="fetch what is not there, where torchvision can")
    add("--demo", action="store_true", help="draw the demo data once, and use their settings")
    few, decode = kind.number(int, low=0, high=1024), "processes that decode images"
    names = ("-j", "--num_workers", "--workers")
    add(*names, type=few, default=min(4, workers.cores()), help=decode)
    bad = "unreadable files; fail: the first ends the run; skip: left out, in training replaced"
    add("--bad_images", choices=["fail", "skip"], default="fail", help=bad)
    most = "with --bad_images skip: stop above this number of files"
    add("--max_bad_images", type=kind.number(int, low=0), default=100, help=most)


def _add_device_option(group: argparse._ArgumentGroup) -> None:
    there = "cuda" if torch.cuda.is_available() else "cpu"
    group.add_argument("--device", type=kind.device, default=there, help="default: a GPU, if any")


def add_checkpoint_options(parser: argparse.ArgumentParser, *, evaluates: bool = True) -> None:
    """Which checkpoint is read, and how its network looks; evaluates: the network also runs."""
    group = parser.add_argument_group("checkpoint")
    add, said = group.add_argument, "default: as the checkpoint says"
    named = '; "random": an untrained network, "pixels": the image itself' if evaluates else ""
    add("--weights", type=kind.path_or("random", "pixels"), help=f"checkpoint to read{named}")
    target = "the target encoder instead of the query encoder"
    add("--use_target", "--use-target", action="store_true", help=target)
    add("--prefix", help=PREFIX)
    add("--arch", help=f"{said}, or resnet50")
    add("--image_size", type=kind.side, help=f"{said}, or 224")
    add("--small_stem", action="store_true", help=said)
    if evaluates:
        add_network_options(group)


def add_network_options(group: argparse._ArgumentGroup) -> None:
    """How a network is run to evaluate it."""
    names = ("-b", "--batch_size", "--batch-size")
    group.add_argument(*names, type=kind.positive, default=256)
    group.add_argument("--seed", type=kind.seed, default=0)
    _add_device_option(group)


def add_recipe_options(group: argparse._ArgumentGroup, *, lr: str) -> None:
    """How a linear classifier is trained; lr: the default rate, or several with commas."""
    add = group.add_argument
    each = "one, or several with commas: a classifier for each in one pass over the data"
    add("--lr", "--learning_rate", type=kind.rate_list, default=lr, help=each)
    add("--epochs", type=kind.positive, default=40)
    tenth = "after these numbers of epochs the learning rate is divided by ten"
    names = ("--lr_schedule", "--lr-schedule")
    add(*names, type=kind.epoch_list, default="15,30,40", help=tenth)
    add("--momentum", type=kind.share, default=0.9)
    names = ("--wd", "--weight_decay", "--weight-decay")
    add(*names, type=kind.not_negative, default=1e-4)


def add_split_options(parser: argparse.ArgumentParser, *file_flags: str) -> None:
    """Which training images are labeled; file_flags: the spellings of the split file's flag."""
    group = parser.add_argument_group("labeled images")
    add = group.add_mutually_exclusive_group().add_argument
    listed = "labeled images, one a line: path below train/ or base name"
    add(*file_flags, type=kind.path, help=listed)
    drawn = "draw this share of every class instead"
    add("--label_fraction", type=kind.number(float, low=1e-9, high=1), help=drawn)
    group.add_argument("--split_seed", type=kind.seed, default=0, help="of --label_fraction's draw")


def add_label_options(parser: argparse.ArgumentParser) -> None:
    """Labels to train with other than those of the class folders; see `utils.data.label_noise`."""
    group = parser.add_argument_group("labels")
    add = group.add_mutually_exclusive_group().add_argument
    noise = "give this share of the training images another class, drawn by --noise_seed"
    add("--label_noise", type=kind.share, help=noise)
    file = "take the classes from a file of lines: path below train/ and class"
    add("--label_file", type=kind.path, help=file)
    group.add_argument("--noise_seed", type=kind.seed, default=0, help="of --label_noise's draw")


def add_crop_options(parser: argparse.ArgumentParser) -> None:
    """More crops of an image, for methods without labels or with pseudo-labels."""
    add = parser.add_argument_group("crops").add_argument
    add(
        "--multi_crop",
        type=kind.crop_groups,
        help='such as "2x224:0.2-1,6x96:0.05-0.2": count x size : share of the area; the first '
        "group is the two views (and sets --image_size), small crops go through the query encoder "
        "only, each pulled to all neighbors of the target view",
    )
    symmetric = "each of the two views once as query and once as target"
    add("--symmetric", action="store_true", help=symmetric)


def add_plain_option(parser: argparse.ArgumentParser, *, may_be_none: bool = False) -> None:
    """--topk_plain; may_be_none: there need not be a plain loss, and without the flag is none."""
    parser.add_argument(
        "--topk_plain",
        type=kind.number(int, low=0) if may_be_none else kind.positive,
        default=0 if may_be_none else None,
        help="neighbors of the plain loss, out of the whole bank; the training loss is the mean of "
        "plain and constrained loss; 1: the target itself; "
        + ("0, the default: no plain loss" if may_be_none else "default: as many as --topk"),
    )


def add_training_options(
    parser: argparse.ArgumentParser, *, mean_shift: bool = True, topk_all: bool = False
) -> None:
    """Everything the training scripts have in common.

    mean_shift: the flags of projector, target encoder and bank too; topk_all: --topk may be "all".
    """
    add_data_options(parser)
    _add_schedule_options(parser)
    _add_image_options(parser, mean_shift=mean_shift)
    _add_network_options(parser, mean_shift=mean_shift)
    _add_speed_options(parser)
    if mean_shift:
        _add_mean_shift_options(parser, topk_all=topk_all)
    _add_run_options(parser)


def _add_schedule_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--batch_size", type=kind.positive, default=256)
    add("--epochs", type=kind.positive, default=200)
    add("--learning_rate", type=kind.not_negative, default=0.01)
    add("--cos", action="store_true", help="cosine learning rate")
    add("--lr_decay_epochs", type=kind.epoch_list, default="90,120", help="without --cos")
    add("--lr_decay_rate", type=kind.share, default=0.2, help="without --cos")
    add("--weight_decay", type=kind.not_negative, default=1e-4)
    add("--sgd_momentum", type=kind.share, default=0.9)
    add("--seed", type=kind.seed, default=0)
    _add_device_option(group)
    same = "on a GPU: only kernels that give the same bits each time (a CPU does anyway)"
    add("--deterministic", action="store_true", help=same)
    add("--debug", action="store_true", help="two epochs of five steps, to try a setup")


def _add_image_options(parser: argparse.ArgumentParser, *, mean_shift: bool) -> None:
    add = parser.add_argument_group("training images in memory").add_argument
    once = "decode each image once; ram: workers crop; device: the training device holds and crops"
    add("--cache_images", choices=["none", "ram", "device"], default="none", help=once)
    resized = "side in pixels to which cached images are resized; without it all must have one size"
    add("--cache_size", type=kind.side, help=resized)
    add = parser.add_argument_group("views").add_argument
    add("--image_size", type=kind.side, default=224, help="side of the crops in pixels")
    if mean_shift:
        add("--weak_strong", action="store_true", help="weak view for the target encoder")
    blur = "probability of blur in the strong view; 0 suits images of about 32 px"
    add("--blur", type=kind.share, default=BLUR_PROBABILITY, help=blur)


def _add_network_options(parser: argparse.ArgumentParser, *, mean_shift: bool) -> None:
    add = parser.add_argument_group("encoders" if mean_shift else "network").add_argument
    network = "torchvision classification model, conv4, or timm/ and the name of one of timm's"
    add("--arch", default="resnet50", help=network)
    stem = "ResNets: 3x3 first convolution, no pooling (images of about 32 px)"
    add("--small_stem", action="store_true", help=stem)
    add("--weights", type=kind.path_text, help="checkpoint to start from")
    add("--prefix", help=PREFIX)
    ways = {
        "shuffle": "each on its part of the batch, the target's dealt out anew, as published",
        "sync": "on the whole batch, as one process does",
        "local": "each on its part",
    }
    choices = list(ways) if mean_shift else ["local", "sync"]
    said = "; ".join(f"{name}: {ways[name]}" for name in choices)
    norm = f"batch norm of several processes: {said}"
    add("--bn", choices=choices, default=choices[0], help=norm)


def _add_mean_shift_options(parser: argparse.ArgumentParser, *, topk_all: bool) -> None:
    add = parser.add_argument_group("mean shift").add_argument
    add("--proj_dim", type=kind.width, help="embedding size; default: features / 4")
    hidden = "hidden size of projector and predictor; default: 2 x features"
    add("--hidden_dim", type=kind.width, help=hidden)
    norm = "batch norm without parameters on the projector's output"
    add("--proj_bn", action="store_true", help=norm)
    add("--momentum", type=kind.share, default=0.99, help="of the moving average")
    add("--mem_bank_size", type=kind.positive, default=128000)
    half = "fp16: the bank keeps embeddings in 16 bits, half the memory; searched in fp32"
    add("--bank_precision", choices=list(BANK_PRECISIONS), default="fp32", help=half)
    near = "neighbors a query is pulled to" + (', or "all" of its class' if topk_all else "")
    add("--topk", type=kind.positive_or_all if topk_all else kind.positive, default=5, help=near)


def _add_speed_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("speed").add_argument
    half = "bf16: the encoders compute in bfloat16; weights, embeddings, bank and loss stay float32"
    add("--precision", choices=list(PRECISIONS), default="fp32", help=half)
    last = "images with the channels last; default: on a CPU and, with bf16 or --tf32, on a GPU"
    add("--channels_last", action="store_true", default=None, help=last)
    either = {"dest": "channels_last", "action": "store_false", "default": None}
    add("--no_channels_last", "--no-channels_last", **either, help="images as PyTorch has them")
    compiles = "torch.compile the encoders: slow to start, faster steps; needs a C++ compiler"
    add("--compile", action="store_true", help=compiles)
    graphs = "with --compile on a GPU: a network's pass is one launch, which helps small images"
    add("--cuda_graphs", action="store_true", help=graphs)
    tf32 = "on GPUs since Ampere: float32 products, the search too, with 10 bits instead of 23"
    add("--tf32", action="store_true", help=tf32)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--checkpoint_path", type=kind.path, default=Path("output/mean_shift_default"))
    after = 'checkpoint to continue after; "auto": the newest in --checkpoint_path, if there is one'
    add("--resume", type=kind.path_or("auto"), help=after)
    other = "also with flags or images that make it another experiment"
    add("--resume_anyway", action="store_true", help=other)
    add("--print_freq", type=kind.positive, default=100, help="steps between log lines")
    kept = "epochs between checkpoints that are kept"
    add("--save_freq", type=kind.positive, default=10, help=kept)
    newest = "minutes between checkpoints for --resume, of which the newest stay; 0: none"
    add("--save_minutes", type=kind.not_negative, default=10, help=newest)
    knn = "epochs between val k-NN figures; 0: only at the end, -1: never"
    add("--knn_freq", type=kind.number(int, low=-1), default=0, help=knn)
    board = "also write the log's figures and a few views to <checkpoint_path>/tensorboard/"
    add("--tensorboard", action="store_true", help=board)


def add_stage_options(group: argparse._ArgumentGroup) -> None:
    """What an evaluation needs as one stage of several; group: with --save."""
    done = "do nothing if --save holds the result of the same checkpoint, flags and images"
    group.add_argument("--keep_done", action="store_true", help=done)
    check = "only see whether flags, checkpoint and images will do"
    group.add_argument("--check", action="store_true", help=check)


def add_output_options(parser: argparse.ArgumentParser, *, help: str) -> None:
    """The file that a script writes; see `result_files.check_output`."""
    group = parser.add_argument_group("file")
    group.add_argument("--output", type=kind.path, required=True, help=help)
    group.add_argument("--force", action="store_true", help="replace the file if there is one")


def parse(
    parser: argparse.ArgumentParser, *, demo: dict[str, Any], needs_data: bool | str = True
) -> argparse.Namespace:
    """Parse the command line; with --demo, draw its data and take defaults of its flags from demo.

    needs_data: it is an error to name no data, or, if this is a flag's name, to give that flag
    without; otherwise args.data may be None.
    Under torchrun this process joins the others, and only the main one prints from then on.
    """
    args = parser.parse_args()
    if args.demo:
        parser.set_defaults(**{name: value for name, value in demo.items() if name in args})
        args = parser.parse_args()
    if isinstance(needs_data, str):
        needs_data = bool(getattr(args, needs_data))
    if needs_data and args.data is None and not args.demo:
        parser.error("data: name the folder that holds train/ and val/ (or try --demo)")
    if getattr(args, "multi_crop", None):
        args.image_size = args.multi_crop[0].size
    args.device = distributed.start(args.device)
    _choose_fastest(args)
    if slow := workers.too_many(args.num_workers):
        print(f"--num_workers {args.num_workers}: {slow}", flush=True)
    with distributed.main_first():
        if args.data is None and args.demo:
            try:
                args.data = demo_data.draw_data_set(DEMO_FOLDER)
            except (OSError, ValueError) as error:
                parser.error(f"--demo: {error}")
        if args.download and needs_data:
            archives.download(args.data, args.dataset)
    return args


def _choose_fastest(args: argparse.Namespace) -> None:
    """Settle the layout of images and the number of threads where the user did not."""
    on_cpu = args.device.type == "cpu"
    if getattr(args, "channels_last", False) is None:
        on_tensor_cores = args.device.type == "cuda" and (args.precision == "bf16" or args.tf32)
        args.channels_last = on_cpu or on_tensor_cores
    if args.demo and on_cpu and "OMP_NUM_THREADS" not in os.environ:
        # In so small a network threads wait for each other longer than they compute, the longer
        # the more a worker takes their cores. faiss follows.
        torch.set_num_threads(1)
