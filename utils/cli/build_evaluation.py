"""From an evaluation script's flags to an encoder, loaders and what a result says of its origin."""

import argparse
from functools import partial

import torch
from torch import nn

from utils.data.bad_images import BadImages
from utils.data.datasets import ImageSet, check_classes, read_split
from utils.data.eval_loader import EvalLoader
from utils.data.image_cache import check_memory
from utils.data.splits import labeled_index
from utils.evaluation import result_files
from utils.evaluation.feature_cache import image_digest
from utils.method import checkpoint
from utils.method.encoders import Backbone, build_backbone, check_image_size, lay_channels_last
from utils.runtime import checked, distributed, files, origin, plain_json
from utils.runtime.errors import InputError, printable


def build_bad_images(args: argparse.Namespace) -> BadImages:
    """What the flags say is to be done about broken images."""
    return BadImages(skip=args.bad_images == "skip", most=args.max_bad_images)


def read_labeled(args: argparse.Namespace, *, only_labeled: bool) -> tuple[ImageSet, ImageSet]:
    """Training and val images of the flags; only_labeled: those that the flags leave a label."""
    train, val = (read_split(args.data, split, dataset=args.dataset) for split in ("train", "val"))
    check_classes(train, val)
    if only_labeled:
        labels = {"fraction": args.label_fraction, "seed": args.split_seed}
        train = train.take(
            labeled_index(train, file=args.train_file, flag="--train_file", **labels)
        )
    return train, val


def read_weights(args: argparse.Namespace) -> dict:
    """The checkpoint that --weights names, {} for "random" and "pixels".

    Its SHA-256 as it is now becomes `args.sha256`, None without a file.
    """
    args.sha256, args.backbone = None, None
    args.encoder = "target" if args.use_target else "query"
    if args.weights in result_files.NAMED:
        if args.prefix is not None:
            raise InputError(f"--prefix {args.prefix}: --weights {args.weights} is no file")
        return {}
    state = checkpoint.load(args.weights, flag="--weights")
    args.sha256 = files.sha256(args.weights)
    return state


def evaluated_backbone(args: argparse.Namespace) -> tuple[Backbone, dict]:
    """The backbone that --weights names, on the CPU, and the checkpoint it came from ({}: none).

    What the flags leave open (arch, image size, stem) is taken from the checkpoint where it says
    so, and written into args, as are role and place of the backbone. "random": untrained, seeded by
    --seed. "pixels": flattened images.
    """
    if not args.weights:
        raise InputError("--weights: name the checkpoint to evaluate")
    state = read_weights(args)
    said = partial(checkpoint.said, state, what=f"--weights {args.weights}")
    args.arch = args.arch or said("arch") or "resnet50"
    args.image_size = args.image_size or said("image_size") or 224
    args.small_stem = args.small_stem or bool(said("small_stem"))
    if args.weights == "pixels":
        return Backbone(nn.Flatten(), 3 * args.image_size**2, ""), {}
    torch.manual_seed(args.seed)
    size = {"image_size": args.image_size}
    backbone = build_backbone(args.arch, small_stem=args.small_stem, **size)
    check_image_size(backbone, args.arch, args.image_size)
    if args.weights not in result_files.NAMED:
        which = {"encoder": args.encoder, "prefix": args.prefix}
        what = weights_flags(args, state)
        found = checkpoint.load_backbone(backbone, state, **which, what=what)
        args.encoder, args.backbone = found.role, found.prefix
        print(printable(f"--weights {args.weights}: backbone {found.words}"), flush=True)
    return backbone, state


def weights_flags(args: argparse.Namespace, state: dict) -> str:
    """What a message on a checkpoint's weights begins with: the flags that may not fit it."""
    name = f"--weights {args.weights}"
    trained = checkpoint.said(state, "image_size", what=name)
    other = trained not in (None, args.image_size)
    size = f", --image_size {args.image_size}, trained at {trained}" * other
    return f"{name} (--arch {args.arch}{size})"


def place(args: argparse.Namespace, network: nn.Module) -> nn.Module:
    """The network on the device of the flags; on a CPU with the channels last, as in training.

    So k-NN figures have the bits of those in its log.
    """
    if args.device.type == "cpu":
        lay_channels_last(network)
    return network.to(args.device)


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

    bad_images: shared by them, and with other loaders; default: a new one by the flags. InputError
    where memory is too small for a batch.
    """
    check_view_memory(args, min(args.batch_size, max(map(len, image_sets))), views=1)
    common = {
        "batch_size": args.batch_size,
        "image_size": args.image_size,
        "num_workers": args.num_workers,
        "device": args.device,
        "bad_images": bad_images or build_bad_images(args),
    }
    return [EvalLoader(images, **common) for images in image_sets]


def identity(
    args: argparse.Namespace,
    state: dict,
    settings: tuple[str, ...],
    *,
    digests: bool,
    **splits: ImageSet,
) -> tuple[dict, dict[str, str]]:
    """What decides a result, for `is_done`, and the key of its features: all that they depend on.

    settings: names of the flags that the result depends on. digests: whether it is kept or looked
    for, so that every image file of the splits ("train", "val") is to be read for it. All processes
    call it. InputError for an image that is gone, unless such are skipped.
    """
    found = image_digests(args, **splits) if digests else {}
    kept = {name: getattr(args, name) for name in settings}
    wanted = encoder_record(args, state) | {"settings": kept, "images": found}
    return wanted, feature_key(args, state, found)


def image_digests(args: argparse.Namespace, **splits: ImageSet) -> dict[str, str]:
    """The digest of each split, every image file of which is read; all processes call it.

    InputError for an image that is gone, unless such are skipped.
    """
    missing_ok = args.bad_images == "skip"
    return {
        split: image_digest(images, missing_ok=missing_ok, text=f"digest of {split}")
        for split, images in splits.items()
    }


def feature_key(args: argparse.Namespace, state: dict, digests: dict[str, str]) -> dict[str, str]:
    """All that the features of an encoder on images of these digests depend on, in words."""
    key = {
        "checkpoint": args.sha256 or f"{args.weights}, seed {args.seed}, torch {torch.__version__}",
        "encoder": args.encoder,
        "backbone": args.backbone or "",
        "arch": args.arch,
        "stem": "small" if args.small_stem else "as built",
        "image size": str(args.image_size),
        "view": EvalLoader.VIEW,
    }
    return key | {f"{split} images": digest for split, digest in digests.items()}


def is_done(args: argparse.Namespace, name: str, wanted: dict, *, table: str) -> bool:
    """Whether --keep_done is given and --save has the wanted result, by its `identity`, as `name`.

    Prints it then, and else what becomes of another, as it will be replaced. table: where its
    figures stand. All processes call it.
    """
    done = False
    if args.keep_done and distributed.is_main():
        path = args.save / name
        try:
            if found := result_files.read_json(path):
                rows = checked.take(found, table, result_files.TABLE, what=str(path))
                if others := _differing(found, wanted):
                    raise InputError(f"{path} has another {others}")
                print(f"{path}: there already, nothing to do\n{result_files.format_rows(rows)}")
                done = True
        except InputError as error:
            print(printable(f"--keep_done: {error}: replaced"), flush=True)
    return distributed.any_true(done)


def _differing(found: dict, wanted: dict) -> str:
    """Names of what a result has otherwise than it is wanted, "" if nothing; paths do not count."""
    wanted = plain_json.loads(plain_json.dumps(wanted))  # lists for tuples
    by_path = wanted["sha256"] is not None
    names = [n for n in wanted if found.get(n) != wanted[n] and not (by_path and n == "checkpoint")]
    if names == ["settings"] and isinstance(found.get("settings"), dict):
        now, then = wanted["settings"], found["settings"]
        names = [f"--{n} ({checked.shown(then.get(n))})" for n in now if now[n] != then.get(n)]
    return ", ".join(names)


def encoder_record(args: argparse.Namespace, state: dict) -> dict:
    """Which encoder a result is of: what `result_files.encoder_of` reads.

    "backbone" tells under which prefix the weights stood in the checkpoint.
    """
    return {
        "checkpoint": args.weights,
        "sha256": args.sha256,
        "epoch": state.get("epoch"),
        "encoder": args.encoder,
        "backbone": args.backbone,
        "arch": args.arch,
        "image_size": args.image_size,
        "small_stem": args.small_stem,
        "seed": args.seed,
    }


def result_record(
    args: argparse.Namespace,
    state: dict,
    *,
    counts: dict[str, int],
    bad_images: BadImages,
    images: dict[str, ImageSet],
) -> dict:
    """What every result file says of its origin: encoder, counts of what was used, command.

    images: by split; "left_out" tells what lies among their files and is no image.
    """
    return encoder_record(args, state) | {
        "counts": counts,
        "left_out": {split: found.left_out.record() for split, found in images.items()},
        "bad_images": bad_images.names,
        "command": origin.command(),
        "torch": torch.__version__,
    }
