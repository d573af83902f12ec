"""Pictures of images and their neighbors, as in the paper's figures: rows of labeled thumbnails.

Drawn with Pillow alone, in its own font, so that nothing has to be installed and no font has to be
found. What is in the picture is the caller's affair: these functions get images and words. Whether
a class is the target's is shown by the frame: thin and blue, or thick and orange with a sign, so
that it can be told without colors as well (the colors are two of Okabe and Ito's, which people with
any color vision tell apart).
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

SAME, OTHER = "#0072B2", "#D55E00"  # Okabe-Ito blue and vermilion
_INK, _GRAY, _PAPER = "black", "#555555", "white"
_TITLE, _CAPTION, _LABEL = 22, 15, 13  # font sizes in pixels
_MARGIN, _GAP = 24, 10
_CAPTION_GAP = 4  # between a row's caption and its frames
_FRAME = 5  # room for a frame around a thumbnail
_MIN_WIDTH = 640  # narrower than this, the words at the top would not be readable
_SPACING = 1.3  # line height by font size

# Left and top edge and side of a thumbnail in the picture, pixels.
Place = tuple[int, int, int]


class Tile(NamedTuple):
    """A thumbnail and the words under it.

    image: square, or None where a file cannot be read. label: the class, say. notes: further lines.
    same: whether the class is the target's; None: not to be told.
    """

    image: Image.Image | None
    label: str = ""
    notes: Sequence[str] = ()
    same: bool | None = None


class Row(NamedTuple):
    """A row of thumbnails under a caption; remark: stands in their place if there are none."""

    caption: str
    tiles: Sequence[Tile]
    remark: str = ""


class Panel(NamedTuple):
    """A target at the left and rows of its neighbors beside it."""

    target: Tile
    rows: Sequence[Row]


class PanelPlaces(NamedTuple):
    """Where the thumbnails of a panel are in the picture."""

    target: Place
    rows: list[list[Place]]


class Sheet(NamedTuple):
    """A picture, RGB, and where its thumbnails are: for each panel, in order."""

    image: Image.Image
    places: list[PanelPlaces]


def neighbor_sheet(
    panels: Sequence[Panel], *, title: str, notes: Sequence[str] = (), side: int = 96
) -> Sheet:
    """Draw panels below each other, under a title, notes and, if marks are drawn, what they mean.

    side: of the neighbors' thumbnails in pixels, which they must have; `target_side(side)` that of
    the targets'. The picture is as wide as its longest row asks for; words that do not fit are
    broken into lines, or end in an ellipsis under a thumbnail.
    """
    columns = max((len(row.tiles) for panel in panels for row in panel.rows), default=0)
    width = 2 * _MARGIN + _target_width(side) + columns * _cell(side)
    width = max(width, _MIN_WIDTH)
    marked = any(tile.same is not None for p in panels for row in p.rows for tile in row.tiles)
    parts = [_header(title, notes, width - 2 * _MARGIN, marked=marked)]
    places = []
    top = _MARGIN + parts[0].height
    for panel in panels:
        part, inside = _panel(panel, width - 2 * _MARGIN, side)
        top += 2 * _GAP
        places.append(PanelPlaces(*_moved(inside, _MARGIN, top)))
        parts.append(part)
        top += part.height
    sheet = Image.new("RGB", (width, top + _MARGIN), _PAPER)
    top = _MARGIN
    for part in parts:
        if part is not parts[0]:
            line = [(_MARGIN, top + _GAP), (width - _MARGIN, top + _GAP)]
            ImageDraw.Draw(sheet).line(line, fill="#CCCCCC")
            top += 2 * _GAP
        sheet.paste(part, (_MARGIN, top))
        top += part.height
    return Sheet(sheet, places)


def target_side(side: int) -> int:
    """The side of a target's thumbnail beside neighbors of `side` pixels."""
    return side * 3 // 2


def badge_side(side: int) -> int:
    """The side of the sign in the top right corner of a thumbnail of another class."""
    return max(14, side // 5)


def thumbnail(image: Tensor, side: int) -> Image.Image:
    """The central square of an image (3, H, W) uint8, side x side pixels, RGB."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    return ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)


def shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, or as much of its beginning as fits into `width` pixels with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1].rstrip()
    return text + "…"


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The text in lines of at most `width` pixels; a single word too long for one is shortened."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [shortened(line, font, width) for line in lines]


@lru_cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font."""
    return ImageFont.load_default(size=size)


@lru_cache(maxsize=4096)
def drawable(text: str) -> str:
    """The text in characters that the font has: accents are dropped, others become "?"."""
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return "".join(letter if " " <= letter <= "~" else "?" for letter in plain)


def _cell(side: int) -> int:
    """The width that a neighbor takes."""
    return side + 2 * _FRAME + _GAP


def _target_width(side: int) -> int:
    """The width that a target takes."""
    return target_side(side) + 2 * _FRAME + 2 * _GAP


def _line(size: int) -> int:
    """The height of a line of text."""
    return round(_SPACING * size)


def _moved(places: PanelPlaces, x: int, y: int) -> PanelPlaces:
    def moved(place: Place) -> Place:
        return place[0] + x, place[1] + y, place[2]

    return PanelPlaces(moved(places.target), [[moved(p) for p in row] for row in places.rows])


def _paragraphs(texts: Sequence[str], size: int, width: int, *, fill: str = _INK) -> Image.Image:
    """Texts below each other, broken into lines of `width` pixels."""
    font = font_of(size)
    lines = [line for text in texts for line in wrapped(drawable(text), font, width)]
    block = Image.new("RGB", (width, max(_line(size) * len(lines), 1)), _PAPER)
    for number, line in enumerate(lines):
        ImageDraw.Draw(block).text((0, _line(size) * number), line, font=font, fill=fill)
    return block


def _below(parts: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """Pictures below each other."""
    height = sum(part.height for part in parts) + gap * (len(parts) - 1)
    whole = Image.new("RGB", (max(part.width for part in parts), max(height, 1)), _PAPER)
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height + gap
    return whole


def _header(title: str, notes: Sequence[str], width: int, *, marked: bool) -> Image.Image:
    """Title, notes and legend."""
    parts = [_paragraphs([title], _TITLE, width)]
    if notes:
        parts.append(_paragraphs(notes, _CAPTION, width, fill=_GRAY))
    if marked:
        parts.append(_legend(width))
    return _below(parts, gap=8)


def _legend(width: int) -> Image.Image:
    """What the frames mean, each beside a square that has it."""
    side = 2 * _line(_CAPTION)
    legend = Image.new("RGB", (width, side + 2 * _FRAME), _PAPER)
    left = 0
    for same, text in ((True, "the target's class"), (False, "another class")):
        sample = Tile(Image.new("RGB", (side, side), "#E8E8E8"), same=same)
        _draw_thumbnail(legend, sample, (left + _FRAME, _FRAME, side))
        left += side + 2 * _FRAME + _GAP
        words = _paragraphs([text], _CAPTION, round(font_of(_CAPTION).getlength(text)) + 1)
        legend.paste(words, (left, (legend.height - words.height) // 2))
        left += words.width + 3 * _GAP
    return legend


def _panel(panel: Panel, width: int, side: int) -> tuple[Image.Image, PanelPlaces]:
    """A panel and the places in it."""
    indent = _target_width(side)
    target = _tile(panel.target, target_side(side))
    below = _line(_CAPTION) + _CAPTION_GAP  # level with the first row
    rows, places, top = [], [], 0
    for row in panel.rows:
        picture, inside = _row(row, width - indent, side)
        places.append([(x + indent, y + top, s) for x, y, s in inside])
        rows.append(picture)
        top += picture.height + _GAP
    right = _below(rows, gap=_GAP) if rows else Image.new("RGB", (1, 1), _PAPER)
    whole = Image.new("RGB", (width, max(right.height, below + target.height)), _PAPER)
    whole.paste(_paragraphs(["target"], _CAPTION, indent - _GAP), (_FRAME, 0))
    whole.paste(target, (0, below))
    whole.paste(right, (indent, 0))
    return whole, PanelPlaces((_FRAME, below + _FRAME, target_side(side)), places)


def _row(row: Row, width: int, side: int) -> tuple[Image.Image, list[Place]]:
    """A row with its caption and the places in it."""
    caption = _paragraphs([row.caption], _CAPTION, width - _FRAME)
    if not row.tiles:
        remark = _paragraphs([row.remark or "none"], _LABEL, width - _GAP, fill=_GRAY)
        words = _below([caption, remark], gap=4)
        picture = Image.new("RGB", (width, words.height), _PAPER)
        picture.paste(words, (_FRAME, 0))
        return picture, []
    tiles = [_tile(tile, side) for tile in row.tiles]
    top = caption.height + _CAPTION_GAP
    picture = Image.new("RGB", (width, top + max(tile.height for tile in tiles)), _PAPER)
    picture.paste(caption, (_FRAME, 0))
    places = []
    for number, tile in enumerate(tiles):
        left = number * _cell(side)
        picture.paste(tile, (left, top))
        places.append((left + _FRAME, top + _FRAME, side))
    return picture, places


def _tile(tile: Tile, side: int) -> Image.Image:
    """A framed thumbnail and its words."""
    font = font_of(_LABEL)
    words = [tile.label, *tile.notes]
    height = side + 2 * _FRAME + 2 + _line(_LABEL) * len(words)
    picture = Image.new("RGB", (side + 2 * _FRAME, height), _PAPER)
    _draw_thumbnail(picture, tile, (_FRAME, _FRAME, side))
    for number, text in enumerate(words):
        top = side + 2 * _FRAME + 2 + _line(_LABEL) * number
        line = shortened(drawable(text), font, side + _FRAME)
        fill = _GRAY if number else _INK
        ImageDraw.Draw(picture).text((_FRAME, top), line, font=font, fill=fill)
    return picture


def _draw_thumbnail(picture: Image.Image, tile: Tile, place: Place) -> None:
    """A tile's image at its place, the frame around it, and the sign where the class differs."""
    left, top, side = place
    draw = ImageDraw.Draw(picture)
    color, thickness = {True: (SAME, 2), False: (OTHER, _FRAME), None: ("#BBBBBB", 1)}[tile.same]
    right, bottom = left + side, top + side
    box = (left - thickness, top - thickness, right + thickness - 1, bottom + thickness - 1)
    draw.rectangle(box, fill=color)
    if tile.image is not None:
        picture.paste(tile.image, (left, top))
    else:
        draw.rectangle((left, top, right - 1, bottom - 1), fill="#DDDDDD")
        draw.line((left, top, right - 1, bottom - 1), fill=_GRAY)
        draw.line((left, bottom - 1, right - 1, top), fill=_GRAY)
    if tile.same is False:
        _draw_unequal(draw, (right - badge_side(side), top, badge_side(side)))


def _draw_unequal(draw: ImageDraw.ImageDraw, place: Place) -> None:
    """A sign "is not equal to", white on orange; the font has none."""
    left, top, side = place
    draw.rectangle((left, top, left + side - 1, top + side - 1), fill=OTHER)
    thickness = max(2, side // 9)
    for height in (0.38, 0.62):
        y = top + height * side
        draw.line((left + 0.2 * side, y, left + 0.8 * side, y), fill=_PAPER, width=thickness)
    slash = (left + 0.32 * side, top + 0.86 * side, left + 0.68 * side, top + 0.14 * side)
    draw.line(slash, fill=_PAPER, width=thickness)
