"""The search of a step on a GPU: ours beside the published arithmetic, and what bounds both.

Times of calls in a row, since a single one takes the host longer than the GPU; the sides take
turns. What any exact search has to do is to read the bank once.
"""

import argparse
import contextlib
import statistics
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import scale
import search
import torch
from torch import Tensor

from gpu_parts.part import Part


class Sizes(NamedTuple):
    """B, K, D; K of the largest bank; neighbors of each method; calls in a row, rounds of them."""

    batch: int
    bank: int
    dim: int
    classes: int
    rows: tuple[int, ...]
    topk: dict[str, int]
    calls: int
    rounds: int


REAL = Sizes(256, 128_000, 512, 1000, scale.ROWS, {"2q": 5, "supervised": 10}, 20, 5)
TINY = Sizes(16, 2048, 32, 10, (256, 1024), {"2q": 5, "supervised": 10}, 2, 2)
CANDIDATES = 10
MOST_MEGABYTES = {"2q": 160, "supervised": 170}
_SECONDS = 4  # that a step of this part may take; less are not begun with


def run(part: Part) -> None:
    """Time, memory, and time against K, each as far as the part's seconds go."""
    sizes = TINY if part.tiny else REAL
    data = search.make_data(_namespace(part, sizes, sizes.bank))
    clock = partial(search.now, part.device)
    with part.attempt("reading the bank"):
        read = best_read(data, sizes, clock)
        part.figure("reading the bank", 1000 * read, "ms")
        part.figure("reading the bank, rate", data["bank"].nbytes / read / 1e9, "GB/s")
        for tf32 in (False, True):
            for method in search.METHODS:
                with part.attempt(f"{method}, {_kind(tf32)}"), products_in(tf32):
                    _compare(part, method, data, sizes, read=read, tf32=tf32)
    del data
    with part.attempt("time against K"):
        _against_rows(part, sizes)
    part.leave_out("k-NN search and vote", "faiss searches on the CPU: benchmarks/knn_search.py")


def _namespace(part: Part, sizes: Sizes, rows: int) -> argparse.Namespace:
    """What `search.make_data` is told."""
    shape = {"batch": sizes.batch, "bank": rows, "dim": sizes.dim, "classes": sizes.classes}
    return argparse.Namespace(**shape, device=part.device)


def _kind(tf32: bool) -> str:
    return "TF32" if tf32 else "float32"


@contextlib.contextmanager
def products_in(tf32: bool) -> Iterator[None]:
    """Products of float32 matrices in TF32 or not, as the scripts' --tf32 sets it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def best_read(data: dict[str, Tensor], sizes: Sizes, clock: search.Clock) -> float:
    """Seconds to read every number of the bank once: the best round, the first not counted."""
    sides = {"read": lambda: data["bank"].sum()}
    times = search.in_turn(sides, rounds=sizes.rounds + 1, calls=sizes.calls, clock=clock)
    return min(times["read"][1:])


def _compare(
    part: Part, method: str, data: dict[str, Tensor], sizes: Sizes, *, read: float, tf32: bool
) -> None:
    """Both sides of a method in turn: loss, time and memory."""
    name = f"{method}, {_kind(tf32)}"
    if part.left() < _SECONDS:
        part.leave_out(name, "no time left")
        return
    k = sizes.topk[method]
    sides = {n: partial(s, data, k, CANDIDATES) for n, s in search.METHODS[method].items()}
    losses = {n: side() for n, side in sides.items()}
    said = ", ".join(f"{n} {loss.item():.7f}" for n, loss in losses.items())
    part.check(f"{name}: same loss on both sides", search.agree(losses, tf32=tf32), said)
    clock = partial(search.now, part.device)
    times = search.in_turn(sides, rounds=sizes.rounds, calls=sizes.calls, clock=clock)
    for n, seconds in times.items():
        part.figure(f"{name}, {n}", [1000 * s for s in seconds], "ms")
    ratios = [a / b for a, b in zip(times["published"], times["ours"], strict=True)]
    part.figure(f"{name}, speed of ours", ratios, "x published")
    readings = statistics.median(times["ours"]) / read
    part.figure(f"{name}, ours in readings of the bank", readings, "x")
    if part.device.type == "cpu":
        part.leave_out("memory above the bank", "of a GPU alone; else benchmarks/search.py")
        return
    for n, side in sides.items():
        most = MOST_MEGABYTES[method] if n == "ours" else None
        part.figure(f"{name}, {n}, memory", search.gpu_megabytes(side), "MB", at_most=most)


def _against_rows(part: Part, sizes: Sizes) -> None:
    """Ours for banks of several sizes; linear in K: the same time for each thousand rows."""
    if part.left() < _SECONDS:
        part.leave_out("time against K", "no time left")
        return
    everything = search.make_data(_namespace(part, sizes, max(sizes.rows)))
    clock = partial(search.now, part.device)
    for rows in sizes.rows:
        data = scale.first_rows(everything, rows)
        sides = {
            method: partial(both["ours"], data, sizes.topk[method], CANDIDATES)
            for method, both in search.METHODS.items()
        }
        for side in sides.values():
            side()
        for method, seconds in search.in_turn(
            sides, rounds=sizes.rounds, calls=sizes.calls, clock=clock
        ).items():
            part.figure(f"{method}, K {rows}", [1000 * s for s in seconds], "ms")
            each = 1e6 * statistics.median(seconds) / (rows / 1000)
            part.figure(f"{method}, K {rows}, each 1000 rows", each, "us")
