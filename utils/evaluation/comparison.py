"""What is measured of an encoder to compare it: accuracies, how its features lie, speed, size.

N images, F feature size.
"""

import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from utils.data.datasets import ImageSet
from utils.data.eval_loader import LabeledLoader
from utils.evaluation import knn, linear_probe
from utils.evaluation.feature_cache import Features
from utils.evaluation.features import finite_rows
from utils.evaluation.linear_run import FromFeatures, LinearRun, Recipe
from utils.method import collapse
from utils.method.encoders import Backbone
from utils.runtime import distributed
from utils.runtime.errors import RunError

MOST = 2048  # images of which distances are measured, evenly taken
CROPS = ("first crops", "second crops")
_LONG_PASS = 0.25  # seconds, from which a batch is large enough to be timed
_SECONDS = 1.0  # of timed passes
_FEWEST_PASSES = 3


def alignment(one: Tensor, two: Tensor) -> float:
    """Mean squared distance of the two views of each image: 0 to 4, the lower the closer.

    one, two: (N, F), unit norm, row i of both the same image. Wang and Isola 2020 (arXiv
    2005.10242), with their alpha 2.
    """
    return float((one.double() - two.double()).square().sum(dim=1).mean())


def uniformity(features: Tensor) -> float:
    """Logarithm of the mean of exp(-2 d^2) over all pairs: -8 to 0, the lower the more even.

    features: (N, F), unit norm, N at least 2; d is the distance of two different rows. 0: all are
    one point; about -4 is the least that many points reach. Wang and Isola 2020 (arXiv 2005.10242),
    with their t 2.
    """
    return float(torch.pdist(features.double()).square().mul(-2).exp().mean().log())


def evenly_taken(images: ImageSet) -> ImageSet:
    """At most MOST of the images, in equal steps."""
    return images.take(np.arange(0, len(images), -(-len(images) // MOST)))


@torch.no_grad()
def extract_crops(backbone: Backbone, loader: LabeledLoader, text: str) -> Features | None:
    """Features of two random crops of each image, those of the loader's epochs 1 and 2.

    By CROPS: features (N, F) float32, not normalized, and labels (N,), on the CPU, in the order of
    the images that can be read. None but on the main process; all call it. text: of the bar.
    RunError for features that are not finite.
    """
    network = backbone.module.eval()
    nothing = torch.zeros(0, backbone.feature_dim)  # of a process without an image in a batch
    crops, labels = {}, torch.from_numpy(loader.images.labels)
    for epoch, name in enumerate(CROPS, 1):
        parts, numbers = [], []
        bar = {"total": len(loader), "leave": False, "disable": not distributed.shows_bars()}
        for batch in tqdm(loader.epoch(epoch), f"{text}, {name}", **bar):
            some = network(batch.images).float().cpu() if len(batch.images) else nothing
            parts.append(distributed.gather_uneven(some))
            numbers.append(distributed.gather_uneven(batch.index))
        # One that stands for a broken image is there twice, with the same crop.
        numbers, rows = np.unique(torch.cat(numbers).numpy(), return_index=True)
        crops[name] = torch.cat(parts)[rows], labels[numbers]
        if not finite_rows(crops[name][0]).all():
            raise RunError(f"{text}: features of random crops are not finite")
    return crops if distributed.is_main() else None


def crop_figures(crops: Features) -> dict[str, float | None]:
    """`alignment` and `uniformity` of what `extract_crops` gave; None of a single image.

    The uniformity is the mean of those of the first and of the second crops, as the authors' code
    has it.
    """
    one, two = (normalize(features, dim=1) for features, _ in crops.values())
    if len(one) < 2:
        return {"alignment": None, "uniformity": None}
    return {
        "alignment": alignment(one, two),
        "uniformity": (uniformity(one) + uniformity(two)) / 2,
    }


def feature_figures(features: Features, *, num_classes: int) -> dict[str, float | None]:
    """k-NN accuracies, percent, and the effective rank of the unit val features, nan if all are 0.

    The features are L2-normalized in place. None: fewer training images than neighbors.
    """
    ks = [k for k in (1, 20) if k <= len(features["train"][1])]
    found = knn.knn_figures(*features.values(), ks=ks, num_classes=num_classes)
    votes = (("1-NN", 1, "accuracy"), ("20-NN", 20, "accuracy"), ("weighted 20-NN", 20, "weighted"))
    figures = {column: found[k][vote] if k in found else None for column, k, vote in votes}
    rank = collapse.embedding_health(features["val"][0], most=MOST)["effective_rank"]
    return figures | {"effective rank": float(rank)}


def linear_sweep(
    recipe: Recipe,
    backbone: Backbone,
    data: FromFeatures,
    *,
    num_classes: int,
    epochs: int,
    device: torch.device,
    text: str,
) -> dict[str, dict[str, float | int | None]]:
    """What a linear classifier of each learning rate reaches, see `linear_probe.summarize`.

    RunError if all rates diverge. text: of the bar.
    """
    run = LinearRun(recipe, backbone, num_classes=num_classes, device=device)
    run.probe.standardize.measure(data.for_statistics())
    bar = {"total": epochs, "leave": False, "disable": not distributed.shows_bars()}
    for _ in tqdm(run.train(data, epochs=epochs, eval_freq=1), text, **bar):
        pass
    return linear_probe.summarize(recipe.lr, run.history)


@torch.no_grad()
def images_per_second(
    network: nn.Module, *, batch_size: int, image_size: int, device: torch.device
) -> tuple[float, int]:
    """Images that pass through the network in a second, with a batch ready on the device.

    The fastest of the passes of a second, at least three, after others to warm up: what else runs
    on the machine makes them slower. The batch grows up to batch_size as long as a pass takes less
    than a quarter of a second; it is returned too.
    """
    network.eval()

    def seconds(images: Tensor) -> float:
        start = time.perf_counter()
        float(network(images).sum())  # reads a number back: the device has finished then
        return time.perf_counter() - start

    count = 1
    while True:
        images = torch.randn(count, 3, image_size, image_size, device=device)
        if count == batch_size or min(seconds(images) for _ in range(2)) > _LONG_PASS:
            break
        count = min(2 * count, batch_size)
    seconds(images)
    passes = []
    while len(passes) < _FEWEST_PASSES or sum(passes) < _SECONDS:
        passes.append(seconds(images))
    return count / min(passes), count


def num_parameters(network: nn.Module) -> int:
    """How many numbers are trained in a network."""
    return sum(parameter.numel() for parameter in network.parameters())
