"""Part `no_waiting`: host and GPU do not wait for each other.

First every method's real loop (loader, `Run`, bfloat16) under CUDA's watch over operations that
wait, which raise. That watch does not see everything: not the end of an event, by which `HostCopy`
waits for the copies of the step before (that it is that step is checked here), no copy from memory
that is not pinned, no allocation. A profile of CMSF-2Q shows these. From it too: the share of the
time in which the device is idle, and how much of the next batch's copy and augmentation lies beside
training. Both from the start of one step to the start of another, when the loop is running.

Without a GPU a device without data stands for it, on which whatever waits for a value fails.
"""

import argparse
import contextlib
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import spans
import tiny
import torch
from every_method import METHODS, Method, Sizes, device_of_shapes, encoders
from torch import nn
from torch.profiler import record_function

from gpu_parts.part import Part
from self_supervised.train_msf_2q import CMSF2Q
from utils.cli import build_training
from utils.data.cropping import CropGroup
from utils.data.datasets import PixelSet
from utils.data.train_loader import TwoViewLoader
from utils.method import previous_embeddings
from utils.method.encoders import QueryTargetEncoders
from utils.runtime import workers
from utils.runtime.streams import HostCopy
from utils.training import loss_watch
from utils.training.engine import Run

WARM_UP, WATCHED = 4, 6  # steps
PLAIN, SETTLING, TRACED = 6, 2, 8  # steps after a warm-up: without a profile, and with it
_BATCH, _SIDE, _SMALL = 32, 32, 16
_PROFILE = 8  # seconds that a profile may take
_COMPILATION, _AFTER_COMPILATION = 30, 4  # seconds that it may take, and that must be left then
_STEP = "step"
# Of an operation that waits: a GPU under the watch, and what stands for it.
_SAYS = re.compile("synchronizing CUDA operation|meta tensor", re.IGNORECASE)


class Network(NamedTuple):
    """What is profiled; workers: that cut the crops, 0: the device does."""

    name: str
    arch: str
    side: int
    batch: int
    workers: int
    most_idle: float | None = None  # percent, the goal


def run(part: Part) -> None:
    """The watch over all methods, profiles, the watch over compiled encoders."""
    torch.backends.cudnn.benchmark = True  # as the scripts
    watch_methods(part, list(METHODS))
    for network in networks(part):
        profile_in_time(part, network)
    if part.device.type != "cuda":
        part.leave_out("compiled encoders", "no GPU")
    elif part.left() < _COMPILATION:
        part.leave_out("compiled encoders", f"{part.left():.0f} s left")
    else:
        watch_compiled(part)


def networks(part: Part) -> list[Network]:
    """What is profiled: the published network, and a small one whose crops come from the host."""
    if part.tiny:
        return [Network("conv4", "conv4", 32, 16, workers=0)]
    cutting = max(1, min(14, workers.cores() - 2))
    small = f"ResNet-18 of 96 px, crops by {cutting} workers"
    return [
        Network("ResNet-50 of 224 px", "resnet50", 224, 256, workers=0, most_idle=5),
        Network(small, "resnet18", 96, 256, workers=cutting),
    ]


def pictures(count: int, side: int) -> PixelSet:
    """Noise in memory, of ten classes."""
    pixels = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    names, labels = [f"{number}.png" for number in range(count)], [n % 10 for n in range(count)]
    return PixelSet(Path("noise"), names, labels, [str(label) for label in range(10)], pixels)


def train(
    model: nn.Module,
    loader: TwoViewLoader,
    folder: Path,
    *,
    steps: int,
    at_step: Callable[[int], None],
    arguments: dict[str, Any],
) -> None:
    """The loop of the training scripts, broken off after some steps; at_step: begins each."""
    flags = argparse.Namespace(learning_rate=0.05, sgd_momentum=0.9, weight_decay=1e-4)
    flags.device = loader.device
    optimizer = build_training.build_optimizer(flags, model)
    args = tiny.run_args(folder, learning_rate=0.05, epochs=1, knn_freq=-1)
    with Run(args, model, optimizer) as run:
        for batch in run.batches(loader):
            at_step(run.epoch_step)
            loss, stats = run.forward(batch, **arguments)
            run.step(loss, stats)
            if run.epoch_step == steps:
                break


class Watch:
    """Called at each step: after the warm-up whatever waits for a GPU raises.

    last: the last step. ages: of the copies to the host, how many steps after they were begun they
    were asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.step, self.ages = device, 0, []
        self.last = WARM_UP + WATCHED if device.type != "meta" else 3

    def __call__(self, step: int) -> None:
        self.step = step
        if step == WARM_UP + 1 and self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Count the ages of copies in the body; what waits is allowed again after it."""
        watch = self

        class Aging(HostCopy):
            def __init__(self, tensor: torch.Tensor) -> None:
                super().__init__(tensor)
                self._begun = watch.step

            def get(self) -> torch.Tensor:
                watch.ages.append(watch.step - self._begun)
                return super().get()

        with contextlib.ExitStack() as stack:
            if self.device.type != "meta":
                for module in (previous_embeddings, loss_watch):
                    stack.enter_context(mock.patch.object(module, "HostCopy", Aging))
            if self.device.type == "cuda":
                stack.callback(torch.cuda.set_sync_debug_mode, "default")
            yield


def waits(
    method: Method,
    networks: QueryTargetEncoders,
    watch: Watch,
    folder: Path,
    *,
    cut_on_device: bool = True,
) -> str:
    """Train a method under the watch: what waited, in words, "" if nothing did."""
    images = pictures(_BATCH * (WARM_UP + WATCHED + 2), 48)
    model = method.build(networks, Sizes(len(images), 10, bank=256, topk=5)).to(watch.device)
    views: dict[str, Any] = {"small": [CropGroup(n, _SMALL) for n in method.small]}
    views |= {"symmetric": method.symmetric, "weak_strong": not method.symmetric}
    loader = TwoViewLoader(
        *(images,),
        **{"batch_size": _BATCH, "image_size": _SIDE, "device": watch.device, **views},
        cut_on_device=cut_on_device,
    )
    steps = {"steps": watch.last, "at_step": watch, "arguments": method.arguments}
    try:
        with watch.on():
            train(model, loader, folder, **steps)
    except RuntimeError as error:
        text = (str(error).splitlines() or [""])[0]
        if _SAYS.search(text):
            return f"step {watch.step}: {text}"
        raise
    return ""


def watch_methods(part: Part, names: Sequence[str]) -> None:
    """No method's step waits, but the one that says so; copies are asked for a step later."""
    faults, unlike, ages, done = [], [], set(), 0
    with contextlib.ExitStack() as stack:
        device = part.device
        if device.type != "cuda":
            device = stack.enter_context(device_of_shapes())
            part.leave_out("copies to the host are asked for a step later", "no GPU")
        for number, (name, cut) in enumerate([*((n, True) for n in names), (names[0], False)]):
            method, watch = METHODS[name], Watch(device)
            with part.attempt(f"steps of {name}" + ", crops from the host" * (not cut)):
                folder = part.scratch / f"watch_{number}"
                waited = waits(method, _small_encoders(), watch, folder, cut_on_device=cut)
                if method.waits:
                    said = waited or "does not wait"
                    part.check(f"{name}: waits, as its flag's help says", bool(waited), said)
                    continue
                done += 1
                faults += [f"{name}: {waited}"] * bool(waited)
                said = f"{done} loops of {watch.last} steps on {device}"
                part.check("no step waits", not faults, "; ".join(faults) or said)
                ages |= set(watch.ages)
                unlike += [name] * (set(watch.ages) != {1})
        if device.type == "cuda":
            said = f"after {sorted(ages)} steps {', '.join(unlike)}"
            part.check("copies to the host are asked for a step later", ages == {1}, said)


def _small_encoders() -> QueryTargetEncoders:
    return encoders("conv4", autocast=torch.bfloat16, channels_last=True)


class Tracer:
    """Called at each step: steps without a profile, then with one, a mark at the start of each."""

    last = WARM_UP + PLAIN + SETTLING + TRACED + 1

    def __init__(self) -> None:
        self.profile: torch.profiler.profile | None = None
        self.times: list[float] = []

    def __call__(self, step: int) -> None:
        self.times.append(time.perf_counter())
        if step == WARM_UP + PLAIN + 1:
            self.profile = torch.profiler.profile()
            self.profile.start()
        with record_function(_STEP):
            pass

    def plain_seconds(self) -> float:
        """A step's, without the profile."""
        return (self.times[WARM_UP + PLAIN] - self.times[WARM_UP]) / PLAIN


def profile_in_time(part: Part, network: Network) -> None:
    """`profile_training`, if there is time for it."""
    what = f"profile, {network.name}"
    if part.left() < _PROFILE:
        part.leave_out(what, f"{part.left():.0f} s left")
        return
    with part.attempt(what):
        profile_training(part, network)


def profile_training(part: Part, network: Network) -> None:
    """Figures of a real loop of CMSF-2Q."""
    device, tracer = part.device, Tracer()
    images = pictures(network.batch * (tracer.last + 3), max(48, network.side // 2))
    loader = TwoViewLoader(
        *(images,),
        **{"batch_size": network.batch, "image_size": network.side, "weak_strong": True},
        **{"device": device, "num_workers": network.workers},
        cut_on_device=network.workers == 0,
    )
    fast = {"autocast": torch.bfloat16, "channels_last": device.type == "cuda"}
    both = encoders(network.arch, proj_dim=None, **fast)
    model = CMSF2Q(both, len(images), mem_bank_size=4096, topk=5, topkp=5).to(device)
    folder = part.scratch / f"profile_{network.arch}"
    try:
        train(model, loader, folder, steps=tracer.last, at_step=tracer, arguments={})
        if device.type == "cuda":
            torch.cuda.synchronize()
    finally:
        if tracer.profile:
            tracer.profile.stop()
    kinds = spans.ON_DEVICE if device.type == "cuda" else ("cpu_op",)
    trace = spans.spans_of(tracer.profile, part.scratch, device=kinds)
    what = f"{network.name}, B {network.batch}"
    part.figure(f"{what}: a step without the profile", 1000 * tracer.plain_seconds(), "ms")
    report(part, what, trace, streams=device.type == "cuda", most_idle=network.most_idle)


def report(
    part: Part, what: str, trace: spans.Trace, *, streams: bool, most_idle: float | None = None
) -> None:
    """Figures and checks of a trace; streams: that of a GPU, not of a CPU's operations."""
    marks = sorted(mark.start for mark in trace.marks if mark.name == _STEP)[SETTLING:]
    start, end, steps = marks[0], marks[-1], len(marks) - 1
    work = spans.within(trace.device, start, end)
    if not work:
        part.leave_out(f"{what}: profile", "it shows no work of the device")
        return
    part.figure(f"{what}: a step in the profile", (end - start) / steps / 1000, "ms")
    part.figure(f"{what}: kernels and copies in a step", len(work) / steps)
    if not streams:
        part.leave_out(f"{what}: idle device, overlap and waits", "no GPU")
        return
    idle = spans.idle_share(work, start, end)
    part.figure(f"{what}: device idle", idle, "%", at_most=most_idle)
    beside = spans.beside(work, spans.busiest(work))
    part.figure(f"{what}: next batch's work beside training", beside, "%")
    calls = spans.within(trace.calls, start, end)
    ends = [call for call in calls if "Synchronize" in call.name]
    busy = (end - start - spans.total(ends)) / steps / 1000
    part.figure(f"{what}: host at work in a step", busy, "ms")
    kept = [
        call
        for call in calls
        if any(word in call.name.lower() for word in ("alloc", "free", "memcreate"))
    ]
    part.figure(f"{what}: memory taken or freed in a step, times", len(kept) / steps)
    stops = [c.name for c in ends if c.name != "cudaEventSynchronize"]
    stops += [call.name for call in calls if call.name in ("cudaMemcpy", "cudaMemset")]
    part.check(f"{what}: the host waits for no stream", not stops, ", ".join(sorted({*stops})))
    said = f"{len(ends)} ends of events in {steps} steps; 2 a step: embeddings and loss"
    part.check(
        f"{what}: the host waits for what the step before sent", len(ends) <= 2 * steps, said
    )
    pageable = {span.name for span in work if "Pageable" in span.name}
    part.check(f"{what}: all copies are from pinned memory", not pageable, ", ".join(pageable))


def watch_compiled(part: Part) -> None:
    """CMSF-2Q with compiled encoders, if they are compiled within the time that is left."""
    what, compiled = "compiled encoders do not wait", _small_encoders().to(part.device)
    try:
        with _within(part.left() - _AFTER_COMPILATION):
            compiled.compile()
            views = torch.randn(2, _BATCH, 3, _SIDE, _SIDE, device=part.device)
            (compiled.query(views[0]) * compiled.target(views[1])).sum().backward()
            torch.cuda.synchronize()
    except Exception as error:  # a compiler can fail in about any way
        reason = (str(error).splitlines() or [""])[0][:200]
        part.leave_out(what, f"not compiled: {type(error).__name__}: {reason}")
        return
    with part.attempt(what):
        waited = waits(METHODS["2Q"], compiled, Watch(part.device), part.scratch / "compiled")
        part.check(what, not waited, waited)


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """TimeoutError if the body takes longer."""

    def end(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1), 1)  # again: see `stop_signals`
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
