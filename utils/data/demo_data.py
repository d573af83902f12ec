"""Draw "fabrics", a small synthetic image data set, as JPEG files for the demo and the tests.

A picture shows a piece of cloth with one of ten printed patterns, in front of clutter. Only the
shape of the pattern tells the class: colors are nearly gray, the print is always darker than its
ground, and the printed share of the cloth follows one distribution for all classes.

On one machine the same arguments give the same files; another processor or another release of
numpy or Pillow may round a pixel differently.
"""

import functools
import json
import math
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

VERSION = 1  # raise it with every change that changes a picture
MARKER = "fabrics.json"  # in the data set's folder: its presence says the drawing is complete
SPLITS = ("train", "val")
SUPERSAMPLE = 2

Rng = np.random.Generator
# A pattern maps coordinates u, v in units of its cells, (H, W) each, to a field (H, W) that is
# lowest in the middle of the print and grows with the distance from it, in the same units.
Pattern = Callable[[np.ndarray, np.ndarray, Rng], np.ndarray]


def _near(u: np.ndarray) -> np.ndarray:
    """Distance from u to the nearest integer, 0 to 0.5."""
    return np.abs(u - np.round(u))


def _motif(u: np.ndarray, v: np.ndarray, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates from the nearest motif's center, every second row moved by a random shift."""
    row = np.round(v)
    u = u + rng.uniform(0, 0.5) * (row % 2)
    return u - np.round(u), v - row


def _bricks(u: np.ndarray, v: np.ndarray, rng: Rng) -> np.ndarray:
    """Mortar between bricks, every second course moved by half a brick."""
    length = rng.uniform(1.3, 1.6)  # of a brick; its height keeps the area of one cell
    course = v * length
    joint = u / length + 0.5 * (np.floor(course) % 2)
    return np.minimum(_near(course) / length, _near(joint) * length)


def _cells(u: np.ndarray, v: np.ndarray, rng: Rng) -> np.ndarray:
    """Borders of the Voronoi cells of a lattice whose points are moved at random."""
    period = 32  # more than the cells across a picture, so that no point is seen twice
    moves = rng.uniform(0.1, 0.9, (2, period, period)).astype(u.dtype)
    column, row = np.floor(u).astype(int), np.floor(v).astype(int)
    # The nine points near each pixel, as seen from it: (9, H, W).
    i, j = np.mgrid[-1:2, -1:2].reshape(2, 9, 1, 1)
    at = (column + i) % period, (row + j) % period
    x, y = column - u + i + moves[0][at], row - v + j + moves[1][at]
    squared = x * x + y * y
    nearest = squared.argmin(axis=0, keepdims=True)
    own_x, own_y, own = (np.take_along_axis(a, nearest, axis=0) for a in (x, y, squared))
    # The border with another point is half way along the line between the two.
    apart = np.hypot(x - own_x, y - own_y)
    np.put_along_axis(squared, nearest, np.inf, axis=0)
    return ((squared - own) / (2 * apart)).min(axis=0)


def _checker(u: np.ndarray, v: np.ndarray, rng: Rng) -> np.ndarray:
    """Every second square of a board."""
    inside = np.minimum(_near(u), _near(v))
    return np.where((np.floor(u) + np.floor(v)) % 2 == 0, -inside, inside)


def _crosses(u: np.ndarray, v: np.ndarray, rng: Rng) -> np.ndarray:
    """Separate plus signs; the width of an arm is a random share of its length."""
    x, y = (np.abs(a) for a in _motif(u, v, rng))
    slim = rng.uniform(0.33, 0.42)
    return np.minimum(np.maximum(slim * x, y), np.maximum(x, slim * y))


def _spots(u: np.ndarray, v: np.ndarray, rng: Rng) -> np.ndarray:
    """Irregular blotches: a sum of waves in random directions, about two cells long."""
    waves = 12
    angle, phase = rng.uniform(0, 2 * math.pi, (2, waves)).astype(u.dtype)
    frequency = 2 * math.pi / rng.uniform(1.2, 2.4, waves).astype(u.dtype)
    field = sum(
        np.cos(f * (np.cos(a) * u + np.sin(a) * v) + p)
        for a, f, p in zip(angle, frequency, phase, strict=True)
    )
    return field / (frequency.mean() * math.sqrt(waves / 2))  # slope about 1


def _zigzag(u: np.ndarray, v: np.ndarray, rng: Rng) -> np.ndarray:
    """Parallel bands with sharp bends."""
    slope, period, distance = rng.uniform(0.8, 1.3), 1.5, 0.7
    bent = v + slope * period * _near(u / period)
    return distance * _near(bent / (distance * math.hypot(1, slope)))


PATTERNS: dict[str, Pattern] = {
    "bricks": _bricks,
    "cells": _cells,
    "checker": _checker,
    "crosses": _crosses,
    "dots": lambda u, v, rng: np.hypot(*_motif(u, v, rng)),
    "grid": lambda u, v, rng: np.minimum(_near(u), _near(v)),
    "rings": lambda u, v, rng: np.abs(np.hypot(*_motif(u, v, rng)) - rng.uniform(0.27, 0.32)),
    "spots": _spots,
    "stripes": lambda u, v, rng: _near(u),
    "zigzag": _zigzag,
}
CLASSES = tuple(PATTERNS)  # in the order of the alphabet


@functools.cache
def _pixel_centers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel, (size, size) float32 each, -0.5 to 0.5."""
    line = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
    return np.meshgrid(line, line)


@functools.cache
def _cubic_weights(size: int, points: int) -> np.ndarray:
    """Weights (size, points) that interpolate pixels between knots; each row sums to 1."""
    d = np.abs(np.linspace(0, points - 1, size)[:, None] - np.arange(points))
    inner = 1.5 * d**3 - 2.5 * d**2 + 1  # the cubic convolution kernel with a = -0.5
    outer = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    weights = np.where(d < 1, inner, np.where(d < 2, outer, 0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _smooth(shape: tuple[int, ...], points: int, rng: Rng) -> np.ndarray:
    """Smooth random fields (..., size, size) through points x points knots drawn from -1 to 1."""
    knots = rng.uniform(-1, 1, (*shape[:-2], points, points)).astype(np.float32)
    weights = _cubic_weights(shape[-1], points)
    return weights @ knots @ weights.T


def _outline(size: int, rng: Rng) -> np.ndarray:
    """How much of each pixel the cloth covers, (size, size) in 0 to 1: a wobbly blob."""
    x, y = _pixel_centers(size)
    x, y = x - rng.uniform(-0.12, 0.12), y - rng.uniform(-0.12, 0.12)
    angle = np.arctan2(y, x)
    border = rng.uniform(0.38, 0.64)
    for waves in (2, 3, 4):
        border = border + 0.05 * rng.uniform(-1, 1) * np.cos(waves * angle + rng.uniform(0, 6.3))
    return np.clip(0.5 + (border - np.hypot(x, y)) * size / 2, 0, 1)


def _print_on(cloth: np.ndarray, label: int, rng: Rng) -> np.ndarray:
    """How much of each pixel is printed, (size, size) in 0 to 1, on and off the cloth."""
    size = len(cloth)
    x, y = _pixel_centers(size)
    bend_x, bend_y = 0.05 * _smooth((2, size, size), 4, rng)
    x, y = x + bend_x, y + bend_y
    cells, angle = rng.uniform(4.5, 7.5), rng.uniform(0, 2 * math.pi)
    aspect = rng.uniform(0.85, 1.15)
    cos, sin = math.cos(angle), math.sin(angle)
    u = cells * aspect * (cos * x - sin * y) + rng.uniform(0, 1)
    v = cells / aspect * (sin * x + cos * y) + rng.uniform(0, 1)
    field = PATTERNS[CLASSES[label]](u, v, rng)
    # The share that is printed is drawn alike for all classes: brightness must not tell them apart.
    share = rng.uniform(0.3, 0.44)
    level = np.quantile(field[cloth > 0.5], share)
    softness = rng.uniform(1.5, 3) * cells / size  # pixels of the canvas, in units of the field
    return np.clip(0.5 + (level - field) / softness, 0, 1)


def _polygon(size: int, rng: Rng) -> np.ndarray:
    """How much of each pixel a small convex polygon covers, (size, size) in 0 to 1."""
    x, y = _pixel_centers(size)
    x, y = x - rng.uniform(-0.45, 0.45), y - rng.uniform(-0.45, 0.45)
    sides = int(rng.integers(3, 6))
    turn, radius = rng.uniform(0, 2 * math.pi), rng.uniform(0.03, 0.07)
    inside = np.full((size, size), np.inf, dtype=np.float32)
    for side in range(sides):
        angle = turn + (side + rng.uniform(-0.2, 0.2)) * 2 * math.pi / sides
        inside = np.minimum(inside, radius - math.cos(angle) * x - math.sin(angle) * y)
    return np.clip(0.5 + inside * size / 2, 0, 1)


def draw_picture(
    label: int, *, split: str, index: int, seed: int = 0, size: int = 48
) -> np.ndarray:
    """Draw one picture, (size, size, 3) uint8; label: a position in CLASSES, split: of SPLITS."""
    rng = np.random.default_rng([seed, SPLITS.index(split), label, index])
    canvas = SUPERSAMPLE * size
    cloth = _outline(canvas, rng)
    contrast = rng.uniform(0.3, 0.55)
    ground = rng.uniform(0.42, 0.54) + contrast / 2
    gray = ground - contrast * _print_on(cloth, label, rng)
    clutter = rng.uniform(0.4, 0.52) + 0.13 * _smooth((canvas, canvas), 12, rng)
    gray = clutter + cloth * (gray - clutter)
    gray *= 1 + 0.25 * _smooth((canvas, canvas), 3, rng)
    for _ in range(rng.integers(0, 3)):
        gray += _polygon(canvas, rng) * (rng.uniform(0.25, 0.75) - gray)
    gray = gray.reshape(size, SUPERSAMPLE, size, SUPERSAMPLE).mean(axis=(1, 3))
    tint = rng.uniform(-0.0125, 0.0125, (3, 1, 1)) + 0.0175 * _smooth((3, size, size), 4, rng)
    tint -= tint.mean(axis=0)  # the channels differ, the brightness stays
    noise = rng.uniform(1, 5) * rng.standard_normal((3, size, size), dtype=np.float32)
    picture = np.clip(np.round(255 * (gray + tint) + noise), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(picture.transpose(1, 2, 0))


def _is_drawn(root: Path, parameters: dict[str, int]) -> bool:
    """Whether root holds this drawing, or nothing; ValueError for anything else."""
    mend, asked = "remove it or name another folder", json.dumps(parameters)
    if (root / MARKER).is_file():
        found = (root / MARKER).read_text(encoding="utf-8").strip()
        if found != asked:
            raise ValueError(f"{root} holds a drawing with {found}, not {asked}: {mend}")
        return True
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{root} is no finished drawing, {MARKER} is missing: {mend}")
    return False


def draw_data_set(
    root: Path,
    *,
    train_per_class: int = 200,
    val_per_class: int = 100,
    size: int = 48,
    seed: int = 0,
) -> Path:
    """Draw root/train/<class>/*.jpg and root/val/... once; a finished drawing is left as it is.

    Returns the folder, an absolute path. The files go to a folder beside it, which is renamed when
    complete: of two calls at once the first to finish wins, and only a killed process leaves its
    `<root>.unfinished-*` behind. ValueError if `root` holds anything else, be it another drawing.
    """
    counts = {"train_per_class": train_per_class, "val_per_class": val_per_class}
    parameters = {"version": VERSION, **counts, "size": size, "seed": seed}
    root = root.resolve()
    if _is_drawn(root, parameters):
        return root
    unfinished = root.with_name(f"{root.name}.unfinished-{uuid.uuid4().hex[:8]}")
    try:
        for split, count in zip(SPLITS, counts.values(), strict=True):
            _write_pictures(unfinished / split, split, count, size=size, seed=seed)
        (unfinished / MARKER).write_text(json.dumps(parameters) + "\n", encoding="utf-8")
        try:
            unfinished.rename(root)
        except OSError:
            # Another process was faster: its drawing counts if it is the one asked for.
            if not _is_drawn(root, parameters):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root


def _write_pictures(folder: Path, split: str, count: int, *, size: int, seed: int) -> None:
    """Write `count` JPEG files per class below folder/<class>."""
    silent = not sys.stderr.isatty()
    for label, name in enumerate(tqdm(CLASSES, desc=f"drawing {split}", disable=silent)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            picture = draw_picture(label, split=split, index=index, seed=seed, size=size)
            Image.fromarray(picture).save(folder / name / f"{index:05d}.jpg", quality=90)
