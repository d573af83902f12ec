"""k-nearest-neighbor evaluation: exact faiss search, two votes, top-5, purity."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.nn.functional import normalize

from utils.data.eval_loader import EvalLoader
from utils.data.splits import unreadable_classes
from utils.evaluation.feature_cache import extract
from utils.runtime import checked, faiss_library
from utils.runtime.errors import InputError, RunError


class Protocol(NamedTuple):
    """A k-NN evaluation as others report it too: for which k, and how the neighbors vote.

    vote: which of `vote_figures` is its accuracy, "accuracy" (majority) or "weighted". temperature:
    of the weighted vote, which stands beside a majority vote too. words: its vote, and whose it is.
    """

    name: str
    ks: tuple[int, ...]
    vote: str
    temperature: float
    words: str


_WEIGHTED = "vote weighted by exp(similarity / temperature)"
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("cmsf", (1, 5, 10, 20), "accuracy", 0.07, "majority vote (CMSF sec. 4)"),
        # With the temperature of Wu et al., arXiv 1805.01978.
        Protocol(
            *("dino", (10, 20, 100, 200), "weighted", 0.07), f"{_WEIGHTED} (arXiv 2104.14294)"
        ),
        Protocol("lightly", (200,), "weighted", 0.1, f"{_WEIGHTED} (lightly's benchmarks)"),
    )
}
CMSF = PROTOCOLS["cmsf"]
# faiss's own limit on a GPU, and the memory it may take there for base and queries at a time:
# ImageNet's base alone has 10 GB.
_GPU_MOST_NEIGHBORS = 2048
_GPU_LIMITS = {"vectorsMemoryLimit": 2**32, "queriesMemoryLimit": 2**30}


def _are_figures(value: object) -> bool:
    row = checked.table_of(checked.or_none(checked.real()))
    if not (isinstance(value, dict) and value):
        return False
    named = all(re.fullmatch("[1-9][0-9]{0,8}", k) for k in value)
    return named and all(row.holds(r) and r.get("accuracy") is not None for r in value.values())


# What `vote_figures` gives, read back from a log: its k are text there.
LOGGED = checked.Kind("k-NN figures", _are_figures)


def search(base: np.ndarray, queries: np.ndarray, *, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest base rows of each query, exact: rows (Q, k) int64, similarity (Q, k) float32.

    base: (N, F), queries: (Q, F), float32, unit norm; the similarity is the inner product, -1 to 1.
    Nearest first, equal similarities in the order of the base. faiss searches on a GPU where it has
    one. InputError without faiss, RunError if it gives an empty place (k above N, or a query that
    is not finite).
    """
    faiss = faiss_library.load("k-NN")
    base, queries = np.ascontiguousarray(base), np.ascontiguousarray(queries)
    metric = faiss.METRIC_INNER_PRODUCT
    if faiss_library.has_gpu(faiss) and k <= _GPU_MOST_NEIGHBORS:
        similarity, rows = faiss.knn_gpu(
            faiss.StandardGpuResources(), queries, base, k, metric=metric, **_GPU_LIMITS
        )
    else:
        similarity, rows = faiss.knn(queries, base, k, metric=metric)
    if empty := int(((rows < 0) | ~np.isfinite(similarity)).any(axis=1).sum()):
        raise RunError(
            f"k-NN: {empty} queries without {k} finite neighbors among {len(base)} rows; "
            f"are the network's weights finite?"
        )
    order = np.lexsort((rows, -similarity), axis=1)
    return tuple(np.take_along_axis(found, order, axis=1) for found in (rows, similarity))


def vote_weights(similarity: np.ndarray, *, temperature: float) -> np.ndarray:
    """Each neighbor's vote exp(similarity / temperature), up to a factor for each query.

    similarity: (Q, k), nearest first. temperature: above 0. Returns (Q, k) float64, 0 to 1: the
    nearest has 1, so that no temperature overflows; the factor changes no ranking.
    """
    similarity = similarity.astype(np.float64)
    return np.exp((similarity - similarity[:, :1]) / temperature)


def _class_votes(neighbor_labels: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """For each neighbor (Q, k) the sum of the votes of its class."""
    votes = np.zeros(neighbor_labels.shape, dtype=np.int64 if weights is None else np.float64)
    # Place by place, so that classes of equal members have equal sums to the last bit.
    for place in range(neighbor_labels.shape[1]):
        same = neighbor_labels == neighbor_labels[:, place, None]
        votes += same if weights is None else same * weights[:, place, None]
    return votes


def majority_vote(neighbor_labels: np.ndarray) -> np.ndarray:
    """The most frequent label (Q,) among each query's neighbors (Q, k) int, nearest first.

    A tie goes to the label of the nearer neighbor. (The published code broke ties at random.)
    """
    # argmax takes the first of equal maxima, and the columns are ordered by distance.
    winner = _class_votes(neighbor_labels, None).argmax(axis=1)
    return np.take_along_axis(neighbor_labels, winner[:, None], axis=1)[:, 0]


def rank_classes(neighbor_labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The classes among each query's neighbors by the sum of their votes, the largest first.

    neighbor_labels: (Q, k) int from 0, nearest first. weights: (Q, k), 0 or more, each neighbor's
    vote; None: one each. Ties go to the nearer neighbor. Returns (Q, k): each class once, then -1.
    """
    votes = _class_votes(neighbor_labels, weights)
    for place in range(1, votes.shape[1]):
        before = neighbor_labels[:, :place] == neighbor_labels[:, place, None]
        votes[before.any(axis=1), place] = -1  # that class has its place already
    order = np.argsort(-votes, axis=1, kind="stable")
    ranked = np.take_along_axis(neighbor_labels, order, axis=1)
    ranked[np.take_along_axis(votes, order, axis=1) < 0] = -1
    return ranked


def vote_figures(
    neighbor_labels: np.ndarray,
    similarity: np.ndarray,
    labels: np.ndarray,
    *,
    ks: Sequence[int],
    num_classes: int,
    temperature: float = CMSF.temperature,
) -> dict[int, dict[str, float | None]]:
    """What several k of one search give, in percent.

    neighbor_labels: (Q, max(ks)) int from 0, similarity: the same shape, both nearest first.
    labels: (Q,) int. For each k: accuracy (majority vote), purity (mean fraction of the k neighbors
    that have the query's label), weighted (accuracy of the vote weighted by `vote_weights`), top5
    and weighted_top5 (is the label among the five classes of most votes? None where there are no
    more than five classes; a class without a neighbor has no place).
    """
    weights = vote_weights(similarity, temperature=temperature)
    true = labels[:, None]
    figures = {}
    for k in ks:
        near = neighbor_labels[:, :k]
        weighted = rank_classes(near, weights[:, :k])
        figures[k] = {
            "accuracy": _percent(majority_vote(near) == labels),
            "purity": _percent(near == true),
            "weighted": _percent(weighted[:, 0] == labels),
            "top5": None,
            "weighted_top5": None,
        }
        if num_classes > 5:
            figures[k]["top5"] = _percent((rank_classes(near)[:, :5] == true).any(axis=1))
            figures[k]["weighted_top5"] = _percent((weighted[:, :5] == true).any(axis=1))
    return figures


def _percent(hits: np.ndarray) -> float:
    return 100 * float(hits.mean())


def ks_for(num_images: int, *, protocol: Protocol = CMSF, also: int | None = None) -> list[int]:
    """The k to report: those of the protocol as far as there are images to search, and `also`.

    Raises InputError if `also` exceeds the number of images, or if there is no k.
    """
    only = f"only {num_images} training images to search"
    if also and also > num_images:
        raise InputError(f"-k {also}: {only}")
    if not also and num_images < min(protocol.ks):
        ks = ", ".join(map(str, protocol.ks))
        raise InputError(f"--protocol {protocol.name}: k {ks}, but {only}")
    return sorted({k for k in protocol.ks if k <= num_images} | ({also} if also else set()))


def evaluate_knn(
    backbone: nn.Module, train: EvalLoader, val: EvalLoader, *, ks: Sequence[int] = CMSF.ks
) -> dict[int, dict[str, float | None]] | None:
    """k-NN figures of a backbone (CMSF sec. 4), see `vote_figures`; None but on the main process.

    train: the labeled base, at least max(ks) images; val: the queries. A k above the number of
    images that can be read has no figures, and a class without such an image is warned of.
    """
    features = extract(backbone, train, val)
    if features is None:
        return None
    for split, images, so in (
        ("train", train.images, "its images count as wrong"),
        ("val", val.images, "figures are over the others"),
    ):
        unreadable_classes(features[split][1], images.classes, what=f"data {images.root}", so=so)
    base, queries = features.values()
    ks = [k for k in ks if k <= len(base[1])]
    return knn_figures(base, queries, ks=ks, num_classes=len(train.images.classes))


def knn_figures(
    base: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    *,
    ks: Sequence[int],
    num_classes: int,
    temperature: float = CMSF.temperature,
) -> dict[int, dict[str, float | None]]:
    """k-NN figures from features, for every k in one search: see `vote_figures`.

    base, queries: features (N, F) float32 and labels (N,) int64, as `extract_features` gives them.
    The features are L2-normalized in place: on ImageNet a copy would be 10 GB.
    """
    unit = (normalize(part, dim=1, out=part).numpy() for part in (base[0], queries[0]))
    rows, similarity = search(*unit, k=max(ks))
    return vote_figures(
        base[1].numpy()[rows],
        similarity,
        queries[1].numpy(),
        ks=ks,
        num_classes=num_classes,
        temperature=temperature,
    )


def format_table(figures: dict[int, dict[str, float | None]]) -> str:
    """A text table of one result: the figures of each k, percent; top-5 where there is one."""
    names = {"accuracy": "accuracy", "weighted": "weighted", "purity": "purity"}
    if next(iter(figures.values()))["top5"] is not None:
        names |= {"top5": "top-5", "weighted_top5": "weighted top-5"}
    lines = ["  k" + "".join(f"  {title:>8}" for title in names.values())]
    for k, row in figures.items():
        cells = (f"  {row[name]:{max(8, len(title))}.2f}" for name, title in names.items())
        lines.append(f"{k:3}" + "".join(cells))
    return "\n".join(lines)


def format_comparison(results: dict[str, dict[int, dict[str, float]]]) -> str:
    """A text table of several results by name: accuracy for each k, percent."""
    ks = sorted(next(iter(results.values())))
    width = max(len(name) for name in results)
    lines = [" " * width + "".join(f"{f'{k}-NN':>8}" for k in ks)]
    for name, figures in results.items():
        lines.append(f"{name:<{width}}" + "".join(f"{figures[k]['accuracy']:8.1f}" for k in ks))
    return "\n".join(lines)
