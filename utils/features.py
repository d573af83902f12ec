"""Features of a whole data set, in the order of its images."""

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn

_CHUNK = 65536  # rows moved at a time


@torch.no_grad()
def extract_features(
    backbone: nn.Module, loader: Iterable, *, num_images: int, left_out: Container[int] = ()
) -> tuple[Tensor, Tensor]:
    """Pass a data set through a backbone in eval mode.

    backbone: (B, 3, S, S) -> (B, F). loader: yields `loaders.EvalBatch` (images on the backbone's
    device). Returns features (N, F) float32, not normalized, and labels (N,) int64, both on the
    CPU, row i from image i. Every row is written exactly once or RuntimeError is raised. left_out:
    `loaders.EvalLoader.left_out`, which is known after the pass: numbers of images that could not
    be read; the rows of those are taken out. The backbone's mode is restored.
    """
    features, labels = None, torch.full((num_images,), -1)
    visits = torch.zeros(num_images, dtype=torch.int64)
    was_training = backbone.training
    backbone.eval()
    try:
        for batch in loader:
            part = backbone(batch.images).float().cpu()
            if features is None:
                features = torch.empty(num_images, part.shape[1])
            features[batch.index] = part
            labels[batch.index] = batch.label
            visits[batch.index] += 1
    finally:
        backbone.train(was_training)
    expected = torch.tensor([number not in left_out for number in range(num_images)])
    if features is None or not torch.equal(visits, expected.long()):
        raise RuntimeError(
            f"{int((visits != expected).sum())} of {num_images} images not visited exactly once"
        )
    return _rows_of(features, expected), labels[expected]


def _rows_of(features: Tensor, chosen: Tensor) -> Tensor:
    """The chosen rows ((N,) bool) of features (N, F), moved up in place: a copy may be 10 GB."""
    rows = chosen.nonzero().squeeze(1)
    if len(rows) < len(features):
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]  # lies at or behind the place it moves to
            features[start : start + len(part)] = features[part]
    return features[: len(rows)]
