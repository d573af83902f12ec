"""Part `agreement`: the GPU computes what the CPU does.

Every method takes steps with SGD on both, from the same weights and the same batches. In float64
they agree: each step's loss, the neighbors that each search found, and in the end what the method
remembers (bank, cache, previous embeddings). Neighbors agree if they are the same rows in the same
order; another row of the same similarity is a tie, which is counted. Rows of a query of zeros (an
image without a previous embedding) are left out, as by the method. In float32 without TF32 and in
bfloat16 rounding grows from step to step: what is left of the agreement is reported.

Without a GPU a CPU stands for it that adds up in another order, so that it rounds otherwise.
"""

import contextlib
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple
from unittest import mock

import tiny
import torch
from every_method import METHODS, Method, Sizes, encoders, placed
from torch import Tensor, nn

from gpu_parts.part import Part
from semi_supervised.pseudo_label import train_head
from utils.method.encoders import QueryTargetEncoders
from utils.runtime import workers

TOLERANCE = 1e-9
ROUNDED = {"float32": None, "bfloat16": torch.bfloat16}
_SEARCHES = ("nearest", "nearest_among", "nearest_with_label")
_REMEMBERED = ("bank.", "cache.", "previous.")


class Side(NamedTuple):
    """Where a method runs; turned: adds up in another order."""

    device: torch.device
    name: str
    turned: bool = False


class Network(NamedTuple):
    """Encoders, the data for them, and the methods that they are tried with.

    build: takes autocast and channels_last. side, small_side: of views and of smaller crops, in
    pixels. seconds: with fewer left no method is begun.
    """

    name: str
    build: Callable[..., QueryTargetEncoders]
    sizes: Sizes
    methods: Sequence[str] = tuple(METHODS)
    batch: int = 4
    side: int = 2
    small_side: int = 2
    steps: int = 12
    seconds: float = 4


class Search(NamedTuple):
    """What a search found, on the host: rows (B, k), whether they count, their similarities."""

    rows: Tensor
    valid: Tensor
    similarity: Tensor


class Trail(NamedTuple):
    """What a method did: its losses, its searches, what it remembers in the end, its module."""

    losses: list[float]
    searches: list[Search]
    memory: dict[str, Tensor]
    module: str


def run(part: Part) -> None:
    """Exactly in float64 first, then how far the others are apart."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # as without --tf32
    if not part.tiny:  # whatever OMP_NUM_THREADS says: one core takes minutes in float64
        torch.set_num_threads(min(16, workers.cores()))
    here, there = Side(torch.device("cpu"), "CPU"), other_side(part.device)
    plain, *real = networks(part.tiny)
    for network in (plain, *real):
        compare_exactly(part, network, here, there)
    for network in real:
        some = network._replace(methods=network.methods[:: 4 if part.tiny else 1])
        for precision in ROUNDED:
            compare_roughly(part, some, precision, here, there)


def other_side(device: torch.device) -> Side:
    """The GPU, or what stands for it on a machine without one."""
    if device.type == "cuda":
        return Side(device, "GPU")
    return Side(device, "CPU that adds up in another order", turned=True)


def networks(small: bool) -> list[Network]:
    """That of the tests, and real ones of real sizes; small: of toy sizes."""

    def of_tests(**_: object) -> QueryTargetEncoders:
        return tiny.encoders()  # without a convolution there is no memory format

    conv4 = partial(Network, "conv4", partial(encoders, "conv4"))
    resnet18 = partial(encoders, "resnet18", small_stem=True)
    resnet = partial(Network, "ResNet-18", resnet18, methods=["2Q"])
    if small:
        sizes = Sizes(48, bank=64)
        real = [conv4(sizes, batch=12, side=16, small_side=8), resnet(sizes, side=8, steps=3)]
    else:
        data = {"side": 32, "small_side": 16}
        real = [conv4(Sizes(256, 10, bank=512, topk=5), batch=64, **data)]
        # So few images that they are visited again.
        real += [resnet(Sizes(64, 10, bank=512, topk=5), batch=32, steps=8, seconds=15, **data)]
    return [Network("two layers", of_tests, Sizes()), *real]


def compare_exactly(part: Part, network: Network, here: Side, there: Side) -> None:
    """In float64; what holds so far is noted after each method."""
    what, done, ties, largest = f"float64, {network.name}", 0, 0, 0.0
    wrong: dict[str, list[str]] = {"losses": [], "neighbors": [], "bank": []}
    for name in _in_time(part, network, "float64"):
        with part.attempt(f"{what}, {name}"):
            one, other = (trail(METHODS[name], network, side) for side in (here, there))
            apart = [abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)]
            if not all(difference <= TOLERANCE for difference in apart):  # nor is nan
                wrong["losses"].append(f"{name} up to {max(apart):.2g} apart")
            differ, tied = differing(one.searches, other.searches)
            wrong["neighbors"] += [f"{name} {differ}"] * bool(differ)
            wrong["bank"] += [f"{name} {entry}" for entry in unlike(one.memory, other.memory)]
            done, ties, largest = done + 1, ties + tied, max(largest, *apart)
            said = f"{done} methods, {network.steps} steps, {here.name} against {there.name}"
            for kind, faults in wrong.items():
                part.check(f"{what}: the same {kind}", not faults, "; ".join(faults) or said)
            part.figure(f"{what}: largest difference of losses", largest)
            part.figure(f"{what}: ties between neighbors", ties)


def compare_roughly(part: Part, network: Network, precision: str, here: Side, there: Side) -> None:
    """In a coarser precision: by folder of the methods' scripts, how far apart the sides are."""
    what, infinite = f"{precision}, {network.name}", []
    apart: dict[str, list[float]] = defaultdict(list)
    alike: dict[str, list[float]] = defaultdict(list)
    for name in _in_time(part, network, precision):
        with part.attempt(f"{what}, {name}"):
            run_on = partial(trail, METHODS[name], network, precision=precision)
            one, other = run_on(here), run_on(there)
            infinite += [name] * (not all(map(math.isfinite, one.losses + other.losses)))
            part.check(f"{what}: losses are finite", not infinite, ", ".join(infinite))
            group = f"{what}, {one.module.split('.')[0].replace('_', '-')}"
            losses = zip(one.losses, other.losses, strict=True)
            apart[group].append(max(abs(a - b) / abs(a) for a, b in losses))
            part.figure(f"{group}: largest relative difference of losses", apart[group])
            if one.searches:
                alike[group].append(shared(one.searches, other.searches))
                part.figure(f"{group}: neighbors that agree", alike[group], "%")


def _in_time(part: Part, network: Network, precision: str) -> Iterator[str]:
    """The network's methods; those for which there is no time are left out."""
    for name in network.methods:
        if part.left() >= network.seconds:
            yield name
        else:
            part.leave_out(f"{precision}, {network.name}, {name}", f"{part.left():.0f} s left")


def trail(method: Method, network: Network, side: Side, *, precision: str = "float64") -> Trail:
    """Train a method for some steps; a head that gives pseudo-labels has two rounds in them."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    as_trained = precision == "bfloat16" and side.device.type == "cuda"
    built = network.build(autocast=ROUNDED.get(precision), channels_last=side.turned or as_trained)
    torch.manual_seed(1)  # of the heads
    model = method.build(built, network.sizes).to(dtype).to(side.device)
    batches = tiny.random_batches(
        network.steps,
        **{"num_images": network.sizes.images, "size": network.batch, "side": network.side},
        **{"classes": network.sizes.classes, "small": method.small, "symmetric": method.symmetric},
        small_side=network.small_side,
    )
    losses, searches, optimizer = [], [], tiny.sgd(model)
    with watched(model, searches), _turned() if side.turned else contextlib.nullcontext():
        for number, batch in enumerate(batches, 1):
            loss, _ = model(placed(batch, side.device, dtype), **method.arguments)
            tiny.update(optimizer, loss)
            losses.append(loss.item())
            if getattr(model, "cache", None) is not None and number % (network.steps // 2) == 0:
                losses.append(_train_head(model, number))
    state = model.state_dict()
    memory = {n: v.cpu() for n, v in state.items() if n.startswith(_REMEMBERED)}
    return Trail(losses, searches, memory, type(model).__module__)


def _train_head(model: nn.Module, number: int) -> float:
    """A round of training on the cache, without images; its loss."""
    embeddings, labels = model.labeled_embeddings(None)
    return train_head(
        *(model.head, embeddings, labels),
        **{"epochs": 2, "batch_size": 4, "learning_rate": 0.1, "decay_epochs": [1]},
        **{"momentum": 0.9, "weight_decay": 1e-4, "seed": [0, number]},
    )["head_loss"]


@contextlib.contextmanager
def _turned() -> Iterator[None]:
    """Linear layers begin their sums with the last summand, which changes nothing but rounding.

    That they read weights in another order would not do: some CPUs then add up as before.
    """
    real = nn.functional.linear

    def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return real(inputs.roll(1, dims=-1), weight.roll(1, dims=-1), bias)

    with mock.patch.object(nn.functional, "linear", linear):
        yield


@contextlib.contextmanager
def watched(model: nn.Module, found: list[Search]) -> Iterator[None]:
    """Note what the searches find that the model's script calls, in their order."""

    def noting(search: Callable) -> Callable:
        def run_search(queries: Tensor, rows: Tensor, **others):
            result = search(queries, rows, **others)
            similarity = torch.einsum("bd,bkd->bk", queries, rows[result.rows].to(queries.dtype))
            counts = result.valid & queries.any(dim=1, keepdim=True)
            found.append(Search(result.rows.cpu(), counts.cpu(), similarity.detach().cpu()))
            return result

        return run_search

    script = sys.modules[type(model).__module__]
    with contextlib.ExitStack() as stack:
        for name in _SEARCHES:
            if hasattr(script, name):
                watch = mock.patch.object(script, name, noting(getattr(script, name)))
                stack.enter_context(watch)
        yield


def differing(one: list[Search], other: list[Search]) -> tuple[str, int]:
    """In words the first search in which the neighbors differ, "" without one; how many ties."""
    ties = 0
    if len(one) != len(other):
        return f"{len(one)} and {len(other)} searches", ties
    for number, (a, b) in enumerate(zip(one, other, strict=True), 1):
        if a.rows.shape != b.rows.shape or not torch.equal(a.valid, b.valid):
            return f"count for others in search {number}", ties
        another = (a.rows != b.rows) & a.valid
        tied = another & ((a.similarity - b.similarity).abs() <= TOLERANCE)
        ties += int(tied.sum())
        if count := int((another & ~tied).sum()):
            return f"{count} of {int(a.valid.sum())} in search {number}", ties
    return "", ties


def shared(one: list[Search], other: list[Search]) -> float:
    """How many of the neighbors that one side found the other has too, in percent."""
    hits = total = 0
    for a, b in zip(one, other, strict=True):
        same = (a.rows.unsqueeze(2) == b.rows.unsqueeze(1)) & b.valid.unsqueeze(1)  # (B, k, k)
        hits += int((same.any(dim=2) & a.valid).sum())
        total += int(a.valid.sum())
    return 100 * hits / total


def unlike(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of what differs: integers at all, the others by more than the tolerance."""
    if one.keys() != other.keys():
        return [*(one.keys() ^ other.keys())]
    return [
        name
        for name, value in one.items()
        if value.shape != other[name].shape
        or not ((value.double() - other[name].double()).abs() <= _allowed(value)).all()
    ]


def _allowed(value: Tensor) -> float:
    return TOLERANCE if value.is_floating_point() else 0
