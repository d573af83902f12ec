"""How distant the neighbors are that a constraint allows: their ranks among all rows."""

import torch
from torch import Tensor

from utils.method.neighbors import Neighbors
from utils.method.search import at_least_float32, slice_length

_RANKED_QUERIES = 64  # what is logged now and then must cost little


@torch.no_grad()
def plain_ranks(queries: Tensor, rows: Tensor, neighbors: Neighbors) -> Tensor:
    """The place (B, k) int64 that each neighbor has among all rows by similarity to its query.

    queries: (B, D), rows: (K, D), unit norm. neighbors: (B, k). 1 for the nearest row, K for the
    farthest, -1 for a neighbor that is not valid; rows as similar as a neighbor do not count
    before it. As in `nearest`, B x K similarities need not exist at once.
    """
    queries = at_least_float32(queries)
    # By the same product as below, as another kernel would round otherwise.
    wanted, place = neighbors.rows.unique(return_inverse=True)
    own = (queries @ rows[wanted].to(queries.dtype).T).gather(1, place)  # (B, k)
    ranks = torch.ones_like(neighbors.rows)
    step = slice_length(queries)
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

    ranks: int64 of any shape, below 1 where not valid. bins: 1 to 63; the last one holds all that
    follow. Returns (bins,) float32; nan without a valid rank.
    """
    bins = torch.arange(bins, device=ranks.device)
    bin_of = torch.bucketize(ranks.flatten(), 2**bins, right=True) - 1  # -1 where not valid
    counts = (bin_of.unsqueeze(1) == bins).sum(dim=0)
    return 100 * counts / counts.sum()


def constrained_ranks(queries: Tensor, rows: Tensor, neighbors: Neighbors) -> Tensor:
    """`rank_histogram` (20,) of the first queries of a batch (CMSF sec. 4); as `plain_ranks`."""
    few = Neighbors(*(part[:_RANKED_QUERIES] for part in neighbors))
    return rank_histogram(plain_ranks(queries[:_RANKED_QUERIES], rows, few))
