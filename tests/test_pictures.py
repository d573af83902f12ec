"""The drawing: thumbnails at their places, marks that need no color, words that fit."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from utils.reporting import pictures
from utils.reporting.pictures import neighbor_sheet

LONG = "a class name of many words that no thumbnail is wide enough for"
COLORS = ["#808080", "red", "green", "yellow", "purple", "teal"]


def read(number):
    """A picture of the color of its number; of -1 there is none."""
    return None if number < 0 else Image.new("RGB", (50, 40), COLORS[number])


def tile(number=0, *words, same=None):
    return {"index": number, "words": words, "same_class": same}


def line(*neighbors, caption="", remark="nothing"):
    return {"caption": caption, "remark": remark, "neighbors": neighbors}


def target(*rows, words=("target",)):
    return {"index": 0, "words": words, "rows": rows}


def draw(*targets, title="Title", side=64, **others):
    return neighbor_sheet(targets, read, title=title, side=side, **others)


def cut(picture, item):
    left, top, side = item["place"]
    return picture.crop((left, top, left + side, top + side))


def colors(image):
    return {color for _, color in image.getcolors(2**24)}


def rgb(name):
    return ImageColor.getrgb(name)


def test_thumbnails_are_at_their_places():
    rows = [line(*map(tile, range(1, 6))), line(), line(tile(1), tile(2))]
    targets = [target(*rows), target(line(tile(3)), line())]
    picture = draw(*targets)
    shown = [n for t in targets for n in [t, *(n for row in t["rows"] for n in row["neighbors"])]]
    assert len(shown) == 10
    for item in shown:
        assert item["place"][2] == (96 if "rows" in item else 64)
        assert colors(cut(picture, item)) == {rgb(COLORS[item["index"]])}


def test_a_class_that_differs_shows_without_colors():
    """A frame twice as thick and a corner, in gray as well."""
    same, other, untold = (tile(0, same=same) for same in (True, False, None))
    picture = draw(target(line(same, other, untold)))
    for item, color in ((same, pictures.SAME), (other, pictures.OTHER)):
        left, top, _ = item["place"]
        assert picture.getpixel((left - 1, top - 1)) == rgb(color)
    gray = picture.convert("L").convert("RGB")
    thickness = []
    for left, top, side in (same["place"], other["place"]):
        middle = side // 2
        outward = [
            [(left - x, top + middle) for x in range(1, 8)],
            [(left + side - 1 + x, top + middle) for x in range(1, 8)],
            [(left + middle, top - y) for y in range(1, 8)],
            [(left + middle, top + side - 1 + y) for y in range(1, 8)],
        ]
        dark = {sum(gray.getpixel(at)[0] < 200 for at in line) for line in outward}
        assert len(dark) == 1  # on all sides
        thickness += dark
    assert thickness[1] >= 2 * thickness[0] > 0
    assert len(colors(cut(gray, same))) == len(colors(cut(gray, untold))) == 1
    corner = pictures.corner_side(64)
    inside = cut(gray, other)
    assert len(colors(inside.crop((64 - corner, 0, 64, corner)))) == 2
    assert colors(inside.crop((0, corner, 64, 64))) == {rgb(COLORS[0])}


def test_the_two_marks_are_explained_where_there_are_any():
    marked, unmarked = (draw(target(line(tile(same=same)))) for same in (True, None))
    assert marked.height > unmarked.height
    assert rgb(pictures.OTHER) in colors(marked)  # in the legend alone
    assert rgb(pictures.OTHER) not in colors(unmarked)


@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("side", [64, 150])
def test_nothing_touches_the_edge(count, side):
    """Long words everywhere: they are broken into lines or shortened, never cut."""
    tiles = [tile(0, LONG, LONG, same=False) for _ in range(count)]
    rows = line(*tiles, caption=LONG * 3), line(caption=LONG, remark=LONG * 5)
    notes = [LONG * 4, "x" * 500]
    picture = draw(target(*rows, words=[LONG] * 3), title=LONG * 3, notes=notes, side=side)
    pixels = np.asarray(picture)
    margin = 15
    for edge in (pixels[:margin], pixels[-margin:], pixels[:, :margin], pixels[:, -margin:]):
        assert (edge == 255).all()
    for left, top, size in (item["place"] for item in tiles):  # words keep to their own column
        gap = pixels[top + size + 8 : top + size + 40, left + size + 7 : left + size + 9]
        assert (gap == 255).all()


def test_words_are_shortened_to_their_width():
    font = pictures.font_of(13)
    assert pictures.shortened("grid", 13, 100) == "grid"
    short = pictures.shortened(LONG, 13, 100)
    assert short.endswith("…") and LONG.startswith(short[:-1]) and len(short) > 8
    assert font.getlength(short) <= 100
    longer = LONG[: len(short) + 1].rstrip() + "…"
    assert font.getlength(longer) > 100  # as much as fits


def test_every_letter_drawn_is_one_the_font_has():
    assert pictures.shortened("Größe café", 13, 999) == "Gr??e caf?"
    assert pictures.shortened("猫 \udcff\n", 13, 999) == "? ??"
    font = pictures.font_of(40)
    missing = bytes(font.getmask("猫"))
    letters = [chr(number) for number in range(33, 127)] + ["…"]
    assert missing and not [x for x in letters if bytes(font.getmask(x)) in (missing, b"")]


def test_a_file_that_cannot_be_read_is_a_crossed_tile():
    empty = tile(-1)
    picture = draw(target(line(empty, tile(1))))
    assert 1 < len(colors(cut(picture, empty))) < 5


def test_no_targets_and_no_rows():
    assert draw().height > 0
    alone = target()
    draw(alone)
    assert len(alone["place"]) == 3
