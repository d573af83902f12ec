"""Results and logs with any type in any field: a script works, or ends in one line."""

import copy
import importlib
import json
import os

import logs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.runtime import files

COMPARE, REPORT, PLOT = (
    importlib.import_module(f"eval.{name}") for name in ("compare", "report", "plot_training")
)
EVIL = "<script>alert(1)</script>"
ODD = st.one_of(
    *(st.none(), st.booleans(), st.integers(-2, 3), st.floats()),
    st.sampled_from([10**400, -(10**400), 2**63, 1e308, -1e308, 5e-324, 1e-310, float("nan")]),
    st.sampled_from([EVIL, "", "$x_{", "\n", "\x1b[31m", "\ud800", "9" * 300, [], {}, [[]]]),
    st.lists(st.one_of(st.none(), st.integers(-1, 1), st.text(max_size=2)), max_size=3),
    st.dictionaries(st.sampled_from(["1", "x", EVIL, "epoch"]), st.none() | st.just([1])),
)


def places(value, place=()):
    """The places of all values in a record, at any depth."""
    items = value.items() if isinstance(value, dict) else []
    items = enumerate(value) if isinstance(value, list) else items
    return [place, *(p for key, part in items for p in places(part, (*place, key)))]


def changed(value, place, new, *, is_key):
    """A copy with a value, or the name of a value, that is another."""
    if not place:
        return new
    value = copy.deepcopy(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    if is_key and isinstance(inner, dict):
        inner[str(new)] = inner.pop(place[-1])
    else:
        inner[place[-1]] = new
    return value


def whole_files(folder):
    """A run with all that can lie in its folder: file -> its records, of a log one a line."""
    start = logs.start(resumed_from={"checkpoint": "x", "epoch": 1, "step": 2})
    lines = [logs.record(1, s, warning="low", confident=9.0) for s in (2, 4)]
    lines += [logs.record(e, 4, constrained_ranks=[70.0, 30.0]) for e in (2, 3)]
    lines += logs.records()[-1:] + [{"epoch": 3, "step": 4, "error": "loss nan"}]
    logs.write(folder, lines, starts=[start, start])
    files.save(folder / "ckpt_epoch_3.pth", {"weight": torch.zeros(1)})
    (folder / "linear").mkdir()
    last = files.sha256(folder / "ckpt_epoch_3.pth")
    whose = {"checkpoint": "x", "sha256": last, "epoch": 3, "encoder": "query", "arch": "conv4"}
    whose |= {"image_size": 16, "small_stem": False, "seed": 0}
    whose |= {"counts": {"val": 12, "classes": 3}, "images": {"val": "x"}}
    whose |= {"settings": {"fine_tune": False}}
    row = {"accuracy": 50.0, "top5": None}
    results = {
        "knn.json": {"k": {"1": row, "20": row}} | whose,
        "linear/linear.json": {"lr": {"0.1": {"top1": 1.0}}, "top1": 1.0, "protocol": "x"} | whose,
        "results.json": {"a row": {"1-NN": 1.0, "of": whose, "left_out": {}, "more": {"lr": row}}},
    }
    for name, record in results.items():
        (folder / name).write_text(json.dumps(record))
    about = json.loads((folder / "run.json").read_text())
    return results | {"run.json": about, "log.jsonl": lines}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd") / "run"
    return folder, whole_files(folder)


def write(path, record):
    if path.suffix == ".jsonl" and isinstance(record, list):
        path.write_text("".join(json.dumps(line) + "\n" for line in record))
    else:
        path.write_text(json.dumps(record))


def ends_well(result, *, output):
    """The script worked, or said in one line that names a file why not; no script in the page."""
    code, _, error = result
    assert (code, error) == (0, "") or (code == 2 and error.count("\n") == 1), error
    if output and code == 0:
        assert EVIL not in output.read_text()


@pytest.mark.parametrize(
    ("script", "examples"),
    [
        (COMPARE, 40),
        (REPORT, 100),
        (PLOT, 3),
        pytest.param(COMPARE, 1000, marks=pytest.mark.slow),
        pytest.param(REPORT, 3000, marks=pytest.mark.slow),
        pytest.param(PLOT, 40, marks=pytest.mark.slow),
    ],
)
def test_any_type_in_any_field(call_script, run, tmp_path, script, examples):
    folder, files = run
    named = {
        COMPARE: ["--results", f"a={folder}", "--save", tmp_path],
        REPORT: [folder, "--output", tmp_path / "page.html"],
        PLOT: [folder, "--output", tmp_path / "x.svg"],
    }[script]
    read = {
        COMPARE: ["knn.json", "linear/linear.json"],
        REPORT: list(files),
        PLOT: ["run.json", "log.jsonl"],
    }[script]
    output = tmp_path / "page.html" if script is REPORT else None
    assert call_script(script, *named)[0] == 0  # as they are

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(st.sampled_from(read), st.data())
    def check(name, data):
        place = data.draw(st.sampled_from(places(files[name])))
        new, is_key = data.draw(ODD), data.draw(st.booleans())
        write(folder / name, changed(files[name], place, new, is_key=is_key))
        try:
            ends_well(call_script(script, *named), output=output)
        finally:
            write(folder / name, files[name])

    check()


@pytest.mark.parametrize("name", ["knn.json", "linear/linear.json", "run.json", "log.jsonl"])
def test_a_pipe_in_place_of_a_file_is_refused(call_script, tmp_path, name):
    """Opened for reading, it would be waited for for ever."""
    folder = tmp_path / "run"
    whole_files(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    scripts = {REPORT: folder, PLOT: folder} if "run" in name or "log" in name else {}
    scripts |= {COMPARE: f"--results=a={folder}", REPORT: folder} if not scripts else {}
    for script, argument in scripts.items():
        code, _, error = call_script(script, argument)
        assert code == 2 and error.count("\n") == 1 and str(folder) in error
