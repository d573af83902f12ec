"""Checkpoints: atomic save, safe and strict load, encoder weights out of any known layout.

A checkpoint of ours is a dict of tensors and Python builtins: `state_dict` of the method's module,
`optimizer`, `epoch`, `args` (the run's settings), `rng_state`, `format`. The encoders' names inside
are those of `encoders.QueryTargetEncoders` behind "encoders.". Also read: checkpoints of the
published CMSF and MSF code, and plain torchvision state dicts. Nothing in a file is ever executed.
"""

import argparse
import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.encoders import Backbone, QueryTargetEncoders
from utils.errors import InputError

FORMAT = "cmsf-1"

# Published names (after "module." of DataParallel is taken out) -> ours.
_PUBLISHED = {"encoder_q.": "query_encoder.", "encoder_t.": "target_encoder."}


def save(path: Path, state: dict) -> None:
    """Write a checkpoint so that `path` is at any moment the old file or the whole new one.

    The bytes go to a temporary file in the same folder, reach the disk, and take the name in one
    step. Whatever fails, the temporary file is gone and the error goes on.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: str | Path, *, flag: str) -> dict:
    """Read a checkpoint on the CPU without running any code that may be in it.

    flag: the user's flag that named the file, for the message. Raises InputError for a missing file
    and for one that holds no dict of tensors and builtins (argparse.Namespace of published
    checkpoints is the one other class that is let in).
    """
    if not Path(path).is_file():
        raise InputError(f"{flag} {path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise about anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise InputError(f"{flag} {path}: not a readable checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{flag} {path}: not a checkpoint (holds a {type(checkpoint).__name__})")
    return checkpoint


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings(checkpoint: dict) -> dict:
    """Flags the run was started with, {} for a plain state dict."""
    args = checkpoint.get("args", checkpoint.get("opt", {}))
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return dict(args) if isinstance(args, dict) else {}


def encoder_weights(checkpoint: dict, classifier: str) -> dict[str, Tensor]:
    """Weights of the encoders under the names of `QueryTargetEncoders`, from any known layout.

    classifier: name of the architecture's last linear layer, `Backbone.classifier`: published
    checkpoints keep the projector there. A plain state dict gives "query_encoder.backbone." alone.
    """
    state = checkpoint
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
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
    """Take the "module." that (Distributed)DataParallel adds out of a parameter's name."""
    return ".".join(part for part in name.split(".") if part != "module")


def _part(name: str, classifier: str) -> str:
    """Published encoders hold the projector in the classifier's place."""
    if name.startswith(classifier + "."):
        return "projector." + name.removeprefix(classifier + ".")
    return "backbone." + name


def load_strictly(module: nn.Module, weights: dict[str, Tensor], *, what: str) -> None:
    """Load weights that fit the module exactly; InputError that begins with `what` otherwise.

    As in PyTorch's own strict load, only the batch norms' batch counters, which files from before
    2018 lack, may be missing.
    """
    own = module.state_dict()
    missing = [n for n in own if n not in weights and not n.endswith("num_batches_tracked")]
    unknown = [n for n in weights if n not in own]
    reshaped = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    problems = [
        f"{len(names)} weights {kind}, first {names[0]}"
        for kind, names in (
            ("missing", missing),
            ("unknown", unknown),
            ("of another shape", reshaped),
        )
        if names
    ]
    if problems:
        raise InputError(f"{what}: does not fit: {'; '.join(problems)}")
    module.load_state_dict(weights)


def load_backbone(
    backbone: Backbone, checkpoint: dict, *, encoder: str = "query", what: str
) -> None:
    """Load one encoder's backbone (encoder: "query" or "target") strictly; see `load_strictly`."""
    prefix = f"{encoder}_encoder.backbone."
    weights = encoder_weights(checkpoint, backbone.classifier)
    chosen = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
    load_strictly(backbone.module, chosen, what=what)


def load_initial_weights(
    encoders: QueryTargetEncoders, classifier: str, checkpoint: dict, *, what: str
) -> str:
    """Start encoders from a checkpoint, strictly; returns in words what was loaded.

    A CMSF or MSF checkpoint fills all of them (query, predictor, target). A plain state dict fills
    both backbones and leaves projector and predictor as they are.
    """
    weights = encoder_weights(checkpoint, classifier)
    prefix = "query_encoder.backbone."
    if all(name.startswith(prefix) for name in weights):
        plain = {name.removeprefix(prefix): value for name, value in weights.items()}
        load_strictly(encoders.query_encoder.backbone, plain, what=what)
        load_strictly(encoders.target_encoder.backbone, plain, what=what)
        return "backbone only; projector and predictor start at random"
    load_strictly(encoders, weights, what=what)
    return "query encoder, predictor and target encoder"
