"""Checkpoints: safe, strict load; encoders out of files of any layout.

A checkpoint of ours is a dict of tensors and builtins: `RUN`, with the encoders' names in
`state_dict` those of `encoders.QueryTargetEncoders` behind "encoders.". Also read: all of a
checkpoint of the published CMSF and MSF code, and the backbone in any other (`layouts`). Nothing in
a file is ever executed, and what stands in it is of the types and ranges said here, or refused.
"""

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.method import layouts, which_encoder
from utils.method.encoders import Backbone, QueryTargetEncoders, mlp
from utils.method.which_encoder import Found
from utils.runtime import checked, safetensors_file, torch_file
from utils.runtime.checked import Kind
from utils.runtime.errors import DamagedError, InputError, printable

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


# Published encoders -> what begins the names of their backbones' weights, and their projectors'.
_PUBLISHED = {
    "encoder_q": ("query_encoder.backbone.", "query_encoder.projector."),
    "encoder_t": ("target_encoder.backbone.", "target_encoder.projector."),
    "predict_q": ("predictor.", "predictor."),
}


def _is_metadata(value: Any) -> bool:
    return _PLAIN.holds(value) and checked.TEXT.holds(value.get("encoder", ""))


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
        "metadata": Kind("a table of plain values (encoder: text)", _is_metadata),
    },
}
RUN = tuple(name for name in _FIELDS[FORMAT] if name != "parts")  # what a run needs to go on


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

    What files of others say of epoch and network in another way is not noted, and that is said.
    """
    epoch = checked.or_none(_COUNT)
    if not _is_own(state):
        about = {name: settings(state).get(name) for name in NETWORK}
        kinds = {name: checked.or_none(kind) for name, kind in NETWORK.items()} | {"epoch": epoch}
        for name, value in (about | {"epoch": state.get("epoch")}).items():
            if not kinds[name].holds(value):
                found = checked.shown(value)
                print(printable(f"{what}: its {name} is {found}, which is not noted"), flush=True)
        return {k: v for k, v in state.items() if k != "epoch" or epoch.holds(v)}
    for name in state:
        if not isinstance(name, str):
            raise InputError(f"{what}: its key {checked.shown(name)} is not text")
    for name, kind in ({"epoch": epoch} | _FIELDS[state["format"]]).items():
        if name in state or name == "metadata":  # of a run a reader asks for what it needs
            checked.take(state, name, kind, what=what)
    return state


def _is_own(checkpoint: dict) -> bool:
    """Whether it says that it is of this repository, or of a kind that has the same key."""
    format = checkpoint.get("format")
    return isinstance(format, str) and format in _FIELDS


def exported(weights: dict[str, Tensor], about: dict[str, Any], *, format: str = EXPORTED) -> dict:
    """The dict that a .pth with a backbone by itself holds: torchvision's names, and metadata."""
    parts = {"epoch": about["epoch"]} if "epoch" in about else {}
    return {"format": format, **parts, "state_dict": weights, "metadata": about}


def metadata(checkpoint: dict) -> dict[str, Any]:
    """What an exported backbone says of itself, {} for any other checkpoint."""
    return checkpoint["metadata"] if checkpoint.get("format") == EXPORTED else {}


def settings(checkpoint: dict) -> dict:
    """Flags the run was started with, {} for a plain state dict.

    Of an exported backbone its metadata, which have the flags that matter for its use; of others'
    checkpoints without flags the arch that they may name.
    """
    arch = {"arch": checkpoint["arch"]} if isinstance(checkpoint.get("arch"), str) else {}
    args = checkpoint.get("args", checkpoint.get("opt", metadata(checkpoint) or arch))
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return {**arch, **args} if isinstance(args, dict) else arch


def said(checkpoint: dict, name: str, *, what: str) -> Any:
    """The "arch", "image_size" or "small_stem" that a checkpoint names, None where it does not.

    InputError that begins with `what` for a value that is none, in a file of this repository.
    """
    kind = checked.or_none(NETWORK[name])
    if not (_is_own(checkpoint) or kind.holds(settings(checkpoint).get(name))):
        return None
    return checked.take(settings(checkpoint), name, kind, what=what, default=None)


def load_strictly(
    module: nn.Module, weights: dict[str, Tensor], *, what: str, finite: bool = True
) -> None:
    """Load weights that fit the module exactly; InputError that begins with `what` otherwise.

    As in PyTorch's own strict load, only the batch norms' batch counters, which files from before
    2018 lack, may be missing; names of older torchvision releases count as today's. finite: also
    refuse weights that are infinite or not a number, or would be in the module's own type.
    """
    torch_file.check_weights(weights, what=what)
    own = module.state_dict()
    now = layouts.spellings(own)
    weights = OrderedDict(
        (name if now.get(name, name) in weights else now[name], value)
        for name, value in weights.items()
    )
    if text := layouts.faults(own, weights):
        raise InputError(f"{what}: does not fit: {text}")
    # Not before: a view in a file can repeat few bytes to more numbers than can be looked at.
    weights = OrderedDict(layouts.with_counters(own, weights))
    broken = [
        name
        for name, value in weights.items()
        if finite and not torch_file.is_finite(value.to(own[name].dtype))
    ]
    if broken:
        raise InputError(f"{what}: {len(broken)} weights are not finite, first {broken[0]}")
    weights._metadata = own._metadata  # the versions of the names that they have by now
    module.load_state_dict(weights)


def find_backbone(
    backbone: Backbone,
    checkpoint: dict,
    *,
    encoder: str = "query",
    prefix: str | None = None,
    what: str,
) -> Found:
    """One encoder's backbone in a checkpoint of any layout; see `layouts` and `which_encoder`.

    encoder: "query", trained by gradient, or "target", a moving average of such. prefix: the one
    under these names instead. InputError that begins with `what` where none fits, or several do.
    """
    if prefix is not None and encoder == "target":
        asked = f"--prefix {torch_file.one_line(prefix) or repr(prefix)}"
        raise InputError(f"{what}: {asked}: not together with the target encoder (--use_target)")
    found, near = layouts.find(checkpoint, backbone, what=what)
    said = metadata(checkpoint).get("encoder")
    if said and prefix is None:  # of an exported backbone, whose names tell nothing
        if encoder == "target" != said:
            raise InputError(f"{what}: no target encoder in it, but {torch_file.one_line(said)}")
        return which_encoder.choose(found, averaged=False, what=what)._replace(role=said)
    which = {"averaged": encoder == "target", "prefix": prefix}
    return which_encoder.choose(found, **which, near=near, what=what)


def load_backbone(backbone: Backbone, checkpoint: dict, *, what: str, **which: str | None) -> Found:
    """Load one encoder's backbone strictly, and say which; which: as of `find_backbone`."""
    found = find_backbone(backbone, checkpoint, what=what, **which)
    load_strictly(backbone.module, found.weights, what=what)
    return found


def load_projector(
    checkpoint: dict, backbone: Backbone, *, what: str, **which: str | None
) -> nn.Module:
    """One encoder's projector, (B, F) -> (B, D), of the sizes that its weights have.

    which: as of `find_backbone`. InputError that begins with `what` where the checkpoint has none,
    or one of another build.
    """
    found = find_backbone(backbone, checkpoint, what=what, **which)
    *encoder, last = found.prefix.split(".")
    # In our files it stands beside the backbone; in published ones as its last linear layer.
    parts = [*encoder, "projector"] if last == "backbone" else [found.prefix, backbone.classifier]
    place = "".join(f"{part}." for part in parts if part)
    chosen = _below(place, layouts.unwrapped(checkpoint, what=what))
    torch_file.check_weights(chosen, what=what)
    sizes = [len(v) for n, v in chosen.items() if n.endswith(".weight") and v.ndim == 2]
    if not sizes:
        raise InputError(f"{what}: no projector beside {found}")
    last = f"{3 * len(sizes) - 2}.running_mean"  # three modules a layer, and the last without two
    projector = mlp([backbone.feature_dim, *sizes], output_norm=last in chosen)
    load_strictly(projector, chosen, what=what)
    return projector


def load_initial_weights(
    encoders: QueryTargetEncoders,
    backbone: Backbone,
    checkpoint: dict,
    *,
    prefix: str | None = None,
    what: str,
) -> str:
    """Start encoders from a checkpoint, strictly; returns in words what was loaded.

    A CMSF or MSF checkpoint fills all of them (query, predictor, target). Of any other, or of a
    prefix, one backbone fills both, and projector and predictor stay as they are.
    """
    if prefix is None and (weights := _all_encoders(checkpoint, backbone.classifier, what=what)):
        load_strictly(encoders, weights, what=what)
        return "query encoder, predictor and target encoder"
    found = find_backbone(backbone, checkpoint, prefix=prefix, what=what)
    for encoder in (encoders.query_encoder, encoders.target_encoder):
        load_strictly(encoder.backbone, found.weights, what=what)
    return f"backbone only ({found.words}); projector and predictor start at random"


def _all_encoders(checkpoint: dict, classifier: str, *, what: str) -> dict[str, Tensor]:
    """The weights of `QueryTargetEncoders` in a CMSF or MSF checkpoint, {} in others."""
    stored = layouts.unwrapped(checkpoint, what=what)
    for table in ("state_dict.", "model.", ""):
        state = _below(table, stored)
        ours = _below("encoders.", state)
        if any(name.startswith("predictor.") for name in ours):
            return ours
        weights = {}
        for old, new in _PUBLISHED.items():
            for name, value in _below(f"{old}.", state).items():
                is_projector = name.startswith(f"{classifier}.")
                name = name.removeprefix(f"{classifier}.") if is_projector else name
                weights[new[is_projector] + name] = value
        if all(_below(new[0], weights) for new in _PUBLISHED.values()):
            return weights
    return {}


def _below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights whose names begin with a prefix, without it."""
    return {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}


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
