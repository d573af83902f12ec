"""Spans of a device's work, placed by hand, and out of a real profile of the CPU."""

import json
import math
import random

import gpu_parts  # noqa: F401  the benchmarks' folder
import pytest
import torch
from spans import Span, beside, busiest, busy, idle_share, spans_of, total, within

#            0    10   20   30   40   50
# stream 7   [----]         [---------]
# stream 7        [--]
# stream 20     [-----]  [----]
WORK = [
    *(Span(7, 0, 10), Span(7, 30, 50), Span(7, 10, 16)),
    *(Span(20, 6, 18), Span(20, 24, 34)),
]


def test_when_the_device_is_busy():
    assert busy(WORK) == [(0, 18), (24, 50)] and busy([]) == []
    assert total(WORK) == 44 and total([Span(7, 0, 9), Span(8, 2, 3)]) == 9


def test_idle_is_what_no_stream_fills():
    assert idle_share(WORK, 0, 50) == pytest.approx(12)
    assert idle_share(WORK, 10, 30) == pytest.approx(30)  # work over the edges counts inside
    assert idle_share(WORK, -50, 0) == idle_share([], 0, 1) == 100
    assert idle_share(WORK, 1, 2) == 0


def test_work_is_cut_at_the_edges():
    assert within(WORK, 8, 30) == [
        *(Span(7, 8, 10), Span(7, 10, 16), Span(20, 8, 18), Span(20, 24, 30)),
    ]


def test_the_share_of_other_streams_beside_training():
    assert busiest(WORK) == 7 and busiest([]) is None
    # 6 to 16 and 30 to 34 of 6 to 18 and 24 to 34.
    assert beside(WORK, 7) == pytest.approx(100 * 14 / 22)
    assert beside([Span(7, 0, 1), Span(8, 1, 2)], 7) == 0
    assert math.isnan(beside([Span(7, 0, 1)], 7)) and math.isnan(beside([], None))


def test_against_time_step_by_step():
    """Spans of whole microseconds, each of which is looked at by itself."""
    draw = random.Random(0)
    for _ in range(200):
        starts = [draw.randrange(40) for _ in range(draw.randrange(1, 9))]
        spans = [Span(draw.randrange(3), s, s + draw.randrange(1, 9)) for s in starts]
        here = [{s.stream for s in spans if s.start <= at < s.end} for at in range(50)]
        assert total(spans) == sum(map(bool, here))
        assert idle_share(spans, 5, 35) == pytest.approx(
            100 * sum(not streams for streams in here[5:35]) / 30
        )
        others = [streams for streams in here if streams - {0}]
        if others:
            share = 100 * sum(0 in streams for streams in others) / len(others)
            assert beside(spans, 0) == pytest.approx(share)


def test_spans_of_a_profile(tmp_path):
    with torch.profiler.profile() as profile:
        for _ in range(3):
            with torch.profiler.record_function("step"):
                torch.ones(200, 200) @ torch.ones(200, 200)
    trace = spans_of(profile, tmp_path, device=("cpu_op",))
    assert [mark.name for mark in trace.marks] == ["step"] * 3 and not trace.calls
    for mark in trace.marks:
        inside = within(trace.device, mark.start, mark.end)
        assert {"aten::ones", "aten::matmul"} <= {span.name for span in inside}
        assert 0 < idle_share(trace.device, mark.start, mark.end) < 100
    assert not list(tmp_path.iterdir())


class AsOfAGpu:
    """Stands in for a profile: what a trace of a GPU says, cut short."""

    def export_chrome_trace(self, path):
        def event(kind, name, ts, dur, tid=1, **args):
            event = {"ph": "X", "cat": kind, "name": name, "pid": 0, "tid": tid}
            return event | {"ts": ts, "dur": dur, "args": args}

        events = [
            {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": "python"}},
            {"ph": "s", "id": 1, "cat": "ac2g", "name": "ac2g", "pid": 0, "tid": 1, "ts": 1},
            event("user_annotation", "step", 0.5, 20.25),
            event("cpu_op", "aten::mm", 1, 3),
            event("cuda_runtime", "cudaLaunchKernel", 2, 1, correlation=5),
            event("kernel", "gemm", 4.5, 10, tid=7, stream=7, device=0, correlation=5),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 5, 2, tid=20, stream=20),
            event("gpu_memset", "Memset (Device)", 7, 1, tid=20, stream=20),
            event("gpu_user_annotation", "step", 4.5, 10, tid=7, stream=7),
            {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler", "tid": "x", "ts": 0, "dur": 9},
        ]
        with open(path, "w") as file:
            json.dump({"traceEvents": events}, file)


def test_spans_of_a_gpu(tmp_path):
    trace = spans_of(AsOfAGpu(), tmp_path)
    copy = Span(20, 5, 7, "Memcpy HtoD (Pinned -> Device)")
    assert trace.device == [Span(7, 4.5, 14.5, "gemm"), copy, Span(20, 7, 8, "Memset (Device)")]
    assert trace.calls == [Span(1, 2, 3, "cudaLaunchKernel")]
    assert trace.marks == [Span(1, 0.5, 20.75, "step")]
    assert beside(trace.device, busiest(trace.device)) == 100
