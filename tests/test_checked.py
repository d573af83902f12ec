"""Values out of files: what is of a kind, and what is said of what is not."""

import pytest

from utils.runtime import checked
from utils.runtime.errors import InputError


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (checked.whole(1, 5), [1, 5], [0, 6, True, 2.0, "2", None, 10**30]),
        (checked.whole(), [-3, 2**63 - 1], [2**63, False, float("nan")]),
        (checked.real(0), [0, 1.5], [-1, float("nan"), float("inf"), True, "1", 10**400]),
        (checked.TEXT, ["", "a"], [b"a", 1, None]),
        (checked.FLAG, [True], [1, None]),
        (checked.list_of(checked.TEXT), [[], ["a"], ("a",)], ["a", [1], {"a": 1}]),
        (checked.table_of(checked.whole(0)), [{}, {"a": 1}], [{1: 1}, {"a": -1}, []]),
        (checked.or_none(checked.TEXT), [None, "a"], [1]),
        (
            checked.PLAIN,
            [None, "a", True, -1, 2.5, [1, ("a", None)], {"a": {"b": [[1]]}}],
            [float("nan"), b"a", {1: 2}, object(), {"a": [{1}]}, [[[[[1]]]]]],
        ),
        (checked.ANY, [None, object()], []),
    ],
)
def test_kinds(kind, right, wrong):
    assert all(map(kind.holds, right))
    assert not any(map(kind.holds, wrong))


def test_what_is_taken_and_what_is_said():
    record = {"epoch": 3, "long": "x" * 100, "odd": {}, "huge": 10**5000, "a\nb": 1, 7: 1.5}
    assert checked.take(record, "epoch", checked.whole(1), what="f") == 3
    assert checked.take(record, "none", checked.TEXT, what="f", default=None) is None
    for name, kind, words in (
        ("epoch", checked.whole(4), "--weights f: epoch is 3, not a whole number of 4 or more"),
        ("epoch", checked.real(0, 1), "--weights f: epoch is 3, not a finite number from 0 to 1"),
        ("none", checked.TEXT, "--weights f: none is missing, not text"),
        ("long", checked.whole(), "--weights f: long is a str, not a whole number"),
        ("odd", checked.TEXT, "--weights f: odd is a dict, not text"),
        ("huge", checked.TEXT, "--weights f: huge is a very large number, not text"),
        ("a\nb", checked.TEXT, "--weights f: a\\nb is 1, not text"),
        (7, checked.TEXT, "--weights f: 7 is 1.5, not text"),
    ):
        with pytest.raises(InputError) as error:
            checked.take(record, name, kind, what="--weights f")
        assert str(error.value) == words
