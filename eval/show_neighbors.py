"""Pictures of images and their neighbors in the memory bank (the figures of CMSF sec. 4).

    python eval/show_neighbors.py --weights <CHECKPOINT> --output neighbors.png <DATASET PATH>

    python eval/show_neighbors.py --demo

For CMSF-2Q each target has three rows: what is nearest to its previous embedding in M', the same
rows in M with their ranks by plain distance to the target, and the plain nearest rows. For other
methods there are the rows of its label, pseudo-label or cluster, with their ranks, and the plain
ones. With --from_features any encoder will do, a published checkpoint or a torchvision state dict:
the nearest training images by the features of `eval_knn.py`. All that is in the picture is also
written to a JSON file beside it.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments, build_evaluation, options
from utils.data.bad_images import BadImages
from utils.data.datasets import ImageSet, read_split
from utils.evaluation import result_files
from utils.evaluation.features import extract_features
from utils.reporting import shown_neighbors
from utils.reporting.shown_neighbors import Shown
from utils.runtime import distributed, files, script
from utils.runtime.errors import InputError

DEMO = {"weights": options.DEMO_CHECKPOINT, "num_workers": 1}
PROGRAM = "CMSF show_neighbors.py"  # what a picture says that it was made by
RANKS = "rank: place among all rows of M by distance to t; the target itself has rank 1."
MOST_MEGAPIXELS = 200
COSINES = "cos: similarity, the cosine of the angle between both."
PREVIOUS = "M': for each row of M the embedding its image had at the visit before."


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="Draw images and their neighbors.")
    options.add_data_options(parser)
    options.add_checkpoint_options(parser)
    group = parser.add_argument_group("picture")
    group.add_argument(
        "--from_features",
        action="store_true",
        help="neighbors among all training images by the encoder's features; needs no bank",
    )
    either = group.add_mutually_exclusive_group()
    either.add_argument("--images", help="targets by their paths below train/, with commas")
    either.add_argument("--index", type=arguments.int_list, help="targets by their numbers")
    either.add_argument(
        "--count",
        type=arguments.number(int, low=1, high=100),
        default=8,
        help="at most so many targets, drawn by --seed, from a bank such as have a constraint",
    )
    group.add_argument(
        *("-k", "--neighbors"),
        type=arguments.number(int, low=1, high=50),
        default=8,
        help="neighbors in a row",
    )
    group.add_argument(
        "--side",
        type=arguments.number(int, low=64, high=512),
        default=96,
        help="side of a neighbor's thumbnail in pixels",
    )
    group.add_argument(
        "--output",
        type=arguments.path,
        default=Path("output/neighbors.png"),
        help="PNG file to write; a JSON file of the same name tells what is in it; replaces "
        "no files but its own",
    )
    return options.parse(parser, demo=DEMO)


def check_output(path: Path) -> None:
    """InputError unless picture and JSON can be written without loss of another file."""
    if path.suffix.lower() != ".png":
        raise InputError(f"--output {path}: name a file that ends in .png")
    about = path.with_suffix(".json")
    check = partial(result_files.check_own, flag="--output")
    check(about, kind="record of neighbors", is_own=is_record)
    check(
        path,
        kind="picture of neighbors",  # older ones say nothing themselves
        is_own=lambda p: (
            result_files.is_png_of(p, PROGRAM) or (result_files.is_png(p) and is_record(about))
        ),
    )


def is_record(path: Path) -> bool:
    """Whether a JSON file is one of those that are written here."""
    return isinstance(result_files.read_json(path).get("targets"), list)


def named_targets(args: argparse.Namespace, images: ImageSet) -> list[int] | None:
    """The targets that --images or --index names, None where they are to be drawn."""
    if args.images is not None:
        return shown_neighbors.numbers_of(images, args.images.split(","))
    for number in args.index or []:
        if not 0 <= number < len(images):
            raise InputError(f"--index {number}: out of range (0 to {len(images) - 1})")
    return args.index


def check_size(args: argparse.Namespace, count: int) -> None:
    """InputError for a picture of `count` targets that no viewer would open."""
    megapixels = 3 * count * (args.neighbors + 2) * (args.side + 30) * (args.side + 70) / 1e6
    if megapixels > MOST_MEGAPIXELS:
        raise InputError(
            f"--side {args.side}, --neighbors {args.neighbors}, {count} targets: about "
            f"{megapixels:.0f} megapixels, {MOST_MEGAPIXELS} at most"
        )


def shown_from_bank(
    args: argparse.Namespace, images: ImageSet, named: list[int] | None
) -> tuple[Shown, dict, list[str]]:
    """Targets and neighbors in the bank, the checkpoint, and what the picture says of them."""
    if not args.weights:
        raise InputError("--weights: name the checkpoint to show neighbors of")
    what = f"--weights {args.weights}"
    if not (state := build_evaluation.read_weights(args)):
        raise InputError(f"{what}: no memory bank in it (--from_features needs none)")
    bank = shown_neighbors.bank_of(state, what=what)
    shown_neighbors.check_same_images(state, bank, images, what=what)
    there = shown_neighbors.newest_rows(bank)
    if absent := [images.name(number) for number in named or [] if number not in there]:
        flag = "images" if args.images else "index"
        raise InputError(
            f"--{flag}: {', '.join(absent[:5])} not in the bank, which holds {len(there)} of "
            f"{len(images)} images (without --{flag}, such as are there are drawn)"
        )
    if named is None:
        available = shown_neighbors.with_constraint(state, bank)
        named = shown_neighbors.drawn_numbers(available, count=args.count, seed=args.seed)
    shown = shown_neighbors.from_bank(state, bank, named, k=args.neighbors)
    step = f", step {state['step']}" if state.get("step") else ""
    about = f"{Path(args.weights).name}: {state.get('method')}, epoch {state.get('epoch')}{step}"
    notes = [f"{about}; M: memory bank of {bank.filled} rows; t: the target's newest row in it."]
    notes += [PREVIOUS, f"{RANKS} {COSINES}"] if hasattr(bank, "previous") else [RANKS]
    return shown, state, notes


def shown_from_features(
    args: argparse.Namespace,
    images: ImageSet,
    named: list[int] | None,
    bad_images: BadImages,
) -> tuple[Shown, dict, list[str]] | None:
    """The same by features of all training images; None but on the main process."""
    backbone, state = build_evaluation.evaluated_backbone(args)
    (loader,) = build_evaluation.eval_loaders(args, images, bad_images=bad_images)
    network = build_evaluation.place(args, backbone.module)
    extracted = extract_features(network, loader, "features of train")
    if extracted is None:
        return None
    features = normalize(extracted[0], dim=1, out=extracted[0])
    numbers = torch.tensor([n for n in range(len(images)) if n not in loader.left_out])
    if unread := [images.name(number) for number in named or [] if number in loader.left_out]:
        raise InputError(f"data {images.root}: {', '.join(unread[:5])} cannot be read")
    if named is None:
        named = shown_neighbors.drawn_numbers(numbers, count=args.count, seed=args.seed)
    shown = shown_neighbors.from_features(features, numbers, named, k=args.neighbors)
    encoder = "target" if args.use_target else "query"
    about = f"{Path(args.weights).name}: features of the {encoder} encoder ({args.arch})"
    return shown, state, [f"{about}; {len(numbers)} training images. {COSINES}"]


def main() -> None:
    """Choose, search, draw, write picture and JSON."""
    args = parse_args()
    check_output(args.output)
    images = read_split(args.data, "train", dataset=args.dataset)
    named = named_targets(args, images)
    check_size(args, args.count if named is None else len(named))
    result_files.make_folder(args.output.parent, flag="--output")
    bad_images = build_evaluation.build_bad_images(args)
    if args.from_features:
        found = shown_from_features(args, images, named, bad_images)
    else:
        found = shown_from_bank(args, images, named) if distributed.is_main() else None
    if found is None:  # not the main process
        return
    shown, state, notes = found
    picture, targets = shown_neighbors.draw(
        shown,
        images,
        title="Neighbors by features" if args.from_features else "Neighbors in the memory bank",
        notes=notes,
        side=args.side,
        bad_images=bad_images,
    )
    with files.atomic_file(args.output, flag="--output") as file:
        says = PngInfo()
        says.add_text("Software", PROGRAM)
        picture.save(file, format="PNG", pnginfo=says)
    record = {
        "targets": targets,
        "constraint": shown.constraint,
        "method": state.get("method"),
        "from_features": args.from_features,
        "size": list(picture.size),
        "side": args.side,
    }
    counts = {"train": len(images), "rows": len(shown.row_images), "classes": len(images.classes)}
    record |= build_evaluation.result_record(
        args, state, counts=counts, bad_images=bad_images, images={"train": images}
    )
    name = args.output.with_suffix(".json").name
    path = result_files.write_json(args.output.parent, name, record, flag="--output")
    print(f"{args.output}\n{path}")


if __name__ == "__main__":
    script.run_script(main)
