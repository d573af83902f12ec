"""Command-line flags that scripts share, each with its default.

Published flags keep their names and defaults, but for those that docs/deviations.md names; new
ones use underscores.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from utils.cli.arguments import (
    crop_groups,
    device,
    epoch_list,
    not_negative,
    number,
    path,
    path_or,
    path_text,
    positive,
    positive_or_all,
    seed,
    share,
    side,
    width,
)
from utils.data import archives, demo_data
from utils.data.augment import BLUR_PROBABILITY
from utils.runtime import distributed, workers
from utils.runtime.origin import ROOT

# The demo data's settings that the training scripts share: a small network, and a small bank where
# there is one.
DEMO_TRAINING = {
    "arch": "conv4",
    "image_size": 32,
    "epochs": 60,
    "batch_size": 32,
    "learning_rate": 0.05,
    "cos": True,
    "blur": 0.0,
    "num_workers": 1,
    "save_freq": 60,
}
DEMO = DEMO_TRAINING | {
    "weak_strong": True,
    "momentum": 0.99,
    "mem_bank_size": 512,
    "proj_dim": 128,
    "hidden_dim": 512,
    "proj_bn": True,
}
DEMO_CHECKPOINT = str(ROOT / "output" / "demo_2q" / f"ckpt_epoch_{DEMO['epochs']}.pth")
DEMO_FOLDER = ROOT / "data" / "demo"

# What --precision may be, and the dtype that the encoders compute in instead of float32.
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
# What --bank_precision may be.
BANK_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Where the images are and how they are read; training and evaluation."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "data", nargs="?", type=path, help="folder with train/<class>/ and val/<class>/"
    )
    group.add_argument(
        "--dataset",
        choices=["imagenet", "imagenet100", *archives.NAMES],
        default="imagenet",
        help="imagenet: any folder tree; imagenet100: 100 of ImageNet's classes; others: the files "
        "that torchvision knows, in the folder `data`",
    )
    group.add_argument(
        "--download",
        action="store_true",
        help="fetch the data set if it is not there, where torchvision can",
    )
    group.add_argument(
        "--demo",
        action="store_true",
        help="draw the synthetic demo data once (data/demo/) and use its settings",
    )
    group.add_argument(
        "-j",
        "--num_workers",
        "--workers",
        type=number(int, low=0, high=1024),
        default=min(4, workers.cores()),
        help="processes that decode images",
    )
    _add_bad_image_options(group)


def _add_bad_image_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--bad_images",
        choices=["fail", "skip"],
        default="fail",
        help="image files that cannot be read: fail: the first one ends the run; skip: leave them "
        "out, in training for the next image of the set",
    )
    group.add_argument(
        "--max_bad_images",
        type=number(int, low=0),
        default=100,
        help="with --bad_images skip: stop above this number of files",
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """--device."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=device, default=default, help="default: the GPU if there is one"
    )


def add_checkpoint_options(parser: argparse.ArgumentParser, *, evaluates: bool = True) -> None:
    """Which checkpoint is read, and how its network looks; evaluates: the network also runs."""
    group = parser.add_argument_group("checkpoint")
    named = '; "random": an untrained network, "pixels": the image itself' if evaluates else ""
    group.add_argument(
        "--weights", type=path_or("random", "pixels"), help=f"checkpoint to read{named}"
    )
    group.add_argument(
        *("--use_target", "--use-target"),
        action="store_true",
        help="the target encoder instead of the query encoder",
    )
    group.add_argument("--arch", help="default: as the checkpoint says, or resnet50")
    group.add_argument("--image_size", type=side, help="default: as the checkpoint says, or 224")
    group.add_argument("--small_stem", action="store_true", help="default: as the checkpoint says")
    if evaluates:
        group.add_argument("-b", "--batch_size", "--batch-size", type=positive, default=256)
        group.add_argument("--seed", type=seed, default=0)
        add_device_option(group)


def add_split_options(parser: argparse.ArgumentParser, *file_flags: str) -> None:
    """Which training images are labeled; file_flags: the spellings of the split file's flag."""
    group = parser.add_argument_group("labeled images")
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        *file_flags,
        type=path,
        help="labeled images, one a line: path below train/ or base name",
    )
    either.add_argument(
        "--label_fraction",
        type=number(float, low=1e-9, high=1),
        help="draw this share of every class instead",
    )
    group.add_argument("--split_seed", type=seed, default=0, help="of the draw of --label_fraction")


def _add_cache_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training images in memory")
    group.add_argument(
        "--cache_images",
        choices=["none", "ram", "device"],
        default="none",
        help="decode every training image once: ram: workers crop what is in memory; device: the "
        "training device holds all images and crops them, without workers",
    )
    group.add_argument(
        "--cache_size",
        type=side,
        help="side in pixels to which cached images are resized; without it all must have one size",
    )


def add_label_options(parser: argparse.ArgumentParser) -> None:
    """Labels to train with other than those of the class folders; see `utils.data.label_noise`."""
    group = parser.add_argument_group("labels")
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--label_noise",
        type=share,
        help="give this share of the training images another class, drawn by --noise_seed",
    )
    either.add_argument(
        "--label_file",
        type=path,
        help="take the classes from a file instead of the folders: lines of path below train/ "
        "and class",
    )
    group.add_argument("--noise_seed", type=seed, default=0, help="of the draw of --label_noise")


def _add_view_options(parser: argparse.ArgumentParser, *, mean_shift: bool) -> None:
    group = parser.add_argument_group("views")
    group.add_argument("--image_size", type=side, default=224, help="side of the crops in pixels")
    if mean_shift:
        group.add_argument(
            "--weak_strong", action="store_true", help="weak view for the target encoder"
        )
    group.add_argument(
        "--blur",
        type=share,
        default=BLUR_PROBABILITY,
        help="probability of blur in the strong view; 0 suits images of about 32 px",
    )


def add_crop_options(parser: argparse.ArgumentParser) -> None:
    """More crops of an image, for methods without labels or with pseudo-labels."""
    group = parser.add_argument_group("crops")
    group.add_argument(
        "--multi_crop",
        type=crop_groups,
        help='such as "2x224:0.2-1,6x96:0.05-0.2": count x size : share of the area; the first '
        "group is the two views (and sets --image_size), small crops go through the query encoder "
        "only, each pulled to all neighbors of the target view",
    )
    group.add_argument(
        "--symmetric",
        action="store_true",
        help="each of the two views once as query and once as target",
    )


def _add_network_options(parser: argparse.ArgumentParser, *, mean_shift: bool) -> None:
    group = parser.add_argument_group("encoders" if mean_shift else "network")
    group.add_argument(
        "--arch", default="resnet50", help="torchvision classification model, or conv4"
    )
    group.add_argument(
        "--small_stem",
        action="store_true",
        help="ResNets: 3x3 first convolution, no pooling (images of about 32 px)",
    )
    group.add_argument("--weights", type=path_text, help="checkpoint to start from")
    ways = {
        "shuffle": "each on its part of the batch, the target's dealt out anew, as published",
        "sync": "on the whole batch, as one process does",
        "local": "each on its part",
    }
    choices = list(ways) if mean_shift else ["local", "sync"]
    group.add_argument(
        "--bn",
        choices=choices,
        default=choices[0],
        help="batch norm of several processes: "
        + "; ".join(f"{name}: {ways[name]}" for name in choices),
    )


def _add_mean_shift_options(parser: argparse.ArgumentParser, *, topk_all: bool) -> None:
    group = parser.add_argument_group("mean shift")
    group.add_argument("--proj_dim", type=width, help="embedding size; default: features / 4")
    group.add_argument(
        "--hidden_dim",
        type=width,
        help="hidden size of projector and predictor; default: 2 x features",
    )
    group.add_argument(
        "--proj_bn",
        action="store_true",
        help="batch norm without parameters on the projector's output",
    )
    group.add_argument("--momentum", type=share, default=0.99, help="of the moving average")
    group.add_argument("--mem_bank_size", type=positive, default=128000)
    group.add_argument(
        "--bank_precision",
        choices=list(BANK_PRECISIONS),
        default="fp32",
        help="fp16: the bank keeps embeddings in 16 bits, half the memory; searched in fp32",
    )
    group.add_argument(
        "--topk",
        type=positive_or_all if topk_all else positive,
        default=5,
        help="neighbors a query is pulled to" + (', or "all" of its class' if topk_all else ""),
    )


def add_plain_option(parser: argparse.ArgumentParser, *, may_be_none: bool = False) -> None:
    """--topk_plain; may_be_none: there need not be a plain loss, and without the flag is none."""
    parser.add_argument(
        "--topk_plain",
        type=number(int, low=0) if may_be_none else positive,
        default=0 if may_be_none else None,
        help="neighbors of the plain loss, out of the whole bank; the training loss is the mean of "
        "plain and constrained loss; 1: the target itself; "
        + ("0, the default: no plain loss" if may_be_none else "default: as many as --topk"),
    )


def _add_speed_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--precision",
        choices=list(PRECISIONS),
        default="fp32",
        help="bf16: the encoders compute in bfloat16, for GPUs (and CPUs) with instructions for "
        "it; weights, embeddings, bank and loss stay float32",
    )
    group.add_argument(
        "--channels_last",
        action="store_true",
        default=None,
        help="lay images out with the channels last; default: where that is faster, on a CPU and, "
        "with bf16 or --tf32, on a GPU",
    )
    group.add_argument(
        *("--no_channels_last", "--no-channels_last"),
        dest="channels_last",
        action="store_false",
        default=None,
        help="lay images out as PyTorch does",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the encoders: minutes at the start, faster steps; needs a C++ compiler",
    )
    group.add_argument(
        "--cuda_graphs",
        action="store_true",
        help="with --compile on a GPU: launch each network's step as one CUDA graph "
        "(torch.compile's reduce-overhead), which helps where launches take the time: small images",
    )
    group.add_argument(
        "--tf32",
        action="store_true",
        help="on NVIDIA GPUs since Ampere: float32 products and convolutions with the 10 bits of "
        "TF32, the search in the bank too; without it with all 23",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--checkpoint_path", type=path, default=Path("output/mean_shift_default"))
    group.add_argument(
        "--resume",
        type=path_or("auto"),
        help='checkpoint to continue after; "auto": the newest whole one of --checkpoint_path, '
        "or a new run if there is none",
    )
    group.add_argument(
        "--resume_anyway",
        action="store_true",
        help="also with flags or images that make it another experiment",
    )
    group.add_argument("--print_freq", type=positive, default=100, help="steps between log lines")
    group.add_argument(
        "--save_freq", type=positive, default=10, help="epochs between checkpoints that are kept"
    )
    group.add_argument(
        "--save_minutes",
        type=not_negative,
        default=10,
        help="minutes between checkpoints for --resume, of which the newest stay; 0: none",
    )
    group.add_argument(
        "--knn_freq",
        type=number(int, low=-1),
        default=0,
        help="epochs between val k-NN figures; 0: only at the end, -1: never",
    )
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write the log's figures and a few views to <checkpoint_path>/tensorboard/",
    )


def add_training_options(
    parser: argparse.ArgumentParser, *, mean_shift: bool = True, topk_all: bool = False
) -> None:
    """Everything the training scripts have in common.

    mean_shift: the flags of projector, target encoder and bank too; topk_all: --topk may be "all".
    """
    add_data_options(parser)
    group = parser.add_argument_group("training")
    group.add_argument("--batch_size", type=positive, default=256)
    group.add_argument("--epochs", type=positive, default=200)
    group.add_argument("--learning_rate", type=not_negative, default=0.01)
    group.add_argument("--cos", action="store_true", help="cosine learning rate")
    group.add_argument("--lr_decay_epochs", type=epoch_list, default="90,120", help="without --cos")
    group.add_argument("--lr_decay_rate", type=share, default=0.2, help="without --cos")
    group.add_argument("--weight_decay", type=not_negative, default=1e-4)
    group.add_argument("--sgd_momentum", type=share, default=0.9)
    group.add_argument("--seed", type=seed, default=0)
    add_device_option(group)
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU: only kernels that give the same bits each time (a CPU does anyway)",
    )
    group.add_argument(
        "--debug", action="store_true", help="two epochs of five steps, to try a setup"
    )

    _add_cache_options(parser)
    _add_view_options(parser, mean_shift=mean_shift)
    _add_network_options(parser, mean_shift=mean_shift)
    _add_speed_options(parser)
    if mean_shift:
        _add_mean_shift_options(parser, topk_all=topk_all)
    _add_run_options(parser)


def parse(
    parser: argparse.ArgumentParser, *, demo: dict[str, Any], needs_data: bool = True
) -> argparse.Namespace:
    """Parse the command line; with --demo, draw its data and take the defaults from `demo`.

    needs_data: it is an error to name no data; otherwise args.data may be None.
    Under torchrun this process joins the others, and only the main one prints from then on.
    """
    workers.check_is_main()
    args = parser.parse_args()
    if args.demo:
        parser.set_defaults(**demo)
        args = parser.parse_args()
    if needs_data and args.data is None and not args.demo:
        parser.error("data: name the folder that holds train/ and val/ (or try --demo)")
    if getattr(args, "multi_crop", None):
        args.image_size = args.multi_crop[0].size
    args.device = distributed.start(args.device)
    _choose_fastest(args)
    if slow := workers.too_many(args.num_workers):
        print(f"--num_workers {args.num_workers}: {slow}", flush=True)
    if args.data is None and args.demo:
        with distributed.main_first():
            args.data = _demo_folder(parser)
    if args.download and needs_data:
        with distributed.main_first():
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


def _demo_folder(parser: argparse.ArgumentParser) -> Path:
    """The demo data, drawn if they are not there."""
    try:
        return demo_data.draw_data_set(DEMO_FOLDER)
    except (OSError, ValueError) as error:
        parser.error(f"--demo: {error}")


def add_stage_options(group: argparse._ArgumentGroup) -> None:
    """What an evaluation needs as one stage of several; group: with --save."""
    group.add_argument(
        "--keep_done",
        action="store_true",
        help="do nothing if --save holds the result of the same checkpoint, flags and images",
    )
    group.add_argument(
        "--check", action="store_true", help="only see whether flags, checkpoint and images will do"
    )


def add_output_options(parser: argparse.ArgumentParser, *, help: str) -> None:
    """The file that a script writes; see `result_files.check_output`."""
    group = parser.add_argument_group("file")
    group.add_argument("--output", type=path, required=True, help=help)
    group.add_argument("--force", action="store_true", help="replace the file if there is one")
