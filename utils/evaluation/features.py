"""Features of a whole data set, in the order of its images."""

from collections.abc import Callable, Container, Iterable

import torch
from torch import Tensor, nn

from utils.runtime import distributed
from utils.runtime.errors import RunError

_CHUNK = 65536  # rows moved at a time


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    loader: Iterable,
    *,
    num_images: int,
    left_out: Container[int] = (),
    everywhere: bool = False,
    path_of: Callable[[int], str] = "number {}".format,
) -> tuple[Tensor, Tensor] | None:
    """Pass a data set through a backbone in eval mode.

    backbone: (B, 3, S, S) -> (B, F). loader: yields `loaders.EvalBatch` (images on the backbone's
    device). Returns features (N, F) float32, not normalized, and labels (N,) int64, both on the
    CPU, row i from image i. Every row is written exactly once or RuntimeError is raised. left_out:
    `loaders.EvalLoader.left_out`, which is known after the pass: numbers of images that could not
    be read; the rows of those are taken out. The backbone's mode is restored. RunError for features
    that are not finite; path_of: number of an image -> its file, to name the first.

    Of several processes each passes its own part of the images through, and all take the running
    statistics of the main one's backbone. The main one returns all rows, the others None unless
    they are wanted everywhere.
    """
    _share_statistics(backbone)
    own = distributed.own_share(num_images)
    was_training = backbone.training
    backbone.eval()
    try:
        features, labels, visits, not_finite = _own_rows(backbone, loader, own)
    finally:
        backbone.train(was_training)
    expected = torch.tensor([number not in left_out for number in range(num_images)])
    wrong = int(distributed.add_up((visits != expected[own.start : own.stop]).sum()))
    sizes = distributed.gather_objects(None if features is None else features.shape[1])
    if wrong or not any(sizes):
        raise RuntimeError(f"{wrong} of {num_images} images not visited exactly once")
    _check_finite(backbone, not_finite, num_images, path_of)
    if features is None:
        features = torch.empty(len(own), next(filter(None, sizes)))
    features, labels = (
        distributed.gather_uneven(rows)
        if everywhere
        else distributed.on_main(rows, slice(own.start, own.stop), num_images)
        for rows in (features, labels)
    )
    if not (everywhere or distributed.is_main()):
        return None
    return _rows_of(features, expected), labels[expected]


def _own_rows(
    backbone: nn.Module, loader: Iterable, own: range
) -> tuple[Tensor | None, Tensor, Tensor, list[int]]:
    """Features (n, F), None without a batch, labels (n,) and visits (n,) of this process' images.

    Labels are -1 and features arbitrary where there was no visit. And the numbers of the images
    whose features are not finite.
    """
    not_finite: list[int] = []
    features, labels = None, torch.full((len(own),), -1)
    visits = torch.zeros(len(own), dtype=torch.int64)
    for batch in loader:
        part = backbone(batch.images).float().cpu()
        if features is None:
            features = torch.empty(len(own), part.shape[1])
        rows = batch.index - own.start
        assert rows.min() >= 0 and rows.max() < len(own), "images of another process"
        features[rows] = part
        labels[rows] = batch.label
        visits[rows] += 1
        not_finite += batch.index[~finite_rows(part)].tolist()
    return features, labels, visits, not_finite


def finite_rows(features: Tensor) -> Tensor:
    """Which rows of features (N, F) can be used: (N,) bool, their length is finite in their dtype.

    A longer one becomes zero when it is normalized, whatever was in it.
    """
    return features.norm(dim=1).isfinite()


def _check_finite(
    backbone: nn.Module, not_finite: list[int], num_images: int, path_of: Callable[[int], str]
) -> None:
    """RunError, in all processes, if images have features that are not finite; by their numbers."""
    numbers = sorted(sum(distributed.gather_objects(not_finite), []))
    if not numbers:
        return
    finite = all(value.isfinite().all() for value in backbone.state_dict().values())
    weights = "finite, but what it makes of images is not" if finite else "not finite"
    raise RunError(
        f"the features of {len(numbers)} of {num_images} images are not finite, first image "
        f"{path_of(numbers[0])}; the network's weights are {weights}: did its training diverge "
        "(try a lower learning rate)?"
    )


@torch.no_grad()
def _share_statistics(backbone: nn.Module) -> None:
    """Give every process the running statistics of the main one's batch norms.

    They differ where each process trains on its own part of a batch. Only eval mode reads them, and
    only the main process saves them, so training goes on as it would have. By way of the host, so
    that an evaluation needs no connection between GPUs.
    """
    if distributed.world_size() > 1:
        for buffer in backbone.buffers():
            if buffer.is_floating_point():
                buffer.copy_(distributed.from_main(buffer.cpu()))


def _rows_of(features: Tensor, chosen: Tensor) -> Tensor:
    """The chosen rows ((N,) bool) of features (N, F), moved up in place: a copy may be 10 GB."""
    rows = chosen.nonzero().squeeze(1)
    if len(rows) < len(features):
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]  # lies at or behind the place it moves to
            features[start : start + len(part)] = features[part]
    return features[: len(rows)]
