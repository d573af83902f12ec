"""Charts as SVG: ticks, places of points, gaps, escaping."""

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.reporting import svg
from utils.reporting.svg import HEIGHT, WIDTH, Line, line_chart, ticks

finite = st.floats(-1e9, 1e9, allow_nan=False)
TAG = "{http://www.w3.org/2000/svg}"


def elements(text, kind, part=None):
    root = ElementTree.fromstring(text)
    return [e for e in root.iter(TAG + kind) if part is None or e.get("class") == part]


def test_ticks_are_round():
    assert ticks(0, 60) == [0, 20, 40, 60]
    assert ticks(0.9853, 0.9963) == [0.985, 0.99, 0.995, 1.0]
    assert ticks(30, 68) == [30, 40, 50, 60, 70]


@given(finite, finite)
def test_ticks_enclose_the_values(one, two):
    low, high = sorted((one, two))
    found = ticks(low, high)
    size = max(abs(low), abs(high), 1e-3)
    assert 2 <= len(found) <= 8 and found == sorted(set(found))
    assert found[0] <= low + 1e-9 * size and found[-1] >= high - 1e-9 * size


def test_points_are_where_the_axes_say():
    text = line_chart([Line("loss", [0, 10], [5, 10])], title="loss")
    first, second = elements(text, "circle")
    labels = {e.text: (float(e.get("x")), float(e.get("y"))) for e in elements(text, "text")}
    # The numbers of x stand in the middle below their lines, those of y 4 below theirs.
    assert float(first.get("cx")) == labels["0"][0]
    assert float(second.get("cx")) == labels["10"][0] == WIDTH - 12
    between = (labels["4"][1] + labels["6"][1]) / 2 - 4
    assert float(first.get("cy")) == pytest.approx(between, abs=0.1)
    assert float(second.get("cy")) == 12


def test_the_axis_can_go_on_beyond_the_last_point():
    text = line_chart([Line("loss", [0, 10], [5, 10])], title="loss", x_end=40)
    labels = {e.text: float(e.get("x")) for e in elements(text, "text") if e.get("x")}
    (_, second) = elements(text, "circle")
    assert labels["40"] == WIDTH - 12 and float(second.get("cx")) == labels["10"]


def test_a_figure_that_is_not_finite_is_a_gap():
    x = list(range(40))
    y = [float(i) for i in x]
    y[10] = math.nan
    y[20] = y[22] = math.inf  # 21 is alone
    text = line_chart([Line("loss", x, y)], title="loss")
    (curve,) = elements(text, "path", "curve")
    assert curve.get("d").count("M") == 3 and "nan" not in text and "inf" not in text
    assert len(elements(text, "circle")) == 1


def test_one_point_is_a_dot():
    text = line_chart([Line("loss", [3.0], [48.5])], title="loss")
    assert len(elements(text, "circle")) == 1 and not elements(text, "path", "curve")


def test_lines_differ_in_color_and_dashes_and_are_named():
    lines = [Line(name, [0, 1], [i, i + 1]) for i, name in enumerate(("a", "b", "c", "d"))]
    text = line_chart(lines, title="four")
    curves = elements(text, "path", "curve")[:4]
    assert (
        len({e.get("stroke") for e in curves})
        == len({e.get("stroke-dasharray") for e in curves})
        == 4
    )
    assert {"a", "b", "c", "d"} <= {e.text for e in elements(text, "text")}
    (root,) = elements(text, "svg")
    assert root.get("viewBox") == f"0 0 {WIDTH} {HEIGHT + 40}"
    assert len(svg.STYLES) == 4


def test_text_is_escaped():
    text = line_chart([Line("<b>", [0], [1]), Line("&", [0], [2])], title='"<script>"', unit="<")
    ElementTree.fromstring(text)
    assert "<b>" not in text and "<script>" not in text


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="loss: nothing to draw"):
        line_chart([Line("loss", [1.0], [math.nan])], title="loss")
