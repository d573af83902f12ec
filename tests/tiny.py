"""Small models, batches and runs that the tests of the training scripts share."""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.cli import arguments, options
from utils.data import cropping
from utils.data.batches import Batch
from utils.method.encoders import QueryTargetEncoders

# A run of seconds on the `image_tree` of conftest.
FLAGS = (
    *("--arch", "conv4", "--image_size", 16, "--batch_size", 8, "--mem_bank_size", 20),
    *("--topk", 3, "--num_workers", 0, "--print_freq", 2),
)


def run_args(folder: Path, **changes: Any) -> argparse.Namespace:
    """The flags of a run in a folder as all training scripts have them, some changed."""
    options.add_training_options(parser := arguments.Parser())
    args = vars(parser.parse_args(["data"])) | {"checkpoint_path": folder} | changes
    return argparse.Namespace(**args)


def encoders(*, momentum: float = 0.9) -> QueryTargetEncoders:
    """On a backbone that is any module with a known feature size; in float64."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU())
    return QueryTargetEncoders(backbone, 8, proj_dim=4, momentum=momentum).double()


def random_batches(
    count: int,
    *,
    num_images: int = 12,
    size: int = 4,
    side: int = 2,
    classes: int = 3,
    small: tuple[int, ...] = (),
    small_side: int = 2,
    symmetric: bool = False,
) -> Iterator[Batch]:
    """Epochs of random permutations: batches of `size` images, two views of each, in float64.

    side: of the views, in pixels. small: numbers of further crops, a group each, of `small_side`.
    symmetric: each image twice, views exchanged.
    """
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(num_images, 3, side, side, generator=generator, dtype=torch.float64)
    for step in range(count):
        place = step % (num_images // size)
        if place == 0:
            order = torch.randperm(num_images, generator=generator)
        index = order[place * size : (place + 1) * size]
        images, corners = base[index], base[index, :, :small_side, :small_side]
        one, two = images + _noise(2, images.shape, generator)
        crops = tuple(corners + _noise(number, corners.shape, generator) for number in small)
        if symmetric:
            one, two = torch.stack([one, two], 1).flatten(0, 1), torch.stack([two, one], 1)
            two, index = two.flatten(0, 1), index.repeat_interleave(2)
        yield Batch(one, two, index, index % classes, crops)


def _noise(views: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(views, *shape, generator=generator, dtype=torch.float64) / 3


def photo(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: a smooth colored field, some edges, a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 40
    waves = rng.uniform(0.2, 2.0, (3, 2)), rng.uniform(0, 6, 3)
    field = [np.sin(a * x + b * y + p) for (a, b), p in zip(*waves, strict=True)]
    pixels = 128 + 90 * np.stack(field, -1) + rng.normal(0, 6, (height, width, 1))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (200, 30, 60)
    return pixels.clip(0, 255).astype(np.uint8)


def two_crops(image: Tensor, draws, size: int, **original) -> Tensor:
    """The two crops of an image (3, H, W) uint8 by draws (2, NUM_DRAWS): (2, 3, size, size)."""
    crops = cropping.random_crops(image, draws, [cropping.CropGroup(2, size)], **original)
    return crops.view(2, 3, size, size)


def sgd(*modules: nn.Module) -> torch.optim.SGD:
    """SGD over what has a gradient; on a GPU one kernel, as in training."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    fused = True if parameters[0].is_cuda else None
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=fused)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of an optimizer."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def state(path: Path) -> dict:
    """A checkpoint, read by torch alone."""
    return torch.load(path, weights_only=True)


def tensors(value, name: str = "") -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its place in it."""
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else []
    items = enumerate(value) if isinstance(value, (list, tuple)) else items
    return {k: v for key, part in items for k, v in tensors(part, f"{name}/{key}").items()}


def assert_same_checkpoint(one: Path, two: Path) -> None:
    """Both files hold the same tensors, bit for bit."""
    one, two = tensors(state(one)), tensors(state(two))
    assert one.keys() == two.keys() and one
    differing = [name for name in one if not torch.equal(one[name], two[name])]
    assert not differing


class PaperEncoders:
    """Query and target of the same start as some encoders, updated by the paper's formulas."""

    def __init__(self, start: QueryTargetEncoders) -> None:
        self.query_encoder = copy.deepcopy(start.query_encoder)
        self.predictor = copy.deepcopy(start.predictor)
        self.target_encoder = copy.deepcopy(start.target_encoder)
        self.momentum = start.momentum

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """q with gradient, then the moving average, then t."""
        q = self.predictor(self.query_encoder(batch.query_view))
        with torch.no_grad():
            old = self.target_encoder.parameters()
            new = self.query_encoder.parameters()
            for target, query in zip(old, new, strict=True):
                target.copy_(self.momentum * target + (1 - self.momentum) * query)
            t = self.target_encoder(batch.target_view)
        return q / q.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True)

    def small_queries(self, batch: Batch) -> list[Tensor]:
        """q of each small crop, as many rows as targets, with gradient."""
        queries = []
        for crops in batch.small_views:
            group = self.predictor(self.query_encoder(torch.cat(list(crops))))
            group = group / group.norm(dim=1, keepdim=True)
            times = len(batch.index) // crops.shape[1]
            for q in group.split(crops.shape[1]):
                queries.append(torch.stack([row for row in q for _ in range(times)]))
        return queries

    def optimizer(self) -> torch.optim.SGD:
        """SGD over query encoder and predictor."""
        return sgd(self.query_encoder, self.predictor)


def loss_over(q: Tensor, rows: list[Tensor], chosen: list[list[int]]) -> Tensor:
    """Mean over the batch of the mean squared distance to each query's chosen rows."""
    per_image = [
        sum(((q_i - rows[n]) ** 2).sum() for n in numbers) / len(numbers)
        for q_i, numbers in zip(q, chosen, strict=True)
    ]
    return sum(per_image) / len(per_image)
