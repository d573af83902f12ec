"""A checkpoint's backbone in torchvision's names, for use outside of this repository.

    python eval/export_backbone.py --weights <CHECKPOINT> --output resnet50.pth

Reads what eval_knn.py does. The last linear layer of the architecture is not in the file, as the
method trains none: a network without it ends in features (B, F), and takes the weights strictly.

    model = torchvision.models.resnet50()
    model.fc = torch.nn.Identity()  # the layer has other names in other architectures
    model.load_state_dict(torch.load("resnet50.pth", weights_only=True)["state_dict"])

timm.create_model("resnet50", num_classes=0) takes the same weights. The file's "metadata" say what
the weights are: arch, stem, size of images and features, normalization, encoder, epoch, SHA-256 of
the checkpoint, digests of the training data.

A --output that ends in .safetensors holds the state dict itself, read by
safetensors.torch.load_file, and the metadata as text in its header. All scripts that take
--weights, and hubconf.py, read both kinds.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments, build_evaluation, options
from utils.data.augment import IMAGENET_MEAN, IMAGENET_STD
from utils.data.eval_loader import EvalLoader
from utils.evaluation import result_files
from utils.method import checkpoint
from utils.method.encoders import Backbone
from utils.runtime import checked, files, plain_json, safetensors_file, script
from utils.runtime.errors import InputError

ENDINGS = (".pth", safetensors_file.ENDING)
# What is taken over from a checkpoint where it has it; "protocol" says how linear.pth was trained.
KEPT = ("method", "protocol", "epoch", "data")


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="Export a checkpoint's backbone.")
    options.add_checkpoint_options(parser, evaluates=False)
    options.add_output_options(parser, help=f"file to write, ends in {' or '.join(ENDINGS)}")
    parser.set_defaults(seed=0)  # of weights that the file replaces
    return parser.parse_args()


def check_flags(args: argparse.Namespace) -> None:
    """InputError for flags that cannot work; before the checkpoint is read."""
    result_files.check_output(args, endings=ENDINGS)
    if args.weights in ("random", "pixels"):
        raise InputError(f"--weights {args.weights}: name a checkpoint to export")
    if safetensors_file.has_ending(args.output):
        safetensors_file.check_library(f"--output {args.output}")


def describe(args: argparse.Namespace, backbone: Backbone, state: dict) -> dict:
    """The metadata: what the weights are and how to use them; args: after `evaluated_backbone`.

    Of a backbone that was exported before, its origin stays what it was.
    """
    kept = {name: state[name] for name in KEPT if is_plain(state.get(name))}
    if "data" not in kept and is_plain(state.get("key")):  # linear.pth
        kept["data"] = state["key"]
    about = {
        **kept,
        "encoder": build_evaluation.encoder_name(args, state),
        "checkpoint_sha256": args.sha256,
        **checkpoint.metadata(state),
    }
    return about | {
        "arch": args.arch,
        "small_stem": args.small_stem,
        "feature_dim": backbone.feature_dim,
        "image_size": args.image_size,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "view": EvalLoader.VIEW,
    }


def is_plain(value: object) -> bool:
    """Whether a value says something and can be written as JSON."""
    return checked.PLAIN.holds(value) and value not in (None, {}, "")


def write(path: Path, weights: dict[str, Tensor], about: dict) -> None:
    """Write the file in the kind that its ending says, atomically; RunError if that fails."""
    weights = {name: value.contiguous() for name, value in weights.items()}
    if not safetensors_file.has_ending(path):
        files.save(path, checkpoint.exported(weights, about), flag="--output")
        return
    data = safetensors_file.encode(weights, about, format=checkpoint.EXPORTED)
    with files.atomic_file(path, flag="--output") as file:
        file.write(data)


@torch.no_grad()
def main() -> None:
    """Read the backbone, check it, write it, say what was written."""
    args = parse_args()
    check_flags(args)
    backbone, state = build_evaluation.evaluated_backbone(args)
    weights = backbone.module.state_dict()
    about = describe(args, backbone, state)
    write(args.output, weights, about)
    print(f"{args.output}: {len(weights)} weights")
    for name, value in about.items():
        print(f"  {name}: {value if isinstance(value, str) else plain_json.dumps(value)}")


if __name__ == "__main__":
    script.run_script(main)
