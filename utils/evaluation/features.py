"""Features of a whole data set, in the order of its images."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.data.eval_loader import EvalLoader
from utils.runtime import distributed
from utils.runtime.errors import RunError

_CHUNK = 65536  # rows moved at a time


@torch.no_grad()
def extract_features(
    backbone: nn.Module, loader: EvalLoader, text: str = "features", *, everywhere: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Pass a data set through a backbone, (B, 3, S, S) -> (B, F), in eval mode; text: of the bar.

    Returns features (N, F) float32, not normalized, and labels (N,) int64, both on the CPU, in the
    order of the images; those that could not be read have no row. The backbone's mode is restored.
    RuntimeError unless every row is written exactly once, RunError for features that are not
    finite.

    Of several processes each passes its own part of the images through, and all take the running
    statistics of the main one's backbone. The main one returns all rows, the others None unless
    they are wanted everywhere.
    """
    _share_statistics(backbone)
    count = len(loader.images)
    own = distributed.own_share(count)
    was_training = backbone.training
    backbone.eval()
    try:
        features, labels, visits = _own_rows(backbone, loader, own, text)
    finally:
        backbone.train(was_training)
    expected = torch.tensor([number not in loader.left_out for number in range(count)])
    wrong = int(distributed.add_up((visits != expected[own.start : own.stop]).sum()))
    sizes = distributed.gather_objects(None if features is None else features.shape[1])
    if wrong or not any(sizes):
        raise RuntimeError(f"{wrong} of {count} images not visited exactly once")
    if features is None:
        features = torch.empty(len(own), next(filter(None, sizes)))
    not_finite = [own[row] for row in (~finite_rows(features) & (visits > 0)).nonzero().flatten()]
    _check_finite(backbone, not_finite, loader)
    features, labels = (
        distributed.gather_uneven(rows)
        if everywhere
        else distributed.on_main(rows, slice(own.start, own.stop), count)
        for rows in (features, labels)
    )
    if not (everywhere or distributed.is_main()):
        return None
    return _rows_of(features, expected), labels[expected]


def _own_rows(
    backbone: nn.Module, loader: EvalLoader, own: range, text: str
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Features (n, F), None without a batch, labels (n,) and visits (n,) of this process' images.

    Labels are -1 and features arbitrary where there was no visit.
    """
    features, labels = None, torch.full((len(own),), -1)
    visits = torch.zeros(len(own), dtype=torch.int64)
    for batch in tqdm(loader, text, leave=False, disable=not distributed.shows_bars()):
        part = backbone(batch.images).float().cpu()
        if features is None:
            features = torch.empty(len(own), part.shape[1])
        rows = batch.index - own.start
        assert rows.min() >= 0 and rows.max() < len(own), "images of another process"
        features[rows] = part
        labels[rows] = batch.label
        visits[rows] += 1
    return features, labels, visits


def finite_rows(features: Tensor) -> Tensor:
    """Which rows of features (N, F) can be used: (N,) bool, their length is finite in their dtype.

    A longer one becomes zero when it is normalized, whatever was in it.
    """
    return features.norm(dim=1).isfinite()


def _check_finite(backbone: nn.Module, own: list[int], loader: EvalLoader) -> None:
    """RunError, in all processes, if a process names images whose features are not finite."""
    numbers = sorted(sum(distributed.gather_objects(own), []))
    if not numbers:
        return
    finite = all(value.isfinite().all() for value in backbone.state_dict().values())
    weights = "finite, but what it makes of images is not" if finite else "not finite"
    raise RunError(
        f"the features of {len(numbers)} of {len(loader.images)} images are not finite, first "
        f"image {loader.images.path(numbers[0])}; the network's weights are {weights}: did its "
        "training diverge (try a lower learning rate)?"
    )


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
