"""Charts as SVG: ticks, places of points, gaps, bands, escaping; which figures make which chart."""

import math
import xml.etree.ElementTree as ElementTree

import logs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.reporting import run_log
from utils.reporting.curves import (
    HEIGHT,
    STYLES,
    WIDTH,
    Chart,
    Curve,
    Group,
    build_charts,
    chart_svg,
    sheet_svg,
    ticks,
)

finite = st.floats(-1e9, 1e9, allow_nan=False)
TAG = "{http://www.w3.org/2000/svg}"


def elements(text, kind, part=None):
    root = ElementTree.fromstring(text)
    return [e for e in root.iter(TAG + kind) if part is None or e.get("class") == part]


def drawn(*curves, title="loss", **others):
    return chart_svg(Chart(title, curves=list(curves), **{"unit": ""} | others))


def group(folder, *each, name="a"):
    """A group of runs with these lines."""
    paths = [logs.write(folder / f"{name}_{i}", lines) for i, lines in enumerate(each)]
    return Group(name, [run_log.read(path) for path in paths])


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
    text = drawn(Curve("loss", [0, 10], [5, 10]))
    first, second = elements(text, "circle")
    labels = {e.text: (float(e.get("x")), float(e.get("y"))) for e in elements(text, "text")}
    # The numbers of x stand in the middle below their lines, those of y 4 below theirs.
    assert float(first.get("cx")) == labels["0"][0]
    assert float(second.get("cx")) == labels["10"][0] == WIDTH - 12
    between = (labels["4"][1] + labels["6"][1]) / 2 - 4
    assert float(first.get("cy")) == pytest.approx(between, abs=0.1)
    assert float(second.get("cy")) == 12


def test_the_axis_can_go_on_beyond_the_last_point():
    text = drawn(Curve("loss", [0, 10], [5, 10]), x_end=40)
    labels = {e.text: float(e.get("x")) for e in elements(text, "text") if e.get("x")}
    (_, second) = elements(text, "circle")
    assert labels["40"] == WIDTH - 12 and float(second.get("cx")) == labels["10"]


def test_a_figure_that_is_not_finite_is_a_gap():
    x = list(range(40))
    y = [float(i) for i in x]
    y[10] = math.nan
    y[20] = y[22] = math.inf  # 21 is alone
    text = drawn(Curve("loss", x, y))
    assert len(elements(text, "path", "curve")) == 3 and "nan" not in text and "inf" not in text
    assert len(elements(text, "circle")) == 1


def test_one_point_is_a_dot():
    text = drawn(Curve("loss", [3.0], [48.5]))
    assert len(elements(text, "circle")) == 1 and not elements(text, "path", "curve")


def test_lines_differ_in_color_and_dashes_and_are_named():
    text = drawn(*(Curve(name, [0, 1], [i, i + 1], i) for i, name in enumerate("abcdefg")))
    curves = elements(text, "path", "curve")[:7]
    for attribute in ("stroke", "stroke-dasharray"):
        assert len({e.get(attribute) for e in curves}) == len(STYLES) == 7
    assert set("abcdefg") <= {e.text for e in elements(text, "text")}
    (root,) = elements(text, "svg")
    assert root.get("viewBox") == f"0 0 {WIDTH} {HEIGHT + 80}"


def test_text_is_escaped():
    text = drawn(Curve("<b>\x1b", [0], [1]), Curve("&", [0], [2]), title='"<script>"', unit="<")
    ElementTree.fromstring(text)
    assert "<b>" not in text and "<script>" not in text


def places(path):
    return [tuple(map(float, part.split())) for part in path.get("d").strip("MZ").split("L")]


def test_a_band_lies_around_its_line_and_within_the_axes():
    text = drawn(Curve("loss", [1, 2, 3], [5, 6, math.nan], 0, [0, 4, 1], [10, 7, math.nan]))
    ((one, two, three, four),) = map(places, elements(text, "path", "band"))
    ((start, end),) = map(places, elements(text, "path", "curve"))
    assert one[0] == four[0] == start[0] and two[0] == three[0] == end[0]
    assert (four[1], one[1]) == (12, HEIGHT - 40)  # 10 at the top, 0 at the bottom
    assert start[1] == (four[1] + one[1]) / 2 and three[1] < end[1] < two[1]


def test_a_group_is_drawn_as_mean_lowest_and_highest(tmp_path):
    seeds = group(tmp_path, *(logs.records(loss=float(seed**2)) for seed in range(3)))
    curve = seeds.curve("loss")
    assert curve.x == [0.5, 1, 1.5, 2, 2.5, 3] and seeds.label == "a (3 runs)"
    assert (set(curve.low), set(curve.high)) == ({0.0}, {4.0})
    assert curve.y == pytest.approx(5 / 3)
    assert len(group(tmp_path, logs.records()).curve("loss").low) == 0


def test_a_group_is_drawn_as_far_as_all_its_runs_are(tmp_path):
    two = group(tmp_path, logs.records(3), logs.records(2))
    assert two.curve("loss").x == [0.5, 1, 1.5, 2]


def test_a_figure_that_one_run_lacks_is_no_figure_of_the_group(tmp_path):
    """A band of some of the runs would be taken for one of all."""
    two = group(tmp_path, logs.records(loss=None), logs.records())
    assert not two.has("loss") and two.has("spread")
    assert "loss" not in [chart.title for chart in build_charts([two])]
    gap = [*logs.records()[:-2], logs.record(3, 4, loss=None)]
    curve = group(tmp_path, gap, logs.records()).curve("loss")
    assert np.isnan(curve.y[-1]) and np.isfinite(curve.y[:-1]).all()
    apart = group(tmp_path, [logs.record(1, 4)] * 2, [logs.record(2, 4)])
    assert not apart.has("loss")


def test_charts_of_one_and_of_several_groups(tmp_path):
    alone = group(tmp_path, logs.records())
    charts = build_charts([alone])
    first = ["loss", "purity of neighbors", "k-NN accuracy"]
    rest = ["effective rank", "spread", "learning rate", "speed"]
    assert [chart.title for chart in charts] == first + rest
    assert [(c.label, c.y.tolist()) for c in charts[2].curves] == [
        ("1-NN", [47.25]),
        ("20-NN", [48.5]),
    ]
    semi = [logs.record(e, 4, confident=50.0, accuracy_confident=90.0) for e in (1, 2)]
    charts = build_charts([alone, group(tmp_path, semi, name="b")])
    purity = [f"purity of neighbors: {which}" for which in ("constrained", "plain")]
    knn = [f"k-NN accuracy: {k}-NN" for k in (1, 20)]
    pseudo = [f"pseudo-labels: {which}" for which in ("coverage", "their accuracy")]
    assert [chart.title for chart in charts] == ["loss", *purity, *knn, *pseudo, *rest]
    assert [[curve.style for curve in chart.curves] for chart in charts[4:7]] == [[0], [1], [1]]
    assert all(chart.x_end == 3 for chart in charts)


def test_ranks_early_to_late(tmp_path):
    lines = [logs.record(e, 4, constrained_ranks=[50.0, 30.0, e, 20.0 - e]) for e in range(1, 6)]
    *_, ranks = build_charts([group(tmp_path, lines)])
    assert ranks.title == "ranks of constrained neighbors"
    assert [curve.label for curve in ranks.curves] == [f"epoch {e}" for e in (1, 2, 4, 5)]
    assert [curve.y[2] for curve in ranks.curves] == [1, 2, 4, 5]


def test_a_sheet_shows_every_chart_and_names_every_group(tmp_path):
    runs = group(tmp_path, *[logs.records()] * 2).runs
    seeds = [Group(name, runs) for name in ("a", "<b>\ud800")]
    charts = build_charts(seeds)
    text = sheet_svg(charts, seeds)
    words = [e.text for e in elements(text, "text")]
    assert {chart.title for chart in charts} <= set(words)
    assert {
        "a (2 runs)",
        r"<b>\ud800 (2 runs)",
        "line: mean, band: lowest to highest of the runs of a name",
    } <= set(words)
    assert len(elements(text, "path", "band")) == 2 * len(charts)
    (root,) = elements(text, "svg")
    _, _, width, height = map(float, root.get("viewBox").split())
    moves = [e.get("transform") for e in elements(text, "g") if "translate" in e.get("transform")]
    corners = [tuple(map(float, m[10:-1].split())) for m in moves if "rotate" not in m]
    assert len(set(corners)) == len(charts)
    assert all(x + WIDTH <= width and y + HEIGHT <= height for x, y in corners)
    assert not any(
        abs(x - u) < WIDTH and abs(y - v) < HEIGHT
        for x, y in corners
        for u, v in corners
        if (x, y) != (u, v)
    )
