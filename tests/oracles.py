"""Slow loops and statistics, which the tests hold the vectorized code against."""

import math
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
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


def aligned(one, two) -> float:
    """The mean of the squared distances, image by image."""
    return sum(squared_distance(a, b) for a, b in zip(one, two, strict=True)) / len(one)


def uniform(rows) -> float:
    """The logarithm of the mean potential over all pairs of different rows."""
    pairs = [(a, b) for a in range(len(rows)) for b in range(len(rows)) if a != b]
    potential = [math.exp(-2 * squared_distance(rows[a], rows[b])) for a, b in pairs]
    return math.log(math.fsum(potential) / len(pairs))


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


def ks(a: np.ndarray, b: np.ndarray) -> float:
    """The two-sample Kolmogorov-Smirnov distance, in units in which 1.95 has probability 0.001."""
    at = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(s), at, side="right") / len(s) for s in (a, b)]
    return np.abs(below[0] - below[1]).max() / math.sqrt(1 / len(a) + 1 / len(b))


def torchvision_resnet18(path: Path) -> tuple[nn.Module, torchvision.transforms.Compose]:
    """A ResNet-18, its state dict saved to `path`: the encoder, and its view of 28 pixels."""
    torch.manual_seed(3)
    model = torchvision.models.resnet18(weights=None)
    torch.save(model.state_dict(), path)
    model.fc = nn.Identity()
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(32),
            torchvision.transforms.CenterCrop(28),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return model.eval(), transform
