"""Checkpoints: safe, strict load; encoder weights out of any known layout.

A checkpoint of ours is a dict of tensors and builtins: `RUN`, with the encoders' names in
`state_dict` those of `encoders.QueryTargetEncoders` behind "encoders.". Also read: checkpoints of
the published CMSF and MSF code, plain torchvision state dicts, and backbones that
eval/export_backbone.py wrote. Nothing in a file is ever executed, and what stands in it is of the
types and ranges said here, or refused.
"""

import argparse
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.method.encoders import Backbone, QueryTargetEncoders, mlp
from utils.runtime import checked, safetensors_file, torch_file
from utils.runtime.checked import Kind
from utils.runtime.errors import DamagedError, InputError

FORMAT = "cmsf-2"
EXPORTED = "cmsf-backbone-1"  # a backbone by itself: "state_dict" and "metadata"

# What a checkpoint says of its network; the size has a limit, as an image of it is made.
NETWORK = {
    "arch": Kind("a name", lambda v: isinstance(v, str) and v.isprintable() and len(v) < 100),
    "image_size": checked.whole(1, 4096),
    "small_stem": checked.FLAG,
}
_BYTES = torch_file.tensor("(n,)", lambda value: True, dims=1, dtype=torch.uint8)
_SUMS = checked.table_of(torch_file.tensor("(2,)", lambda value: len(value) == 2, dims=1))
_PLAIN = checked.table_of(checked.PLAIN)
_COUNT = checked.whole(0)


def _is_metadata(value: Any) -> bool:
    return _PLAIN.holds(value) and value.get("encoder", "query") in ("query", "target")


# The fields of files of ours, by format.
_FIELDS = {
    FORMAT: {
        "method": checked.TEXT,
        "epoch": checked.whole(1),
        "step": checked.or_none(_COUNT),
        "state_dict": checked.TABLE,
        "optimizer": checked.TABLE,
        "rng_states": checked.list_of(checked.table_of(_BYTES)),
        "means": Kind(
            "sums of figures", lambda v: isinstance(v, dict) and _SUMS.holds(v.get("sums"))
        ),
        "bad_images": checked.list_of(checked.TEXT),
        "seconds": checked.real(0),
        "data": checked.table_of(checked.TEXT),
        "args": _PLAIN,
        "parts": checked.table_of(checked.TABLE),
    },
    EXPORTED: {
        "state_dict": checked.TABLE,
        "metadata": Kind("a table of plain values (encoder: query or target)", _is_metadata),
    },
}
RUN = tuple(name for name in _FIELDS[FORMAT] if name != "parts")  # what a run needs to go on

# torchvision's networks in its own older names -> today's (densenet.py, vision_transformer.py).
_OLDER = (
    (re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)"), r"\1\2"),
    (re.compile(r"(.*\.mlp)\.linear_1\.(weight|bias)"), r"\1.0.\2"),
    (re.compile(r"(.*\.mlp)\.linear_2\.(weight|bias)"), r"\1.3.\2"),
)
# Published names (after "module." of DataParallel is taken out) -> ours.
_PUBLISHED = {"encoder_q": "query_encoder", "encoder_t": "target_encoder"}
_QUERY = "query_encoder.backbone."


def load(path: str | Path, *, flag: str) -> dict:
    """Read a checkpoint on the CPU without running any code that may be in it.

    flag: the user's flag that named the file, for the message. A file that ends in .safetensors
    comes in the layout of an exported backbone, if it is one, or else as {"state_dict": ...}.
    InputError for what is no dict of tensors and builtins, or has a field of another type or range
    than it must have; DamagedError, one of them, for a missing or damaged file.
    """
    what = f"{flag} {path}"
    if not Path(path).is_file():
        reason = "a folder" if Path(path).is_dir() else "no such file"
        raise DamagedError(f"{what}: {reason}")
    if safetensors_file.has_ending(path):
        state = _from_safetensors(path, what=what)
    else:
        state = torch_file.read(path, what=what)
    if not isinstance(state, dict):
        raise InputError(f"{what}: not a checkpoint (holds a {type(state).__name__})")
    return _checked(state, what=what)


def _from_safetensors(path: str | Path, *, what: str) -> dict:
    """A safetensors file in the layout of the .pth that would hold the same."""
    safetensors_file.check_library(what)
    try:
        weights, about, format = safetensors_file.decode(path)
    except Exception as error:  # a damaged file can raise about anything
        raise DamagedError(torch_file.unreadable(what)) from error
    return {"state_dict": weights} if format is None else exported(weights, about, format=format)


def _checked(state: dict, *, what: str) -> dict:
    """A file's content, if its fields are as they must be; InputError, begun by `what`, if not.

    An epoch in files of others that is no number of one is left out, and that is said.
    """
    for name in state:
        if not isinstance(name, str):
            raise InputError(f"{what}: its key {checked.shown(name)} is not text")
    fields = _FIELDS.get(checked.take(state, "format", checked.TEXT, what=what, default=""), {})
    epoch = checked.or_none(_COUNT)
    if "format" not in state and not epoch.holds(found := state.get("epoch")):
        print(f"{what}: its epoch is {checked.shown(found)}, which is not noted", flush=True)
        del state["epoch"]
    for name, kind in ({"epoch": epoch} | fields).items():
        if name in state or name == "metadata":  # of a run a reader asks for what it needs
            checked.take(state, name, kind, what=what)
    return state


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
    kind = checked.or_none(NETWORK[name])
    return checked.take(settings(checkpoint), name, kind, what=what, default=None)


def encoder_weights(checkpoint: dict, classifier: str, *, what: str) -> dict[str, Tensor]:
    """Weights of the encoders under the names of `QueryTargetEncoders`, from any known layout.

    classifier: name of the last linear layer: published checkpoints keep the projector there. A
    plain state dict gives "query_encoder.backbone." alone. InputError, begun by `what`, for weights
    that are no dense tensors of numbers.
    """
    state = checkpoint
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state.get(key), dict) else state
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    torch_file.check_weights(state, what=what)
    if ours := _below("encoders.", state):
        return ours
    state = {_without_module(name): value for name, value in state.items()}
    layer = classifier + "."
    if not any(name.partition(".")[0] in _PUBLISHED for name in state):
        return {f"{_QUERY}{n}": v for n, v in state.items() if not n.startswith(layer)}
    weights = {}
    for name, value in state.items():
        encoder, _, rest = name.partition(".")
        if encoder == "predict_q":
            weights[f"predictor.{rest}"] = value
        elif encoder in _PUBLISHED and rest.startswith(layer):
            weights[f"{_PUBLISHED[encoder]}.projector.{rest.removeprefix(layer)}"] = value
        elif encoder in _PUBLISHED:
            weights[f"{_PUBLISHED[encoder]}.backbone.{rest}"] = value
    return weights


def _below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights whose names begin with a prefix, without it."""
    return {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}


def _without_module(name: str) -> str:
    """A parameter's name without what (Distributed)DataParallel and torch.compile add to it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


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
        "of another type": [name for name, one, value in both if _type(one) != _type(value)],
    }
    if texts := [
        f"{len(names)} weights {kind}, first {torch_file.one_line(names[0])}"
        for kind, names in problems.items()
        if names
    ]:
        raise InputError(f"{what}: does not fit: {'; '.join(texts)}")
    # Not before: a view in a file can repeat few bytes to more numbers than can be looked at.
    broken = [name for name, _, value in both if finite and not torch_file.is_finite(value)]
    if broken:
        raise InputError(f"{what}: {len(broken)} weights are not finite, first {broken[0]}")
    weights._metadata = own._metadata  # the versions of the names that they have by now
    module.load_state_dict(weights)


def _name_now(name: str, own: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    """A weight's name in this torchvision, where the network has it under that one alone."""
    for older, now in _OLDER:
        if (match := older.fullmatch(name)) and (new := match.expand(now)) in own:
            return name if new in weights else new
    return name


def _type(value: Tensor) -> tuple[bool, bool]:
    """What a weight must be to stand for another: of one floating type for any other."""
    return value.is_floating_point(), value.dtype == torch.bool


def load_backbone(
    backbone: Backbone, checkpoint: dict, *, encoder: str = "query", what: str
) -> None:
    """Load one encoder's backbone (encoder: "query" or "target") strictly; see `load_strictly`."""
    weights = encoder_weights(checkpoint, backbone.classifier, what=what)
    chosen = _below(f"{encoder}_encoder.backbone.", weights)
    if not chosen:
        raise InputError(f"{what}: no {encoder} encoder in it")
    load_strictly(backbone.module, chosen, what=what)


def load_projector(
    checkpoint: dict, backbone: Backbone, *, encoder: str = "query", what: str
) -> nn.Module:
    """One encoder's projector, (B, F) -> (B, D), of the sizes that its weights have.

    InputError that begins with `what` where the checkpoint has none, or one of another build.
    """
    weights = encoder_weights(checkpoint, backbone.classifier, what=what)
    chosen = _below(f"{encoder}_encoder.projector.", weights)
    sizes = [len(v) for n, v in chosen.items() if n.endswith(".weight") and v.ndim == 2]
    if not sizes:
        raise InputError(f"{what}: no projector of the {encoder} encoder in it")
    last = f"{3 * len(sizes) - 2}.running_mean"  # three modules a layer, and the last without two
    projector = mlp([backbone.feature_dim, *sizes], output_norm=last in chosen)
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
    if not all(name.startswith(_QUERY) for name in weights):
        load_strictly(encoders, weights, what=what)
        return "query encoder, predictor and target encoder"
    for encoder in (encoders.query_encoder, encoders.target_encoder):
        load_strictly(encoder.backbone, _below(_QUERY, weights), what=what)
    return "backbone only; projector and predictor start at random"


def load_optimizer(
    optimizer: torch.optim.Optimizer, state: dict, *, what: str, finite: bool = True
) -> None:
    """Load what an SGD has kept of the parameters, whose groups and shapes are those of this one.

    InputError that begins with `what` otherwise. finite: also for what is infinite or not a number.
    Its settings stay as they are here, the kernels by which it computes among them, and so does how
    momentum lies in memory: a fused kernel takes none that lies otherwise than its parameter.
    """
    what = f"{what}: optimizer"
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    own = optimizer.state_dict()["param_groups"]
    groups = checked.take(state, "param_groups", checked.list_of(checked.TABLE), what=what)
    numbers = checked.list_of(_COUNT)
    found = [list(checked.take(group, "params", numbers, what=what)) for group in groups]
    if found != [group["params"] for group in own]:
        raise InputError(f"{what}: param_groups has other parameters than this run")
    for number in checked.take(state, "state", checked.TABLE, what=what):
        if not checked.whole(0, len(parameters) - 1).holds(number):
            raise InputError(f"{what}: state has no parameter {checked.shown(number)}")
        shape = parameters[number].shape
        slot = torch_file.tensor(
            f"{tuple(shape)}{', finite,' * finite}",
            lambda v, shape=shape: v.shape == shape and (not finite or torch_file.is_finite(v)),
            dims=len(shape),
        )
        kind = checked.table_of(checked.or_none(slot))
        checked.take(state["state"], number, kind, what=f"{what}: state")
    optimizer.load_state_dict({"state": state["state"], "param_groups": own})
    for parameter, slots in optimizer.state.items():
        for name, value in slots.items():
            if value is not None and value.stride() != parameter.stride():
                slots[name] = torch.empty_like(parameter).copy_(value)
