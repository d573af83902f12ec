"""k-nearest-neighbor evaluation: exact faiss search, majority vote, purity."""

from collections.abc import Sequence

import faiss
import numpy as np
from torch import Tensor, nn
from torch.nn.functional import normalize

from utils.data import EvalLoader
from utils.errors import InputError
from utils.features import extract_features

KS = (1, 5, 10, 20)


def search(base: np.ndarray, queries: np.ndarray, *, k: int) -> np.ndarray:
    """Row numbers of the k nearest base rows of each query, exact, nearest first.

    base: (N, F), queries: (Q, F), float32, unit norm. Returns (Q, k) int64; equal similarities are
    in the order of the base. faiss searches on a GPU where it has one, on the CPU otherwise. Raises
    ValueError if faiss gives an empty place (k above N, or a query that is not finite).
    """
    base, queries = np.ascontiguousarray(base), np.ascontiguousarray(queries)
    metric = faiss.METRIC_INNER_PRODUCT
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0:
        resources = faiss.StandardGpuResources()
        similarity, rows = faiss.knn_gpu(resources, queries, base, k, metric=metric)
    else:
        similarity, rows = faiss.knn(queries, base, k, metric=metric)
    if (rows < 0).any() or not np.isfinite(similarity).all():
        empty = int(((rows < 0) | ~np.isfinite(similarity)).any(axis=1).sum())
        raise ValueError(f"{empty} queries without {k} finite neighbors among {len(base)} rows")
    order = np.lexsort((rows, -similarity), axis=1)
    return np.take_along_axis(rows, order, axis=1)


def majority_vote(neighbor_labels: np.ndarray) -> np.ndarray:
    """The most frequent label among each query's neighbors; a tie goes to the nearer neighbor.

    neighbor_labels: (Q, k) int, nearest first. Returns (Q,). Of the labels with most votes the one
    whose nearest member is nearest wins. (The published code broke ties at random.)
    """
    votes = (neighbor_labels[:, :, None] == neighbor_labels[:, None, :]).sum(axis=2)
    # argmax takes the first of equal maxima, and the columns are ordered by distance.
    winner = votes.argmax(axis=1)
    return np.take_along_axis(neighbor_labels, winner[:, None], axis=1)[:, 0]


def accuracy_and_purity(
    neighbor_labels: np.ndarray, labels: np.ndarray, *, ks: Sequence[int]
) -> dict[int, dict[str, float]]:
    """Vote accuracy and purity for several k of one search, in percent.

    neighbor_labels: (Q, max(ks)) int, nearest first. labels: (Q,) int. purity: mean fraction of the
    k neighbors that have the query's label.
    """
    return {
        k: {
            "accuracy": 100 * float((majority_vote(neighbor_labels[:, :k]) == labels).mean()),
            "purity": 100 * float((neighbor_labels[:, :k] == labels[:, None]).mean()),
        }
        for k in ks
    }


def ks_for(num_images: int, *, also: int | None = None) -> list[int]:
    """The k to report: 1, 5, 10, 20 as far as there are images to search, and `also`.

    Raises InputError if `also` exceeds the number of images.
    """
    if also and also > num_images:
        raise InputError(f"-k {also}: only {num_images} training images to search")
    return sorted({k for k in KS if k <= num_images} | ({also} if also else set()))


def evaluate_knn(
    backbone: nn.Module, train: EvalLoader, val: EvalLoader, *, ks: Sequence[int] = KS
) -> dict[int, dict[str, float]]:
    """k-NN accuracy and purity of a backbone, percent, for every k in one search (CMSF sec. 4).

    Features are those before the projector, backbone in eval mode, L2-normalized. train: the
    labeled base, at least max(ks) images;
    val: the queries.
    """
    base, base_labels = extract_features(backbone, train, num_images=len(train.images))
    queries, labels = extract_features(backbone, val, num_images=len(val.images))
    rows = search(_unit(base), _unit(queries), k=max(ks))
    return accuracy_and_purity(base_labels.numpy()[rows], labels.numpy(), ks=ks)


def _unit(features: Tensor) -> np.ndarray:
    """L2-normalize the rows in place; on ImageNet a copy would be 10 GB."""
    return normalize(features, dim=1, out=features).numpy()


def format_table(figures: dict[int, dict[str, float]]) -> str:
    """A text table of one result: accuracy and purity for each k, percent."""
    lines = ["  k  accuracy  purity"]
    lines += [f"{k:3}{row['accuracy']:10.2f}{row['purity']:8.2f}" for k, row in figures.items()]
    return "\n".join(lines)


def format_comparison(results: dict[str, dict[int, dict[str, float]]]) -> str:
    """A text table of several results by name: accuracy for each k, percent."""
    ks = sorted(next(iter(results.values())))
    width = max(len(name) for name in results)
    lines = [" " * width + "".join(f"{f'{k}-NN':>8}" for k in ks)]
    for name, figures in results.items():
        lines.append(f"{name:<{width}}" + "".join(f"{figures[k]['accuracy']:8.1f}" for k in ks))
    return "\n".join(lines)
