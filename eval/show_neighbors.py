"""Pictures of images and their neighbors in the memory bank (the figures of CMSF sec. 4).

    python eval/show_neighbors.py --weights <CHECKPOINT> --output neighbors.png <DATASET PATH>

    python eval/show_neighbors.py --demo

For CMSF-2Q each target has three rows: what is nearest to its previous embedding in M', the same
rows in M with their ranks by plain distance to the target, and the plain nearest rows. For other
methods there are the rows of its label, pseudo-label or cluster, with their ranks, and the plain
ones. With --from_features any encoder will do, that of another library too:
the nearest training images by the features of `eval_knn.py`. All that is in the picture is also
written to a JSON file beside it.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments, build_evaluation, options
from utils.data.bad_images import BadImages, read_images
from utils.data.datasets import ImageSet, read_split
from utils.evaluation import result_files
from utils.evaluation.features import extract_features
from utils.reporting import shown_neighbors
from utils.reporting.pictures import neighbor_sheet
from utils.reporting.shown_neighbors import Searched
from utils.runtime import distributed, files, script
from utils.runtime.errors import InputError, printable

DEMO = {"weights": options.DEMO_CHECKPOINT, "num_workers": 1}
PICTURE = {"ending": ".png", "of": "neighbors", "key": "targets"}
PROGRAM = "CMSF show_neighbors.py"  # what a picture says that it was made by
RANKS = "rank: place among all rows of M by distance to t; the target itself has rank 1."
COSINES = "cos: similarity, the cosine of the angle between both."
PREVIOUS = "M': for each row of M the embedding its image had at the visit before."
MOST_MEGAPIXELS = 200


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="Draw images and their neighbors.")
    options.add_data_options(parser)
    options.add_checkpoint_options(parser)
    group = parser.add_argument_group("picture")
    text = "neighbors among all training images by the encoder's features; needs no bank"
    group.add_argument("--from_features", action="store_true", help=text)
    either = group.add_mutually_exclusive_group()
    either.add_argument("--images", help="targets by their paths below train/, with commas")
    either.add_argument("--index", type=arguments.int_list, help="targets by their numbers")
    text = "at most so many targets, drawn by --seed, from a bank such as have a constraint"
    number = arguments.number(int, low=1, high=100)
    either.add_argument("--count", type=number, default=8, help=text)
    number = arguments.number(int, low=1, high=50)
    group.add_argument("-k", "--neighbors", type=number, default=8, help="neighbors in a row")
    number, text = arguments.number(int, low=64, high=512), "of a neighbor's thumbnail in pixels"
    group.add_argument("--side", type=number, default=96, help=f"side {text}")
    text = "PNG file to write, with a JSON file beside it; replaces no files but its own"
    path = Path("output/neighbors.png")
    group.add_argument("--output", type=arguments.path, default=path, help=text)
    return options.parse(parser, demo=DEMO)


def named_targets(args: argparse.Namespace, images: ImageSet) -> list[int] | None:
    """The targets that --images or --index names, None where they are to be drawn."""
    if args.images is not None:
        numbers = {images.name(number): number for number in range(len(images))}
        names = dict.fromkeys(args.images.split(","))
        if unknown := [name for name in names if name not in numbers]:
            raise InputError(f"--images {','.join(unknown[:5])}: not in {images.root}")
        return [numbers[name] for name in names]
    for number in args.index or []:
        if not 0 <= number < len(images):
            raise InputError(f"--index {number}: out of range (0 to {len(images) - 1})")
    return args.index


def choose(args: argparse.Namespace, named: list[int] | None, searched: Searched) -> list[int]:
    """The rows of the named targets, or of --count drawn ones; InputError for what has no row."""
    images, row_of, constraint = searched.images, searched.row_of, searched.constraint
    if wrong := [images.name(number) for number in named or [] if number not in row_of]:
        flag = "images" if args.images else "index"
        reason = "cannot be read" if args.from_features else "not in the bank"
        raise InputError(
            f"--{flag}: {', '.join(wrong[:5])} {reason}, {len(row_of)} of {len(images)} images are "
            f"there (without --{flag}, such are drawn)"
        )
    if named is None:
        there = sorted(row_of)
        if constraint:  # such as have one, if there are any
            there = [number for number in there if constraint.there[row_of[number]]] or there
        if len(there) < args.count:
            print(f"--count {args.count}: only {len(there)} images to draw from, all are shown")
        count = min(args.count, len(there))
        named = sorted(np.random.default_rng(args.seed).choice(there, count, replace=False))
    return [row_of[number] for number in named]


def search_bank(args: argparse.Namespace, images: ImageSet) -> tuple[Searched, list[str], dict]:
    """What is searched in the bank, notes for the picture, and the checkpoint."""
    if not args.weights:
        raise InputError("--weights: name the checkpoint to show neighbors of")
    state, what = build_evaluation.read_weights(args), f"--weights {args.weights}"
    searched = shown_neighbors.from_bank(state, images, k=args.neighbors, what=what)
    step = f", step {state['step']}" if state.get("step") else ""
    about = f"{Path(args.weights).name}: {state.get('method')}, epoch {state.get('epoch')}{step}"
    rows = f"M: memory bank of {len(searched.index)} rows; t: the target's newest row in it."
    has_previous = searched.constraint and searched.constraint.groups is None
    notes = [PREVIOUS, f"{RANKS} {COSINES}"] if has_previous else [RANKS]
    return searched, [f"{about}; {rows}", *notes], state


def search_features(
    args: argparse.Namespace, images: ImageSet, bad_images: BadImages
) -> tuple[Searched, list[str], dict] | None:
    """The same of the features of all training images; None but on the main process."""
    backbone, state = build_evaluation.evaluated_backbone(args)
    (loader,) = build_evaluation.eval_loaders(args, images, bad_images=bad_images)
    network = build_evaluation.place(args, backbone.module)
    extracted = extract_features(network, loader, "features of train")
    if extracted is None:
        return None
    features = normalize(extracted[0], dim=1, out=extracted[0])
    index = torch.tensor(sorted(set(range(len(images))) - {*loader.left_out}))
    if not len(index):
        raise InputError(f"data {images.root}: no image in it can be read")
    name, encoder = Path(args.weights).name, printable(args.encoder)
    about = f"{name}: features of the {encoder} encoder ({args.arch})"
    notes = [f"{about}; {len(index)} training images. {COSINES}"]
    row_of = {number: row for row, number in enumerate(index.tolist())}
    return Searched(images, features, index, row_of, args.neighbors, by_rank=False), notes, state


def read_picture(images: ImageSet, bad_images: BadImages, number: int) -> Image.Image | None:
    """The picture of an image; None where it cannot be read."""
    made, broken = read_images(images, [number], lambda _, p: p, tolerated=bad_images.tolerated)
    for reason in broken.values():
        bad_images.add(images.path(number), reason)
    return Image.fromarray(made[number].permute(1, 2, 0).numpy()) if made else None


def main() -> None:
    """Choose, search, draw, write picture and JSON."""
    args = parse_args()
    result_files.check_picture(
        args.output, **PICTURE, is_own=lambda p: result_files.is_png_of(p, PROGRAM)
    )
    images = read_split(args.data, "train", dataset=args.dataset)
    named = named_targets(args, images)
    count = args.count if named is None else len(named)
    megapixels = 3 * count * (args.neighbors + 2) * (args.side + 30) * (args.side + 70) / 1e6
    if megapixels > MOST_MEGAPIXELS:  # no viewer would open it
        said = f"--side {args.side}, --neighbors {args.neighbors}, {count} targets"
        raise InputError(f"{said}: about {megapixels:.0f} megapixels, {MOST_MEGAPIXELS} at most")
    result_files.make_folder(args.output.parent, flag="--output")
    bad_images = build_evaluation.build_bad_images(args)
    if args.from_features:
        found = search_features(args, images, bad_images)
    else:
        found = search_bank(args, images) if distributed.is_main() else None
    if found is None:  # not the main process
        return
    searched, notes, state = found
    targets = [searched.target(row) for row in choose(args, named, searched)]
    title = "Neighbors by features" if args.from_features else "Neighbors in the memory bank"
    read = partial(read_picture, images, bad_images)
    picture = neighbor_sheet(targets, read, title=title, notes=notes, side=args.side)
    with files.atomic_file(args.output, flag="--output") as file:
        says = PngInfo()
        says.add_text("Software", PROGRAM)
        picture.save(file, format="PNG", pnginfo=says)
    counts = {"train": len(images), "rows": len(searched.index), "classes": len(images.classes)}
    record = {
        "title": title,
        "notes": notes,
        "targets": targets,
        "constraint": searched.constraint and searched.constraint.name,
        "method": state.get("method"),
        "from_features": args.from_features,
        "size": list(picture.size),
        "side": args.side,
    } | build_evaluation.result_record(
        args, state, counts=counts, bad_images=bad_images, images={"train": images}
    )
    name = args.output.with_suffix(".json").name
    path = result_files.write_json(args.output.parent, name, record, flag="--output")
    print(f"{args.output}\n{path}")


if __name__ == "__main__":
    script.run_script(main)
