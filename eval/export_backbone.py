"""A checkpoint's backbone in the names of its library, for use outside of this repository.

    python eval/export_backbone.py --weights <CHECKPOINT> --output resnet50.pth

The architecture's last linear layer is not in the file, as the method trains none: a network
without it ends in features (B, F), and takes the weights strictly.

    model = torchvision.models.resnet50()
    model.fc = torch.nn.Identity()  # the layer has other names in other architectures
    model.load_state_dict(torch.load("resnet50.pth", weights_only=True)["state_dict"])

timm.create_model("resnet50", num_classes=0) takes the same weights, and of `--arch timm/NAME` those
of NAME. Networks of one image size are built for it: vit_b_16(image_size=S), or timm's img_size=S.
The file's "metadata" say what the weights are and how images are normalized. A --output that ends
in .safetensors holds the state dict itself, for safetensors.torch.load_file, and the metadata as
text in its header. All scripts that take --weights, and hubconf.py, read both kinds.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments, build_evaluation, options
from utils.data.augment import IMAGENET_MEAN, IMAGENET_STD
from utils.data.eval_loader import EvalLoader
from utils.evaluation import result_files
from utils.method import checkpoint
from utils.method.encoders import Backbone
from utils.runtime import checked, files, plain_json, safetensors_file, script
from utils.runtime.errors import InputError, printable

ENDINGS = (".pth", safetensors_file.ENDING)


def parse_args() -> argparse.Namespace:
    """The flags of this script; InputError, before the checkpoint is read, if they cannot work."""
    parser = arguments.Parser(description="Export a checkpoint's backbone.")
    options.add_checkpoint_options(parser, evaluates=False)
    options.add_output_options(parser, help=f"file to write, ends in {' or '.join(ENDINGS)}")
    parser.set_defaults(seed=0)  # of weights that the file replaces
    args = parser.parse_args()
    result_files.check_output(args, endings=ENDINGS)
    if args.weights in result_files.NAMED:
        raise InputError(f"--weights {args.weights}: name a checkpoint to export")
    if safetensors_file.has_ending(args.output):
        safetensors_file.check_library(f"--output {args.output}")
    return args


def describe(args: argparse.Namespace, backbone: Backbone, state: dict) -> dict:
    """The metadata: what the weights are and how to use them; args: after `evaluated_backbone`.

    Of a backbone that was exported before, its origin stays what it was.
    """
    kept = {name: state.get(name) for name in ("method", "protocol", "epoch", "data")}
    kept["data"] = kept["data"] or state.get("key")  # as linear.pth calls it
    plain = {n: v for n, v in kept.items() if v not in (None, {}, "") and checked.PLAIN.holds(v)}
    return {
        **plain,
        "encoder": args.encoder,
        "checkpoint_sha256": args.sha256,
        **checkpoint.metadata(state),
        "arch": args.arch,
        "small_stem": args.small_stem,
        "feature_dim": backbone.feature_dim,
        "image_size": args.image_size,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "view": EvalLoader.VIEW,
    }


def main() -> None:
    """Read the backbone, check it, write it, say what was written."""
    args = parse_args()
    backbone, state = build_evaluation.evaluated_backbone(args)
    weights = {name: value.contiguous() for name, value in backbone.module.state_dict().items()}
    about = describe(args, backbone, state)
    if safetensors_file.has_ending(args.output):
        data = safetensors_file.encode(weights, about, format=checkpoint.EXPORTED)
        with files.atomic_file(args.output, flag="--output") as file:
            file.write(data)
    else:
        files.save(args.output, checkpoint.exported(weights, about), flag="--output")
    print(f"{args.output}: {len(weights)} weights")
    for name, value in about.items():
        text = value if isinstance(value, str) else plain_json.dumps(value)
        print(printable(f"  {name}: {text}"))


if __name__ == "__main__":
    script.run_script(main)
