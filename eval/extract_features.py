"""An encoder's features of the images of any folder, in one NumPy file.

    python eval/extract_features.py --weights <CHECKPOINT> --output features.npz <IMAGE FOLDER>

All images below the folder, or with --split those of <FOLDER>/train or <FOLDER>/val. Under torchrun
several processes share the work.

    file = np.load("features.npz")
    file["features"]  # (N, F) float32; with --normalize rows of unit norm
    file["names"]     # (N,) paths below the folder
    file["labels"]    # (N,) int64, positions in classes; -1 for images that lie in no folder of it
    file["classes"]   # (C,) the names of the folders directly in it
    json.loads(str(file["metadata"]))  # checkpoint, SHA-256, arch, encoder, image size, view, ...
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments, build_evaluation, options
from utils.data.datasets import ImageSet, read_any_folder, read_split
from utils.data.eval_loader import EvalLoader
from utils.evaluation import result_files
from utils.evaluation.features import extract_features
from utils.method import checkpoint
from utils.method.encoders import Encoder
from utils.runtime import files, plain_json, script
from utils.runtime.errors import InputError

DEMO = {"weights": options.DEMO_CHECKPOINT, "num_workers": 1, "split": "val"}
SPLITS = ("train", "val")
ENDING = ".npz"


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="Features of a folder's images.")
    options.add_data_options(parser)
    options.add_checkpoint_options(parser)
    parser.add_argument("--split", choices=SPLITS, help="only the images of data/train or data/val")
    parser.add_argument("--normalize", action="store_true", help="give each row the L2 norm 1")
    text = "embeddings behind the projector, not features"
    parser.add_argument("--projected", action="store_true", help=text)
    options.add_output_options(parser, help=f"file to write, ends in {ENDING}")
    return options.parse(parser, demo=DEMO)


def read_images(args: argparse.Namespace) -> ImageSet:
    """The images of the folder or the split; InputError where it is not clear which are meant."""
    if args.split:
        return read_split(args.data, args.split, dataset=args.dataset)
    if args.dataset != "imagenet":
        raise InputError(f"--dataset {args.dataset}: only with --split")
    images = read_any_folder(args.data)
    if images.classes and set(images.classes) <= {*SPLITS, "test"}:
        names = "/, ".join(images.classes)
        raise InputError(
            f"data {args.data}: name one of its {names}/, by --split or as the folder itself"
        )
    return images


def write(path: Path, features: Tensor, loader: EvalLoader, record: dict) -> None:
    """Write the rows with what they are, atomically; RunError if that fails."""
    images = loader.images
    kept = [number for number in range(len(images)) if number not in loader.left_out]
    with files.atomic_file(path, flag="--output") as file:
        np.savez(
            file,
            features=features.numpy(),
            names=np.array([images.name(number) for number in kept], dtype=np.str_),
            labels=images.labels[kept],
            classes=np.array(images.classes, dtype=np.str_),
            metadata=np.array(plain_json.dumps(record)),
        )


def main() -> None:
    """Extract the features of a folder's images and write them."""
    args = parse_args()
    result_files.check_output(args, endings=(ENDING,))
    images = read_images(args)
    backbone, state = build_evaluation.evaluated_backbone(args)
    network = backbone.module
    if args.projected:
        what = f"--projected: --weights {args.weights}"
        if args.weights in result_files.NAMED:
            raise InputError(f"{what}: no projector in it")
        which = {"encoder": "target" if args.use_target else "query", "prefix": args.prefix}
        projector = checkpoint.load_projector(state, backbone, **which, what=what)
        network = Encoder(network, projector)
    network = build_evaluation.place(args, network)
    (loader,) = build_evaluation.eval_loaders(args, images)
    found = extract_features(network, loader)
    if found is None:  # not the main process
        return
    features, _ = found
    if args.normalize:
        normalize(features, dim=1, out=features)
    record = build_evaluation.result_record(
        args,
        state,
        counts={"images": len(features), "classes": len(images.classes)},
        bad_images=loader.bad_images,
        images={args.split or "images": images},
    )
    record |= {
        "layer": "projector" if args.projected else "backbone",
        "normalized": args.normalize,
        "view": EvalLoader.VIEW,
        "folder": str(images.root),
        "images": images.digest(),
    }
    write(args.output, features, loader, record)
    what = "embeddings" if args.projected else "features"
    print(f"{args.output}: {len(features)} images, {features.shape[1]} {what} each")


if __name__ == "__main__":
    script.run_script(main)
