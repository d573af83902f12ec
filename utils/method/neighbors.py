"""Nearest rows of the memory bank, the mean-shift loss on them, and their purity.

Pure functions on tensors. B is the batch, K the rows searched, D the embedding size, k the
neighbors. All vectors have unit norm, so the nearest row is the one of largest inner product and
||q - z||^2 = 2 - 2 q.z. Searches never need gradients; the loss touches only the k rows selected,
so its backward pass handles B x k x D numbers and nothing of size B x K exists in it.

A query that is not finite finds nothing that is valid, and the loss over nothing is nan, at which a
run stops: otherwise it would go on with whatever rows come first among similarities of nan.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from utils.method.search import inner_products, top_k

_SUMMED = 2**16  # rows of the bank that are summed at a time


class Neighbors(NamedTuple):
    """For each query its neighbors, nearest first.

    rows: (B, k) int64, row numbers in the bank. valid: (B, k) bool, whether this neighbor counts;
    where it is False the row number means nothing.
    """

    rows: Tensor
    valid: Tensor

    def first(self, k: int) -> "Neighbors":
        """Only the k nearest of each query, or all where there are no more."""
        return Neighbors(self.rows[:, :k], self.valid[:, :k])


@torch.no_grad()
def nearest(queries: Tensor, rows: Tensor, *, k: int, allowed: Tensor | None = None) -> Neighbors:
    """Find the k rows nearest to each query, exactly.

    queries: (B, D), rows: (K, D), unit norm, also in half precision. allowed: bool, (K,) or (B, K),
    rows that may be found at all. Returns (B, min(k, K)) neighbors; where fewer rows are allowed,
    the rest are not valid. B x K similarities need not exist at once.
    """
    similarity, found = top_k(queries, rows, min(k, len(rows)), allowed)
    return Neighbors(found, similarity > -torch.inf)


@torch.no_grad()
def nearest_with_label(
    queries: Tensor, rows: Tensor, *, k: int, labels: Tensor, row_labels: Tensor
) -> Neighbors:
    """Find the k rows nearest to each query among the rows of its own label, exactly.

    queries: (B, D), rows: (K, D), unit norm. labels: (B,) int64, -1 for a query that may find every
    row; row_labels: (K,) int64. Returns (B, min(k, K)) neighbors; where fewer rows have the label,
    the rest are not valid. (The published code filled up with rows of other classes.)

    On a CPU the rows of each label in the batch are searched for its own queries alone: of 1,000
    classes a thousandth of the bank for a query. On a GPU one masked product is faster than a
    launch for every label, and waits for nothing.
    """
    if rows.device.type != "cpu":
        same = (labels.unsqueeze(1) == row_labels) | (labels < 0).unsqueeze(1)  # (B, K) bool
        return nearest(queries, rows, k=k, allowed=same)
    found = torch.zeros(len(queries), min(k, len(rows)), dtype=torch.int64)
    found = Neighbors(found, torch.zeros_like(found, dtype=torch.bool))
    ordered, by_label = row_labels.sort(stable=True)
    for label in labels.unique():
        mine = (labels == label).nonzero().squeeze(1)
        if label < 0:
            here = nearest(queries[mine], rows, k=k)
        else:
            first, end = torch.searchsorted(ordered, torch.stack([label, label + 1]))
            members = by_label[first:end]
            here = nearest(queries[mine], rows[members], k=k)
            here = here._replace(rows=members[here.rows])
        found.rows[mine, : here.rows.shape[1]] = here.rows
        found.valid[mine, : here.rows.shape[1]] = here.valid
    return found


@torch.no_grad()
def nearest_among(
    queries: Tensor, rows: Tensor, *, candidates: Neighbors, k: int, fill: Neighbors
) -> Neighbors:
    """Find the k rows nearest to each query among its own candidates; the nearest others fill up.

    queries: (B, D), rows: (K, D), unit norm. candidates: (B, k') rows that satisfy the constraint,
    in any order. fill: (B, >= k) plain neighbors of the same queries: where a query has fewer than
    k valid candidates, its nearest other rows follow (CMSF sec. 3.1, k' < k). Returns (B, k)
    neighbors, candidates first (fewer if both together have fewer columns).
    """
    similarity = inner_products(queries, rows, candidates.rows)
    similarity.masked_fill_(~candidates.valid, -torch.inf)
    top = similarity.topk(min(k, similarity.shape[1]), dim=1)
    chosen = candidates.rows.gather(1, top.indices)

    is_candidate = fill.rows.unsqueeze(2) == candidates.rows.unsqueeze(1)  # (B, k, k')
    other = fill.valid & ~(is_candidate & candidates.valid.unsqueeze(1)).any(dim=2)
    found = torch.cat([chosen, fill.rows], dim=1)
    valid = torch.cat([top.values > -torch.inf, other], dim=1)
    # A stable sort moves what is valid to the front and keeps candidates before others, near before
    # far.
    order = (~valid).int().argsort(dim=1, stable=True)[:, :k]
    return Neighbors(found.gather(1, order), valid.gather(1, order))


def mean_shift_loss(query: Tensor, rows: Tensor, neighbors: Neighbors) -> Tensor:
    """Mean squared distance of each query to its neighbors (MSF eq. 1, CMSF eq. 1).

    query: (B, D), or (V, B, D) for V views of each image, unit norm, carries the gradient. rows:
    (K, D), unit norm, no gradient. Returns a scalar in 0 to 4: the mean over views and batch of the
    mean over each image's valid neighbors of ||q - z||^2; nan if an image has none. Differs from
    the published code where fewer than k rows satisfy a constraint: it filled up with arbitrary
    rows, here only valid ones enter the mean.
    """
    distance = 2 - 2 * torch.einsum("...bd,bkd->...bk", query, rows[neighbors.rows].to(query.dtype))
    count = neighbors.valid.sum(dim=1)
    return (distance.masked_fill(~neighbors.valid, 0).sum(dim=-1) / count).mean()


def mean_shift_loss_all(
    query: Tensor, rows: Tensor, *, labels: Tensor, row_labels: Tensor, num_classes: int
) -> Tensor:
    """Mean squared distance of each query to all rows of its label (CMSF top-all).

    query: (B, D), unit norm, carries the gradient. rows: (K, D), unit norm. labels: (B,) and
    row_labels: (K,) int64 in 0 to num_classes - 1, or -1 for a row of no class. Returns a scalar in
    0 to 4; nan if a label is not in the bank. Since all rows have unit norm, the mean of 2 - 2 q.z
    over a class is 2 - 2 q.(mean of z): the bank is summed by class once, whatever B is.
    """
    with torch.no_grad():
        row_labels = row_labels.where(row_labels >= 0, num_classes)  # summed too, but not used
        sums = query.new_zeros(num_classes + 1, rows.shape[1])
        for part, own in zip(rows.split(_SUMMED), row_labels.split(_SUMMED), strict=True):
            sums.index_add_(0, own, part.to(sums.dtype))
        # Not bincount: on a GPU it waits to learn the largest label.
        ones = torch.ones_like(row_labels, dtype=sums.dtype)
        counts = sums.new_zeros(num_classes + 1).index_add_(0, row_labels, ones)
        means = sums[labels] / counts[labels].unsqueeze(1)  # (B, D)
    return (2 - 2 * (query * means).sum(dim=1)).mean()


@torch.no_grad()
def purity(labels: Tensor, row_labels: Tensor, neighbors: Neighbors) -> Tensor:
    """Mean fraction of a query's valid neighbors that have its label, in percent.

    labels: (B,) int64, row_labels: (K,) int64; queries of label -1 (unknown) are left out, and
    without any other the result is nan. A target in the bank is its own nearest neighbor and
    counts, as in the published figures.
    """
    same = (row_labels[neighbors.rows] == labels.unsqueeze(1)) & neighbors.valid
    share = same.sum(dim=1) / neighbors.valid.sum(dim=1)
    known = labels >= 0
    return 100 * (share * known).sum() / known.sum()


@torch.no_grad()
def purity_all(
    labels: Tensor, truth: Tensor, *, row_labels: Tensor, row_truth: Tensor, num_classes: int
) -> Tensor:
    """Mean fraction of the rows of a query's label that are of its true class, in percent.

    labels, truth: (B,) int64, what a query counts as and what it is; row_labels, row_truth: (K,)
    int64; all in 0 to num_classes - 1. What `purity` says of k neighbors, of top-all.
    """
    pairs = (row_labels * num_classes + row_truth).sort().values
    wanted, first = labels * num_classes + truth, labels * num_classes
    bounds = torch.stack([wanted, wanted + 1, first, first + num_classes])
    places = torch.searchsorted(pairs, bounds)  # (4, B)
    return 100 * ((places[1] - places[0]) / (places[3] - places[2])).mean()
