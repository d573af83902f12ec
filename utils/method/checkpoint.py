"""Checkpoints: atomic, sealed save; safe, strict load; encoder weights out of any known layout.

A checkpoint of ours is a dict of tensors and Python builtins: `state_dict` of the method's module,
`optimizer`, `epoch`, `args` (the run's settings), `format`, and what `engine` needs to go on. The
encoders' names inside are those of `encoders.QueryTargetEncoders` behind "encoders.". Also read:
checkpoints of the published CMSF and MSF code, plain torchvision state dicts, and backbones that
eval/export_backbone.py wrote. Nothing in a file is ever executed, and what stands in it is of the
types and ranges said here, or refused.

Every file written here is sealed: its zip archive ends in a comment with the SHA-256 of all that
stands before it. torch.load alone lets a flipped bit through: it does not check the archive's
checksums. For other readers the file is what torch.save writes.
"""

import argparse
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.method import checkpoint_fields
from utils.method.checkpoint_fields import EXPORTED, FORMAT  # noqa: F401 (a name of this module too)
from utils.method.encoders import Backbone, QueryTargetEncoders, mlp
from utils.runtime import checked, files, safetensors_file, torch_file
from utils.runtime.errors import DamagedError, InputError

# torchvision's networks in its own older names -> today's (densenet.py, vision_transformer.py).
_OLDER = (
    (re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)"), r"\1\2"),
    (re.compile(r"(.*\.mlp)\.linear_1\.(weight|bias)"), r"\1.0.\2"),
    (re.compile(r"(.*\.mlp)\.linear_2\.(weight|bias)"), r"\1.3.\2"),
)
# Published names (after "module." of DataParallel is taken out) -> ours.
_PUBLISHED = {"encoder_q.": "query_encoder.", "encoder_t.": "target_encoder."}


def load(path: str | Path, *, flag: str) -> dict:
    """Read a checkpoint on the CPU without running any code that may be in it.

    flag: the user's flag that named the file, for the message. A file of ours must have its seal
    intact, any other zip archive its checksums. A file that ends in .safetensors comes in the
    layout of an exported backbone, if it is one, or else as {"state_dict": ...}. Raises InputError
    for a missing or damaged file, for one that holds no dict of tensors and builtins (see
    `torch_file.read`), and for a field of another type or range than it must have; DamagedError,
    one of them, where the file is at fault.
    """
    what = f"{flag} {path}"
    if not Path(path).is_file():
        reason = "a folder" if Path(path).is_dir() else "no such file"
        raise DamagedError(f"{what}: {reason}")
    is_safetensors = safetensors_file.has_ending(path)
    if is_safetensors:
        safetensors_file.check_library(what)
    try:
        sealed = is_safetensors or files.is_intact(path)
        state = _from_safetensors(path) if is_safetensors else torch_file.read(path)
    except torch_file.NotAllowedError as error:
        raise InputError(f"{what}: {error}") from error
    except Exception as error:  # a damaged file can raise about anything
        reason = torch_file.reason(error)
        raise DamagedError(f"{what}: not a readable checkpoint ({reason})") from error
    if not isinstance(state, dict):
        raise InputError(f"{what}: not a checkpoint (holds a {type(state).__name__})")
    if "format" in state and not sealed:
        raise DamagedError(f"{what}: not a readable checkpoint (its seal is missing)")
    return checkpoint_fields.check(state, what=what)


def _from_safetensors(path: str | Path) -> dict:
    """A safetensors file in the layout of the .pth that would hold the same."""
    weights, about, format = safetensors_file.decode(path)
    if format is None:
        return {"state_dict": weights}
    return exported(weights, about, format=format)


def exported(weights: dict[str, Tensor], about: dict[str, Any], *, format: str = EXPORTED) -> dict:
    """The dict that a .pth with a backbone by itself holds: torchvision's names, and metadata."""
    parts = {"epoch": about["epoch"]} if "epoch" in about else {}
    return {"format": format, **parts, "state_dict": weights, "metadata": about}


def metadata(checkpoint: dict) -> dict[str, Any]:
    """What an exported backbone says of itself, {} for any other checkpoint."""
    return checkpoint["metadata"] if checkpoint.get("format") == EXPORTED else {}


def settings(checkpoint: dict) -> dict:
    """Flags the run was started with, {} for a plain state dict.

    Of an exported backbone its metadata, which have the flags that matter for its use.
    """
    args = checkpoint.get("args", checkpoint.get("opt", metadata(checkpoint)))
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return dict(args) if isinstance(args, dict) else {}


def said(checkpoint: dict, name: str, *, what: str) -> Any:
    """The "arch", "image_size" or "small_stem" that a checkpoint names, None where it does not.

    InputError that begins with `what` for a value that is none.
    """
    kind = checked.or_none(checkpoint_fields.NETWORK[name])
    return checked.take(settings(checkpoint), name, kind, what=what, default=None)


def encoder_weights(checkpoint: dict, classifier: str, *, what: str) -> dict[str, Tensor]:
    """Weights of the encoders under the names of `QueryTargetEncoders`, from any known layout.

    classifier: name of the architecture's last linear layer, `Backbone.classifier`: published
    checkpoints keep the projector there. A plain state dict gives "query_encoder.backbone." alone.
    InputError that begins with `what` for weights that are no dense tensors of numbers.
    """
    state = checkpoint
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    torch_file.check_weights(state, what=what)
    ours = {name: value for name, value in state.items() if name.startswith("encoders.")}
    if ours:
        return {name.removeprefix("encoders."): value for name, value in ours.items()}

    state = {_without_module(name): value for name, value in state.items()}
    weights = {}
    if any(name.startswith(tuple(_PUBLISHED)) for name in state):
        for name, value in state.items():
            if name.startswith("predict_q."):
                weights["predictor." + name.removeprefix("predict_q.")] = value
            for theirs, mine in _PUBLISHED.items():
                if name.startswith(theirs):
                    weights[mine + _part(name.removeprefix(theirs), classifier)] = value
    else:
        for name, value in state.items():
            if not name.startswith(classifier + "."):
                weights["query_encoder.backbone." + name] = value
    return weights


def _without_module(name: str) -> str:
    """A parameter's name without what (Distributed)DataParallel and torch.compile add to it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _part(name: str, classifier: str) -> str:
    """Published encoders hold the projector in the classifier's place."""
    if name.startswith(classifier + "."):
        return "projector." + name.removeprefix(classifier + ".")
    return "backbone." + name


def load_strictly(
    module: nn.Module, weights: dict[str, Tensor], *, what: str, finite: bool = True
) -> None:
    """Load weights that fit the module exactly; InputError that begins with `what` otherwise.

    As in PyTorch's own strict load, only the batch norms' batch counters, which files from before
    2018 lack, may be missing; names of older torchvision releases count as today's. finite: also
    refuse weights that are infinite or not a number.
    """
    torch_file.check_weights(weights, what=what)
    own = module.state_dict()
    weights = OrderedDict((_name_now(name, own, weights), v) for name, v in weights.items())
    for name in own:
        if name.endswith("num_batches_tracked"):
            weights.setdefault(name, own[name])
    both = [(name, own[name], weights[name]) for name in own if name in weights]
    problems = {
        "missing": [name for name in own if name not in weights],
        "unknown": [name for name in weights if name not in own],
        "of another shape": [name for name, one, value in both if one.shape != value.shape],
        "of another type": [
            name
            for name, one, value in both
            if not (_is_like(one, value) or name.endswith("num_batches_tracked"))
        ],
    }
    if texts := [
        f"{len(names)} weights {kind}, first {torch_file.one_line(names[0])}"
        for kind, names in problems.items()
        if names
    ]:
        raise InputError(f"{what}: does not fit: {'; '.join(texts)}")
    broken = [name for name, _, value in both if finite and not torch_file.is_finite(value)]
    if broken:
        raise InputError(f"{what}: {len(broken)} weights are not finite, first {broken[0]}")
    weights._metadata = own._metadata  # the versions of the names that they have by now
    module.load_state_dict(weights)


def _name_now(name: str, own: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    """A weight's name in this torchvision, where the network has it under that one alone."""
    for older, now in _OLDER:
        if match := older.fullmatch(name):
            new = match.expand(now)
            if new in own and new not in weights:
                return new
    return name


def _is_like(own: Tensor, value: Tensor) -> bool:
    """Whether a value can stand for the module's own: floating for floating, int for int."""
    if own.is_floating_point() or value.is_floating_point():
        return own.is_floating_point() == value.is_floating_point()
    return (own.dtype == torch.bool) == (value.dtype == torch.bool)


def load_backbone(
    backbone: Backbone, checkpoint: dict, *, encoder: str = "query", what: str
) -> None:
    """Load one encoder's backbone (encoder: "query" or "target") strictly; see `load_strictly`."""
    prefix = f"{encoder}_encoder.backbone."
    weights = encoder_weights(checkpoint, backbone.classifier, what=what)
    chosen = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
    if not chosen:
        raise InputError(f"{what}: no {encoder} encoder in it")
    load_strictly(backbone.module, chosen, what=what)


def load_projector(
    checkpoint: dict, backbone: Backbone, *, encoder: str = "query", what: str
) -> nn.Module:
    """One encoder's projector, (B, F) -> (B, D), of the sizes that its weights have.

    InputError that begins with `what` where the checkpoint has none, or one of another build.
    """
    prefix = f"{encoder}_encoder.projector."
    weights = encoder_weights(checkpoint, backbone.classifier, what=what)
    chosen = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
    layers = [v for n, v in chosen.items() if n.endswith(".weight") and v.ndim == 2]
    if not layers:
        raise InputError(f"{what}: no projector of the {encoder} encoder in it")
    sizes = [backbone.feature_dim, *(len(layer) for layer in layers)]
    last = f"{3 * len(layers) - 2}.running_mean"  # three modules a layer, and the last without two
    projector = mlp(sizes, output_norm=last in chosen)
    load_strictly(projector, chosen, what=what)
    return projector


def load_initial_weights(
    encoders: QueryTargetEncoders, classifier: str, checkpoint: dict, *, what: str
) -> str:
    """Start encoders from a checkpoint, strictly; returns in words what was loaded.

    A CMSF or MSF checkpoint fills all of them (query, predictor, target). A plain state dict fills
    both backbones and leaves projector and predictor as they are.
    """
    weights = encoder_weights(checkpoint, classifier, what=what)
    prefix = "query_encoder.backbone."
    if all(name.startswith(prefix) for name in weights):
        plain = {name.removeprefix(prefix): value for name, value in weights.items()}
        load_strictly(encoders.query_encoder.backbone, plain, what=what)
        load_strictly(encoders.target_encoder.backbone, plain, what=what)
        return "backbone only; projector and predictor start at random"
    load_strictly(encoders, weights, what=what)
    return "query encoder, predictor and target encoder"
