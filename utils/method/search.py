"""The largest inner products of queries with the rows of a bank: exact, and in little memory."""

from functools import lru_cache

import torch
from torch import Tensor

# How many similarities exist at once. On a CPU a slice that stays near the cache costs no time
# (measured flat from 1,000 to 128,000 rows at B 256) and bounds memory to 16 MB; a GPU wants few
# launches, and has 64 MB for it.
_CPU_SIMILARITIES = 2**22
_GPU_SIMILARITIES = 2**24
# Candidates for each neighbor where bfloat16 chooses them.
_CANDIDATES = 4
# Queries from which that is faster: the bank is rounded to bfloat16 for all of them at once, which
# takes longer than a float32 product with few (measured: equal at about 50, K 128,000, D 512).
_MANY_QUERIES = 64
# Of an inner product of unit vectors in bfloat16: rounding both vectors (2 x 2^-9), the sum in
# float32 (D 2^-24, at most 2^-12 up to D 4096) and the result (2^-9).
_BFLOAT16_ERROR = 2**-8 + 2**-9 + 2**-12


def top_k(
    queries: Tensor, rows: Tensor, k: int, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest inner products of each query, largest first, and their rows: two (B, k).

    queries: (B, D), rows: (K, D), unit norm; compared in the dtype of the queries, at least in
    float32. k: at most K. allowed: bool, (K,) or (B, K); where fewer than k rows are, the rest
    are -inf. On a CPU that multiplies in bfloat16, several times as fast as in float32, that
    chooses candidates. A row that is none has a similarity of at most their lowest, plus the error
    of such a product: where the k-th lies above that nothing was missed, and where it does not the
    query is searched for again.
    """
    queries = at_least_float32(queries)
    if not _is_worth_choosing(queries, rows, k):
        return _by_slices(queries, rows, k, allowed)
    rough, chosen = _by_slices(queries.bfloat16(), rows, _CANDIDATES * k, allowed)
    similarity = inner_products(queries, rows, chosen).masked_fill_(rough == -torch.inf, -torch.inf)
    similarity, order = similarity.topk(k, dim=1)
    found = chosen.gather(1, order)
    certain = similarity[:, -1] >= rough[:, -1] + _BFLOAT16_ERROR
    if not certain.all():
        again = (~certain).nonzero().squeeze(1)
        allowed = allowed[again] if allowed is not None and allowed.dim() == 2 else allowed
        similarity[again], found[again] = _by_slices(queries[again], rows, k, allowed)
    return similarity, found


def _is_worth_choosing(queries: Tensor, rows: Tensor, k: int) -> bool:
    """Whether products in bfloat16 save more than comparing the candidates again costs."""
    return (
        rows.device.type == "cpu"
        and len(queries) >= _MANY_QUERIES
        and queries.dtype == torch.float32
        and _has_fast_bfloat16()
        and rows.shape[0] >= 64 * _CANDIDATES * k > 0
        and rows.shape[1] >= 64
    )


@lru_cache
def _has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies matrices in bfloat16 by instructions of its own."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("amx_tile"))


def _by_slices(
    queries: Tensor, rows: Tensor, k: int, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`top_k` by products in the dtype of the queries; the bank slice by slice."""
    step = max(slice_length(queries), k)
    best_similarity, best_rows = [], []
    for start in range(0, max(len(rows), 1), step):
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


def inner_products(queries: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Inner products (B, n) of each query (B, D) with its own rows (B, n), by slices of columns."""
    step = max(_CPU_SIMILARITIES // queries.numel(), 1)
    parts = index.split(step, dim=1)
    products = [torch.einsum("bd,bnd->bn", queries, rows[p].to(queries.dtype)) for p in parts]
    return torch.cat(products, dim=1)


def slice_length(queries: Tensor) -> int:
    """How many rows of a bank are compared with queries (B, D) at a time."""
    budget = _CPU_SIMILARITIES if queries.device.type == "cpu" else _GPU_SIMILARITIES
    return max(budget // max(len(queries), 1), 1)


def at_least_float32(queries: Tensor) -> Tensor:
    """Rows of a bank in half precision as queries: products of 16 bits would make ties of them."""
    return queries.to(torch.promote_types(queries.dtype, torch.float32))
