"""What a GPU did when: spans of time out of a torch profile, and how much of the time they fill.

    with torch.profiler.profile() as profile:
        ...
    trace = spans_of(profile, folder)
    share = idle_share(trace.device, start, end)

Times are microseconds on one clock for host and device.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_CALLS = ("cuda_runtime", "cuda_driver")


class Span(NamedTuple):
    """From start to end on a stream of the device, or on a thread of the host."""

    stream: int
    start: float
    end: float
    name: str = ""


class Trace(NamedTuple):
    """device: kernels and copies. calls: of the host to CUDA. marks: `record_function` blocks."""

    device: list[Span]
    calls: list[Span]
    marks: list[Span]


def spans_of(
    profile: torch.profiler.profile, scratch: Path, *, device: Sequence[str] = ON_DEVICE
) -> Trace:
    """The spans of a profile that has ended, which is written into the folder `scratch` for it.

    device: categories of the trace that count as the device's work; ("cpu_op",) has spans without a
    GPU too.
    """
    path = scratch / "trace.json"
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text(errors="replace"))["traceEvents"]
    path.unlink()
    found: dict[str, list[Span]] = defaultdict(list)
    for event in events:
        if event.get("ph") != "X":  # no span
            continue
        stream = event.get("args", {}).get("stream", event["tid"])
        span = Span(stream, event["ts"], event["ts"] + event["dur"], event["name"])
        found[event.get("cat", "")].append(span)
    kinds = (device, _CALLS, ("user_annotation",))
    return Trace(*([span for kind in part for span in found[kind]] for part in kinds))


def within(spans: Iterable[Span], start: float, end: float) -> list[Span]:
    """The parts of spans that lie between start and end."""
    return [
        span._replace(start=max(start, span.start), end=min(end, span.end))
        for span in spans
        if span.start < end and span.end > start
    ]


def busy(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """When any of the spans is there: (start, end) that do not touch each other, in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted((span.start, span.end) for span in spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def total(spans: Iterable[Span]) -> float:
    """How long any of the spans is there."""
    return sum(end - start for start, end in busy(spans))


def idle_share(spans: Iterable[Span], start: float, end: float) -> float:
    """The share of the time from start to end in which none of the spans is there, in percent."""
    return 100 * (1 - total(within(spans, start, end)) / (end - start))


def busiest(spans: Iterable[Span]) -> int | None:
    """The stream with the most work; None without any."""
    work: dict[int, float] = defaultdict(float)
    for span in spans:
        work[span.stream] += span.end - span.start
    return max(work, key=work.__getitem__, default=None)


def beside(spans: Sequence[Span], stream: int | None) -> float:
    """The share of the time of other streams' work in which `stream` works too, in percent.

    nan where the other streams have no work.
    """
    other = [span for span in spans if span.stream != stream]
    own = [span for span in spans if span.stream == stream]
    # Both at once: what the two have together, less what they fill between them.
    if not other:
        return float("nan")
    shared = total(other) + total(own) - total(spans)
    return 100 * shared / total(other)
