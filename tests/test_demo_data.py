"""The drawn data set: what the pictures give away, what lies on disk, what interruption does."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from utils.data import demo_data
from utils.data.demo_data import CLASSES, MARKER, PATTERNS, SPLITS, draw_data_set, draw_picture

pytestmark = pytest.mark.filterwarnings("error")
SMALL = {"train_per_class": 2, "val_per_class": 1, "size": 16, "seed": 0}


def in_another_process(folder, **options):
    code = f"""from pathlib import Path
from utils.data.demo_data import draw_data_set
draw_data_set(Path({str(folder)!r}), **{options})"""
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def state(folder):
    """Content and time stamp of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {f.relative_to(folder): (f.read_bytes(), f.stat().st_mtime_ns) for f in files}


def assert_complete(root, *, train_per_class, val_per_class, size, seed):
    """Exactly the expected tree, every file a JPEG, and nothing left beside it."""
    expected = {Path(MARKER)} | {
        Path(split, name, f"{index:05d}.jpg")
        for split, count in (("train", train_per_class), ("val", val_per_class))
        for name in CLASSES
        for index in range(count)
    }
    assert set(state(root)) == expected
    for path in expected - {Path(MARKER)}:
        with Image.open(root / path) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (size, size))
    assert list(root.parent.glob(f"{root.name}*")) == [root]
    assert json.loads((root / MARKER).read_text())["seed"] == seed


# One picture


def test_classes_are_the_ten_sorted_names():
    names = "bricks cells checker crosses dots grid rings spots stripes zigzag"
    assert tuple(names.split()) == CLASSES


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_same_arguments_same_bits_and_every_argument_counts(label):
    arguments = {"split": "train", "index": 3, "seed": 5, "size": 24}
    picture = draw_picture(label, **arguments)
    assert picture.shape == (24, 24, 3)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, draw_picture(label, **arguments))
    for change in ({"split": "val"}, {"index": 4}, {"seed": 6}, {"index": 5, "seed": 3}):
        other = draw_picture(label, **{**arguments, **change})
        # Not merely other noise: the pictures have nothing to do with each other.
        assert np.abs(picture.astype(int) - other).mean() > 10, change


def test_a_larger_picture_shows_the_same_scene():
    """Drawn at 64 and box-reduced to 32 it is the picture drawn at 32, but for noise and edges."""
    for label in range(len(CLASSES)):
        large = draw_picture(label, split="train", index=0, size=64).astype(float)
        small = draw_picture(label, split="train", index=0, size=32).astype(float)
        reduced = large.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        assert np.corrcoef(reduced.ravel(), small.ravel())[0, 1] > 0.9, CLASSES[label]


# The patterns


def printed(name, seed, share=0.37, points=240, extent=8.0):
    """A pattern's field on a square `extent` cells wide, and what is printed of it."""
    line = np.linspace(-extent / 2, extent / 2, points)
    u, v = np.meshgrid(line, line)
    field = PATTERNS[name](u, v, np.random.default_rng(seed))
    return field, field < np.quantile(field, share)


@pytest.mark.parametrize("a, b", list(itertools.combinations(CLASSES, 2)))
def test_patterns_differ_for_the_same_random_numbers(a, b):
    # Unrelated prints with a share of 0.37 differ in 2 * 0.37 * 0.63 = 47% of the points; the
    # nearest pair, crosses and dots with the same centers, in 11%.
    for seed in range(3):
        assert (printed(a, seed)[1] != printed(b, seed)[1]).mean() > 0.09


@pytest.mark.parametrize("name", CLASSES)
def test_fields_measure_distance_where_the_print_ends(name):
    """No seams between the tiles, and one unit is one cell: slopes stay below 1 (blotches: 3)."""
    steepest = 3 if name == "spots" else 1.001
    for seed in range(5):
        field, _ = printed(name, seed)
        step = 8.0 / 239
        level = np.quantile(field, 0.44)  # the largest share that is printed
        for along in (field, field.T):
            near = np.minimum(along[1:], along[:-1]) < level
            assert (np.abs(np.diff(along, axis=0))[near] <= steepest * step).all()
        slope = np.hypot(*np.gradient(field, step))[field < level]
        assert np.median(slope) > (0.3 if name in ("spots", "crosses") else 0.95)


@pytest.mark.parametrize(
    "name, dark, light",
    [
        ("stripes", [(0, 0.3), (2, 0.7)], [(0.5, 0), (1.5, 0.2)]),
        ("grid", [(0, 0.5), (0.5, 1)], [(0.5, 0.5), (-0.5, 1.5)]),
        ("checker", [(0.5, 0.5), (1.5, 1.5), (0.5, -1.5)], [(1.5, 0.5), (0.5, 1.5), (-0.5, 0.5)]),
        ("dots", [(0, 0), (1, 0), (-3, 0)], [(0.5, 0), (1.5, 0)]),
        ("crosses", [(0, 0), (0.3, 0), (0, 0.3), (-0.3, 0)], [(0.3, 0.3), (0.5, 0), (-0.3, 0.3)]),
        ("rings", [(0.3, 0), (0, 0.3), (0.7, 0)], [(0, 0), (1, 0), (0.5, 0)]),
    ],
)
def test_hand_placed_points(name, dark, light):
    for seed in range(3):
        field, _ = printed(name, seed)
        level = np.quantile(field, 0.37)
        for points, is_dark in ((dark, True), (light, False)):
            for u, v in points:
                one = PATTERNS[name](
                    np.array([[float(u)]]), np.array([[float(v)]]), np.random.default_rng(seed)
                )
                assert (one.item() < level) == is_dark, (u, v, seed)


def test_every_second_course_of_bricks_is_moved():
    length = np.random.default_rng(0).uniform(1.3, 1.6)  # the first draw of the field
    u, v = np.meshgrid([0, length / 2, length], [0.5 / length, 1.5 / length, 2.5 / length])
    field = PATTERNS["bricks"](u, v, np.random.default_rng(0))
    inside = 0.5 / length  # half the height of a brick
    expected = [[0, inside, 0], [inside, 0, inside], [0, inside, 0]]
    np.testing.assert_allclose(field, expected, atol=1e-9)


def test_cells_against_all_points():
    """The border nearest to some places, from a slow search over all points around."""
    moves = np.random.default_rng(0).uniform(0.1, 0.9, (2, 32, 32))  # the first draw of the field
    steps = list(itertools.product(range(-6, 7), repeat=2))
    sites = np.array(
        [(i + moves[0, i % 32, j % 32], j + moves[1, i % 32, j % 32]) for i, j in steps]
    )
    places = np.random.default_rng(1).uniform(-3, 3, (200, 2))
    field = PATTERNS["cells"](places[:, :1], places[:, 1:], np.random.default_rng(0))
    for place, found in zip(places, field.ravel(), strict=True):
        own = sites[np.linalg.norm(sites - place, axis=1).argmin()]
        to_borders = []
        for site in sites:
            if (site != own).any():
                across = (site - own) / np.linalg.norm(site - own)
                to_borders.append(((site + own) / 2 - place) @ across)
        assert found == pytest.approx(min(to_borders), abs=1e-9)


# What the pictures give away


@pytest.mark.parametrize("index", range(4))
def test_nothing_but_the_pattern_depends_on_the_class(monkeypatch, index):
    """The same pattern and the same random numbers give the same picture, whatever the label."""
    make = np.random.default_rng

    def without_label(key):
        seed, split, _, index = key
        return make([seed, split, index])

    monkeypatch.setattr(np.random, "default_rng", without_label)
    monkeypatch.setattr(demo_data, "PATTERNS", dict.fromkeys(CLASSES, PATTERNS["stripes"]))
    first, *others = (
        draw_picture(label, split="train", index=index) for label in range(len(CLASSES))
    )
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.fixture(scope="module")
def pictures():
    """80 training and 60 validation pictures per class: images (N, 32, 32, 3) and labels (N)."""
    sets = []
    for split, count in zip(SPLITS, (80, 60), strict=True):
        places = [(label, index) for label in range(len(CLASSES)) for index in range(count)]
        images = [draw_picture(c, split=split, index=i, size=32) for c, i in places]
        sets.append((np.stack(images) / 255, np.array([label for label, _ in places])))
    return sets


def neighbor_accuracy(bank, bank_labels, queries, labels, *, k):
    """Percent right of a majority vote among the k nearest by Euclidean distance."""
    squared = (bank**2).sum(1) - 2 * queries @ bank.T  # up to the query's own norm
    nearest = bank_labels[np.argsort(squared, axis=1)[:, :k]]
    votes = np.stack([(nearest == label).sum(1) for label in range(len(CLASSES))], axis=1)
    return 100 * (votes.argmax(1) == labels).mean()


def test_mean_color_and_brightness_give_nothing_away(pictures):
    (train, train_labels), (val, val_labels) = pictures
    colors, queries = train.mean((1, 2)), val.mean((1, 2))
    centers = np.stack([colors[train_labels == c].mean(0) for c in range(len(CLASSES))])
    order = np.arange(len(CLASSES))
    accuracies = [neighbor_accuracy(centers, order, queries, val_labels, k=1)]
    for bank, query in ((colors, queries), (colors.mean(1)[:, None], queries.mean(1)[:, None])):
        for k in (1, 20):
            accuracies.append(neighbor_accuracy(bank, train_labels, query, val_labels, k=k))
    assert max(accuracies) < 15, accuracies


def test_raw_pixels_say_little(pictures):
    (train, train_labels), (val, val_labels) = pictures
    mean, std = train.mean((0, 1, 2)), train.std((0, 1, 2))
    flat = [((images - mean) / std).reshape(len(images), -1) for images in (train, val)]
    bank, queries = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in flat)
    assert 14 < neighbor_accuracy(bank, train_labels, queries, val_labels, k=20) < 35


def test_the_printed_share_is_drawn_alike():
    """Every class prints 30 to 44% of its cloth, with a mean near the middle of that."""
    for label, name in enumerate(CLASSES):
        shares = []
        for index in range(40):
            rng = np.random.default_rng([label, index])
            cloth = demo_data._outline(64, rng)
            shares.append(demo_data._print_on(cloth, label, rng)[cloth > 0.5].mean())
        assert 0.27 < min(shares) < max(shares) < 0.47, name
        assert abs(np.mean(shares) - 0.37) < 0.03, name


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_prints_are_darker_than_their_cloth(monkeypatch, label):
    """The middle of a picture, nearly always cloth, when everything is printed or nothing is."""
    grays = []
    for printed in (np.zeros, np.ones):
        monkeypatch.setattr(
            demo_data, "_print_on", lambda cloth, *_, fill=printed: fill(cloth.shape)
        )
        drawn = [draw_picture(label, split="train", index=i, size=32) for i in range(20)]
        grays.append(np.stack(drawn)[:, 12:20, 12:20].mean((1, 2, 3)) / 255)
    contrast = grays[0] - grays[1]
    # 0.3 to 0.55 in light that varies by a quarter; polygons may cover a part.
    assert (contrast > 0.1).all() and (contrast < 0.7).all()
    assert 0.35 < contrast.mean() < 0.5


def test_colors_are_nearly_gray(pictures):
    for images, labels in pictures:
        tint = images - images.mean(axis=-1, keepdims=True)
        for label in range(len(CLASSES)):
            assert 0.01 < tint[labels == label].std() < 0.04


# On disk


def test_files(tmp_path):
    root = draw_data_set(tmp_path / "new" / "fabrics", **SMALL)
    assert root == tmp_path / "new" / "fabrics"
    assert_complete(root, **SMALL)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "black.jpg", quality=90)
    with (
        Image.open(root / "train" / "dots" / "00000.jpg") as image,
        Image.open(tmp_path / "black.jpg") as reference,
    ):
        assert image.quantization == reference.quantization


def test_each_file_shows_its_own_picture(tmp_path):
    (tmp_path / "fabrics").mkdir()  # an empty folder is filled
    root = draw_data_set(tmp_path / "fabrics", **SMALL)
    places = [("train", c, i) for c in range(10) for i in range(2)]
    places += [("val", c, 0) for c in range(10)]
    drawn = np.stack([draw_picture(c, split=s, index=i, size=16) for s, c, i in places])
    for place, (split, label, index) in enumerate(places):
        with Image.open(root / split / CLASSES[label] / f"{index:05d}.jpg") as image:
            read = np.asarray(image).astype(float)
        distance = np.abs(drawn - read).mean(axis=(1, 2, 3))
        assert distance.argmin() == place
        assert distance[place] < 8  # gray levels: what JPEG costs


def test_second_call_does_nothing(tmp_path, monkeypatch):
    root = draw_data_set(tmp_path / "fabrics", **SMALL)
    before = state(root)
    monkeypatch.setattr(demo_data, "draw_picture", lambda *a, **k: pytest.fail("drawn again"))
    assert draw_data_set(root, **SMALL) == root
    assert state(root) == before


@pytest.mark.parametrize(
    "change", [{"train_per_class": 1}, {"val_per_class": 2}, {"size": 17}, {"seed": 1}]
)
def test_other_parameters_are_refused(tmp_path, change):
    root = draw_data_set(tmp_path / "fabrics", **SMALL)
    before = state(tmp_path)
    (name, value), *_ = change.items()
    with pytest.raises(ValueError, match=f'"{name}": {SMALL[name]}.*"{name}": {value}'):
        draw_data_set(root, **{**SMALL, **change})
    assert state(tmp_path) == before


def test_another_version_or_marker_is_refused(tmp_path, monkeypatch):
    root = draw_data_set(tmp_path / "fabrics", **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(demo_data, "VERSION", demo_data.VERSION + 1)
        with pytest.raises(ValueError, match="version"):
            draw_data_set(root, **SMALL)
    (root / MARKER).write_text("{")
    with pytest.raises(ValueError, match="holds a drawing with {, not"):
        draw_data_set(root, **SMALL)


@pytest.mark.parametrize("missing", ["marker", "everything"])
def test_foreign_files_are_refused_and_kept(tmp_path, missing):
    root = tmp_path / "fabrics"
    if missing == "marker":
        draw_data_set(root, **SMALL)
        (root / MARKER).unlink()
    else:
        root.mkdir()
        (root / "thesis.txt").write_text("precious")
    before = state(tmp_path)
    with pytest.raises(ValueError, match=f"{MARKER} is missing"):
        draw_data_set(root, **SMALL)
    assert state(tmp_path) == before


# Interruption and company


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_drawing_starts_again(tmp_path, monkeypatch, error):
    calls = itertools.count()

    def interrupted(*args, **kwargs):
        if next(calls) == 25:  # in the validation pictures
            raise error
        return draw_picture(*args, **kwargs)

    root = tmp_path / "fabrics"
    with monkeypatch.context() as patch:
        patch.setattr(demo_data, "draw_picture", interrupted)
        with pytest.raises(error):
            draw_data_set(root, **SMALL)
    assert next(calls) == 26
    assert not list(tmp_path.iterdir())
    assert_complete(draw_data_set(root, **SMALL), **SMALL)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_drawing_leaves_nothing_that_counts(tmp_path):
    root = tmp_path / "fabrics"
    process = in_another_process(root, train_per_class=100_000)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob("*.jpg")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("fabrics.unfinished-")
    assert not list(left.rglob(MARKER))  # the marker comes last
    assert not root.exists()
    draw_data_set(root, **SMALL)
    assert left.exists()  # it might be the folder of a process that still draws
    left.rename(tmp_path / "aside")
    assert_complete(root, **SMALL)


def test_two_processes_at_once(tmp_path):
    root = tmp_path / "fabrics"
    options = {**SMALL, "train_per_class": 10}
    processes = [in_another_process(root, **options) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert errors == ["", ""]  # no progress bar off a terminal
    assert_complete(root, **options)


@pytest.mark.parametrize("other_seed", [0, 1])
def test_the_first_to_finish_wins(tmp_path, monkeypatch, other_seed):
    """Another call finishes while this one draws."""
    root = tmp_path / "fabrics"
    write, winner = demo_data._write_pictures, {}

    def overtaken(*args, **kwargs):
        if not winner:
            winner["is"] = None
            draw_data_set(root, **{**SMALL, "seed": other_seed})
            winner["is"] = state(root)
        write(*args, **kwargs)

    monkeypatch.setattr(demo_data, "_write_pictures", overtaken)
    if other_seed == SMALL["seed"]:
        assert draw_data_set(root, **SMALL) == root
    else:
        with pytest.raises(ValueError, match='"seed": 1.*"seed": 0'):
            draw_data_set(root, **SMALL)
    assert state(root) == winner["is"]
    assert list(tmp_path.iterdir()) == [root]
