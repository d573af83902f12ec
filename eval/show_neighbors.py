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
from collections.abc import Collection
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments, build_evaluation, options
from utils.data.bad_images import BadImages, reason_of
from utils.data.datasets import ImageSet, read_split
from utils.evaluation import result_files
from utils.evaluation.features import extract_features
from utils.reporting import shown_neighbors
from utils.reporting.pictures import neighbor_sheet
from utils.reporting.shown_neighbors import neighbors_of, newest_rows
from utils.runtime import distributed, files, script
from utils.runtime.errors import InputError

DEMO = {"weights": options.DEMO_CHECKPOINT, "num_workers": 1}
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


def check_output(path: Path) -> None:
    """InputError unless picture and JSON can be written without loss of another file."""
    if path.suffix.lower() != ".png":
        raise InputError(f"--output {path}: name a file that ends in .png")
    about = path.with_suffix(".json")

    def is_record(path: Path) -> bool:
        return isinstance(result_files.read_json(path).get("targets"), list)

    def is_picture(path: Path) -> bool:  # older ones say nothing themselves
        said = result_files.is_png_of(path, PROGRAM)
        return said or (result_files.is_png(path) and is_record(about))

    check = partial(result_files.check_own, flag="--output")
    check(about, kind="record of neighbors", is_own=is_record)
    check(path, kind="picture of neighbors", is_own=is_picture)


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


def choose(
    args: argparse.Namespace,
    images: ImageSet,
    named: list[int] | None,
    there: Collection[int],
    *,
    absent: str,
    preferred: Collection[int] = (),
) -> list[int]:
    """The targets: the named ones, or --count drawn from the preferred, or else all, sorted.

    InputError for named ones that are not there; absent: what is said of them.
    """
    if wrong := [images.name(number) for number in named or [] if number not in there]:
        flag = "images" if args.images else "index"
        raise InputError(
            f"--{flag}: {', '.join(wrong[:5])} {absent}, {len(there)} of {len(images)} images are "
            f"there (without --{flag}, such are drawn)"
        )
    if named is not None:
        return named
    available = sorted(preferred or there)
    if len(available) < args.count:
        print(f"--count {args.count}: only {len(available)} images to draw from, all are shown")
    count = min(args.count, len(available))
    return sorted(np.random.default_rng(args.seed).choice(available, count, replace=False).tolist())


def shown_from_bank(
    args: argparse.Namespace, images: ImageSet, named: list[int] | None
) -> tuple[dict, dict]:
    """What is shown of targets and their neighbors in the bank, and the checkpoint."""
    if not args.weights:
        raise InputError("--weights: name the checkpoint to show neighbors of")
    state = build_evaluation.read_weights(args)
    bank = shown_neighbors.bank_of(state, images, what=f"--weights {args.weights}")
    constraint, newest = shown_neighbors.constraint_of(state, bank), newest_rows(bank)
    preferred = [n for n, row in newest.items() if constraint and constraint.there[row]]
    numbers = choose(args, images, named, newest, absent="not in the bank", preferred=preferred)
    rows = torch.tensor([newest[number] for number in numbers])
    found = neighbors_of(
        rows, *bank.in_use("features", "index"), images, k=args.neighbors, constraint=constraint
    )
    step = f", step {state['step']}" if state.get("step") else ""
    about = f"{Path(args.weights).name}: {state.get('method')}, epoch {state.get('epoch')}{step}"
    notes = [f"{about}; M: memory bank of {bank.filled} rows; t: the target's newest row in it."]
    notes += [PREVIOUS, f"{RANKS} {COSINES}"] if hasattr(bank, "previous") else [RANKS]
    shown = {"title": "Neighbors in the memory bank", "notes": notes, "targets": found}
    return shown | {"constraint": constraint and constraint.name, "rows": bank.filled}, state


def shown_from_features(
    args: argparse.Namespace, images: ImageSet, named: list[int] | None, bad_images: BadImages
) -> tuple[dict, dict] | None:
    """The same by features of all training images; None but on the main process."""
    backbone, state = build_evaluation.evaluated_backbone(args)
    (loader,) = build_evaluation.eval_loaders(args, images, bad_images=bad_images)
    network = build_evaluation.place(args, backbone.module)
    extracted = extract_features(network, loader, "features of train")
    if extracted is None:
        return None
    features = normalize(extracted[0], dim=1, out=extracted[0])
    row_of = {n: i for i, n in enumerate(sorted(set(range(len(images))) - {*loader.left_out}))}
    if not row_of:
        raise InputError(f"data {images.root}: no image in it can be read")
    numbers = choose(args, images, named, row_of, absent="cannot be read")
    rows, index = torch.tensor([row_of[number] for number in numbers]), torch.tensor([*row_of])
    found = neighbors_of(rows, features, index, images, k=args.neighbors, by_rank=False)
    encoder = "target" if args.use_target else "query"
    about = f"{Path(args.weights).name}: features of the {encoder} encoder ({args.arch})"
    notes = [f"{about}; {len(row_of)} training images. {COSINES}"]
    shown = {"title": "Neighbors by features", "notes": notes, "targets": found}
    return shown | {"constraint": None, "rows": len(row_of)}, state


def draw(shown: dict, images: ImageSet, bad_images: BadImages, *, side: int) -> Image.Image:
    """The picture, for which each file is read once in each size."""

    @cache
    def thumbnail(number: int, side: int) -> Image.Image | None:
        try:
            image = Image.fromarray(images.image(number).permute(1, 2, 0).numpy())
        except MemoryError:
            raise
        except Exception as error:  # a damaged file can raise about anything
            path = images.path(number)
            bad_images.add(path, reason_of(error, path))
            return None
        return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)

    words = {"title": shown["title"], "notes": shown["notes"]}
    return neighbor_sheet(shown["targets"], thumbnail, **words, side=side)


def main() -> None:
    """Choose, search, draw, write picture and JSON."""
    args = parse_args()
    check_output(args.output)
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
        found = shown_from_features(args, images, named, bad_images)
    else:
        found = shown_from_bank(args, images, named) if distributed.is_main() else None
    if found is None:  # not the main process
        return
    shown, state = found
    picture = draw(shown, images, bad_images, side=args.side)
    with files.atomic_file(args.output, flag="--output") as file:
        says = PngInfo()
        says.add_text("Software", PROGRAM)
        picture.save(file, format="PNG", pnginfo=says)
    counts = {"train": len(images), "rows": shown.pop("rows"), "classes": len(images.classes)}
    shown |= {"method": state.get("method"), "from_features": args.from_features}
    shown |= {"size": list(picture.size), "side": args.side}
    record = shown | build_evaluation.result_record(
        args, state, counts=counts, bad_images=bad_images, images={"train": images}
    )
    name = args.output.with_suffix(".json").name
    path = result_files.write_json(args.output.parent, name, record, flag="--output")
    print(f"{args.output}\n{path}")


if __name__ == "__main__":
    script.run_script(main)
