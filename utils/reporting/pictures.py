"""Pictures of images and their neighbors, as in the paper's figures: rows of labeled thumbnails.

Drawn with Pillow alone, in its own font. Whether a class is the target's is shown by the frame:
thin and blue, or thick and orange with a filled corner, so that it can be told without colors as
well (the colors are two of Okabe and Ito's, which people with any color vision tell apart).
"""

import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

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
    read: Callable[[int, int], Image.Image | None],
    *,
    title: str,
    notes: Sequence[str] = (),
    side: int = 96,
) -> Image.Image:
    """Draw targets, as `shown_neighbors` tells of them, below each other; RGB.

    read: the thumbnail of an image's number and side in pixels; None where a file cannot be read.
    side: of the neighbors'; a target has half as much again. Words that do not fit end in an
    ellipsis. "place" of all that is drawn becomes its thumbnail's left and top edge and side.
    """
    big = side * 3 // 2
    lines = [line for target in targets for line in target["rows"]]
    columns = max((len(line["neighbors"]) for line in lines), default=0)
    left = _MARGIN + big + 2 * (_FRAME + _GAP)  # of the neighbors
    right = left + max(columns * (side + 2 * _FRAME + _GAP), _LEAST)
    head = [(part, GRAY) for note in notes for part in textwrap.wrap(note, (right - _MARGIN) // 8)]
    if any(n["same_class"] is not None for line in lines for n in line["neighbors"]):
        head += MARKS.items()
    line_height = side + 2 * _FRAME + 3 * _LINE + _GAP  # with a caption and two words
    least = big + 2 * _FRAME + 4 * _LINE
    heights = [max(len(t["rows"]) * line_height, least) + 2 * _GAP for t in targets]
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
            place = (left, top + 2 * _GAP + number * line_height)
            _draw_line(sheet, line, place, side, read)
        top += height
    return sheet


def corner_side(side: int) -> int:
    """The side of the filled corner, top right, of a thumbnail of another class."""
    return max(14, side // 5)


def shortened(text: str, size: int, width: float) -> str:
    """As much of a text as fits into `width` pixels, in letters that the font has.

    Accents are dropped, other letters become "?"; what is cut off an ellipsis.
    """
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    text = "".join(letter if " " <= letter <= "~" else "?" for letter in plain)
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


def _draw_line(sheet: Image.Image, line: dict, place: tuple, side: int, read: Callable) -> None:
    """A caption, and below it the neighbors, or why there are none."""
    x, y = place
    _write(sheet, line["caption"], (x + _FRAME, y), sheet.width - _MARGIN - x)
    if not line["neighbors"]:
        place = (x + _FRAME, y + _LINE)
        _write(sheet, line["remark"], place, sheet.width - _MARGIN - x, color=GRAY)
    for column, neighbor in enumerate(line["neighbors"]):
        left = x + column * (side + 2 * _FRAME + _GAP)
        _draw_tile(sheet, neighbor, (left, y + _LINE), side, read)


def _draw_tile(sheet: Image.Image, record: dict, place: tuple, side: int, read: Callable) -> None:
    """A framed thumbnail and its words; a gray square with a cross for what cannot be read."""
    left, top = place[0] + _FRAME, place[1] + _FRAME
    right, bottom = left + side - 1, top + side - 1
    record["place"] = [left, top, side]
    same = record.get("same_class")
    color, width = {True: (SAME, 2), False: (OTHER, _FRAME), None: ("#BBBBBB", 1)}[same]
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left - width, top - width, right + width, bottom + width), fill=color)
    if image := read(record["index"], side):
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
