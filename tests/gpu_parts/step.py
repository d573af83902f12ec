"""A training step of 2Q on a GPU: what it costs above its encoders, and from files of images.

The sides of `compare` take turns, so that a GPU that slows down with its heat slows all of them:
the encoders alone on views that are ready; the whole step, from crops of uint8 on the device
through the loader's views and the training loop; the same with the published arithmetic. As eager
PyTorch, and compiled.
"""

import argparse
import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import loader as loader_benchmark
import numpy as np
import search
import spans
import step as step_benchmark
import torch

from gpu_parts.part import Part
from utils.cli import build_training
from utils.data.datasets import read_image_folder
from utils.runtime import workers

ROUNDS = 5
_ROUND = 0.6  # seconds that a side has of one
_LEAST_SHARE = 97  # percent of the encoders' images a second that a whole step is to reach
_LEAST_FED = 95  # percent
_REAL = ("--precision", "bf16", "--channels_last", "--weak_strong")  # ResNet-50, 224, 256, 128000
_TINY = (
    *("--arch", "conv4", "--image_size", 32, "--batch_size", 8, "--mem_bank_size", 512),
    "--weak_strong",
)
_PICTURES = 64  # files, each of which stands for many images: it is decoded every time
_PROFILED = 10  # steps
_ENDING = 4  # seconds before its end at which a part ends itself


@dataclass
class Study:
    """What is measured: sides, each a step of `args.batch_size` images; clock: waits for a GPU."""

    part: Part
    args: argparse.Namespace
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    sides: dict[str, Callable[[], object]]
    clock: search.Clock


def run(part: Part) -> None:
    """All of it, as far as the part's seconds go; the longest comes last."""
    study = build_study(part)
    with part.attempt("eager"):
        compare(study, "eager")
    with part.attempt("views"):
        views = step_benchmark.ready_loader(study.args).epoch(1)
        making = {"views": partial(next, views)}
        times = search.in_turn(making, rounds=ROUNDS + 1, calls=2 * ROUNDS, clock=study.clock)
        part.figure("views of a batch", [1000 * s for s in times["views"][1:]], "ms")
    with part.attempt("from files"):
        from_files(study, seconds=0.5 if part.tiny else 2)
    if part.tiny:
        part.leave_out("compiled", "half a minute of a compiler tells nothing at toy sizes")
        return
    compiled(study, least=40)


def build_study(part: Part) -> Study:
    """The method with its bank, and the three sides of `compare`."""
    flags = ("--device", part.device, *(_TINY if part.tiny else _REAL))
    args = step_benchmark.script_flags(*flags)
    model, optimizer = step_benchmark.build(args)
    views = step_benchmark.make_batch(args, args.batch_size)

    def steps_of(method: torch.nn.Module, folder: str) -> Iterator[torch.Tensor]:
        crops = step_benchmark.ready_loader(args)
        return step_benchmark.training_steps(method, optimizer, crops, part.scratch / folder)

    published = step_benchmark.Published2Q(model)
    sides = {
        "encoders alone": partial(step_benchmark.encoder_step, model, optimizer, views),
        "whole step": partial(next, steps_of(model, "ours")),
        "published arithmetic": partial(next, steps_of(published, "published")),
    }
    return Study(part, args, model, optimizer, sides, partial(search.now, part.device))


def compare(study: Study, name: str) -> None:
    """Images a second of the sides, in turn; memory; whether the host is what a step waits for."""
    part, clock, sides = study.part, study.clock, study.sides
    for _ in range(3):  # libraries are set up, networks compiled, graphs recorded
        losses = {n: side() for n, side in sides.items() if n != "encoders alone"}
        sides["encoders alone"]()
    for n, loss in losses.items():
        part.check(f"{name}, {n}: the loss is finite", bool(loss.isfinite()), f"{loss:.4f}")
    once = search.in_turn(sides, rounds=1, clock=clock)["whole step"][0]
    calls = 1 if part.tiny else min(max(round(_ROUND / once), 1), 20)
    times = search.in_turn(sides, rounds=ROUNDS, calls=calls, clock=clock)
    note_rates(part, name, times, study.args.batch_size)
    shares = [100 * host_share(sides["whole step"], clock) for _ in range(ROUNDS)]
    part.figure(f"{name}, host of a lone step (launch-bound near 100)", shares, "%")
    if part.device.type == "cpu":
        part.leave_out("peak memory, device idle in a step", "of a GPU alone")
        return
    for n, side in sides.items():
        peak = search.gpu_megabytes(side) / 1024
        part.figure(f"{name}, {n}, peak memory above what stays", peak, "GiB")
    with part.attempt(f"{name}, profile of whole steps"):
        idle = 100 - busy_share(sides["whole step"], part.scratch, clock)
        part.figure(f"{name}, device idle in whole steps", idle, "%")


def note_rates(part: Part, name: str, times: dict[str, list[float]], batch: int) -> None:
    """Figures of the seconds that a step of each side took in each round."""
    for n, seconds in times.items():
        part.figure(f"{name}, {n}", [batch / s for s in seconds], "images/s")
    whole = times["whole step"]
    shares = [100 * a / b for a, b in zip(times["encoders alone"], whole, strict=True)]
    part.figure(f"{name}, whole step of encoders alone", shares, "%", at_least=_LEAST_SHARE)
    ratios = [a / b for a, b in zip(times["published arithmetic"], whole, strict=True)]
    part.figure(f"{name}, speed of ours", ratios, "x published")


def host_share(
    step: Callable[[], object],
    clock: search.Clock,
    *,
    here: Callable[[], float] = time.perf_counter,
) -> float:
    """The share of a step's time after which the host has told the GPU all it has to do.

    Of a step alone: of several in a row the host waits for the one before.
    """
    start = clock()
    step()
    told = here() - start
    return told / (clock() - start)


def compiled(study: Study, *, least: float, **how: Any) -> None:
    """`compare` with encoders that are compiled, if `least` seconds are left.

    how: what their `compile` is told.
    """
    part = study.part
    if part.left() < least:
        part.leave_out("compiled", f"{part.left():.0f} s left")
        return
    with part.attempt("compiled"), ends_in_time(part, "compiled"):
        torch.compiler.reset()
        start = study.clock()
        study.model.encoders.compile(**how)
        study.sides["encoders alone"]()
        part.figure("compiled, first step of the encoders", study.clock() - start, "s")
        compare(study, "compiled")


@contextlib.contextmanager
def ends_in_time(part: Part, name: str) -> Iterator[None]:
    """End this process, and say so, shortly before it would be killed: a compiler heeds nobody."""

    def end() -> None:
        part.leave_out(name, "was not done when the time of the part was over")
        os._exit(0)

    timer = threading.Timer(max(part.left() - _ENDING, 0), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def from_files(study: Study, *, seconds: float) -> None:
    """The training loop from JPEGs of 500x375, decoded by all cores, for some seconds.

    First the loader alone: what the cores can decode.
    """
    part, args = study.part, argparse.Namespace(**vars(study.args))
    args.num_workers = workers.cores()
    folder = part.scratch / "pictures"
    folder.mkdir(exist_ok=True)
    loader_benchmark.write_pictures(folder, 8 if part.tiny else _PICTURES)
    files = read_image_folder(folder)
    images = files.take(np.arange(step_benchmark.IMAGES) % len(files))
    loader = build_training.build_loader(args, images)
    run, batches = step_benchmark.training_batches(
        study.model, study.optimizer, loader, part.scratch / "from_files"
    )

    def train() -> None:
        run.step(*run.forward(next(batches)))

    measured = partial(rate, batch=args.batch_size, seconds=seconds, clock=study.clock)
    bursts = args.num_workers  # workers that begin together are done together
    alone = measured(partial(next, batches), first=2 * bursts, multiple=bursts)
    part.figure("from files, loader alone", alone, "images/s")
    part.figure("from files, loader alone, each core", alone / args.num_workers, "images/s")
    trained = measured(train, first=bursts, multiple=bursts)
    part.figure("from files, training", trained, "images/s")
    busy = 0.0
    if part.device.type == "cuda":
        with part.attempt("profile of training from files"):
            busy = busy_share(train, part.scratch, study.clock)
            part.figure("from files, device idle", 100 - busy, "%")
    else:
        part.leave_out("from files, device idle", "of a GPU alone")
    fed = max(busy, 100 * trained / alone)
    name = "from files, device busy or of what the cores decode, the higher"
    part.figure(name, fed, "%", at_least=_LEAST_FED)
    batches.close()


def rate(
    step: Callable[[], object],
    *,
    batch: int,
    seconds: float,
    first: int,
    multiple: int,
    clock: search.Clock,
    here: Callable[[], float] = time.perf_counter,
) -> float:
    """Images a second over at least so many seconds, in a multiple of steps, after some first."""
    for _ in range(first):
        step()
    start = clock()
    for number in itertools.count(1):
        step()
        if number % multiple == 0 and here() - start >= seconds:
            return number * batch / (clock() - start)


def busy_share(step: Callable[[], object], scratch: Path, clock: search.Clock) -> float:
    """The share of the time in which a GPU does anything during some steps, in percent."""
    # Without the host's operations, the recording of which would slow it down.
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(_PROFILED):
            step()
        clock()
    device = spans.spans_of(profile, scratch).device
    start, end = min(span.start for span in device), max(span.end for span in device)
    return 100 - spans.idle_share(device, start, end)
