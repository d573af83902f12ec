"""Parts of tests/gpu.py that check: a method that differs, or waits, on purpose is found."""

import json

import gpu_parts  # noqa: F401  the benchmarks' folder
import pytest
import torch
from every_method import METHODS
from gpu_parts import agreement
from gpu_parts.part import Part

CPU = torch.device("cpu")


@pytest.fixture
def part(tmp_path):
    return Part(scratch=tmp_path, out=tmp_path, seconds=600, data=None, tiny=True)


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
