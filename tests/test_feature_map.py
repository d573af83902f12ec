"""The picture of features as XML: places, markers, legend, cells of the matrix, hostile names."""

import os
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nasty_names import components

from utils.evaluation import feature_space
from utils.reporting import feature_map
from utils.reporting.feature_map import SIDE, Knn, Map, Points, shade, sheet_svg, short

TAG = "{http://www.w3.org/2000/svg}"


def drawn(classes, places, labels, *, counts=None, colored=None, words=None, has_ticks=True):
    """The parsed picture of one map."""
    counts = np.eye(len(classes), dtype=int) if counts is None else np.array(counts)
    worst = feature_space.most_frequent(counts, most=5)
    knn = Knn(7, counts, 100 * counts.trace() / counts.sum(), worst)
    colored = list(range(min(20, len(classes)))) if colored is None else colored
    one = Map("PCA", np.array(places, dtype=float), ("axis 1", "axis 2"), has_ticks)
    points = Points(np.array(labels), words or [f"file {i}" for i in range(len(labels))])
    text = sheet_svg([one], points, knn, classes=classes, colored=colored, notes=["a note"])
    return ElementTree.fromstring(text)


def part(root, name):
    (found,) = (e for e in root.iter(TAG + "g") if e.get("class") == name)
    return found


def texts(root):
    return [element.text for element in root.iter(TAG + "text")]


def legend(root):
    """Marker -> the words on its height."""
    group = part(root, "legend")
    heights = {float(e.get("y")) - 5: e.text for e in group.iter(TAG + "text")}
    return {e.get("href"): heights[float(e.get("y"))] for e in group.iter(TAG + "use")}


def cells(root):
    """By class and class taken for, as the cells say: fill, the text in it and its color."""
    found = {}
    for group in part(root, "matrix").iter(TAG + "g"):
        title, rect, text = (group.find(TAG + name) for name in ("title", "rect", "text"))
        if rect is not None:
            inside = (None, None) if text is None else (text.text, text.get("fill"))
            found[title.text] = (rect.get("fill"), *inside)
    return found


def places_of(root):
    """Words -> x, y and marker of each point of the map."""
    points = part(root, "map").iter(TAG + "use")
    return {
        e.find(TAG + "title").text: (float(e.get("x")), float(e.get("y")), e.get("href"))
        for e in points
    }


def test_points_land_where_the_axes_say():
    hand_placed = [(0, 0), (4, 0), (4, 8), (1, 2)]
    root = drawn(["a", "b"], hand_placed, [0, 0, 1, 1])
    labels = [e for e in part(root, "map").iter(TAG + "text") if e.text.isdigit()]
    # The numbers of x stand below their lines, those of y 5 below theirs, left of the map.
    across = {float(e.text): float(e.get("x")) for e in labels if e.get("x") != "-6"}
    up = {float(e.text): float(e.get("y")) - 5 for e in labels if e.get("x") == "-6"}
    points = places_of(root)
    for number, (x, y) in enumerate(hand_placed):
        *place, marker = points[f"file {number}"]
        assert place == pytest.approx([across[x], up[y]], abs=0.11)
        assert marker == f"#m{number // 2}"
    assert all(0 <= x <= SIDE and 0 <= y <= SIDE for x, y, _ in points.values())
    assert across[4] > across[0] + SIDE / 2 and up[0] > up[8] + SIDE / 2
    bare = drawn(["a", "b"], hand_placed, [0, 0, 1, 1], has_ticks=False)
    assert texts(part(bare, "map")) == ["PCA", "axis 1", "axis 2"]
    assert places_of(bare) == points


def test_points_in_one_place_lie_in_the_middle():
    for spot in ((0, 0), (3, -1e-9)):
        points = places_of(drawn(["a", "b"], [spot] * 3, [0, 1, 0])).values()
        assert {point[:2] for point in points} == {(SIDE / 2, SIDE / 2)}


def test_classes_are_told_apart_without_color_and_named():
    """Twenty by shape and filling alone; neighbors by the color as well."""
    classes = [f"class {i}" for i in range(20)]
    root = drawn(classes, np.random.default_rng(0).normal(size=(40, 2)), [*range(20)] * 2)
    (defs,) = root.iter(TAG + "defs")
    markers = {f"#{e.get('id')}": e for e in defs.iter(TAG + "path")}
    looks = {name: (e.get("d"), e.get("fill") == "white") for name, e in markers.items()}
    assert len(set(looks.values())) == 20
    colors = [({e.get("fill"), e.get("stroke")} - {"white"}).pop() for e in markers.values()]
    shapes = [e.get("d") for e in markers.values()]
    for one in (colors, shapes):
        assert all(a != b for a, b in zip(one, one[1:], strict=False))
    assert legend(root) == {f"#m{i}": name for i, name in enumerate(classes)}
    assert {point[2] for point in places_of(root).values()} == set(markers)


def test_what_has_no_color_is_gray_and_counted():
    classes = [f"class {i}" for i in range(25)]
    places = np.random.default_rng(0).normal(size=(50, 2))
    root = drawn(classes, places, [*range(25)] * 2, colored=[3, 22])
    expected = {"#m0": "class 3", "#m1": "class 22", "#other": "23 other classes"}
    assert legend(root) == expected and "(46 of 50 points)" in texts(root)
    drawn_as = [point[2] for point in places_of(root).values()]
    assert drawn_as[:46] == ["#other"] * 46  # below the others
    assert sorted(drawn_as[46:]) == ["#m0", "#m0", "#m1", "#m1"]


def luminance(color):
    """As contrast is defined (WCAG 2)."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_scale_prints_in_gray_and_its_text_can_be_read():
    shades = [shade(percent) for percent in range(101)]
    lights = [luminance(fill) for fill, _ in shades]
    assert lights == sorted(lights, reverse=True) and lights[0] == pytest.approx(1)
    for light, (_, ink) in zip(lights, shades, strict=True):
        text = {"#fff": 1, "#000": 0}[ink]
        assert (max(light, text) + 0.05) / (min(light, text) + 0.05) >= 4.5


def test_the_matrix_has_percents_of_the_rows():
    counts = [[999, 1, 0], [50, 50, 0], [0, 0, 0]]
    found = cells(drawn(["a", "b", "c"], [(0, 0), (1, 1)], [0, 1], counts=counts))
    says = {words.rpartition(":")[0]: text for words, (_, text, _) in found.items()}
    assert says == {
        **{"a taken for a": ">99", "a taken for b": "<1", "a taken for c": "0"},
        **{"b taken for a": "50", "b taken for b": "50", "b taken for c": "0"},
        **{f"c taken for {name}": "–" for name in "abc"},
    }
    assert found["a taken for b: 1 of 1000"][0] == shade(0.1)[0]
    assert found["b taken for b: 50 of 100"] == (shade(50)[0], "50", shade(50)[1])


@pytest.mark.parametrize("count", [20, 21, 30, 31, 45])
def test_matrices_of_many_classes(count):
    """Above 20 without numbers, above 30 those of lowest accuracy, whose rows are still whole."""
    classes = [f"class {i:02}" for i in range(count)]
    counts = np.random.default_rng(count).integers(1, 9, (count, count))
    root = drawn(classes, [(0, 0), (1, 1)], [0, 1], counts=counts)
    found = cells(root)
    assert all((text is None) == (count > 20) for _, text, _ in found.values())
    accuracy = counts.diagonal() / counts.sum(axis=1)
    shown = sorted(classes[i] for i in np.argsort(accuracy)[:30])
    assert sorted({words.split(" taken")[0] for words in found}) == shown
    said = f"the 30 of {count} classes with the lowest accuracy"
    assert any(said in text for text in texts(root)) == (count > 30)
    assert len(found) == len(shown) * (len(shown) + (count > 30))
    for name in shown:
        row = [words for words in found if words.startswith(f"{name} taken")]
        numbers = [int(words.rpartition(":")[2].split(" of ")[0]) for words in row]
        assert sum(numbers) == counts[classes.index(name)].sum()


def test_the_most_frequent_confusions_are_told():
    counts = [[5, 3, 0], [0, 8, 0], [1, 0, 9]]
    said = texts(drawn(["a", "b", "c"], [(0, 0), (1, 1)], [0, 1], counts=counts))
    assert [text for text in said if "taken for" in text] == [
        "a taken for b: 3 of 8 (37.5%)",
        "c taken for a: 1 of 10 (10.0%)",
    ]
    assert "No image is taken for another class" in texts(drawn(["a", "b"], [(0, 0)], [0]))


HOSTILE = [
    "<script>1</script>",
    "a\"b'c&d]]>",
    "line\nfeed",
    os.fsdecode(b"\xff\xfe"),
    "\x00",
]


def assert_harmless(root, classes):
    known = {"svg", "title", "rect", "defs", "path", "circle", "text", "g", "use"}
    assert {e.tag.removeprefix(TAG) for e in root.iter()} == known
    assert not [name for e in root.iter() for name in e.attrib if name.startswith("on")]
    assert len(legend(root)) == len(classes)


def test_hostile_names_are_text():
    points = [(0, 0), (1, 1), (2, 2), (3, 0), (1, 4)]
    root = drawn(HOSTILE, points, range(5), words=HOSTILE, counts=np.ones((5, 5), dtype=int))
    assert_harmless(root, HOSTILE)
    shown = {"<script>1</script>", "a\"b'c&d]]>", r"line\nfeed", r"\xff\xfe", r"\x00"}
    assert set(legend(root).values()) == shown


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.sets(components().map(os.fsdecode), min_size=2, max_size=5).map(sorted))
def test_names_as_file_systems_allow_them(classes):
    labels = range(len(classes))
    assert_harmless(drawn(classes, [(i, i) for i in labels], labels, words=classes), classes)


def test_long_names_are_shortened_in_the_middle():
    assert short("a short name", 18) == "a short name"
    assert short("a name that goes on and on to its end", 18) == "a name t… its end"
    for wide in ("W" * 40, "\u6f22" * 40, "\U0001f600" * 40):
        text = short(wide, 18)
        assert 7 <= len(text) <= 12 and "…" in text
    assert feature_map.confusion((0, 1, 2), np.array([[1, 2], [0, 1]]), ["x" * 80, "y"], 9) == (
        "xxxx…xxx taken for y: 2 of 3 (66.7%)"
    )
