"""Features of a whole data set, in the order of its images."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def extract_features(
    backbone: nn.Module, loader: Iterable, *, num_images: int
) -> tuple[Tensor, Tensor]:
    """Pass a data set through a backbone in eval mode.

    backbone: (B, 3, S, S) -> (B, F). loader: yields `loaders.EvalBatch` (images on the backbone's
    device). Returns features (N, F) float32, not normalized, and labels (N,) int64, both on the
    CPU, row i from image i. Every row is written exactly once or RuntimeError is raised. The
    backbone's mode is restored.
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
    if features is None or not bool((visits == 1).all()):
        raise RuntimeError(
            f"{int((visits != 1).sum())} of {num_images} images not visited exactly once"
        )
    return features, labels
