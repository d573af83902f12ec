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
import contextlib
import fcntl
import hashlib
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from utils import checked, checkpoint_fields, safetensors_file, torch_file
from utils.checkpoint_fields import EXPORTED, FORMAT  # noqa: F401 (a name of this module too)
from utils.encoders import Backbone, QueryTargetEncoders, mlp
from utils.errors import DamagedError, InputError, RunError

_SEAL = b"cmsf sha256 "
_SEAL_SIZE = len(_SEAL) + 2 * hashlib.sha256().digest_size
_TEMPORARY = ".tmp"

# torchvision's networks in its own older names -> today's (densenet.py, vision_transformer.py).
_OLDER = (
    (re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)"), r"\1\2"),
    (re.compile(r"(.*\.mlp)\.linear_1\.(weight|bias)"), r"\1.0.\2"),
    (re.compile(r"(.*\.mlp)\.linear_2\.(weight|bias)"), r"\1.3.\2"),
)
# Published names (after "module." of DataParallel is taken out) -> ours.
_PUBLISHED = {"encoder_q.": "query_encoder.", "encoder_t.": "target_encoder."}


class _Sealing:
    """A file for torch.save to write to that hashes what passes and ends in the seal."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._held = b""  # the last two bytes: at the end the archive's length of comment, 0

    def write(self, data: bytes | memoryview) -> int:
        """Write all but the last two bytes so far."""
        view = memoryview(data).cast("B")
        if len(view) < 2:
            view = memoryview(self._held + bytes(view))
        else:
            self._pass_on(self._held)
        self._pass_on(view[:-2])
        self._held = bytes(view[-2:])
        return len(data)

    def seal(self) -> None:
        """End the archive with the comment that seals it."""
        assert self._held == b"\0\0", "torch.save wrote no zip archive"
        self._pass_on(_SEAL_SIZE.to_bytes(2, "little"))
        self._file.write(_SEAL + self._digest.hexdigest().encode())

    def flush(self) -> None:
        """Nothing is kept back here that could be flushed."""

    def _pass_on(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)


def save(path: Path, state: dict, *, flag: str = "") -> None:
    """Write a sealed checkpoint; RunError if that fails. See `atomic_file`."""
    with atomic_file(path, flag=flag) as file:
        sealing = _Sealing(file)
        torch.save(state, sealing)
        sealing.seal()


@contextlib.contextmanager
def atomic_file(path: Path, *, flag: str = "") -> Iterator[BinaryIO]:
    """A file to write to so that `path` is at any moment the old file or the whole new one.

    The bytes go to a temporary file in the same folder, reach the disk, and take the name in one
    step, which reaches the disk too. Whatever fails, the temporary file is gone and RunError is
    raised, which names the file and, if given, the user's flag. A process killed meanwhile leaves
    its temporary file behind: the next that writes the same file removes it, here. A link stays
    one: what it leads to is written. A pipe, a device or a folder is not replaced: RunError.
    """
    what = f"{flag} {path}".strip()
    path = Path(os.path.realpath(path))
    if os.path.exists(path) and not path.is_file():
        raise RunError(f"{what} could not be written: not a regular file")
    name = re.escape(path.name)
    _remove_abandoned(path.parent, re.compile(rf"\.{name}\.\d+{re.escape(_TEMPORARY)}"))
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with _open_held(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # before the lock is given back
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{what} could not be written: {_reason(error)}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str, *, flag: str = "") -> None:
    """Write a text file as `save` writes a checkpoint: whole, or not at all with RunError.

    What UTF-8 cannot hold, as in a name that is no text, is escaped.
    """
    with atomic_file(path, flag=flag) as file:
        file.write(text.encode(errors="backslashreplace"))


def remove_temporaries(folder: Path) -> None:
    """Remove what processes that were killed while they wrote to this folder have left."""
    _remove_abandoned(folder, re.compile(rf"\..*{re.escape(_TEMPORARY)}", re.DOTALL))


def _open_held(path: Path) -> BinaryIO:
    """An empty file that this process holds by a record lock until it closes it, or ends.

    Whoever had it before may have renamed or removed it before it was held: then once more.
    """
    while True:
        file = open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb")  # noqa: SIM115
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate()
                return file
        file.close()


def _remove_abandoned(folder: Path, names: re.Pattern[str]) -> None:
    """Remove the files of these names that no process holds; none where there are no locks."""
    with contextlib.suppress(OSError):  # no such folder: whoever writes to it will say so
        for entry in os.scandir(folder):
            if not names.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError), open(entry.path, "r+b") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry.path)


def _flush_folder(path: Path) -> None:
    """Have the names in a folder reach the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(folder)
    finally:
        os.close(folder)


def _reason(error: BaseException) -> str:
    """The system's words for what went wrong, also where torch.save has wrapped its error."""
    while error:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        text, error = str(error), error.__cause__ or error.__context__
    return (text.splitlines() or ["unknown"])[0]


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
        sealed = is_safetensors or _is_intact(path)
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


def _is_intact(path: str | Path) -> bool:
    """Whether a file is sealed; ValueError if it is and the seal, or else a checksum, is wrong."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _SEAL_SIZE))
        seal = file.read()
        if seal.startswith(_SEAL):
            if seal != _SEAL + _sha256_of_first(size - _SEAL_SIZE, file):
                raise ValueError("damaged: its bytes are not those that were sealed")
            return True
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"damaged: wrong checksum of {broken}")
    return False


def _sha256_of_first(count: int, file: BinaryIO) -> bytes:
    """Hexadecimal SHA-256 of the first `count` bytes of a file."""
    digest = hashlib.sha256()
    file.seek(0)
    while count > 0 and (block := file.read(min(count, 2**20))):
        digest.update(block)
        count -= len(block)
    return digest.hexdigest().encode()


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
