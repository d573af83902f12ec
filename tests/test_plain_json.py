"""JSON that every reader takes, and files that are none."""

import ast
import json
import math
import os

import pytest
from conftest import ROOT

from utils.runtime import plain_json
from utils.runtime.errors import InputError


def strict(text):
    """The value of a text, by a parser that knows no NaN."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_null_at_any_depth():
    value = {"a": [math.nan, (1.5, -math.inf)], "b": {"c": math.inf, "d": "NaN"}, "e": None}
    expected = {"a": [None, [1.5, None]], "b": {"c": None, "d": "NaN"}, "e": None}
    for indent in (None, 2):
        assert strict(plain_json.dumps(value, indent=indent)) == expected


def test_what_others_write_of_it_is_read_as_null():
    assert plain_json.loads("[NaN, -Infinity, 1e999, -1e999, 1e3, 2]") == [None] * 4 + [1000, 2]


@pytest.mark.parametrize("text", ["", "{", "nan", "[" * 100_000, "9" * 5000])
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        plain_json.loads(text)


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opened for reading it would wait for ever
    for name, reason in (("pipe", "not a regular file"), ("none", "No such file"), (".", "not a")):
        with pytest.raises(InputError, match=reason) as error:
            plain_json.read_text(tmp_path / name)
        assert str(tmp_path) in str(error.value)
    (tmp_path / "latin").write_bytes(b"\xe9")
    assert plain_json.read_text(tmp_path / "latin") == "\ufffd"


def test_nothing_else_writes_json():
    """So that no nan gets into a file; digests of JSON's text are no files."""
    for folder in ("utils", "eval", "self_supervised", "semi_supervised", "supervised"):
        for path in (ROOT / folder).rglob("*.py"):
            calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
            found = [n for n in calls if ast.unparse(n.func) in ("json.dump", "json.dumps")]
            if path.stem not in ("plain_json", "demo_data"):
                assert not found, path
