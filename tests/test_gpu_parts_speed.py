"""The parts `step` and `search` of tests/gpu.py, on a CPU: what they compare, what they report."""

import copy
import json
import os
import threading

import pytest
import torch
from gpu_parts import search as search_part
from gpu_parts import step as step_part
from gpu_parts.part import RECORD, Part

search, step = search_part.search, step_part.step_benchmark
SMALL = (
    *("--device", "cpu", "--arch", "conv4", "--image_size", 16, "--batch_size", 8),
    *("--mem_bank_size", 64, "--proj_dim", 16, "--hidden_dim", 32, "--topk", 3, "--topkp", 6),
)


class FakeClock:
    """Seconds that pass where a test says so; `late`: those that a wait adds."""

    def __init__(self):
        self.seconds, self.late = 0.0, 0.0

    def __call__(self):
        """Wait for the GPU, then say the time."""
        self.seconds, self.late = self.seconds + self.late, 0.0
        return self.seconds

    def here(self):
        return self.seconds

    def passes(self, seconds, late=0.0):
        self.seconds += seconds
        self.late += late


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def part(tmp_path):
    return Part(scratch=tmp_path, out=tmp_path, seconds=600, data=None, tiny=True)


def record(part):
    return json.loads((part.scratch / RECORD).read_text())


def figures(part):
    return {figure["name"]: figure for figure in record(part)["figures"]}


def left_out(part):
    return {entry["name"]: entry["why"] for entry in record(part)["left_out"]}


def test_published_arithmetic_trains_as_ours_does():
    """Where every row and image has been seen and no image is twice in a batch: loss by loss."""
    args = step.script_flags(*SMALL)
    model, optimizer = step.build(args)
    other = copy.deepcopy(model)
    published = step.Published2Q(other)
    other_optimizer = step.build_training.build_optimizer(args, other)
    few = [step.make_batch(args, args.batch_size) for _ in range(5)]
    for number in range(15):  # round the bank, and each image comes again
        batch = few[number % 5]
        losses = [method(batch)[0] for method in (model, published)]
        for loss, one in zip(losses, (optimizer, other_optimizer), strict=True):
            step.update(one, loss)
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=2e-5)
    assert torch.allclose(model.bank.features, published.rows, atol=1e-5)
    assert torch.allclose(model.bank.previous, published.older, atol=1e-5)
    assert torch.allclose(model.previous.embeddings, published.store, atol=1e-5)


def test_whole_steps_see_new_images_and_train(tmp_path):
    args = step.script_flags(*SMALL)
    model, optimizer = step.build(args)
    before = copy.deepcopy(model.encoders.state_dict())
    steps = step.training_steps(model, optimizer, step.ready_loader(args), tmp_path)
    losses = [next(steps).item() for _ in range(3)]
    assert len(set(losses)) == 3 and all(0 < loss < 4 for loss in losses)
    newest = model.bank.index[model.bank.newest(24)]
    assert len(set(newest.tolist())) == 24
    changed = [k for k, v in model.encoders.state_dict().items() if not torch.equal(v, before[k])]
    assert any("target" in k for k in changed) and any("predictor" in k for k in changed)


def test_sides_take_turns_and_are_timed_with_what_they_leave_to_wait_for(clock):
    calls = []

    def side(name, seconds, late):
        calls.append(name)
        clock.passes(seconds, late)

    sides = {"a": lambda: side("a", 0.25, 0.5), "b": lambda: side("b", 1, 0)}
    times = search.in_turn(sides, rounds=2, calls=3, clock=clock)
    assert calls == [*"aaabbb"] * 2
    assert times == {"a": [0.75, 0.75], "b": [1, 1]}


def test_rates_of_known_times(tmp_path):
    part = Part(scratch=tmp_path, out=tmp_path, seconds=600, data=None, tiny=False)
    times = {
        "encoders alone": [0.5, 0.96, 0.5],
        "whole step": [1.0, 1.0, 0.5],
        "published arithmetic": [2.0, 1.5, 2.0],
    }
    step_part.note_rates(part, "eager", times, 8)
    found = figures(part)
    assert found["eager, encoders alone"]["value"] == 16
    assert found["eager, whole step"]["value"] == 8
    share = found["eager, whole step of encoders alone"]
    assert (share["lowest"], share["value"], share["highest"]) == (50, 96, 100)
    assert not share["reached"]
    assert found["eager, speed of ours"]["value"] == 2


def test_rate_counts_whole_bursts_after_the_first_steps(clock):
    count = iter(range(100))

    def one():
        next(count)
        clock.passes(0.05, late=0.05)
        clock()

    found = step_part.rate(
        one, batch=8, seconds=1, first=4, multiple=4, clock=clock, here=clock.here
    )
    assert found == pytest.approx(80)
    assert next(count) == 4 + 12  # 8 steps take 0.8 s


def test_host_share_of_a_step(clock):
    share = step_part.host_share(lambda: clock.passes(0.3, late=0.7), clock, here=clock.here)
    assert share == pytest.approx(0.3)


def test_reading_is_the_best_round_after_the_first(clock, monkeypatch):
    seconds = iter([0.1, 5, 3, 4])
    data = {"bank": type("Bank", (), {"sum": lambda self: clock.passes(next(seconds))})()}
    sizes = search_part.TINY._replace(calls=1, rounds=3)
    assert search_part.best_read(data, sizes, clock) == 3


def test_search_runs_on_a_cpu(part):
    torch.set_float32_matmul_precision("highest")  # whatever a test before has left
    search_part.run(part)
    assert all(check["holds"] for check in record(part)["checks"])
    found = figures(part)
    for method in search.METHODS:
        for kind in ("float32", "TF32"):
            assert found[f"{method}, {kind}, ours"]["value"] > 0
        assert found[f"{method}, K 1024"]["n"] == search_part.TINY.rounds
    assert torch.get_float32_matmul_precision() == "highest"


def test_losses_that_differ_are_no_agreement():
    one = torch.tensor(1.5)
    assert search.agree({"ours": one, "published": one + 1e-6}, tf32=False)
    assert not search.agree({"ours": one, "published": one + 1e-4}, tf32=False)
    assert search.agree({"ours": one, "published": one + 1e-4}, tf32=True)
    assert not search.agree({"ours": one, "published": one + 1e-2}, tf32=True)


def test_step_runs_on_a_cpu(part):
    step_part.run(part)
    assert all(check["holds"] for check in record(part)["checks"])
    found = figures(part)
    for side in ("encoders alone", "whole step", "published arithmetic"):
        assert found[f"eager, {side}"]["n"] == step_part.ROUNDS
    alone, fed = (found[f"from files, {name}"]["value"] for name in ("loader alone", "training"))
    (share,) = (v["value"] for name, v in found.items() if name.endswith("the higher"))
    assert share == pytest.approx(100 * fed / alone)
    assert "compiled" in left_out(part)


def test_compiled_steps_and_settings(part):
    """The backend "eager" traces the networks as any does, and compiles nothing."""
    study = step_part.build_study(part)
    step_part.compiled(study, least=0, backend="eager")
    encoders = study.model.encoders
    networks = (encoders.query_encoder, encoders.predictor, encoders.target_encoder)
    assert all(network._compiled_call_impl is not None for network in networks)
    assert figures(part)["compiled, whole step"]["n"] == step_part.ROUNDS
    step_part.compiled(study, least=10**6, backend="eager")
    assert "s left" in left_out(part)["compiled"]

    assert all(check["holds"] for check in record(part)["checks"])


def test_a_part_ends_itself_before_it_is_killed(tmp_path, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set() if code == 0 else None)
    part = Part(scratch=tmp_path, out=tmp_path, seconds=0.1, data=None, tiny=True)
    with step_part.ends_in_time(part, "compiled"):
        assert ended.wait(10)
    assert "compiled" in left_out(part)

    ended.clear()
    seconds = step_part._ENDING + 0.3
    part = Part(scratch=tmp_path, out=tmp_path, seconds=seconds, data=None, tiny=True)
    with step_part.ends_in_time(part, "eager"):
        pass
    assert not ended.wait(0.6) and "eager" not in left_out(part)
