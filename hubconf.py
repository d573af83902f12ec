"""Backbones for torch.hub: from one line of code to features.

    model = torch.hub.load(<REPOSITORY>, "cmsf_resnet50", weights=<PATH OR URL>)
    features = model(images)  # (B, 3, S, S), normalized by ImageNet's mean and spread -> (B, 2048)
    model = torch.hub.load(<REPOSITORY>, "cmsf", weights=<PATH OR URL>)  # the network it says it is

With source="local" the repository is a folder. weights: any checkpoint that the evaluations read,
what eval/export_backbone.py wrote among them; None for an untrained network. It is read without
running code that may be in it, and must fit the network exactly; ValueError says what is wrong.

The repository's own package is called `utils`, as others are. It is imported aside: a `utils` that
is there before is not taken for it, and `import utils` finds after it what it would have found.
"""

# Modules only: torch.hub offers every function and class that it finds here as an entry point.
import functools
import hashlib
import importlib
import os
import pathlib
import sys
import types
import urllib.parse

import torch
from torch import nn

dependencies = ["torch", "torchvision"]


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
    prefix: str | None = None,
    small_stem: bool | None = None,
    image_size: int | None = None,
    sha256: str | None = None,
    progress: bool = True,
) -> nn.Module:
    """A backbone in eval mode: images (B, 3, S, S) -> features (B, F), not normalized.

    arch: a torchvision classification model, or "timm/" and a name of timm's, if that is installed;
    None: as the checkpoint says, or resnet50. weights: a path, or an http(s) or file URL, which is
    downloaded once to torch.hub's folder of checkpoints; None: random. encoder: of several
    backbones in it "query", the one trained by gradient, or "target", a moving average; prefix: the
    one under these names, or under a part of them. small_stem: a ResNet's 3x3 first convolution;
    None: as the checkpoint says. image_size: S of networks that are built for one size, such as
    vision transformers; None: as the checkpoint says, or 224. sha256: what the file's must begin
    with. progress: of the download.

    Raises ValueError for weights that are not there, cannot be read or do not fit, and for an arch
    that is unknown or cannot take the image size.
    """
    if encoder not in ("query", "target"):
        raise ValueError(f"encoder {encoder}: neither query nor target")
    if prefix is not None and (weights is None or encoder == "target"):
        raise ValueError(f"prefix {prefix}: not without weights, nor with the target encoder")
    own, state, what = _own(), {}, f"weights {weights}"
    try:
        if weights is not None:
            state = _read(os.path.expanduser(weights), sha256=sha256, progress=progress)
        arch = arch or own.checkpoint.said(state, "arch", what=what) or "resnet50"
        if small_stem is None:
            small_stem = bool(own.checkpoint.said(state, "small_stem", what=what))
        if image_size is None:
            image_size = own.checkpoint.said(state, "image_size", what=what) or 224
        backbone = own.encoders.build_backbone(arch, small_stem=small_stem, image_size=image_size)
        if weights is not None:
            what = f"{what} (arch {arch}, image_size {image_size})"
            which = {"encoder": encoder, "prefix": prefix}
            own.checkpoint.load_backbone(backbone, state, **which, what=what)
    except own.errors.InputError as error:
        raise ValueError(str(error)) from error
    return backbone.module.eval()


def _read(weights: str, *, sha256: str | None, progress: bool) -> dict:
    """The checkpoint of a path or URL; a URL's is downloaded unless it was before.

    A damaged download is not kept, so that the next call tries anew.
    """
    own, path = _own(), pathlib.Path(weights)
    parts = urllib.parse.urlsplit(weights)
    is_url = parts.scheme in ("http", "https", "file")
    if is_url:
        # Not by the name alone, as two addresses may end in the same one.
        place = hashlib.sha256(weights.encode()).hexdigest()[:16]
        name = pathlib.Path(urllib.parse.unquote(parts.path)).name
        path = pathlib.Path(torch.hub.get_dir(), "checkpoints", f"{place}-{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
    if is_url and not path.exists():
        try:
            torch.hub.download_url_to_file(weights, str(path), progress=progress)
        except (OSError, ValueError) as error:
            raise ValueError(f"weights {weights}: could not be downloaded ({error})") from error
    try:
        state = own.checkpoint.load(path, flag="weights")
        if sha256 and not own.files.sha256(path).startswith(sha256.lower()):
            raise own.errors.DamagedError(f"weights {weights}: its SHA-256 is not {sha256}")
    except own.errors.DamagedError:
        if is_url:
            path.unlink(missing_ok=True)
        raise
    return state


@functools.cache
def _own() -> types.SimpleNamespace:
    """Modules of this repository's `utils`; afterwards `utils` is what it was before."""
    root = str(pathlib.Path(__file__).resolve().parent)
    others = _taken_out()
    sys.path.insert(0, root)
    try:
        names = ("method.checkpoint", "method.encoders", "runtime.files", "runtime.errors")
        own = {n.partition(".")[2]: importlib.import_module(f"utils.{n}") for n in names}
    finally:
        sys.path.remove(root)
        _taken_out()
        sys.modules.update(others)
    return types.SimpleNamespace(**own)


def _taken_out() -> dict[str, types.ModuleType]:
    """Take any `utils` and what is in it out of the loaded modules."""
    names = [name for name in sys.modules if name.split(".")[0] == "utils"]
    return {name: sys.modules.pop(name) for name in names}
