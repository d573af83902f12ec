"""The drawing: thumbnails at their places, marks that need no color, words that fit."""

import numpy as np
import pytest
from conftest import write_image
from PIL import Image, ImageChops, ImageColor

from utils.data import cropping
from utils.reporting import pictures
from utils.reporting.pictures import Panel, Row, Tile, neighbor_sheet

LONG = "a class name of many words that no thumbnail is wide enough for"


def plain(color, side):
    return Image.new("RGB", (side, side), color)


def tile(color, side=64, **others):
    return Tile(plain(color, side), **others)


def panel(*rows, side=64):
    return Panel(tile("navy", pictures.target_side(side), label="target"), rows)


def cut(sheet, place):
    left, top, side = place
    return sheet.image.crop((left, top, left + side, top + side))


def colors(image):
    return {color for _, color in image.getcolors(2**24)}


def rgb(name):
    return ImageColor.getrgb(name)


def test_thumbnails_are_at_their_places():
    palette = ["red", "green", "yellow", "purple", "teal"]
    rows = [
        Row("first", [tile(color) for color in palette]),
        Row("none here", [], "nothing"),
        Row("second", [tile(color) for color in palette[:2]]),
    ]
    sheet = neighbor_sheet([panel(*rows), panel(*rows[::-1])], title="Title", side=64)
    assert len(sheet.places) == 2
    for places, drawn in zip(sheet.places, (rows, rows[::-1]), strict=True):
        assert colors(cut(sheet, places.target)) == {rgb("navy")}
        assert [len(row) for row in places.rows] == [len(row.tiles) for row in drawn]
        for row, inside in zip(drawn, places.rows, strict=True):
            for expected, place in zip(row.tiles, inside, strict=True):
                assert ImageChops.difference(cut(sheet, place), expected.image).getbbox() is None


def test_a_class_that_differs_shows_without_colors():
    """A frame twice as thick and a sign, in gray as well."""
    row = Row("", [tile("#808080", same=same) for same in (True, False, None)])
    sheet = neighbor_sheet([panel(row)], title="Title", side=64)
    same, other, untold = sheet.places[0].rows[0]
    for place, color in ((same, pictures.SAME), (other, pictures.OTHER)):
        assert sheet.image.getpixel((place[0] - 1, place[1] - 1)) == rgb(color)
    gray = sheet._replace(image=sheet.image.convert("L").convert("RGB"))
    thickness = []
    for left, top, side in (same, other):
        middle = side // 2
        outward = [
            [(left - x, top + middle) for x in range(1, 8)],
            [(left + side - 1 + x, top + middle) for x in range(1, 8)],
            [(left + middle, top - y) for y in range(1, 8)],
            [(left + middle, top + side - 1 + y) for y in range(1, 8)],
        ]
        dark = {sum(gray.image.getpixel(at)[0] < 200 for at in line) for line in outward}
        assert len(dark) == 1  # on all sides
        thickness += dark
    assert thickness[1] >= 2 * thickness[0] > 0
    assert len(colors(cut(gray, same))) == len(colors(cut(gray, untold))) == 1
    badge = pictures.badge_side(64)
    left, top, side = other
    assert len(colors(cut(gray, (left + side - badge, top, badge)))) >= 2
    assert colors(cut(sheet, (left, top + badge, side - badge))) == {rgb("#808080")}


def test_the_two_marks_are_explained_where_there_are_any():
    marked, unmarked = (
        neighbor_sheet([panel(Row("", [tile("gray", same=same)]))], title="Title", side=64)
        for same in (True, None)
    )
    assert marked.image.height > unmarked.image.height
    assert rgb(pictures.OTHER) in colors(marked.image)  # in the legend alone
    assert rgb(pictures.OTHER) not in colors(unmarked.image)


@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("side", [64, 150])
def test_nothing_touches_the_edge(count, side):
    """Long words everywhere: they are broken into lines or shortened, never cut."""
    tiles = [tile("gray", side, label=LONG, notes=[LONG], same=False)] * count
    drawn = Panel(
        tile("gray", pictures.target_side(side), label=LONG, notes=[LONG, LONG]),
        [Row(LONG * 3, tiles), Row(LONG, [], LONG * 5)],
    )
    sheet = neighbor_sheet([drawn], title=LONG * 3, notes=[LONG * 4, "x" * 500], side=side)
    pixels = np.asarray(sheet.image)
    margin = 15
    for edge in (pixels[:margin], pixels[-margin:], pixels[:, :margin], pixels[:, -margin:]):
        assert (edge == 255).all()
    for place in sheet.places[0].rows[0]:  # words keep to their own column
        left, top, size = place
        gap = pixels[top + size + 8 : top + size + 40, left + size + 7 : left + size + 9]
        assert (gap == 255).all()


def test_words_are_shortened_to_their_width():
    font = pictures.font_of(13)
    assert pictures.shortened("grid", font, 100) == "grid"
    short = pictures.shortened(LONG, font, 100)
    assert short.endswith("…") and LONG.startswith(short[:-1]) and len(short) > 8
    assert font.getlength(short) <= 100
    longer = LONG[: len(short) + 1].rstrip() + "…"
    assert font.getlength(longer) > 100  # as much as fits


def test_lines_keep_every_word():
    font = pictures.font_of(15)
    lines = pictures.wrapped(LONG, font, 120)
    assert " ".join(lines) == LONG and len(lines) > 3
    assert all(font.getlength(line) <= 120 for line in lines)
    assert pictures.wrapped("", font, 120) == [""]


def test_every_letter_drawn_is_one_the_font_has():
    assert pictures.drawable("Größe café") == "Große cafe".replace("ß", "?")
    assert pictures.drawable("猫 \udcff\n") == "? ??"
    font = pictures.font_of(40)
    missing = bytes(font.getmask("猫"))
    letters = [chr(number) for number in range(33, 127)] + ["…"]
    assert missing and not [x for x in letters if bytes(font.getmask(x)) in (missing, b"")]


def test_a_thumbnail_is_the_central_square(tmp_path):
    image = Image.new("RGB", (90, 30), "red")
    image.paste(plain("blue", 30), (30, 0))
    image.save(tmp_path / "wide.png")
    square = pictures.thumbnail(cropping.decode(tmp_path / "wide.png"), 64)
    assert square.size == (64, 64)
    assert colors(square.crop((8, 0, 56, 64))) == {(0, 0, 255)}
    assert all(blue > 150 for _, _, blue in colors(square))
    write_image(tmp_path / "same.png", seed=1, size=(20, 20))
    same = pictures.thumbnail(cropping.decode(tmp_path / "same.png"), 20)
    with Image.open(tmp_path / "same.png") as original:
        assert ImageChops.difference(same, original).getbbox() is None


def test_16_bit_images_are_read_as_in_training(tmp_path):
    Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16)).save(tmp_path / "gray.png")
    image = cropping.decode(tmp_path / "gray.png")
    assert colors(pictures.thumbnail(image, 8)) == {(128, 128, 128)}


def test_a_file_that_cannot_be_read_is_a_crossed_tile():
    sheet = neighbor_sheet([panel(Row("", [Tile(None), tile("red")]))], title="Title", side=64)
    empty, _ = sheet.places[0].rows[0]
    assert 1 < len(colors(cut(sheet, empty))) < 5


def test_no_panels_and_no_rows():
    assert neighbor_sheet([], title="Title").places == []
    assert neighbor_sheet([panel()], title="Title", side=64).places[0].rows == []
