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

SAME, OTHER = "#0072B2", "#D55E00"  # Okabe-Ito blue and vermilion
_GRAY = "#555555"
_TITLE, _CAPTION, _LABEL = 22, 15, 13  # font sizes in pixels
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
    lines = [line for target in targets for line in target["rows"]]
    columns = max((len(line["neighbors"]) for line in lines), default=0)
    indent, step = side * 3 // 2 + 2 * (_FRAME + _GAP), side + 2 * _FRAME + _GAP
    width = indent + max(columns * step, _LEAST)
    words = [(title, _TITLE, "black")]
    for note in notes:
        words += [(part, _CAPTION, _GRAY) for part in textwrap.wrap(note, width // 8)]
    if any(n["same_class"] is not None for line in lines for n in line["neighbors"]):
        words.append(("thin blue frame: the target's class", _CAPTION, SAME))
        words.append(("thick orange frame with a corner: another class", _CAPTION, OTHER))
    heights = [_height(target, side) for target in targets]
    top = _MARGIN + sum(_line(size) for _, size, _ in words)
    size = (width + 2 * _MARGIN, top + sum(heights) + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    y = _MARGIN
    for text, size, color in words:
        _write(sheet, text, (_MARGIN, y), width, size, color)
        y += _line(size)
    for target, height in zip(targets, heights, strict=True):
        edge = [(_MARGIN, top + _GAP), (_MARGIN + width, top + _GAP)]
        ImageDraw.Draw(sheet).line(edge, fill="#CCCCCC")
        y = top + 2 * _GAP
        _write(sheet, "target", (_MARGIN + _FRAME, y), indent, _CAPTION)
        _draw_tile(sheet, target, (_MARGIN, y + _line(_CAPTION)), side * 3 // 2, read)
        for line in target["rows"]:
            left = _MARGIN + indent
            _write(sheet, line["caption"], (left + _FRAME, y), width - indent, _CAPTION)
            below = y + _line(_CAPTION)
            if not line["neighbors"]:
                place = (left + _FRAME, below)
                _write(sheet, line["remark"], place, width - indent, _LABEL, _GRAY)
            for column, neighbor in enumerate(line["neighbors"]):
                _draw_tile(sheet, neighbor, (left + column * step, below), side, read)
            y += _line_height(line, side)
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


def _line(size: int) -> int:
    """The height of a line of text."""
    return round(1.3 * size)


def _tile_height(record: dict, side: int) -> int:
    return side + 2 * _FRAME + 2 + _line(_LABEL) * len(record["words"])


def _line_height(line: dict, side: int) -> int:
    tiles = [_tile_height(neighbor, side) for neighbor in line["neighbors"]]
    return _line(_CAPTION) + max(tiles, default=_line(_LABEL)) + _GAP


def _height(target: dict, side: int) -> int:
    lines = sum(_line_height(line, side) for line in target["rows"])
    own = _line(_CAPTION) + _tile_height(target, side * 3 // 2)
    return 2 * _GAP + max(lines, own)


def _write(
    sheet: Image.Image,
    text: str,
    place: tuple[int, int],
    width: int,
    size: int,
    color: str = "black",
) -> None:
    text = shortened(text, size, width)
    ImageDraw.Draw(sheet).text(place, text, font=font_of(size), fill=color)


def _draw_tile(sheet: Image.Image, record: dict, place: tuple[int, int], side: int, read) -> None:
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
        draw.line((left, top, right, bottom), fill=_GRAY)
        draw.line((left, bottom, right, top), fill=_GRAY)
    if same is False:
        start = right - corner_side(side) + 1
        draw.polygon([(start, top), (right, top), (right, top + corner_side(side) - 1)], fill=OTHER)
    for number, text in enumerate(record["words"]):
        y = bottom + 1 + _FRAME + 2 + _line(_LABEL) * number
        _write(sheet, text, (left, y), side + _FRAME, _LABEL, _GRAY if number else "black")
