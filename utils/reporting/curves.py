"""The curves of runs: which figures make which chart, and charts as SVG, for pages and files.

A chart is as wide as its box; its text keeps its proportion, so that a box of 300 to 450 pixels
suits it. Nothing has to be installed to draw it, and neither a network nor a script to show it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import numpy as np

from utils.reporting.run_log import KNN, RunLog
from utils.runtime.errors import printable

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
_TEXT = 'fill="#3c4046" font-size="13" font-family="sans-serif"'
_GRID = 'class="grid" stroke="#e3e5e8"'
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

    def rank_histograms(self) -> dict[float, np.ndarray]:
        """As `RunLog.rank_histograms`, the mean of the runs; {} where they do not go together."""
        each = [run.rank_histograms() for run in self.runs]
        bins = {len(shares) for one in each for shares in one.values()}
        if any(list(one) != list(each[0]) for one in each) or len(bins) > 1:
            return {}
        return {place: np.mean([one[place] for one in each], axis=0) for place in each[0]}


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
    for group in groups:
        curves = [
            Curve(f"epoch {epoch:.3g}", range(len(shares)), shares, style)
            for style, (epoch, shares) in enumerate(group.rank_histograms().items())
            if np.isfinite(shares).any()
        ]
        if curves:
            of = f", {group.name}" if len(groups) > 1 else ""
            x_label = "log2 of the rank by plain distance"
            charts.append(Chart(f"ranks of constrained neighbors{of}", "percent", curves, x_label))
    return charts


def chart_svg(chart: Chart) -> str:
    """A chart as an SVG element, without its title but for readers by ear."""
    parts, height = _draw(chart)
    return _svg(WIDTH, height, chart.title, parts)


def sheet_svg(charts: list[Chart], groups: list[Group]) -> str:
    """Charts with their titles below a legend of groups, each of a style, as an SVG file."""
    width, top, parts = COLUMNS * (WIDTH + _GAP) + _GAP, _GAP, []
    for style, group in enumerate(groups):
        sample = _sample(style, _GAP, top) if len(groups) > 1 else ""
        parts += [sample, _words(group.label, _GAP + 42 if sample else _GAP, top + 4, size=16)]
        top += _LINE
    if any(len(group.runs) > 1 for group in groups):
        parts.append(_words(BAND, _GAP, top + 4))
        top += _LINE
    for first in range(0, len(charts), COLUMNS):
        drawn = [(chart, *_draw(chart)) for chart in charts[first : first + COLUMNS]]
        for column, (chart, inside, _) in enumerate(drawn):
            left = _GAP + column * (WIDTH + _GAP)
            title = chart.title if len(chart.title) <= 48 else f"{chart.title[:47]}…"
            parts.append(_words(title, left + WIDTH / 2, top + _GAP, "middle", size=16))
            move = f'transform="translate({left} {top + _GAP + 10})"'
            parts += [f"<g {move}>", f"<title>{_escaped(chart.title)}</title>", *inside, "</g>"]
        top += max(height for *_, height in drawn) + 2 * _GAP
    paper = f'<rect width="{width}" height="{top}" fill="white"/>'
    return _svg(width, top, "curves of training runs", [paper, *parts])


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


def _svg(width: float, height: float, title: str, parts: list[str]) -> str:
    """An SVG element of this size."""
    head = f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    head += f' width="{width}" height="{height}" role="img" aria-label="{_escaped(title)}" {_TEXT}>'
    return "\n".join([head, f"<title>{_escaped(title)}</title>", *filter(None, parts), "</svg>"])


def _escaped(text: str) -> str:
    return escape(printable(text))


def _words(text: str, x: float, y: float, anchor: str = "start", *, size: int = 13) -> str:
    where = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {where}>{_escaped(text)}</text>"


def _stroke(style: int) -> str:
    color, dashes = STYLES[style % len(STYLES)]
    return (
        f'class="curve" fill="none" stroke-width="2" stroke="{color}" stroke-dasharray="{dashes}"'
    )


def _sample(style: int, x: float, y: float) -> str:
    """A piece of a line, for a legend."""
    return f'<path {_stroke(style)} d="M{x:g} {y:g}h34"/>'


def _draw(chart: Chart) -> tuple[list[str], int]:
    """Axes, grid, curves and, below, a legend of several; and how high that is."""
    heights = np.concatenate([part for c in chart.curves for part in (c.y, c.low, c.high)])
    heights = heights[np.isfinite(heights)]
    x_ticks = ticks(0, max(chart.x_end, *(curve.x[-1] for curve in chart.curves)))
    y_ticks = ticks(heights.min(), heights.max())
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        """The place of a point in the picture, in pixels."""
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        place = _LEFT + across * (right - _LEFT), bottom - up * (bottom - _TOP)
        return round(float(place[0]), 1), round(float(place[1]), 1)

    parts = []
    for tick in y_ticks:
        y = at(0, tick)[1]
        parts.append(f'<path {_GRID} d="M{_LEFT} {y}H{right}"/>')
        parts.append(_words(f"{tick:g}", _LEFT - 5, y + 4, "end"))
    for tick in x_ticks:
        x = at(tick, y_ticks[0])[0]
        parts.append(f'<path {_GRID} d="M{x} {_TOP}V{bottom}"/>')
        parts.append(_words(f"{tick:g}", x, bottom + 16, "middle"))
    parts.append(_words(chart.x_label, (_LEFT + right) / 2, HEIGHT - 6, "middle"))
    parts.append(f'<g transform="translate(13 {(_TOP + bottom) / 2}) rotate(-90)">')
    parts += [_words(chart.unit, 0, 0, "middle"), "</g>"]
    for curve in chart.curves:
        parts += _curve(curve, at)
    named = [curve for curve in chart.curves if curve.label and len(chart.curves) > 1]
    for place, curve in enumerate(named):  # two abreast
        x, y = _LEFT + place % 2 * 150, HEIGHT + 8 + _LINE * (place // 2)
        parts += [_sample(curve.style, x, y), _words(curve.label, x + 40, y + 4)]
    return parts, HEIGHT + _LINE * math.ceil(len(named) / 2)


def _curve(curve: Curve, at: Callable) -> Iterator[str]:
    """Band and line with gaps where y is not finite; a few points, and those alone, as dots."""
    color = STYLES[curve.style % len(STYLES)][0]
    few = np.isfinite(curve.y).sum() <= _FEW
    for part in np.ma.clump_unmasked(np.ma.masked_invalid(curve.y)):
        line, low, high = (
            [at(*point) for point in zip(curve.x[part], y[part], strict=False)]
            for y in (curve.y, curve.low, curve.high)
        )
        if low:
            edge = "L".join(f"{x} {y}" for x, y in low + high[::-1])
            fill = f'fill="{color}" stroke="{color}" opacity="0.2"'  # of one point a stroke
            yield f'<path class="band" {fill} d="M{edge}Z"/>'
        if len(line) > 1:
            places = "L".join(f"{x} {y}" for x, y in line)
            yield f'<path {_stroke(curve.style)} d="M{places}"/>'
        for x, y in line if few or len(line) == 1 else []:
            yield f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>'
