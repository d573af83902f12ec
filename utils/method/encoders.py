"""Backbones by name, MLP heads, and the pair of encoders of the method.

A backbone maps images (B, 3, S, S) to features (B, F). An encoder is a backbone and its projector
and maps images to embeddings (B, D); the query side has a predictor behind it, the target encoder
is the moving average of the query encoder.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from utils.runtime import distributed
from utils.runtime.errors import InputError

TIMM = "timm/"  # in front of the names of timm's networks
# torchvision classifiers whose training output is not one tensor.
_WITH_AUXILIARY_OUTPUT = ("googlenet", "inception_v3")
# Of torch.compile for CUDA graphs: each size of crops has a graph of its own.
_AS_GRAPHS = {"mode": "reduce-overhead", "dynamic": False}


class Backbone(NamedTuple):
    """A network that ends in features: (B, 3, S, S) -> (B, feature_dim).

    classifier: the name that the removed last linear layer has in the architecture's own state dict
    ("fc", "classifier.6"), which tells its weights in a checkpoint.
    """

    module: nn.Module
    feature_dim: int
    classifier: str


class Conv4(nn.Module):
    """Four 3x3 convolutions of 16-32-64-128 channels for small images: 128 features.

    Batch norm and ReLU after each, 2x2 max pooling between them, global average at the end.
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 64), (64, 128)):
            convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers[:-1])
        self.fc = nn.Linear(128, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, num_classes), S at least 8."""
        return self.fc(self.features(images).mean(dim=(2, 3)))


def build_backbone(arch: str, *, small_stem: bool = False, image_size: int = 224) -> Backbone:
    """Build a backbone with random weights; its last linear layer becomes the identity.

    arch: "conv4", a torchvision classification model, or "timm/" and the name of one of timm's.
    small_stem: of a ResNet for images of about 32 px: a 3x3 first convolution of stride 1, no
    pooling behind it. image_size: of networks that are built for one size, as vision transformers
    are by their position embeddings; others do not ask. InputError for an unknown arch, one that
    ends in no linear layer, a size it cannot be built for, or a small stem on what is no ResNet.
    """
    if arch.startswith(TIMM):
        backbone = _from_timm(arch, image_size)
    else:
        backbone = _without_classifier(
            Conv4() if arch == "conv4" else _from_torchvision(arch, image_size), arch
        )
    if small_stem:
        _shrink_stem(backbone.module, arch)
    return backbone


def _from_torchvision(arch: str, image_size: int) -> nn.Module:
    """torchvision's network with its classifier."""
    from torchvision import models  # takes as long as to import torch itself

    if arch in _WITH_AUXILIARY_OUTPUT or arch not in models.list_models(module=models):
        known = f"a torchvision classification model, conv4, or {TIMM} and a name of timm's"
        raise InputError(f"--arch {arch}: unknown; {known}")
    size = {}
    if arch.startswith("vit_"):
        size = {"image_size": image_size}
    elif arch.startswith("maxvit_"):
        size = {"input_size": (image_size, image_size)}
    with _takes(image_size, arch) if size else contextlib.nullcontext():
        return models.get_model(arch, weights=None, **size)


def _without_classifier(module: nn.Module, arch: str) -> Backbone:
    """The backbone of a network whose classifier is its last linear layer."""
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise InputError(f"--arch {arch}: ends in no linear layer that a projector could replace")
    classifier = linear[-1]
    feature_dim = module.get_submodule(classifier).in_features
    module.set_submodule(classifier, nn.Identity())
    return Backbone(module, feature_dim, classifier)


def _from_timm(arch: str, image_size: int) -> Backbone:
    """timm's network without its classifier, which timm itself leaves out."""
    try:
        import timm
    except ImportError as error:
        raise InputError(f"--arch {arch}: needs the package timm (pip install it)") from error
    name = arch.removeprefix(TIMM)
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # a known model, but none of its weights' names
        raise InputError(f"--arch {arch}: {error}") from error
    if not timm.is_model(name):  # names of the hub and paths too
        raise InputError(f"--arch {arch}: unknown to timm {timm.__version__}")
    if config is not None and config.classifier is None:
        raise InputError(f"--arch {arch}: no classifier, so it ends in no features (B, F)")
    size = {"img_size": image_size} if config is not None and config.fixed_input_size else {}
    with _takes(image_size, arch) if size else contextlib.nullcontext():
        module = timm.create_model(name, pretrained=False, num_classes=0, **size)
        patch = getattr(getattr(module, "patch_embed", None), "patch_size", ()) if size else ()
        if any(image_size % side for side in patch):  # timm would leave the rest out
            what = f"--image_size {image_size}: --arch {arch}"
            raise InputError(
                f"{what} cannot take it (no multiple of its patch size, {patch[0]} px)"
            )
    classifier = module.pretrained_cfg["classifier"]
    classifier = classifier if isinstance(classifier, str) else classifier[0]  # of distilled ones
    return Backbone(module, module.head_hidden_size, classifier)


def _shrink_stem(module: nn.Module, arch: str) -> None:
    """Give a ResNet a first convolution for small images; InputError for another network."""
    first = getattr(module, "conv1", None)
    if not isinstance(first, nn.Conv2d) or not hasattr(module, "maxpool"):
        raise InputError(f"--small_stem: only for ResNets, not for --arch {arch}")
    module.conv1 = nn.Conv2d(3, first.out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
    module.maxpool = nn.Identity()


@contextlib.contextmanager
def _takes(image_size: int, arch: str, *, flag: str = "--image_size") -> Iterator[None]:
    """What goes wrong inside is the size's fault: InputError that names it."""
    try:
        yield
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{flag} {image_size}: --arch {arch} cannot take it ({reason})") from error


def check_image_size(
    backbone: Backbone, arch: str, image_size: int, *, flag: str = "--image_size"
) -> None:
    """Pass one black image through the backbone; InputError, naming the flag, if it cannot."""
    was_training = backbone.module.training
    with torch.no_grad(), _takes(image_size, arch, flag=flag):
        try:
            features = backbone.module.eval()(torch.zeros(1, 3, image_size, image_size))
        finally:
            backbone.module.train(was_training)
    if features.shape != (1, backbone.feature_dim):
        made = f"makes {tuple(features.shape)} of an image"
        raise InputError(f"--arch {arch}: {made} at {flag} {image_size}, no features (B, F)")


def lay_channels_last(network: nn.Module) -> None:
    """Lay the weights of 2D convolutions out with the channels last; others have no such layout."""
    for weight in network.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


class _Layers(nn.Sequential):
    """nn.Sequential with a forward of ours: PyTorch 2.11 compiles no container of its own."""

    def forward(self, features: Tensor) -> Tensor:
        """Pass features (B, F) through the layers, one after the other."""
        for layer in self:
            features = layer(features)
        return features


def mlp(sizes: Sequence[int], *, output_norm: bool = False) -> nn.Sequential:
    """Linear-BN-ReLU-...-Linear through the given sizes, [input, hidden, ..., output].

    output_norm: a batch norm without affine parameters on the output, which keeps the embeddings'
    rank up (not in the published code).
    """
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes[:-2], sizes[1:-1], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(sizes[-2], sizes[-1]))
    if output_norm:
        layers.append(nn.BatchNorm1d(sizes[-1], affine=False))
    return _Layers(*layers)


class Encoder(nn.Module):
    """A backbone and its projector: (B, 3, S, S) -> (B, D)."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D), not normalized."""
        return self.projector(self.backbone(images))


class _Encoders(nn.Module):
    """What both kinds of encoders have: precision, layout, compiled networks.

    autocast: the dtype of 16 bits in which convolutions and linear layers compute (torch.autocast),
    or None. Parameters, gradients, moving average and embeddings stay float32 all the same, so the
    weights fit encoders with and without it. channels_last: images and the weights of convolutions
    lie in memory with the channels last, which changes speed, and results by rounding alone.
    """

    _cuda_graphs = False

    def __init__(self, *, autocast: torch.dtype | None, channels_last: bool) -> None:
        super().__init__()
        self.autocast, self.channels_last = autocast, channels_last

    def compile(self, *args: Any, cuda_graphs: bool = False, **kwargs: Any) -> None:
        """Compile each network in place, as nn.Module.compile does.

        The names of the weights stay. A backbone run by itself, as in evaluation, is not compiled.
        cuda_graphs: each network's pass forward or backward is launched as one CUDA graph, whose
        inputs are copied into its memory; what stays between steps must not lie there.
        """
        self._cuda_graphs = cuda_graphs
        for network in self.children():
            network.compile(*args, **((_AS_GRAPHS if cuda_graphs else {}) | kwargs))

    def _begin_step(self) -> None:
        """From here on what CUDA graphs made in the last step may be overwritten.

        Embeddings and losses live on, as they are made outside of the graphs; gradients, made by
        the graphs, must have been used by now.
        """
        if self._cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def _pass(self, images: Tensor, *networks: nn.Module) -> Tensor:
        """Pass images through the networks, one after the other; float32 comes out of autocast."""
        output, autocast = images, self.autocast
        if self.channels_last:
            output = images.to(memory_format=torch.channels_last)
        # No cache of cast weights: each is used once here, and one that outlived a step (in an
        # autocast of the caller's) would hide what the optimizer did to it.
        with torch.autocast(
            images.device.type, autocast, enabled=autocast is not None, cache_enabled=False
        ):
            for network in networks:
                output = network(output)
        # bfloat16 has 8 significant bits: too few for a unit norm and for telling neighbors apart.
        return output if autocast is None else output.float()


class SoleBackbone(_Encoders):
    """A backbone alone, for methods with neither projector nor target encoder.

    Its weights have the names that `QueryTargetEncoders` gives to those of its query backbone, so
    that whatever reads checkpoints reads these. backbone: any module (B, 3, S, S) -> (B, F).
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__(autocast=autocast, channels_last=channels_last)
        self.query_encoder = Encoder(backbone, nn.Identity())
        if channels_last:
            lay_channels_last(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> features (B, F), with gradient."""
        self._begin_step()
        return self._pass(images, self.query_encoder)


class QueryTargetEncoders(_Encoders):
    """Query encoder with predictor, and the target encoder that follows it (CMSF sec. 3).

    backbone: any module (B, 3, S, S) -> (B, feature_dim); the target encoder starts as a copy of
    it. proj_dim: D, default feature_dim / 4; hidden_dim: of projector and predictor, default 2
    feature_dim (the published sizes). proj_bn: batch norm without affine parameters on the
    projector's output. momentum: m of the moving average, 0 to 1. shuffle_target: with several
    processes, the target's batch norm sees other rows together than the query's (MoCo).
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        proj_dim: int | None = None,
        hidden_dim: int | None = None,
        proj_bn: bool = False,
        momentum: float = 0.99,
        shuffle_target: bool = False,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__(autocast=autocast, channels_last=channels_last)
        self.proj_dim = proj_dim or feature_dim // 4
        self.momentum, self.shuffle_target = momentum, shuffle_target
        hidden_dim = hidden_dim or 2 * feature_dim
        projector = mlp([feature_dim, hidden_dim, self.proj_dim], output_norm=proj_bn)
        self.query_encoder = Encoder(backbone, projector)
        self.predictor = mlp([self.proj_dim, hidden_dim, self.proj_dim])
        self.target_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        if channels_last:
            lay_channels_last(self)

    def query(self, images: Tensor, *small: Tensor) -> Tensor:
        """q = norm(h(f(images))): (B, D), unit norm, with gradient. A step begins with it.

        small: further crops of the same images, (n, B, 3, s, s) of each size s: then (V, B, D), a
        row of queries for the images and for each of the small crops. Each size is one pass, with
        batch-norm statistics of its own, as in SwAV (arXiv 2006.09882). Where each of the images is
        there twice, one after the other (symmetric loss), small crops are given once.
        """
        self._begin_step()
        views = []
        for crops in (images.unsqueeze(0), *small):
            q = self._pass(crops.flatten(0, 1), self.query_encoder, self.predictor)
            q = normalize(q, dim=1).unflatten(0, crops.shape[:2])
            views.append(q.repeat_interleave(len(images) // crops.shape[1], dim=1))
        return torch.cat(views) if small else views[0].squeeze(0)

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """t = norm(g(images)): (B, D), unit norm, no gradient.

        With `shuffle_target` the rows are dealt out anew among the processes before, and taken back
        after, all of which must then call it together.
        """
        order = None
        if self.shuffle_target:
            images, order = distributed.shuffled(images)
        t = normalize(self._pass(images, self.target_encoder), dim=1)
        return t if order is None else distributed.unshuffled(t, order)

    @torch.no_grad()
    def update_target(self) -> None:
        """Moving average of the parameters: g <- m g + (1 - m) f.

        Parameters only: g has batch-norm statistics of its own, from its own (weak) views, so an
        average of buffers too, as of torch.optim.swa_utils, would be another method.
        """
        target, query = self.target_encoder.parameters(), self.query_encoder.parameters()
        torch._foreach_lerp_(list(target), list(query), 1 - self.momentum)
