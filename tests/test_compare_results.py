"""compare.py on what other scripts have written: one checkpoint a row, the same val images."""

import importlib
import json

import pytest

COMPARE = importlib.import_module("eval.compare")
FROZEN = {"protocol": "backbone features, frozen encoder; L2-normalized"}  # of an early version
TUNED = {"settings": {"fine_tune": True}}


def test_table_of_results(call_script, tmp_path, capsys):
    full, part = tmp_path / "full", tmp_path / "part"
    for folder in (full / "linear", full / "finetune", part):
        folder.mkdir(parents=True)
    knn = {"k": {"1": {"accuracy": 61.25}, "20": {"accuracy": 70.0}}}
    (full / "knn.json").write_text(json.dumps(knn))
    (full / "linear" / "linear.json").write_text(json.dumps({"top1": 80.5} | FROZEN))
    (full / "finetune" / "linear.json").write_text(json.dumps({"top1": 90.75} | TUNED))
    code, stdout, _ = call_script(
        COMPARE, "--save", tmp_path, "--results", f"a b={full}", f"c={part}"
    )
    assert code == 0
    assert "a b        61.2        70.0        80.5        90.8" in stdout
    assert "c             -           -           -           -" in stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["a b"]["linear"] == 80.5 and results["c"]["1-NN"] is None

    for bad in ("a", f"a={tmp_path / 'none'}"):
        code, _, stderr = call_script(COMPARE, "--results", bad)
        assert code == 2 and bad in stderr
    (part / "knn.json").write_text("{")
    code, _, stderr = call_script(COMPARE, "--results", f"c={part}")
    assert code == 2 and "no result file" in stderr


def test_a_row_has_the_results_of_one_checkpoint(call_script, tmp_path):
    """Of another there is a line instead of a figure, and a reason in the file."""
    new, old = ({"checkpoint": "ckpt.pth", "sha256": letter * 64} for letter in "ab")
    for name, whose in (("linear", old), ("finetune", new), ("early", {})):
        folder = tmp_path / ("x/linear" if name == "early" else f"run/{name}")
        folder.mkdir(parents=True)
        how = TUNED if name == "finetune" else FROZEN
        (folder / "linear.json").write_text(json.dumps({"top1": 80.5} | whose | how))
    knn = {"k": {"1": {"accuracy": 61.25}, "20": {"accuracy": None}}}
    (tmp_path / "run" / "knn.json").write_text(json.dumps(knn | new))
    rows = (f"cmsf={tmp_path / 'run'}", f"early={tmp_path / 'x'}")
    code, out, _ = call_script(COMPARE, "--save", tmp_path, "--results", *rows)
    assert code == 0
    named = [f"ckpt.pth (sha256 {letter * 12})" for letter in "ab"]
    reason = f"of {named[1]}, not of {named[0]} as knn.json"
    assert f"cmsf: linear/linear.json left out: {reason}" in out.splitlines()
    assert "early: the files do not say of which checkpoint they are" in out.splitlines()
    assert "cmsf         61.2           -           -        80.5" in out
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["cmsf"]["linear"] is None and record["cmsf"]["fine-tuned"] == 80.5
    assert record["cmsf"]["of"]["sha256"] == "a" * 64
    assert record["cmsf"]["left_out"] == {"linear/linear.json": reason}
    assert record["early"]["linear"] == 80.5 and record["early"]["of"]["sha256"] is None


VAL = {"counts": {"val": 12, "classes": 3}, "images": {"val": "a" * 64, "train": "x"}}


@pytest.mark.parametrize(
    ("place", "record", "reason"),
    [
        ("linear", FROZEN, ""),
        ("finetune", TUNED, ""),
        ("linear", {"settings": {"fine_tune": False}} | VAL, ""),
        ("linear", FROZEN | {"images": {"val": "a" * 64, "train": "y"}}, ""),  # of other labels
        ("linear", FROZEN | {"counts": {"val": 12, "train": 5}}, ""),
        ("linear", TUNED, "of a fine-tuned encoder"),
        (
            "linear",
            {"protocol": "features, encoder trained too"},
            "of a fine-tuned encoder",
        ),
        ("finetune", FROZEN, "of a frozen encoder"),
        ("finetune", {"settings": {"fine_tune": False}} | VAL, "of a frozen encoder"),
        ("finetune", {}, "it does not say whether the encoder was trained too (--fine-tune)"),
        ("linear", FROZEN | {"counts": {"val": 11}}, "on 11 val images"),
        ("linear", FROZEN | {"counts": {"classes": 4}}, "on unknown val images of 4 classes"),
        ("finetune", TUNED | VAL | {"images": {"val": "b" * 64}}, f"(digest {'b' * 12})"),
    ],
)
def test_a_column_has_results_of_its_kind_on_the_same_images(
    call_script, tmp_path, place, record, reason
):
    (tmp_path / place).mkdir()
    (tmp_path / place / "linear.json").write_text(json.dumps({"top1": 80.5} | record))
    (tmp_path / "knn.json").write_text(json.dumps({"k": {"1": {"accuracy": 61.25}}} | VAL))
    code, out, _ = call_script(COMPARE, "--results", f"x={tmp_path}", "--save", tmp_path)
    row = json.loads((tmp_path / "results.json").read_text())["x"]
    column = {"linear": "linear", "finetune": "fine-tuned"}[place]
    assert code == 0 and row[column] == (None if reason else 80.5) and row["1-NN"] == 61.25
    assert list(row["left_out"]) == ([f"{place}/linear.json"] if reason else [])
    assert reason in out and (f"{place}/linear.json left out: " in out) == bool(reason)


def test_rows_have_names_of_their_own(call_script, tmp_path):
    """And those of other val images are said."""
    for name, count in (("a", 12), ("b", 12), ("c", 13)):
        (tmp_path / name).mkdir()
        knn = {"k": {"1": {"accuracy": 61.25}}, "counts": {"val": count}}
        (tmp_path / name / "knn.json").write_text(json.dumps(knn))
    code, out, _ = call_script(
        COMPARE, "--results", *(f"{name}={tmp_path / name}" for name in "abc")
    )
    said = [line for line in out.splitlines() if "not comparable" in line]
    assert code == 0 and said == ["c: on 13 val images, a: on 12 val images: not comparable"]
    code, _, stderr = call_script(
        COMPARE, "--results", f"a={tmp_path / 'a'}", f"a={tmp_path / 'b'}"
    )
    assert code == 2 and f"a={tmp_path / 'b'}: there is a row of the name 'a' already" in stderr
    code, out, stderr = call_script(
        COMPARE, "--results", f"a={tmp_path / 'a'}", "--save", "/proc/self"
    )
    assert code == 2 and "--save /proc/self: " in stderr and out == ""
