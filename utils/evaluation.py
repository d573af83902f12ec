"""From an evaluation script's flags to an encoder, loaders and what a result says of its origin."""

import argparse
from functools import partial

import torch
from torch import nn

from utils import checkpoint, origin
from utils.bad_images import BadImages
from utils.data import ImageSet
from utils.encoders import Backbone, build_backbone, check_image_size
from utils.errors import InputError
from utils.feature_cache import image_digest
from utils.image_cache import check_memory
from utils.loaders import EvalLoader


def build_bad_images(args: argparse.Namespace) -> BadImages:
    """What the flags say is to be done about broken images."""
    return BadImages(skip=args.bad_images == "skip", most=args.max_bad_images)


def evaluated_backbone(args: argparse.Namespace) -> tuple[Backbone, dict]:
    """The backbone that --weights names, on the CPU, and the checkpoint it came from ({}: none).

    What the flags leave open (arch, image size, stem) is taken from the checkpoint where it says
    so, and written into args. "random": untrained, seeded by --seed. "pixels": flattened images.
    """
    if not args.weights:
        raise InputError("--weights: name the checkpoint to evaluate")
    named = args.weights in ("random", "pixels")
    state = {} if named else checkpoint.load(args.weights, flag="--weights")
    said = partial(checkpoint.said, state, what=f"--weights {args.weights}")
    args.arch = args.arch or said("arch") or "resnet50"
    args.image_size = args.image_size or said("image_size") or 224
    args.small_stem = args.small_stem or bool(said("small_stem"))
    if args.weights == "pixels":
        return Backbone(nn.Flatten(), 3 * args.image_size**2, ""), {}
    torch.manual_seed(args.seed)
    backbone = build_backbone(args.arch, small_stem=args.small_stem)
    check_image_size(backbone, args.arch, args.image_size)
    if not named:
        what = f"--weights {args.weights} (--arch {args.arch})"
        encoder = "target" if args.use_target else "query"
        checkpoint.load_backbone(backbone, state, encoder=encoder, what=what)
    return backbone, state


def encoder_name(args: argparse.Namespace, state: dict) -> str:
    """Which encoder is read from a checkpoint, or was exported to it: "query" or "target"."""
    named = "target" if args.use_target else "query"
    return checkpoint.metadata(state).get("encoder", named)


def check_view_memory(args: argparse.Namespace, images: int, *, views: int) -> None:
    """InputError for batches of so many images, each with its views, that memory cannot hold."""
    of_pixel = 5 if args.device.type == "cpu" else 1  # bytes: decoded, and a float32 on the device
    check_memory(
        images * views * 3 * args.image_size**2 * of_pixel,
        flags=f"--batch_size {args.batch_size}, --image_size {args.image_size}",
    )


def eval_loaders(
    args: argparse.Namespace, *image_sets: ImageSet, bad_images: BadImages | None = None
) -> list[EvalLoader]:
    """Evaluation loaders with the flags' batch size, image size, workers and device.

    bad_images: shared by them, and with other loaders; default: a new one by the flags.
    """
    bad_images = bad_images or build_bad_images(args)
    check_view_memory(args, min(args.batch_size, max(map(len, image_sets))), views=1)
    return [
        EvalLoader(
            images,
            batch_size=args.batch_size,
            image_size=args.image_size,
            num_workers=args.num_workers,
            device=args.device,
            bad_images=bad_images,
        )
        for images in image_sets
    ]


def feature_key(
    args: argparse.Namespace, state: dict, *, contents: bool, **splits: ImageSet
) -> dict[str, str]:
    """All that an encoder's features of these splits ("train", "val") depend on, by name.

    args and state: after `evaluated_backbone`. contents: the bytes of all image files count, which
    are read; otherwise their sizes and times, see `image_digest`. Raises InputError for an image
    that is gone, unless such images are skipped.
    """
    missing_ok = args.bad_images == "skip"
    origin = f"{args.weights}, seed {args.seed}, torch {torch.__version__}"
    return {
        "checkpoint": checkpoint.sha256(args.weights) if state else origin,
        "encoder": "target" if args.use_target else "query",
        "arch": args.arch,
        "stem": "small" if args.small_stem else "as built",
        "image size": str(args.image_size),
        "view": EvalLoader.VIEW,
    } | {
        f"{split} images": image_digest(
            images, contents=contents, missing_ok=missing_ok, text=f"digest of {split}"
        )
        for split, images in splits.items()
    }


def result_record(
    args: argparse.Namespace,
    state: dict,
    *,
    counts: dict[str, int],
    bad_images: BadImages,
    images: dict[str, ImageSet],
) -> dict:
    """What every result file says of its origin: checkpoint, sha256, network, counts, command.

    counts: of what was used; bad_images: the files that were not, as they cannot be read. images:
    by split; "left_out" tells what lies among their files and is no image.
    """
    from_file = bool(state)
    return {
        "checkpoint": args.weights,
        "sha256": checkpoint.sha256(args.weights) if from_file else None,
        "epoch": state.get("epoch"),
        "encoder": encoder_name(args, state),
        "arch": args.arch,
        "image_size": args.image_size,
        "seed": args.seed,
        "counts": counts,
        "left_out": {split: found.left_out.record() for split, found in images.items()},
        "bad_images": bad_images.names,
        "command": origin.command(),
        "torch": torch.__version__,
    }
