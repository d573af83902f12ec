"""The curves of runs: which figures make which chart, and charts as SVG, for pages and files.

A chart is as wide as its box; its text keeps its proportion, so that a box of 300 to 450 pixels
suits it. Nothing has to be installed to draw it, and neither a network nor a script to show it.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.reporting import svg_template
from utils.reporting.run_log import KNN, RunLog

WIDTH, HEIGHT = 400, 250  # of a chart's coordinates
COLUMNS = 3  # of charts in a picture
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 40
_LINE, _GAP = 20, 24  # height of a line of a legend; room around charts in a picture
_FEW = 20  # points up to which each is marked
# Okabe and Ito's colors, those that are strong on white first, each with dashes of its own.
STYLES = (
    *(("#0072B2", "none"), ("#D55E00", "7 4"), ("#00795A", "2 3"), ("#A0457A", "9 3 2 3")),
    *(("#000000", "14 4"), ("#56B4E9", "4 2"), ("#E69F00", "1 2")),
)
_TEMPLATE = Path(__file__).with_suffix(".svg")
BAND = "line: mean, band: lowest to highest of the runs of a name"
_PURITY = {"purity_constrained": "constrained", "purity_plain": "plain"}
# Title, unit, and name in the log -> label, in the order they are drawn.
PANELS = (
    ("loss", "squared distance", {"loss": "loss"}),
    ("purity of neighbors", "percent", _PURITY),
    ("k-NN accuracy", "percent", {f"{KNN}{k}": f"{k}-NN" for k in (1, 5, 10, 20)}),
    ("pseudo-labels", "percent", {"confident": "coverage", "accuracy_confident": "their accuracy"}),
    ("effective rank", "dimensions", {"effective_rank": "effective rank"}),
    ("spread", "0 to 1", {"spread": "spread"}),
    ("learning rate", "", {"lr": "learning rate"}),
    ("speed", "images/s", {"images_per_s": "images/s"}),
)


class Curve(NamedTuple):
    """A line over a chart; a y that is not finite is a gap.

    label: "" for none in the chart's legend. style: a place in `STYLES`. low, high: of a band
    around it, or nothing.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    low: Sequence[float] = ()
    high: Sequence[float] = ()


class Chart(NamedTuple):
    """A small picture; its x axis goes from 0 to the last point, or x_end if that is farther."""

    title: str
    unit: str
    curves: list[Curve]
    x_label: str = "epochs"
    x_end: float = 0


@dataclass(frozen=True)
class Group:
    """Runs of one method that are drawn as one: their mean, and a band from lowest to highest."""

    name: str
    runs: list[RunLog]

    @property
    def label(self) -> str:
        """What a legend says."""
        return self.name if len(self.runs) == 1 else f"{self.name} ({len(self.runs)} runs)"

    def has(self, figure: str) -> bool:
        """Whether all its runs have a figure: a band of some would be taken for one of all."""
        return bool(np.isfinite(self.curve(figure).y).any())

    def curve(self, figure: str, label: str = "", style: int = 0) -> Curve:
        """The curve of a figure, where all runs were measured; where one is not finite a gap."""
        curves = [run.curve(figure) for run in self.runs]
        places = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = np.array([[curve[place] for place in places] for curve in curves])
        band = (values.min(axis=0), values.max(axis=0)) if len(curves) > 1 else ()
        return Curve(label, places, values.mean(axis=0), style, *band)


def build_charts(groups: list[Group]) -> list[Chart]:
    """The charts of which some group has a figure.

    Of one group all figures of a panel in one chart; for several a chart each for the first and
    the last of what goes together, 1-NN and 20-NN, say, and a style for each group.
    """
    charts = []
    x_end = max(r.place[0] - 1 + r.place[1] / r.steps for group in groups for r in group.runs)
    for title, unit, figures in PANELS:
        there = {n: text for n, text in figures.items() if any(g.has(n) for g in groups)}
        if there and len(groups) == 1:
            curves = [groups[0].curve(*item, style) for style, item in enumerate(there.items())]
            charts.append(Chart(title, unit, curves, x_end=x_end))
        elif there:
            for name in dict.fromkeys((next(iter(there)), list(there)[-1])):
                curves = [g.curve(name, "", i) for i, g in enumerate(groups) if g.has(name)]
                text = f"{title}: {there[name]}" if len(figures) > 1 else title
                charts.append(Chart(text, unit, curves, x_end=x_end))
    if len(groups) == len(groups[0].runs) == 1:
        ranks = groups[0].runs[0].rank_histograms()
        curves = [
            Curve(f"epoch {epoch:.3g}", range(len(shares)), shares, style)
            for style, (epoch, shares) in enumerate(ranks.items())
        ]
        x_label = "log2 of the rank by plain distance"
        charts += [Chart("ranks of constrained neighbors", "percent", curves, x_label)] * bool(
            curves
        )
    return charts


def chart_svg(chart: Chart) -> str:
    """A chart as an SVG element, without its title but for readers by ear."""
    drawn = _draw(chart)
    return _render(chart.title, WIDTH, drawn["height"], charts=[drawn])


def sheet_svg(charts: list[Chart], groups: list[Group]) -> str:
    """Charts with their titles below a legend of groups, each of a style, as an SVG file."""
    styles = itertools.cycle(STYLES) if len(groups) > 1 else itertools.repeat(None)
    legend = [(style, group.label) for style, group in zip(styles, groups, strict=False)]
    legend += [(None, BAND)] * any(len(group.runs) > 1 for group in groups)
    drawn = [_draw(chart) for chart in charts]
    top, step = _GAP + _LINE * len(legend), max(chart["height"] for chart in drawn) + 2 * _GAP
    for number, chart in enumerate(drawn):
        chart["left"] = _GAP + number % COLUMNS * (WIDTH + _GAP)
        chart["top"] = top + number // COLUMNS * step + _GAP + 10
    width, height = COLUMNS * (WIDTH + _GAP) + _GAP, drawn[-1]["top"] + step
    return _render("curves of training runs", width, height, charts=drawn, legend=legend)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose `low` and `high`, 2 to 8 of them."""
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size + 1e-30:  # one value, as far as a picture shows
        room = size / 10 if size > 1e-30 else 0.5
        low, high = low - room, high + room
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _render(title: str, width: int, height: int, **parts: list) -> str:
    """An SVG element of this size; with a legend a sheet on white paper."""
    sides = {"left": _LEFT, "right": WIDTH - _RIGHT, "top": _TOP, "bottom": HEIGHT - _BOTTOM}
    sides |= {"title": title, "width": width, "height": height, "gap": _GAP, "line_height": _LINE}
    return svg_template.read(_TEMPLATE).render(sides | parts)


def _draw(chart: Chart) -> dict:
    """What the template draws of a chart, and how high that is."""
    heights = np.concatenate([part for c in chart.curves for part in (c.y, c.low, c.high)])
    heights = heights[np.isfinite(heights)]
    x_ticks = ticks(0, max(chart.x_end, *(curve.x[-1] for curve in chart.curves)))
    y_ticks = ticks(heights.min(), heights.max())

    def at(x: float, y: float) -> tuple[float, float]:
        """The place of a point in the picture, in pixels."""
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        place = _LEFT + across * (WIDTH - _RIGHT - _LEFT), HEIGHT - _BOTTOM
        return round(float(place[0]), 1), round(float(place[1] - up * (place[1] - _TOP)), 1)

    named = [curve for curve in chart.curves if curve.label and len(chart.curves) > 1]
    return chart._asdict() | {
        "height": HEIGHT + _LINE * math.ceil(len(named) / 2),
        "x_ticks": [(f"{tick:g}", at(tick, y_ticks[0])[0]) for tick in x_ticks],
        "y_ticks": [(f"{tick:g}", at(0, tick)[1]) for tick in y_ticks],
        "pieces": [piece for curve in chart.curves for piece in _pieces(curve, at)],
        "legend": [  # two abreast
            (_style(c), c.label, _LEFT + i % 2 * 150, HEIGHT + 8 + _LINE * (i // 2))
            for i, c in enumerate(named)
        ],
    }


def _style(curve: Curve) -> tuple[str, str]:
    return STYLES[curve.style % len(STYLES)]


def _pieces(curve: Curve, at: Callable) -> Iterator[tuple]:
    """Style, band, line and dots of each piece between gaps; dots of few points, or of one."""
    few = np.isfinite(curve.y).sum() <= _FEW
    for part in np.ma.clump_unmasked(np.ma.masked_invalid(curve.y)):
        line, low, high = (
            [at(*point) for point in zip(curve.x[part], y[part], strict=False)]
            for y in (curve.y, curve.low, curve.high)
        )
        yield _style(curve), low + high[::-1], line, line if few or len(line) == 1 else []
