"""Nearest rows of the memory bank, the mean-shift loss on them, and their purity.

Pure functions on tensors. B is the batch, K the rows searched, D the embedding size, k the
neighbors. All vectors have unit norm, so the nearest row is the one of largest inner product and
||q - z||^2 = 2 - 2 q.z. Searches never need gradients; the loss touches only the k rows selected,
so its backward pass handles B x k x D numbers and nothing of size B x K exists in it.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# How many similarities exist at once. On a CPU a slice that stays near the cache costs no time
# (measured flat from 1,000 to 128,000 rows at B 256) and bounds memory to 16 MB; a GPU wants few
# launches, and has 64 MB for it.
_CPU_SIMILARITIES = 2**22
_GPU_SIMILARITIES = 2**24
_RANKED_QUERIES = 64
_SUMMED = 2**16  # rows of the bank that are summed at a time
# Candidates for each neighbor where bfloat16 chooses them.
_CANDIDATES = 4
# Queries from which that is faster: the bank is rounded to bfloat16 for all of them at once, which
# takes longer than a float32 product with few (measured: equal at about 50, K 128,000, D 512).
_MANY_QUERIES = 64
# Of an inner product of unit vectors in bfloat16: rounding both vectors (2 x 2^-9), the sum in
# float32 (D 2^-24, at most 2^-12 up to D 4096) and the result (2^-9).
_BFLOAT16_ERROR = 2**-8 + 2**-9 + 2**-12


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

    queries: (B, D), unit norm. rows: (K, D), unit norm. Both also in half precision: they are
    compared in the dtype of the queries, at least in float32. allowed: bool, (K,) or (B, K), rows
    that may be found at all; None allows every row. Returns (B, min(k, K)) neighbors; where fewer
    rows are allowed, the rest are not valid. The bank is searched slice by slice: B x K
    similarities need not exist at once. On a CPU that multiplies in bfloat16, several times as fast
    as in float32, that chooses candidates; what is found is the same.
    """
    queries, k = _at_least_float32(queries), min(k, rows.shape[0])
    if not _is_worth_choosing(queries, rows, k):
        return _nearest_of_all(queries, rows, k, allowed)
    found, certain = _nearest_of_chosen(queries, rows, k, allowed)
    if not certain.all():
        open_ = (~certain).nonzero().squeeze(1)
        allowed = allowed[open_] if allowed is not None and allowed.dim() == 2 else allowed
        rest = _nearest_of_all(queries[open_], rows, k, allowed)
        found.rows[open_], found.valid[open_] = rest.rows, rest.valid
    return found


def _at_least_float32(queries: Tensor) -> Tensor:
    """Rows of a bank in half precision as queries: products of 16 bits would make ties of them."""
    return queries.to(torch.promote_types(queries.dtype, torch.float32))


def _top_by_slices(
    queries: Tensor, rows: Tensor, k: int, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The k largest inner products (B, k) float32 or wider, largest first, and their rows.

    The products are in the dtype of the queries.
    """
    budget = _CPU_SIMILARITIES if rows.device.type == "cpu" else _GPU_SIMILARITIES
    step = max(budget // max(queries.shape[0], 1), k, 1)
    best_similarity, best_rows = [], []
    for start in range(0, rows.shape[0], step):
        similarity = queries @ rows[start : start + step].to(queries.dtype).T
        similarity = similarity.float() if similarity.dtype == torch.bfloat16 else similarity
        if allowed is not None:
            similarity.masked_fill_(~allowed[..., start : start + step], -torch.inf)
        top = similarity.topk(min(k, similarity.shape[1]), dim=1)
        best_similarity.append(top.values)
        best_rows.append(top.indices + start)
    similarity, found = torch.cat(best_similarity, dim=1), torch.cat(best_rows, dim=1)
    if len(best_rows) > 1:
        similarity, order = similarity.topk(k, dim=1)
        found = found.gather(1, order)
    return similarity, found


def _nearest_of_all(queries: Tensor, rows: Tensor, k: int, allowed: Tensor | None) -> Neighbors:
    """`nearest` by every row's similarity in the dtype of the queries."""
    similarity, found = _top_by_slices(queries, rows, k, allowed)
    # Not "> -inf": a similarity that is nan must stay in the loss, where the run stops at it.
    return Neighbors(found, similarity != -torch.inf)


def _is_worth_choosing(queries: Tensor, rows: Tensor, k: int) -> bool:
    """Whether products in bfloat16 save more than comparing the candidates again costs."""
    return (
        rows.device.type == "cpu"
        and len(queries) >= _MANY_QUERIES
        and queries.dtype == torch.float32
        and rows.dtype in (torch.float32, torch.float16)
        and _has_fast_bfloat16()
        and rows.shape[0] >= 64 * _CANDIDATES * k
        and rows.shape[1] >= 64
    )


@lru_cache
def _has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies matrices in bfloat16 by instructions of its own."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("amx_tile"))


def _nearest_of_chosen(
    queries: Tensor, rows: Tensor, k: int, allowed: Tensor | None
) -> tuple[Neighbors, Tensor]:
    """`nearest` among the rows of largest similarity in bfloat16; certain (B,) bool.

    A row that was not chosen has a similarity of at most the lowest that was, plus the error of a
    bfloat16 product. Where the k-th nearest candidate lies above that, nothing was missed.
    """
    rough, chosen = _top_by_slices(queries.bfloat16(), rows, _CANDIDATES * k, allowed)
    similarity = _similarity_at(queries, rows, chosen).masked_fill_(rough == -torch.inf, -torch.inf)
    top = similarity.topk(k, dim=1)
    certain = top.values[:, -1] >= rough[:, -1] + _BFLOAT16_ERROR
    return Neighbors(chosen.gather(1, top.indices), top.values != -torch.inf), certain


@torch.no_grad()
def nearest_with_label(
    queries: Tensor, rows: Tensor, *, k: int, labels: Tensor, row_labels: Tensor
) -> Neighbors:
    """Find the k rows nearest to each query among the rows of its own label, exactly.

    queries: (B, D), unit norm. rows: (K, D), unit norm. labels: (B,) int64, -1 for a query that
    may find every row; row_labels: (K,) int64. Returns (B, min(k, K)) neighbors; where fewer rows
    have the label, the rest are not valid. (The published code filled up with rows of other
    classes.)

    On a CPU the rows of each label in the batch are searched for its own queries alone: of 1,000
    classes a thousandth of the bank for a query, and never more work than with a mask. On a GPU
    one masked product is faster than a launch for every label, and waits for nothing.
    """
    if rows.device.type != "cpu":
        same = (labels.unsqueeze(1) == row_labels) | (labels < 0).unsqueeze(1)  # (B, K) bool
        return nearest(queries, rows, k=k, allowed=same)
    k = min(k, len(rows))
    found = Neighbors(
        torch.zeros(len(queries), k, dtype=torch.int64),
        torch.zeros(len(queries), k, dtype=torch.bool),
    )
    by_label = _narrow(row_labels).argsort(stable=True)
    ordered = row_labels[by_label]
    for label in labels.unique():
        mine = (labels == label).nonzero().squeeze(1)
        if label < 0:
            here = nearest(queries[mine], rows, k=k)
        else:
            first, end = (
                torch.searchsorted(ordered, label, right=right) for right in (False, True)
            )
            members = by_label[first:end]
            if len(members) == 0:
                continue
            here = nearest(queries[mine], rows[members], k=k)
            here = here._replace(rows=members[here.rows])
        found.rows[mine, : here.rows.shape[1]] = here.rows
        found.valid[mine, : here.rows.shape[1]] = here.valid
    return found


def _narrow(labels: Tensor) -> Tensor:
    """Labels in the narrowest integers that hold them: of 16 bits a CPU sorts five times as fast.

    With that the bank is grouped anew in each step: 1.1 ms for 128,000 rows, of 70 for the search;
    groups kept up to date as it turns over could save no more than that.
    """
    if len(labels) and int(labels.min()) >= -(2**15) and int(labels.max()) < 2**15:
        return labels.to(torch.int16)
    return labels


@torch.no_grad()
def nearest_among(
    queries: Tensor, rows: Tensor, *, candidates: Neighbors, k: int, fill: Neighbors
) -> Neighbors:
    """Find the k rows nearest to each query among its own candidates; the nearest others fill up.

    queries: (B, D), unit norm. rows: (K, D), unit norm. candidates: (B, k') rows that satisfy the
    constraint, in any order. fill: (B, >= k) plain neighbors of the same queries, nearest first, as
    `nearest` gives them: where a query has fewer than k valid candidates, its nearest other rows
    follow (CMSF sec. 3.1, k' < k). Returns (B, k) neighbors (fewer if `candidates` and `fill`
    together have fewer columns): candidates first, then the rows that fill up.
    """
    similarity = _similarity_at(queries, rows, candidates.rows)
    similarity.masked_fill_(~candidates.valid, -torch.inf)
    top = similarity.topk(min(k, similarity.shape[1]), dim=1)
    chosen = candidates.rows.gather(1, top.indices)

    is_candidate = fill.rows.unsqueeze(2) == candidates.rows.unsqueeze(1)  # (B, k, k')
    other = fill.valid & ~(is_candidate & candidates.valid.unsqueeze(1)).any(dim=2)
    found = torch.cat([chosen, fill.rows], dim=1)
    valid = torch.cat([top.values != -torch.inf, other], dim=1)
    # A stable sort moves what is valid to the front and keeps candidates before others, near before
    # far.
    order = (~valid).int().argsort(dim=1, stable=True)[:, :k]
    return Neighbors(found.gather(1, order), valid.gather(1, order))


def _similarity_at(queries: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Inner products (B, n) of each query (B, D) with its own rows (B, n), by slices of columns."""
    step = max(_CPU_SIMILARITIES // queries.numel(), 1)
    return torch.cat(
        [
            torch.einsum("bd,bnd->bn", queries, rows[part].to(queries.dtype))
            for part in index.split(step, dim=1)
        ],
        dim=1,
    )


def all_finite(*embeddings: Tensor) -> Tensor:
    """Whether unit vectors (B, D) have neither nan nor infinity: () bool, where they are.

    Asked before a batch enters a bank. Nothing waits for the answer: the bank keeps its rows by it,
    and the loss becomes nan, at which the run stops.
    """
    return torch.isfinite(torch.stack([part.detach().sum() for part in embeddings])).all()


def mean_shift_loss(query: Tensor, rows: Tensor, neighbors: Neighbors) -> Tensor:
    """Mean squared distance of each query to its neighbors (MSF eq. 1, CMSF eq. 1).

    query: (B, D), or (V, B, D) for V views of each image, unit norm, carries the gradient. rows:
    (K, D), unit norm, no gradient. Returns a scalar in 0 to 4: the mean over views and batch of the
    mean over each image's valid neighbors of ||q - z||^2. Differs from the published code where
    fewer than k rows satisfy a constraint: it filled up with arbitrary rows, here only valid ones
    enter the mean.
    """
    distance = 2 - 2 * torch.einsum("...bd,bkd->...bk", query, rows[neighbors.rows].to(query.dtype))
    count = neighbors.valid.sum(dim=1).clamp(min=1)
    return (distance.masked_fill(~neighbors.valid, 0).sum(dim=-1) / count).mean()


def mean_shift_loss_all(
    query: Tensor, rows: Tensor, *, labels: Tensor, row_labels: Tensor, num_classes: int
) -> Tensor:
    """Mean squared distance of each query to all rows of its label (CMSF top-all).

    query: (B, D), unit norm, carries the gradient. rows: (K, D), unit norm. labels: (B,) and
    row_labels: (K,) int64 in 0 to num_classes - 1, or -1 for a row of no class; every label of the
    batch must be in the bank, otherwise the result is nan. Returns a scalar in 0 to 4. Since all
    rows have unit norm, the mean of 2 - 2 q.z over a class is 2 - 2 q.(mean of z): the bank is
    summed by class once, whatever B is.
    """
    with torch.no_grad():
        row_labels = row_labels.where(row_labels >= 0, num_classes)  # summed too, but not used
        sums = query.new_zeros(num_classes + 1, rows.shape[1])
        for part, labels_of_part in zip(
            rows.split(_SUMMED), row_labels.split(_SUMMED), strict=True
        ):
            sums.index_add_(0, labels_of_part, part.to(sums.dtype))
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
    share = same.sum(dim=1) / neighbors.valid.sum(dim=1).clamp(min=1)
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


@torch.no_grad()
def plain_ranks(queries: Tensor, rows: Tensor, neighbors: Neighbors) -> Tensor:
    """The place each neighbor has among all rows by similarity to its query: how distant it is.

    queries: (B, D), unit norm. rows: (K, D), unit norm. neighbors: (B, k). Returns (B, k) int64: 1
    for the nearest row, K for the farthest, -1 for a neighbor that is not valid. Rows as similar
    as a neighbor do not count before it. As in `nearest`, B x K similarities need not exist at
    once.
    """
    queries = _at_least_float32(queries)
    # By the same product as below, as another kernel would round otherwise.
    wanted, place = neighbors.rows.unique(return_inverse=True)
    own = (queries @ rows[wanted].to(queries.dtype).T).gather(1, place)  # (B, k)
    ranks = torch.ones_like(neighbors.rows)
    budget = _CPU_SIMILARITIES if rows.device.type == "cpu" else _GPU_SIMILARITIES
    step = max(budget // max(queries.shape[0], 1), 1)
    for start in range(0, rows.shape[0], step):
        similarity = queries @ rows[start : start + step].to(queries.dtype).T
        for column in range(ranks.shape[1]):
            before = similarity > own[:, column, None]
            # In int64 a CPU would take longer for the sums than for the similarities.
            ranks[:, column] += before.sum(dim=1, dtype=torch.int32)
        # A neighbor is not before itself, even if it was rounded otherwise here.
        local = neighbors.rows - start
        here = (local >= 0) & (local < similarity.shape[1])
        itself = similarity.gather(1, local.clamp(0, similarity.shape[1] - 1))
        ranks -= (here & (itself > own)).long()
    return ranks.masked_fill(~neighbors.valid, -1)


def rank_histogram(ranks: Tensor, *, bins: int = 20) -> Tensor:
    """How many of the ranks lie in [1, 2), [2, 4), [4, 8), ..., in percent of the valid ones.

    ranks: int64 of any shape, from 1; below 1: not valid, as `plain_ranks` marks them. bins: 1 to
    63; the last one holds all that follow. Returns (bins,) float32; nan without a valid rank.
    """
    edges = 2 ** torch.arange(bins, device=ranks.device)
    bin_of = torch.bucketize(ranks.flatten(), edges, right=True) - 1  # -1 where not valid
    counts = (bin_of.unsqueeze(1) == torch.arange(bins, device=ranks.device)).sum(dim=0)
    return 100 * counts / counts.sum()


def constrained_ranks(queries: Tensor, rows: Tensor, neighbors: Neighbors) -> Tensor:
    """How distant a constraint's neighbors are: `rank_histogram` of the first queries of a batch.

    queries: (B, D), rows: (K, D), both unit norm. neighbors: (B, k). Returns percents (20,) float32
    (CMSF sec. 4, the histogram of ranks). 64 queries: what is logged now and then must cost little.
    """
    few = Neighbors(*(part[:_RANKED_QUERIES] for part in neighbors))
    return rank_histogram(plain_ranks(queries[:_RANKED_QUERIES], rows, few))
