"""Pictures of images and their neighbors, as in the paper's figures: rows of labeled thumbnails.

Drawn with Pillow alone, in its own font. Whether a class is the target's is shown by the frame:
thin and blue, or thick and orange with a filled corner, so that it can be told without colors as
well (the colors are two of Okabe and Ito's, which people with any color vision tell apart).
"""

import textwrap
from collections.abc import Callable, Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont, ImageOps

SAME, OTHER, GRAY = "#0072B2", "#D55E00", "#555555"  # Okabe-Ito blue and vermilion
MARKS = {
    "thin blue frame: the target's class": SAME,
    "thick orange frame with a corner: another class": OTHER,
}
_TITLE, _TEXT = 22, 14  # font sizes in pixels
_LINE = 19  # height of a line of text
_MARGIN, _GAP = 24, 10
_FRAME = 5  # room for a frame around a thumbnail
_LEAST = 660  # width beside the targets in which every caption fits


def neighbor_sheet(
    targets: list[dict],
    read: Callable[[int], Image.Image | None],
    *,
    title: str,
    notes: Sequence[str] = (),
    side: int = 96,
) -> Image.Image:
    """Draw targets, as `shown_neighbors` tells of them, below each other; RGB.

    read: the picture of an image's number; None where a file cannot be read. side: of a neighbor's
    thumbnail, the central square; a target's is half as much again. Words that do not fit end in
    an ellipsis. "place" of all that is drawn becomes its thumbnail's left and top edge and side.
    """
    big = side * 3 // 2
    neighbors = [line["neighbors"] for target in targets for line in target["rows"]]
    left = _MARGIN + big + 2 * (_FRAME + _GAP)  # of the neighbors
    column = side + 2 * _FRAME + _GAP
    right = left + max(max(map(len, neighbors), default=0) * column, _LEAST)
    head = [(part, GRAY) for note in notes for part in textwrap.wrap(note, (right - _MARGIN) // 8)]
    if any(one["same_class"] is not None for line in neighbors for one in line):
        head += MARKS.items()
    row = column + 3 * _LINE  # with a caption and two words
    heights = [max(len(t["rows"]) * row, big + 2 * _FRAME + 4 * _LINE) + 2 * _GAP for t in targets]
    top = _MARGIN + (len(head) + 2) * _LINE
    sheet = Image.new("RGB", (right + _MARGIN, top + sum(heights) + _MARGIN), "white")
    _write(sheet, title, (_MARGIN, _MARGIN), right - _MARGIN, size=_TITLE)
    for number, (text, color) in enumerate(head):
        _write(sheet, text, (_MARGIN, _MARGIN + (number + 2) * _LINE), right - _MARGIN, color=color)
    for target, height in zip(targets, heights, strict=True):
        ImageDraw.Draw(sheet).line([(_MARGIN, top + _GAP), (right, top + _GAP)], fill="#CCCCCC")
        _write(sheet, "target", (_MARGIN + _FRAME, top + 2 * _GAP), big)
        _draw_tile(sheet, target, (_MARGIN, top + 2 * _GAP + _LINE), big, read)
        for number, line in enumerate(target["rows"]):
            y = top + 2 * _GAP + number * row
            _write(sheet, line["caption"], (left + _FRAME, y), right - left)
            for place, neighbor in enumerate(line["neighbors"]):
                _draw_tile(sheet, neighbor, (left + place * column, y + _LINE), side, read)
            if not line["neighbors"]:
                place = (left + _FRAME, y + _LINE)
                _write(sheet, line["remark"], place, right - left, color=GRAY)
        top += height
    return sheet


def corner_side(side: int) -> int:
    """The side of the filled corner, top right, of a thumbnail of another class."""
    return max(14, side // 5)


def shortened(text: str, size: int, width: float) -> str:
    """As much of a text as fits into `width` pixels, then an ellipsis; other letters become "?"."""
    text = "".join(letter if " " <= letter <= "~" else "?" for letter in text)
    if font_of(size).getlength(text) <= width:
        return text
    while text and font_of(size).getlength(text + "…") > width:
        text = text[:-1].rstrip()
    return text + "…"


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font."""
    return ImageFont.load_default(size=size)


def _write(sheet: Image.Image, text: str, place: tuple, width: int, *, size=_TEXT, color="black"):
    text = shortened(text, size, width)
    ImageDraw.Draw(sheet).text(place, text, font=font_of(size), fill=color)


def _draw_tile(sheet: Image.Image, record: dict, place: tuple, side: int, read: Callable) -> None:
    """A framed thumbnail and its words; a gray square with a cross for what cannot be read."""
    left, top = place[0] + _FRAME, place[1] + _FRAME
    right, bottom = left + side - 1, top + side - 1
    record["place"] = [left, top, side]
    same = record.get("same_class")
    color, width = {True: (SAME, 2), False: (OTHER, _FRAME), None: ("#BBBBBB", 1)}[same]
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left - width, top - width, right + width, bottom + width), fill=color)
    if image := read(record["index"]):
        image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
        sheet.paste(image, (left, top))
    else:
        draw.rectangle((left, top, right, bottom), fill="#DDDDDD")
        draw.line((left, top, right, bottom), fill=GRAY)
        draw.line((left, bottom, right, top), fill=GRAY)
    if same is False:
        start = right - corner_side(side) + 1
        draw.polygon([(start, top), (right, top), (right, top + corner_side(side) - 1)], fill=OTHER)
    for number, text in enumerate(record["words"]):
        y = bottom + 2 + _FRAME + _LINE * number
        _write(sheet, text, (left, y), side + _FRAME, color=GRAY if number else "black")
