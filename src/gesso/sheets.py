"""Contact sheets: pictures in a grid, each group under its caption. Drawing only; the pictures come from elsewhere.

Pillow is imported when a sheet is drawn; its own scalable font is used, so that every machine draws the same sheet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageFont

    Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

_PAPER, _INK, _SOFT_INK, _EDGE = "#f6f3ec", "#25231f", "#7d766a", "#dcd6c9"
_MARGIN, _GAP, _INSIDE = 48, 32, 8  # pixels: around the sheet, between groups, between a group's pictures
_TITLE_SIZES, _CAPTION_SIZE, _NOTE_SIZE = (44, 36, 29, 23), 19, 17
_CAPTION_LINES = 2
_LINE = 25


@dataclass(frozen=True, kw_only=True)
class Group:
    """Pictures that share a caption, such as one prompt's seeds."""

    caption: str
    pictures: Sequence["Image.Image"]


def contact_sheet(
    groups: Sequence[Group], *, title: str, note: str = "", columns: int = 4, side: int = 168
) -> "Image.Image":
    """Draws the groups row by row.

    Args:
        groups: at least one, each with at least one picture; all with the same number of pictures look best.
        title: large, at the top; smaller, then cut where it has no room.
        note: small, beside the title (model, seeds, seconds).
        columns: groups in a row.
        side: the longer side of every picture on the sheet, in pixels.

    Returns:
        An RGB picture.
    """
    from PIL import Image, ImageDraw, ImageFont

    most = max(len(group.pictures) for group in groups)
    cell_width = most * side + (most - 1) * _INSIDE
    cell_height = side + 12 + _CAPTION_LINES * _LINE
    columns = min(columns, len(groups))
    rows = math.ceil(len(groups) / columns)
    top = _MARGIN + _TITLE_SIZES[0] + 36
    width = 2 * _MARGIN + columns * cell_width + (columns - 1) * _GAP
    sheet = Image.new("RGB", (width, top + rows * (cell_height + _GAP) - _GAP + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    baseline, note_font = _MARGIN + _TITLE_SIZES[0] - 8, ImageFont.load_default(_NOTE_SIZE)
    room = round(width - 2 * _MARGIN - _GAP - note_font.getlength(note))
    title_font = _title_font(title, room)
    draw.text((_MARGIN, baseline), _shortened(title, title_font, room), _INK, title_font, "ls")
    draw.text((width - _MARGIN, baseline), note, _SOFT_INK, note_font, "rs")
    draw.line((_MARGIN, top - 20, width - _MARGIN, top - 20), _EDGE, 2)
    font = ImageFont.load_default(_CAPTION_SIZE)
    for place, group in enumerate(groups):
        row, column = divmod(place, columns)
        left, upper = _MARGIN + column * (cell_width + _GAP), top + row * (cell_height + _GAP)
        for number, picture in enumerate(group.pictures):
            _put(sheet, picture, left + number * (side + _INSIDE), upper, side)
        for line, text in enumerate(wrapped(group.caption, font, cell_width, _CAPTION_LINES)):
            draw.text((left, upper + side + 10 + line * _LINE), text, _INK, font)
    return sheet


def wrapped(text: str, font: "Font", width: int, lines: int) -> list[str]:
    """The text in at most so many lines of at most `width` pixels; what does not fit ends in "…"."""
    made: list[str] = []
    words = text.split()
    while words and len(made) < lines:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        made.append(" ".join(words[:count]))
        words = words[count:]
    if words:
        made[-1] += " …"
    return [_shortened(line, font, width) for line in made]


def _title_font(title: str, room: int) -> "Font":
    """The largest font in which the title fits, the smallest where it fits in none."""
    from PIL import ImageFont

    fonts = [ImageFont.load_default(size) for size in _TITLE_SIZES]
    return next((font for font in fonts if font.getlength(title) <= room), fonts[-1])


def _shortened(line: str, font: "Font", width: int) -> str:
    while font.getlength(line) > width and len(line) > 1:
        line = f"{line.removesuffix('…').rstrip()[:-1].rstrip()}…"
    return line


def _put(sheet: "Image.Image", picture: "Image.Image", left: int, upper: int, side: int) -> None:
    """Pastes a picture, scaled to fit a square and centred in it, with slightly rounded corners and a thin edge."""
    from PIL import Image, ImageDraw

    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    fitted = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    corner = (left + (side - size[0]) // 2, upper + (side - size[1]) // 2)
    mask = Image.new("L", (size[0] * 4, size[1] * 4), 0)  # drawn four times as large: smooth corners
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, size[0] * 4 - 1, size[1] * 4 - 1), 4 * 6, 255)
    sheet.paste(fitted, corner, mask.resize(size, Image.Resampling.LANCZOS))
    edge = (*corner, corner[0] + size[0] - 1, corner[1] + size[1] - 1)
    ImageDraw.Draw(sheet).rounded_rectangle(edge, 6, outline=_EDGE)
