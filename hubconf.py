"""Backbones for torch.hub: from one line of code to features.

    model = torch.hub.load(<REPOSITORY>, "cmsf_resnet50", weights=<PATH OR URL>)
    features = model(images)  # (B, 3, S, S), normalized by ImageNet's mean and spread -> (B, 2048)

With source="local" the repository is a folder. weights: any checkpoint that the evaluations read,
what eval/export_backbone.py wrote among them; None for an untrained network. It is read without
running code that may be in it, and must fit the network exactly; ValueError says what is wrong.

The repository's own package is called `utils`, as others are. It is imported aside: a `utils` that
is there before is not taken for it, and `import utils` finds after it what it would have found.
"""

# Modules only: torch.hub offers every function and class that it finds here as an entry point.
import contextlib
import hashlib
import importlib
import os
import pathlib
import sys
import types
import urllib.parse
from collections import abc

import torch
from torch import nn

dependencies = ["torch", "torchvision"]

_ROOT = str(pathlib.Path(__file__).resolve().parent)
_PACKAGE = "utils"
_SCHEMES = ("http", "https", "file")


def cmsf_resnet50(weights: str | os.PathLike | None = None, **options) -> nn.Module:
    """ResNet-50 in eval mode: (B, 3, S, S) -> (B, 2048); options: as of `cmsf`."""
    return cmsf("resnet50", weights=weights, **options)


def cmsf_resnet18(weights: str | os.PathLike | None = None, **options) -> nn.Module:
    """ResNet-18 in eval mode: (B, 3, S, S) -> (B, 512); options: as of `cmsf`."""
    return cmsf("resnet18", weights=weights, **options)


def cmsf(
    arch: str | None = None,
    *,
    weights: str | os.PathLike | None = None,
    encoder: str = "query",
    small_stem: bool | None = None,
    sha256: str | None = None,
    progress: bool = True,
) -> nn.Module:
    """A backbone in eval mode: images (B, 3, S, S) -> features (B, F), not normalized.

    arch: a torchvision classification model; None: as the checkpoint says, or resnet50. weights: a
    path, or an http(s) or file URL, which is downloaded once to torch.hub's folder of checkpoints;
    None: random. encoder: "query" or "target". small_stem: a ResNet's 3x3 first convolution; None:
    as the checkpoint says. sha256: what the file's must begin with. progress: of the download.

    Raises ValueError for weights that are not there, cannot be read or do not fit.
    """
    if encoder not in ("query", "target"):
        raise ValueError(f"encoder {encoder}: neither query nor target")
    checkpoint, encoders, files, errors = _own(
        "method.checkpoint", "method.encoders", "runtime.files", "runtime.errors"
    )
    try:
        state = {}
        if weights is not None:
            with _usable(
                os.path.expanduser(weights), errors.DamagedError, progress=progress
            ) as path:
                if sha256 and not files.sha256(path).startswith(sha256.lower()):
                    raise errors.DamagedError(f"weights {weights}: its SHA-256 is not {sha256}")
                state = checkpoint.load(path, flag="weights")
        what = f"weights {weights}"
        arch = arch or checkpoint.said(state, "arch", what=what) or "resnet50"
        if small_stem is None:
            small_stem = bool(checkpoint.said(state, "small_stem", what=what))
        backbone = encoders.build_backbone(arch, small_stem=small_stem)
        if weights is not None:
            what = f"weights {weights} (arch {arch})"
            checkpoint.load_backbone(backbone, state, encoder=encoder, what=what)
    except errors.InputError as error:
        raise ValueError(str(error)) from error
    return backbone.module.eval()


@contextlib.contextmanager
def _usable(weights: str, damaged: type, *, progress: bool) -> abc.Iterator[str]:
    """The file of a path or URL; a URL's is downloaded unless it was before.

    Where the body finds it `damaged`, the download is not kept, so that the next call tries anew.
    """
    parts = urllib.parse.urlsplit(weights)
    if parts.scheme not in _SCHEMES:
        yield weights
        return
    folder = pathlib.Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    # Not by the name alone, as two addresses may end in the same one.
    place = hashlib.sha256(weights.encode()).hexdigest()[:16]
    path = folder / f"{place}-{pathlib.Path(urllib.parse.unquote(parts.path)).name}"
    if not path.exists():
        try:
            torch.hub.download_url_to_file(weights, str(path), progress=progress)
        except (OSError, ValueError) as error:
            raise ValueError(f"weights {weights}: could not be downloaded ({error})") from error
    try:
        yield str(path)
    except damaged:
        path.unlink(missing_ok=True)
        raise


def _own(*names: str) -> list[types.ModuleType]:
    """Modules of this repository's package."""
    with _only_own_package():
        return [importlib.import_module(f"{_PACKAGE}.{name}") for name in names]


@contextlib.contextmanager
def _only_own_package() -> abc.Iterator[None]:
    """Within the body `utils` is this repository's; afterwards it is what it was before."""
    global _modules
    before = _taken_out()
    sys.modules.update(_modules)
    sys.path.insert(0, _ROOT)
    try:
        yield
    finally:
        sys.path.remove(_ROOT)
        _modules = _taken_out()
        sys.modules.update(before)


# This repository's package, so that a second call imports nothing anew.
_modules: dict[str, types.ModuleType] = {}


def _taken_out() -> dict[str, types.ModuleType]:
    """Take the package and what is in it out of the loaded modules."""
    names = [name for name in sys.modules if name.split(".")[0] == _PACKAGE]
    return {name: sys.modules.pop(name) for name in names}
