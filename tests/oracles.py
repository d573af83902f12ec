"""Slow loops written from the paper, which the tests hold the vectorized code against."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def squared_distance(a, b) -> float:
    """||a - b||^2 by components."""
    return math.fsum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True))


def nearest_rows(query, rows, *, k, allowed=None) -> list[int]:
    """Row numbers of the k allowed rows nearest to one query, nearest first."""
    numbers = [i for i in range(len(rows)) if allowed is None or allowed[i]]
    return sorted(numbers, key=lambda i: squared_distance(query, rows[i]))[:k]


def constrained_rows(query, rows, candidates, *, k) -> list[int]:
    """The k candidates nearest to one query; then the nearest rows that are no candidates."""
    inside = sorted(candidates, key=lambda i: squared_distance(query, rows[i]))[:k]
    outside = [i for i in nearest_rows(query, rows, k=len(rows)) if i not in candidates]
    return inside + outside[: k - len(inside)]


def loss_of(queries, rows, chosen) -> float:
    """Mean over the batch of the mean squared distance to each query's chosen rows."""
    per_query = [
        math.fsum(squared_distance(q, rows[i]) for i in numbers) / len(numbers)
        for q, numbers in zip(queries, chosen, strict=True)
    ]
    return math.fsum(per_query) / len(per_query)


class LargestTensor(TorchDispatchMode):
    """Watches every operation and keeps the size of the largest tensor it makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        sizes = [tensor.numel() for tensor in made if isinstance(tensor, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result
