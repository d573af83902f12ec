"""Line charts as SVG text, for pages that need neither a network nor a script.

A chart is as wide as its box; its text keeps its proportion, so that a box of 300 to 450 pixels
suits it.
"""

import math
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 400, 250  # of the coordinates
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 40
# Okabe and Ito's colors that are strong on white, each with dashes of its own.
STYLES = (("#0072B2", ""), ("#D55E00", "7 4"), ("#00795A", "2 3"), ("#A0457A", "9 3 2 3"))
_FEW = 20  # points up to which each is marked


class Line(NamedTuple):
    """A curve: its label, x and y of its points; a y that is not finite is a gap."""

    label: str
    x: list[float]
    y: list[float]


def ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Round numbers that enclose `low` and `high`, about `most` of them and at least 2."""
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size + 1e-30:  # one value, as far as a picture shows
        room = size / 10 if size > 1e-30 else 0.5
        low, high = low - room, high + room
    rough = (high - low) / (most - 2)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def line_chart(
    lines: list[Line],
    *,
    title: str,
    x_label: str = "epochs",
    unit: str = "",
    x_end: float = 0,
) -> str:
    """An SVG element with axes, grid and a legend below where there are several lines.

    title: what readers of the page by ear get. The x axis goes from 0 to the last point, or x_end
    if that is farther. Raises ValueError without a finite point.
    """
    points = [
        [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)] for line in lines
    ]
    every = [point for one in points for point in one]
    if not every:
        raise ValueError(f"{title}: nothing to draw")
    x_ticks = ticks(0, max(x_end, *(x for x, _ in every)))
    y_ticks = ticks(min(y for _, y in every), max(y for _, y in every))
    rows = -(-len(lines) // 2) if len(lines) > 1 else 0
    height = HEIGHT + 20 * rows

    def at(x: float, y: float) -> tuple[float, float]:
        """The place of a point in the picture, in pixels."""
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return (
            round(_LEFT + across * (WIDTH - _LEFT - _RIGHT), 1),
            round(HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">',
        f"<title>{escape(title)}</title>",
        *_grid(x_ticks, y_ticks, at),
        *_axis_names(x_label, unit),
    ]
    for place, line in enumerate(lines):
        parts += _curve(line, at, STYLES[place % len(STYLES)])
    if len(lines) > 1:
        parts += [part for place, line in enumerate(lines) for part in _entry(line, place)]
    return "\n".join([*parts, "</svg>"])


def _axis_names(x_label: str, unit: str) -> list[str]:
    """What is written below the x axis, and along the y axis if that has a unit."""
    across, up = (_LEFT + WIDTH - _RIGHT) / 2, (_TOP + HEIGHT - _BOTTOM) / 2
    places = {f'x="{across}" y="{HEIGHT - 6}"': x_label}
    if unit:
        places[f'transform="translate(13 {up}) rotate(-90)"'] = unit
    return [
        f'<text class="tick" {place} text-anchor="middle">{escape(name)}</text>'
        for place, name in places.items()
    ]


def _grid(x_ticks: list[float], y_ticks: list[float], at) -> list[str]:
    """Grid lines with their numbers."""
    parts = []
    for tick in y_ticks:
        (left, y), (right, _) = at(x_ticks[0], tick), at(x_ticks[-1], tick)
        parts.append(f'<path class="grid" d="M{left} {y}H{right}"/>')
        parts.append(
            f'<text class="tick" x="{left - 5}" y="{y + 4}" text-anchor="end">{tick:g}</text>'
        )
    for tick in x_ticks:
        (x, bottom), (_, top) = at(tick, y_ticks[0]), at(tick, y_ticks[-1])
        parts.append(f'<path class="grid" d="M{x} {top}V{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>'
        )
    return parts


def _curve(line: Line, at, style: tuple[str, str]) -> list[str]:
    """A path with gaps where y is not finite; a few points, and those alone, as dots."""
    color, dashes = style
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if math.isfinite(y):
            runs[-1].append(at(x, y))
        elif runs[-1]:
            runs.append([])
    path = " ".join("M" + "L".join(f"{x} {y}" for x, y in run) for run in runs if len(run) > 1)
    parts = []
    if path:
        dash = f' stroke-dasharray="{dashes}"' if dashes else ""
        parts.append(f'<path class="curve" stroke="{color}"{dash} d="{path}"/>')
    few = sum(map(len, runs)) <= _FEW
    dots = [point for run in runs for point in run if few or len(run) == 1]
    return parts + [f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>' for x, y in dots]


def _entry(line: Line, place: int) -> list[str]:
    """A line of the legend, two abreast."""
    color, dashes = STYLES[place % len(STYLES)]
    x, y = _LEFT + (place % 2) * 150, HEIGHT + 8 + 20 * (place // 2)
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    return [
        f'<path class="curve" stroke="{color}"{dash} d="M{x} {y}h30"/>',
        f'<text class="tick" x="{x + 36}" y="{y + 4}">{escape(line.label)}</text>',
    ]
