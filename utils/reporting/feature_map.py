"""A picture of an encoder's features, as SVG: maps of points in classes, a matrix of confusions.

A class is told by its marker's shape as well as by its color, in a legend that names it.
"""

import math
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.reporting import svg_template
from utils.reporting.curves import STYLES, ticks
from utils.runtime.errors import printable

MOST_COLORED = 20  # classes; also up to which numbers stand in the matrix
MOST_ROWS = 30  # of the matrix
TITLE, OTHERS = "The encoder's features", "all others"
SIDE = 440  # of a map, in pixels
_DARK = (8, 48, 107)  # of 100 percent; 0 is white
_TEMPLATE = Path(__file__).with_suffix(".svg")


def _star(points: int, outer: float, inner: float, turn: float) -> list[tuple[float, float]]:
    """A star around 0, its first point upwards, then turned by so many degrees."""
    angles = [math.radians(turn - 90 + 180 * i / points) for i in range(2 * points)]
    radii = [outer, inner] * points
    return [
        (round(r * math.cos(a), 3), round(r * math.sin(a), 3))
        for r, a in zip(radii, angles, strict=True)
    ]


def _regular(corners: int, radius: float, turn: float) -> list[tuple[float, float]]:
    return _star(corners, radius, radius * math.cos(math.pi / corners), turn)


# Ten, each filled for one class and hollow for another; about a pixel in radius.
SHAPES = (
    *(_regular(24, 1, 0), _regular(3, 1.4, 0), _regular(4, 1.25, 45), _star(4, 1.6, 0.65, 45)),
    *(_regular(3, 1.4, 180), _regular(4, 1.4, 0), _star(4, 1.6, 0.65, 0), _regular(3, 1.4, 90)),
    *(_regular(3, 1.4, 270), _star(5, 1.5, 0.6, 0)),
)


class Map(NamedTuple):
    """Places (n, 2) of the points; has_ticks: whether the axes have numbers."""

    title: str
    places: np.ndarray
    axes: tuple[str, str]
    has_ticks: bool = True


class Points(NamedTuple):
    """Of each point its class (n,) int64, and what a reader sees who points at it."""

    labels: np.ndarray
    words: list[str]


class Knn(NamedTuple):
    """What k-NN says of all images.

    counts: (C, C), a row for each true class. accuracy: percent. most_frequent: of the confusions
    class, class taken for, images.
    """

    k: int
    counts: np.ndarray
    accuracy: float
    most_frequent: list[tuple[int, int, int]]


def sheet_svg(
    maps: list[Map],
    points: Points,
    knn: Knn,
    *,
    classes: list[str],
    colored: list[int],
    notes: list[str],
) -> str:
    """The whole picture as an SVG file. colored: the classes with a marker, 20 at most."""
    count = len(points.labels)
    return svg_template.read(_TEMPLATE).render(
        title=TITLE,
        notes=[short(note, 140) for note in notes],
        side=SIDE,
        radius=5 if count <= 500 else 4 if count <= 2000 else 3,
        styles=[_style(place) for place in range(len(colored))],
        maps=[_draw(one, points, colored) for one in maps],
        legend=_legend(points.labels, classes, colored),
        matrix=_matrix(knn.counts, classes),
        scale=[(share, *shade(share)) for share in (0, 25, 50, 75, 100)],
        knn=knn,
        confusions=[confusion(one, knn.counts, classes, most=17) for one in knn.most_frequent],
    )


def short(text: str, most: float) -> str:
    """A text as wide as so many letters at most: its beginning and its end."""
    text = printable(text)
    widths = np.cumsum([0, *map(_width, text)])
    if widths[-1] <= most:
        return text
    head = int((widths <= most / 2).sum()) - 1
    tail = int((widths[-1] - widths <= most / 2 - 1).sum()) - 1
    return f"{text[:head]}…{text[len(text) - tail :]}"


def _width(character: str) -> float:
    """About how wide it is, in small letters."""
    if unicodedata.east_asian_width(character) in "WF":
        return 2
    return 1.6 if character in "MW@%mw" else 1.2 if character.isupper() else 1


def confusion(one: tuple[int, int, int], counts: np.ndarray, classes: list[str], most: int) -> str:
    """A confusion in words; most: characters of a name."""
    true, taken, number = one
    total = int(counts[true].sum())
    names = (short(classes[i], most) for i in (true, taken))
    return "{} taken for {}".format(*names) + f": {number} of {total} ({100 * number / total:.1f}%)"


def shade(percent: float) -> tuple[str, str]:
    """The color of a cell, darker with every percent, and black or white for text on it."""
    rgb = [round(255 + (dark - 255) * percent / 100) for dark in _DARK]
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    light = float(np.dot((0.2126, 0.7152, 0.0722), linear)) + 0.05  # as contrast is defined (WCAG)
    return "#{:02x}{:02x}{:02x}".format(*rgb), "#fff" if 1.05 / light > light / 0.05 else "#000"


def _style(place: int) -> dict:
    """The marker of a class; neighbors in the list differ in color, in shape and in its filling."""
    color, hollow = STYLES[place % len(STYLES)][0], (place + place // len(SHAPES)) % 2
    fill, line = ("white", color) if hollow else (color, "white")
    return {"shape": SHAPES[place % len(SHAPES)], "fill": fill, "line": line, "hollow": hollow}


def _legend(labels: np.ndarray, classes: list[str], colored: list[int]) -> list[tuple]:
    """Marker and words of each line; what has no marker of its own is counted."""
    lines = [(f"m{place}", short(classes[label], 24)) for place, label in enumerate(colored)]
    rest = labels[~np.isin(labels, colored)]
    if others := len(classes) - len(colored):
        kinds = f"{others} other class" + "es" * (others > 1)
        lines += [("other", kinds), ("", f"({len(rest)} of {len(labels)} points)")]
    return lines


def _draw(one: Map, points: Points, colored: list[int]) -> dict:
    """What the template draws of a map: what is not colored first, the rest in mixed order."""
    axes = [_axis(values) for values in one.places.T]
    places = np.column_stack([to(x) for (to, _), x in zip(axes, one.places.T, strict=True)])
    places[:, 1] = SIDE - places[:, 1]
    order = np.random.default_rng(0).permutation(len(places))  # else the last class hides others
    marker = {label: f"m{place}" for place, label in enumerate(colored)}
    marks = [
        (*places[i].tolist(), marker.get(int(points.labels[i]), "other"), points.words[i])
        for i in order
    ]
    return {
        "title": one.title,
        "axes": one.axes,
        "x_ticks": axes[0][1] if one.has_ticks else [],
        "y_ticks": [(text, SIDE - at) for text, at in axes[1][1]] if one.has_ticks else [],
        "marks": sorted(marks, key=lambda mark: mark[2] != "other"),
    }


def _axis(values: np.ndarray) -> tuple[Callable, list[tuple[str, float]]]:
    """Where a value lies along a side, in pixels; words and places of the ticks."""
    marks = np.array(ticks(float(values.min()), float(values.max())))
    room = 0.04 * (marks[-1] - marks[0])
    low, high = max(marks[0], values.min() - room), min(marks[-1], values.max() + room)

    def to(value: np.ndarray) -> np.ndarray:
        return ((value - low) / (high - low) * SIDE).round(1)

    inside = marks[(low <= marks) & (marks <= high)]
    return to, [(f"{mark:g}", float(to(mark))) for mark in inside]


def _matrix(counts: np.ndarray, classes: list[str]) -> dict:
    """What the template draws of the matrix: where there are many classes, those most mistaken."""
    totals, rows = counts.sum(axis=1), np.arange(len(classes))
    if is_cut := len(rows) > MOST_ROWS:
        accuracy = np.where(totals > 0, counts.diagonal() / np.maximum(totals, 1), np.inf)
        rows = np.sort(np.argsort(accuracy, kind="stable")[:MOST_ROWS])
    columns = np.column_stack([counts[:, rows], np.delete(counts, rows, 1).sum(axis=1)])
    names = [classes[row] for row in rows] + [OTHERS] * is_cut
    with_text = len(classes) <= MOST_COLORED
    labels = [short(name, 18) for name in names]
    return {
        "is_cut": is_cut,
        "of": len(classes),
        "side": 42 if len(classes) <= 10 else 32 if with_text else 22,  # of a cell
        "room": 16 + 9 * max(sum(map(_width, label)) for label in labels),  # for labels
        "columns": labels,
        "rows": [
            [
                _cell(int(columns[row, j]), int(totals[row]), with_text)
                | {"words": f"{classes[row]} taken for {name}"}
                for j, name in enumerate(names)
            ]
            for row in rows
        ],
    }


def _cell(count: int, total: int, with_text: bool) -> dict:
    """Color and number of a cell of the matrix; 0 and 100 percent are that exactly."""
    percent = 100 * count / total if total else 0
    text = "<1" if 0 < percent < 0.5 else ">99" if 99.5 <= percent < 100 else f"{percent:.0f}"
    fill, ink = shade(percent)
    text = (text if total else "–") if with_text else ""
    return {"fill": fill, "ink": ink, "text": text, "of": f"{count} of {total}"}
