"""Every method as a small model, and a device that stands in for a GPU."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from self_supervised.train_msf import MSF
from self_supervised.train_msf_2q import CMSF2Q
from self_supervised.train_msf_km import CMSFKM
from semi_supervised.pseudo_label import PseudoLabelHead
from semi_supervised.train_pseudo_cmsf import PseudoCMSF
from supervised.train_sup_msf import SupervisedCMSF
from supervised.train_sup_xent import CrossEntropy
from utils.data.batches import Batch
from utils.method import previous_embeddings
from utils.method.encoders import QueryTargetEncoders, SoleBackbone, build_backbone
from utils.training import loss_watch


class Sizes(NamedTuple):
    """images, classes: of the data. bank: K. topk: k."""

    images: int = 12
    classes: int = 3
    bank: int = 10
    topk: int = 3


class Method(NamedTuple):
    """A method that encoders and sizes make a model of.

    arguments: of its forward, besides the batch. symmetric, small: what batches it wants, see
    `tiny.random_batches`. waits: a step waits for a GPU, as the flag's help says.
    """

    build: Callable[[QueryTargetEncoders, Sizes], nn.Module]
    arguments: dict[str, Any] = {}
    symmetric: bool = False
    small: tuple[int, ...] = ()
    waits: bool = False


def _msf(encoders: QueryTargetEncoders, sizes: Sizes) -> MSF:
    return MSF(encoders, mem_bank_size=sizes.bank, topk=sizes.topk)


def _byol(encoders: QueryTargetEncoders, sizes: Sizes) -> MSF:
    return MSF(encoders, mem_bank_size=sizes.bank, topk=1)


def _clustered(encoders: QueryTargetEncoders, sizes: Sizes) -> CMSFKM:
    """One image in five has no cluster."""
    bank = {"mem_bank_size": sizes.bank, "topk": sizes.topk}
    model = CMSFKM(encoders, sizes.images, num_clusters=4, **bank)
    images = torch.arange(sizes.images)
    model.clusters = (images % 4).masked_fill(images % 5 == 4, -1)
    return model


def _two_q(encoders: QueryTargetEncoders, sizes: Sizes) -> CMSF2Q:
    bank = {"mem_bank_size": sizes.bank, "topk": sizes.topk, "topkp": sizes.topk + 1}
    return CMSF2Q(encoders, sizes.images, **bank)


def _supervised(encoders: QueryTargetEncoders, sizes: Sizes) -> SupervisedCMSF:
    return SupervisedCMSF(encoders, sizes.classes, mem_bank_size=sizes.bank, topk=sizes.topk)


def _top_all(encoders: QueryTargetEncoders, sizes: Sizes) -> SupervisedCMSF:
    return SupervisedCMSF(encoders, sizes.classes, mem_bank_size=sizes.bank, topk=None)


def _top_all_of_given_labels(encoders: QueryTargetEncoders, sizes: Sizes) -> SupervisedCMSF:
    """And the target itself."""
    model = _top_all(encoders, sizes)
    model.given = (torch.arange(sizes.images) + 1) % sizes.classes
    model.topk_plain = 1
    return model


def _given_labels(encoders: QueryTargetEncoders, sizes: Sizes) -> SupervisedCMSF:
    model = _supervised(encoders, sizes)
    model.given = (torch.arange(sizes.images) + 1) % sizes.classes
    return model


def _pseudo(**options: Any) -> Callable[[QueryTargetEncoders, Sizes], PseudoCMSF]:
    """Every second image is labeled."""

    def build(encoders: QueryTargetEncoders, sizes: Sizes) -> PseudoCMSF:
        head = PseudoLabelHead("mlp", encoders.proj_dim, sizes.classes)
        labeled = torch.arange(sizes.images) % 2 == 0
        bank = {"mem_bank_size": sizes.bank, "topk": sizes.topk}
        return PseudoCMSF(encoders, head, labeled, **bank, **options)

    return build


def _cross_entropy(encoders: QueryTargetEncoders, sizes: Sizes) -> CrossEntropy:
    """On the whole query encoder as its backbone."""
    options = {"autocast": encoders.autocast, "channels_last": encoders.channels_last}
    backbone = SoleBackbone(encoders.query_encoder, **options)
    return CrossEntropy(backbone, encoders.proj_dim, sizes.classes)


_CACHED = {"conf_th": 0.5, "cache_size": 8}
METHODS = {
    "MSF": Method(_msf),
    "BYOL": Method(_byol),
    "KM": Method(_clustered),
    "2Q": Method(_two_q),
    "2Q, symmetric": Method(_two_q, symmetric=True),
    "2Q, multi-crop": Method(_two_q, small=(2,)),
    "supervised": Method(_supervised),
    "supervised, given labels": Method(_given_labels),
    "supervised, top-all": Method(_top_all),
    "supervised, top-all of given labels and own": Method(_top_all_of_given_labels),
    "cross-entropy": Method(_cross_entropy),
    "pseudo-labels": Method(_pseudo(**_CACHED)),
    "pseudo-labels, all": Method(_pseudo(topk_plain=1)),
    "pseudo-labels, not yet": Method(_pseudo(**_CACHED), arguments={"constrained": False}),
    "pseudo-labels, confident in the cache": Method(
        _pseudo(**_CACHED, cache_confident=True), waits=True
    ),
}


def encoders(arch: str, *, small_stem: bool = False, **options: Any) -> QueryTargetEncoders:
    """On a backbone, always of the same weights; options: of the encoders."""
    torch.manual_seed(0)
    backbone = build_backbone(arch, small_stem=small_stem)
    return QueryTargetEncoders(
        backbone.module, backbone.feature_dim, momentum=0.9, **{"proj_dim": 64} | options
    )


def placed(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """A batch as the loader gives it for a device: views and labels there, `index` on the host."""
    query, target, *small = (
        view.to(device, dtype) for view in (batch.query_view, batch.target_view, *batch.small_views)
    )
    return Batch(query, target, batch.index, batch.label.to(device), tuple(small))


class NeverThere:
    """A `HostCopy` that does not look at what it copies."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def get(self) -> Tensor:
        return torch.ones(self.shape, dtype=self.dtype)


@contextlib.contextmanager
def device_of_shapes() -> Iterator[torch.device]:
    """The device "meta" for a GPU: its tensors have shapes and no data.

    So whatever needs to know one of their values fails. Host tensors beside it are real.
    """
    with contextlib.ExitStack() as stack:
        for module in (previous_embeddings, loss_watch):
            stack.enter_context(mock.patch.object(module, "HostCopy", NeverThere))
        without = mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        stack.enter_context(without)
        yield torch.device("meta")
