"""Parts of tests/gpu.py that check: a method that differs, or waits, on purpose is found."""

import json
import time

import gpu_parts  # noqa: F401  the benchmarks' folder
import pytest
import torch
from every_method import METHODS
from gpu_parts import agreement, no_waiting
from gpu_parts.part import Part
from spans import Span, Trace

from utils.method.encoders import QueryTargetEncoders
from utils.training import loss_watch

CPU = torch.device("cpu")


@pytest.fixture
def part(tmp_path):
    part = Part(scratch=tmp_path, out=tmp_path, seconds=600, data=None, tiny=True)
    part.device = CPU
    return part


def found(part):
    """name -> whether it holds, and name -> value."""
    record = json.loads((part.scratch / "record.json").read_text())
    checks = {check["name"]: (check["holds"], check["said"]) for check in record["checks"]}
    return checks, {figure["name"]: figure["value"] for figure in record["figures"]}, record


def compare(part, *methods, arch="two layers", precision="float64"):
    """Both sides of this machine, with one network."""
    (network,) = (n for n in agreement.networks(True) if n.name == arch)
    network = network._replace(methods=methods)
    sides = agreement.Side(CPU, "CPU"), agreement.other_side(CPU)
    if precision == "float64":
        agreement.compare_exactly(part, network, *sides)
    else:
        agreement.compare_roughly(part, network, precision, *sides)


def second_model(monkeypatch, name, change):
    """The second time that a method is built, the model is changed."""
    method, built = METHODS[name], []

    def build(encoders, sizes):
        built.append(method.build(encoders, sizes))
        if len(built) == 2:
            change(built[-1])
        return built[-1]

    monkeypatch.setitem(METHODS, name, method._replace(build=build))


@pytest.mark.parametrize("name", METHODS)
def test_methods_agree_with_themselves(part, name):
    compare(part, name)
    checks, figures, _ = found(part)
    assert len(checks) == 3 and all(holds for holds, _ in checks.values())
    assert 0 < figures["float64, two layers: largest difference of losses"] < 1e-12


def scale_loss(model):
    real = model.forward
    model.forward = lambda *batch: (real(*batch)[0] * (1 + 1e-8), {})


def another_neighbor(model):
    model.topk = 2


def another_label(model):
    real = model.bank.enqueue
    model.bank.enqueue = lambda rows, **columns: real(
        rows, **columns | {"label": columns["label"].roll(1)}
    )


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (scale_loss, {"losses", "bank"}),
        (another_neighbor, {"losses", "neighbors", "bank"}),
        (another_label, {"bank"}),
    ],
)
def test_a_method_that_differs_is_found(part, monkeypatch, change, kinds):
    second_model(monkeypatch, "MSF", change)
    compare(part, "MSF", "BYOL")
    checks, _, _ = found(part)
    wrong = {name.split()[-1] for name, (holds, _) in checks.items() if not holds}
    assert wrong == kinds
    for kind in kinds:
        holds, said = checks[f"float64, two layers: the same {kind}"]
        assert said.startswith("MSF") and "BYOL" not in said


def test_a_loss_that_is_not_finite_is_found(part, monkeypatch):
    def spoil(model):
        model.forward = lambda *_: (next(model.parameters()).sum() * torch.nan, {})

    for precision in ("float64", "float32"):
        second_model(monkeypatch, "MSF", spoil)
        compare(part, "MSF", precision=precision)
        checks, _, _ = found(part)
        what = "the same losses" if precision == "float64" else "losses are finite"
        assert not checks[f"{precision}, two layers: {what}"][0]
        monkeypatch.undo()


def test_an_error_in_one_method_leaves_the_others(part, monkeypatch):
    monkeypatch.setitem(METHODS, "MSF", METHODS["MSF"]._replace(build=lambda *_: 1 / 0))
    compare(part, "MSF", "BYOL")
    checks, _, _ = found(part)
    assert checks.pop("float64, two layers, MSF") == (False, "ZeroDivisionError: division by zero")
    assert len(checks) == 3 and all(holds for holds, _ in checks.values())


def test_without_time_methods_are_left_out(part, monkeypatch):
    monkeypatch.setattr(part, "left", lambda: 1)
    compare(part, "MSF", "2Q")
    _, _, record = found(part)
    assert [left["name"].split(", ")[-1] for left in record["left_out"]] == ["MSF", "2Q"]


def test_coarse_precisions_are_compared_by_folder(part):
    compare(part, "MSF", "2Q", "cross-entropy", arch="conv4", precision="float32")
    checks, figures, record = found(part)
    assert checks == {"float32, conv4: losses are finite": (True, "")}
    differences = {name: value for name, value in figures.items() if "difference" in name}
    assert {name.split(": ")[0].split(", ")[2] for name in differences} == {
        *("self-supervised", "supervised"),
    }
    assert all(0 < value < 0.1 for value in differences.values())
    assert 90 <= figures["float32, conv4, self-supervised: neighbors that agree"] <= 100


def search(rows, similarity, valid=(True, True)):
    return agreement.Search(*(torch.tensor([part]) for part in (rows, valid, similarity)))


def test_which_neighbors_are_the_same():
    one = search([3, 5], [0.9, 0.5])
    for other, expected in (
        (search([3, 5], [0.9, 0.5]), ("", 0)),
        (search([3, 6], [0.9, 0.5]), ("", 1)),  # of the same similarity
        (search([3, 6], [0.9, 0.5 - 1e-6]), ("1 of 2 in search 1", 0)),
        (search([5, 3], [0.5, 0.9]), ("2 of 2 in search 1", 0)),
        (search([3, 6], [0.9, 0.5], (True, False)), ("count for others in search 1", 0)),
    ):
        assert agreement.differing([one], [other]) == expected
    apart = search([3, 9], [0.9, 0.1], (True, False)), search([3, 8], [0.9, 0.2], (True, False))
    assert agreement.differing([apart[0]], [apart[1]]) == ("", 0)  # what does not count
    assert agreement.differing([one], []) == ("1 and 0 searches", 0)
    assert agreement.shared([one], [search([5, 3], [0.9, 0.5])]) == 100
    assert agreement.shared([one], [search([5, 7], [0.9, 0.5])]) == 50
    assert agreement.shared([one], [search([5, 3], [0.9, 0.5], (True, False))]) == 50


def test_what_is_remembered_is_compared_to_the_tolerance():
    one = {"bank.features": torch.zeros(2, 2).double(), "bank.label": torch.tensor([1, 2])}
    near, far = (one | {"bank.features": one["bank.features"] + d} for d in (1e-10, 1e-8))
    assert agreement.unlike(one, near) == [] and agreement.unlike(one, far) == ["bank.features"]
    assert agreement.unlike(one, one | {"bank.label": torch.tensor([1, 3])}) == ["bank.label"]
    assert agreement.unlike(one, {"bank.label": one["bank.label"]}) == ["bank.features"]
    nan = {"bank.features": one["bank.features"] * torch.nan}
    assert agreement.unlike(one, one | nan) == ["bank.features"]


# Nothing waits.


def watched(part, *names):
    no_waiting.watch_methods(part, list(names))
    checks, _, record = found(part)
    return checks, {left["name"]: left["why"] for left in record["left_out"]}


def test_methods_do_not_wait_but_the_one_that_says_so(part):
    exception = "pseudo-labels, confident in the cache"
    checks, left_out = watched(part, "2Q, symmetric", "cross-entropy", exception)
    assert checks["no step waits"] == (True, "3 loops of 3 steps on meta")
    holds, said = checks[f"{exception}: waits, as its flag's help says"]
    assert holds and said.startswith("step 1: ") and len(checks) == 2
    assert left_out == {"copies to the host are asked for a step later": "no GPU"}


def changed(monkeypatch, name, forward=None, **fields):
    """The method with another forward, (model's own, *its arguments) -> loss and figures."""
    method = METHODS[name]

    def build(encoders, sizes):
        model = method.build(encoders, sizes)
        real = model.forward
        if forward:
            model.forward = lambda *given: forward(real, *given)
        return model

    monkeypatch.setitem(METHODS, name, method._replace(build=build, **fields))


def test_a_step_that_waits_is_found(part, monkeypatch):
    def looks_at_its_loss(real, batch):
        loss, stats = real(batch)
        return (loss if loss > 0 else -loss), stats

    changed(monkeypatch, "BYOL", looks_at_its_loss)
    checks, _ = watched(part, "MSF", "BYOL")
    holds, said = checks["no step waits"]
    assert not holds and said.startswith("BYOL: step 1: ") and "MSF" not in said


def test_an_exception_that_no_longer_waits_is_found(part, monkeypatch):
    changed(monkeypatch, "BYOL", waits=True)
    checks, _ = watched(part, "MSF", "BYOL")
    assert checks["BYOL: waits, as its flag's help says"] == (False, "does not wait")
    assert checks["no step waits"][0]


def test_other_errors_are_no_waiting(part, monkeypatch):
    def fails(real, batch):
        raise RuntimeError("shapes do not fit")

    changed(monkeypatch, "BYOL", fails)
    checks, _ = watched(part, "MSF", "BYOL")
    assert checks["steps of BYOL"] == (False, "RuntimeError: shapes do not fit")
    assert checks["no step waits"][0]


@pytest.mark.parametrize("later", [False, True])
def test_the_age_of_copies(tmp_path, monkeypatch, later):
    """A CPU looks at a loss at once; as if it were a GPU, a step later."""
    monkeypatch.setattr(loss_watch, "_is_read_later", lambda loss: later)
    monkeypatch.setattr(no_waiting, "WARM_UP", 1)
    watch = no_waiting.Watch(CPU)
    waited = no_waiting.waits(METHODS["MSF"], no_waiting._small_encoders(), watch, tmp_path)
    assert waited == "" and set(watch.ages) == {int(later)}
    assert len(watch.ages) == watch.last - later


def test_the_watch_of_a_gpu_is_on_after_the_warm_up(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    watch = no_waiting.Watch(torch.device("cuda"))
    with pytest.raises(ZeroDivisionError), watch.on():
        for step in range(1, watch.last + 1):
            watch(step)
            assert modes == ["error"] * (step > no_waiting.WARM_UP)
        assert watch.last >= no_waiting.WARM_UP + 5
        1 / 0  # noqa: B018
    assert modes == ["error", "default"]


def steps_of_a_gpu(*, steps=3, pause=0.0, copy="Pinned", stop="cudaEventSynchronize"):
    """Steps of 1000 us: training, the next batch made beside its second half, two short waits."""
    marks, device, calls = [], [], []
    for start in range(0, 1000 * (steps + 1 + no_waiting.SETTLING), 1000):
        marks.append(Span(1, start, start + 1, "step"))
        device.append(Span(7, start, start + 500, "gemm"))
        device.append(Span(7, start + 500, start + 1000 - pause, "gemm"))
        device.append(Span(20, start + 500, start + 600, f"Memcpy HtoD ({copy} -> Device)"))
        calls += [Span(1, start + at, start + at + 50, stop) for at in (100, 800)]
    return Trace(device, calls, marks)


def reported(part, trace, **options):
    no_waiting.report(part, "it", trace, **{"streams": True} | options)
    checks, figures, record = found(part)
    short = {name.removeprefix("it: "): value for name, value in figures.items()}
    return {name for name, (holds, _) in checks.items() if not holds}, short, record


def test_figures_of_a_trace(part):
    failed, figures, record = reported(part, steps_of_a_gpu(pause=100))
    assert not failed and not record["left_out"]
    assert figures == pytest.approx(
        {
            "a step in the profile": 1.0,
            "kernels and copies in a step": 3,
            "device idle": 10,
            "next batch's work beside training": 100,
            "host at work in a step": 0.9,
            "memory taken or freed in a step, times": 0,
        }
    )


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"copy": "Pageable"}, "all copies are from pinned memory"),
        ({"stop": "cudaStreamSynchronize"}, "the host waits for no stream"),
        ({"stop": "cudaMemcpy"}, "the host waits for no stream"),
    ],
)
def test_what_the_watch_does_not_see_is_found_in_a_trace(part, options, what):
    assert reported(part, steps_of_a_gpu(**options))[0] == {f"it: {what}"}


def test_one_more_wait_in_a_step_is_found(part):
    trace = steps_of_a_gpu()
    trace.calls.append(Span(1, 3300, 3310, "cudaEventSynchronize"))
    assert reported(part, trace)[0] == {"it: the host waits for what the step before sent"}


def test_a_profile_without_a_devices_work_is_left_out(part):
    failed, figures, record = reported(part, steps_of_a_gpu()._replace(device=[]))
    assert not failed and not figures
    assert record["left_out"] == [
        {"name": "it: profile", "why": "it shows no work of the device"},
    ]


def test_training_is_profiled(part, monkeypatch):
    for name in ("WARM_UP", "PLAIN", "SETTLING"):
        monkeypatch.setattr(no_waiting, name, 1)
    monkeypatch.setattr(no_waiting.Tracer, "last", 6)
    (network,) = no_waiting.networks(part)
    no_waiting.profile_training(part, network)
    _, figures, record = found(part)
    what = f"{network.name}, B {network.batch}"
    assert figures[f"{what}: kernels and copies in a step"] > 500
    assert 0 < figures[f"{what}: a step without the profile"] < 1e5
    assert [left["why"] for left in record["left_out"]] == ["no GPU"]


def test_without_time_no_profile_is_begun(part, monkeypatch):
    monkeypatch.setattr(part, "left", lambda: 3)
    no_waiting.profile_in_time(part, no_waiting.networks(part)[0])
    assert found(part)[2]["left_out"] == [{"name": "profile, conv4", "why": "3 s left"}]


@pytest.mark.parametrize("works", [True, False])
def test_compiled_encoders_are_watched_where_there_is_a_compiler(part, monkeypatch, works):
    def compile_(self):
        if not works:
            raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(QueryTargetEncoders, "compile", compile_)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(no_waiting, "WARM_UP", 1)
    no_waiting.watch_compiled(part)
    checks, _, record = found(part)
    assert [holds for holds, _ in checks.values()] == [True] * works
    left_out = [left["why"] for left in record["left_out"]]
    assert left_out == ["not compiled: RuntimeError: no compiler"] * (not works)


def test_compilation_ends_in_time():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="longer than 0 s"), no_waiting._within(0.2):
        time.sleep(20)
    assert time.monotonic() - start < 10
    with no_waiting._within(0.2):
        pass
    time.sleep(0.3)  # nothing comes after it
