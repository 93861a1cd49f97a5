"""Drawing of the faces world: portraits to pixels.

In here: the palette and the order in which a face is painted, from what is farthest to what is nearest. Not in here:
outlines (`canvas.py`, `hair.py`), where features lie (`portraits.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from gesso.worlds.faces import hair
from gesso.worlds.faces.canvas import (
    Box,
    Canvas,
    Colour,
    Outline,
    Pixels,
    above,
    band,
    below,
    both,
    box,
    either,
    ellipse,
    grown,
    shade,
    stroke,
    superellipse,
    without,
)
from gesso.worlds.faces.portraits import (
    EYE_LINE,
    MOUTH_LINE,
    NOSE_TOP,
    Mouth,
    Portrait,
    eyes,
    mouth,
    nose_tip,
    rotation,
    turn,
)

PALETTE: Final[dict[str, tuple[int, int, int]]] = {
    # grounds
    "blue": (120, 180, 240), "green": (150, 212, 150), "yellow": (255, 228, 120), "pink": (255, 182, 205),
    "purple": (190, 165, 235), "orange": (255, 186, 110), "white": (250, 250, 250), "grey": (170, 176, 184),
}  # fmt: skip
"""Red, green and blue of each ground, 0..255."""
SHIRT_COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (214, 48, 49), "blue": (38, 84, 190), "green": (30, 140, 70), "yellow": (246, 196, 24),
    "purple": (124, 58, 170), "black": (40, 40, 46), "white": (240, 240, 240),
}  # fmt: skip
SKIN_COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "ivory": (255, 231, 214), "rose": (250, 205, 185), "sand": (238, 190, 150), "honey": (222, 165, 110),
    "bronze": (194, 132, 84), "chestnut": (156, 98, 62), "umber": (118, 72, 46), "ebony": (80, 50, 36),
}  # fmt: skip
HAIR_COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "black": (34, 30, 36), "brown": (98, 62, 38), "auburn": (140, 50, 30), "ginger": (222, 106, 30),
    "blond": (240, 204, 96), "silver": (200, 202, 210), "teal": (28, 150, 156), "pink": (236, 90, 160),
}  # fmt: skip
EYE_COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "brown": (104, 60, 28), "blue": (40, 120, 220), "green": (50, 150, 70), "grey": (120, 130, 140),
}  # fmt: skip
FRAME_COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "black": (28, 28, 32), "red": (206, 30, 46), "gold": (206, 156, 40), "blue": (30, 70, 190),
}  # fmt: skip

_WHITE: Final = (255.0, 255.0, 255.0)
_DARK: Final = (44.0, 30.0, 34.0)
_LIPS: Final = (196.0, 70.0, 80.0)
_INSIDE: Final = (110.0, 26.0, 36.0)
_LINE: Final = 0.035
_HEAD: Final = (-1.3, -1.3, 1.3, 1.35)
# By expression: how far brows rise, how much their inner ends do beside that, and how far eyes are open.
_BROWS: Final = {
    "calm": (0.0, 0.0, 0.80),
    "smiling": (0.03, 0.02, 0.90),
    "laughing": (0.05, 0.03, 0.50),
    "sad": (0.02, 0.12, 0.72),
    "surprised": (0.13, 0.03, 1.20),
    "angry": (-0.05, -0.14, 0.75),
}


def draw(portraits: Sequence[Portrait], side: int = 64) -> Pixels:
    """Return pictures, uint8 [N, side, side, 3], red green blue. Raises ValueError where `side` is less than 16."""
    if side < 16:
        raise ValueError(f"side is {side}; it must be 16 or more")
    pictures = np.empty((len(portraits), side, side, 3), dtype=np.uint8)
    for picture, portrait in zip(pictures, portraits, strict=True):
        picture[...] = _drawn(portrait, side)
    return pictures


def _drawn(portrait: Portrait, side: int) -> Pixels:
    person = portrait.person
    canvas = Canvas(side, PALETTE[portrait.background], (portrait.x, portrait.y), portrait.size, rotation(portrait))
    skin, coat = SKIN_COLOURS[person.skin], HAIR_COLOURS[person.hair_colour]
    w, t = person.head_width, turn(portrait)
    _outlined(canvas, hair.back(person.hair, w, t), shade(coat, 0.86), hair.BOX)
    _body(canvas, skin, SHIRT_COLOURS[portrait.shirt])
    for sign in (-1, 1):
        ear = ellipse(sign * (w + 0.03) - 0.10 * t, 0.10, person.ear, person.ear * 1.25)
        _outlined(canvas, ear, shade(skin, 0.93), _HEAD)
    head = _head(w, person.jaw)
    _outlined(canvas, head, skin, _HEAD)
    canvas.lay(without(grown(head, -_LINE), ellipse(-0.16, -0.08, w, 1.0)), shade(skin, 0.86), _HEAD, 0.8)
    _cheeks(canvas, portrait, skin)
    _beard(canvas, portrait, head, coat)
    _eyes(canvas, portrait, skin)
    _brows(canvas, portrait, coat)
    _nose(canvas, portrait, skin)
    _mouth(canvas, portrait, skin)
    _outlined(canvas, hair.front(person.hair, w, t), coat, hair.BOX)
    _glasses(canvas, portrait)
    return canvas.pixels()


def _outlined(
    canvas: Canvas, outline: Outline | None, colour: Colour, reach: tuple[float, float, float, float]
) -> None:
    """Lay a colour with a darker line of it around."""
    if outline is not None:
        canvas.lay_lined(outline, colour, _LINE, reach)


def _head(w: float, jaw: float) -> Outline:
    """Return a head: a round skull, and below it a jaw from pointed (0) to square (1)."""
    skull = both(superellipse(0, -0.02, w, 0.96, 0.2), above(0.25))
    if jaw < 0.5:
        return either(skull, both(ellipse(0, 0.08, w * (0.90 + 0.2 * jaw), 0.92), below(-0.05)))
    return either(skull, both(superellipse(0, 0.08, w * 0.99, 0.90, 0.9 * jaw), below(-0.05)))


def _body(canvas: Canvas, skin: Colour, shirt: Colour) -> None:
    reach = (-1.9, 0.4, 1.9, 3.2)
    _outlined(canvas, superellipse(0, 2.15, 1.35, 0.95, 0.5), shirt, reach)
    neck = either(box(0, 1.0, 0.32, 0.45, 0.1), ellipse(0, 1.36, 0.36, 0.20))
    _outlined(canvas, neck, shade(skin, 0.84), reach)


def _cheeks(canvas: Canvas, portrait: Portrait, skin: Colour) -> None:
    person = portrait.person
    for sign, (x, y) in zip((-1, 1), eyes(portrait), strict=True):
        middle = (x + sign * 0.08, y + 0.36)
        if person.rosy:
            rosy = tuple(0.5 * a + 0.5 * b for a, b in zip(skin, (240, 80, 90), strict=True))
            canvas.lay(ellipse(*middle, 0.16, 0.12), rosy, _around(*middle, 0.2), 0.7)  # type: ignore[arg-type]
        if person.freckled:
            for dx, dy in ((-0.09, -0.02), (0.03, 0.05), (0.10, -0.06)):
                spot = (middle[0] + dx, middle[1] - 0.04 + dy)
                canvas.lay(ellipse(*spot, 0.035, 0.035), shade(skin, 0.6), _around(*spot, 0.06), 0.8)


def _beard(canvas: Canvas, portrait: Portrait, head: Outline, coat: Colour) -> None:
    style, lips = portrait.person.beard, mouth(portrait)
    if style == "full":
        bare = superellipse(lips.x, 0.12, portrait.person.head_width - 0.16, 0.42, 0.3)
        _outlined(canvas, without(both(grown(head, 0.03), below(0.10)), bare), coat, _HEAD)
    if style == "goatee":
        _outlined(canvas, both(ellipse(lips.x, 0.86, 0.26, 0.26), below(0.70)), coat, _HEAD)
    if style in ("moustache", "full"):
        for sign in (-1, 1):
            line = ((lips.x + sign * 0.04, MOUTH_LINE - 0.15), (lips.x + sign * 0.30, MOUTH_LINE - 0.10))
            canvas.lay(stroke(line, 0.085), shade(coat, 0.8), _HEAD)


def _eyes(canvas: Canvas, portrait: Portrait, skin: Colour) -> None:
    person = portrait.person
    opened = _BROWS[portrait.expression][2]
    r, t = person.eye_size, turn(portrait)
    for x, y in eyes(portrait):
        reach = _around(x, y, r * 1.5)
        white = ellipse(x, y, r, r * opened)
        if portrait.expression == "laughing":
            arch = [(x + r * u, y + 0.10 * (2 * u * u - 1)) for u in (-1.0, -0.5, 0.0, 0.5, 1.0)]
            canvas.lay(stroke(arch, 0.045), _DARK, reach)
            continue
        canvas.lay(grown(white, 0.035), _DARK, reach)
        canvas.lay(white, _WHITE, reach)
        iris = (x + 0.05 * t, y + 0.01)
        canvas.lay(both(white, ellipse(*iris, r * 0.62, r * 0.62)), EYE_COLOURS[person.eyes], reach)
        canvas.lay(both(white, ellipse(*iris, r * 0.30, r * 0.30)), _DARK, reach)
        glint = (iris[0] + r * 0.25, iris[1] - r * 0.28)
        canvas.lay(both(white, ellipse(*glint, r * 0.2, r * 0.2)), _WHITE, reach)


def _brows(canvas: Canvas, portrait: Portrait, coat: Colour) -> None:
    person = portrait.person
    raised, inner, _ = _BROWS[portrait.expression]
    for sign, (x, y) in zip((-1, 1), eyes(portrait), strict=True):
        level = y - person.eye_size - 0.13 - raised
        line = (
            (x - sign * 0.16, level - inner + person.brow_slope),
            (x + sign * 0.04, level - 0.03),
            (x + sign * 0.20, level + 0.03 - person.brow_slope),
        )
        canvas.lay(stroke(line, person.brow_weight), shade(coat, 0.62), _around(x, level, 0.45))


def _nose(canvas: Canvas, portrait: Portrait, skin: Colour) -> None:
    (x, tip), wide = nose_tip(portrait), portrait.person.nose_width
    top = x - 0.09 * turn(portrait)
    reach = (x - 0.5, NOSE_TOP - 0.3, x + 0.5, tip + 0.2)
    canvas.lay(either(stroke(((top, NOSE_TOP), (x, tip - 0.05)), 0.05), ellipse(x, tip - 0.04, wide, 0.09)),
               shade(skin, 0.84), reach)  # fmt: skip
    under = [(x + wide * u, tip + 0.04 - 0.05 * u * u) for u in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    canvas.lay(stroke(under, 0.028), shade(skin, 0.5), reach)


def _mouth(canvas: Canvas, portrait: Portrait, skin: Colour) -> None:
    person, lips = portrait.person, mouth(portrait)
    tone = tuple(0.55 * a + 0.45 * b for a, b in zip(_LIPS, skin, strict=True))
    colour: Colour = shade(tone, 0.82)  # type: ignore[arg-type]
    reach = _around(lips.x, MOUTH_LINE, 0.62)
    if not lips.opening:
        canvas.lay(stroke(_smile(lips), person.lip), colour, reach)
        return
    if portrait.expression == "surprised":
        hole = ellipse(lips.x, MOUTH_LINE, lips.half_width, lips.opening)
    else:
        hole = both(
            ellipse(lips.x, MOUTH_LINE - lips.rise, lips.half_width, lips.opening + lips.rise),
            below(MOUTH_LINE - lips.rise),
        )
    canvas.lay(grown(hole, person.lip), colour, reach)
    canvas.lay(hole, _INSIDE, reach)
    if portrait.expression == "laughing":
        canvas.lay(both(hole, above(MOUTH_LINE - lips.rise + 0.10)), _WHITE, reach)


def _smile(lips: Mouth) -> list[tuple[float, float]]:
    """Return points along a closed mouth from corner to corner."""
    steps = (-1.0, -0.67, -0.33, 0.0, 0.33, 0.67, 1.0)
    return [(lips.x + lips.half_width * u, MOUTH_LINE + lips.rise * (0.6 - 1.6 * u * u)) for u in steps]


def _glasses(canvas: Canvas, portrait: Portrait) -> None:
    person = portrait.person
    if person.glasses == "none":
        return
    (left, _), (right, y) = eyes(portrait)
    r = max(0.26, person.eye_spacing - 0.10)
    frame = FRAME_COLOURS[person.frame]
    lens = [_lens(person.glasses, x, y, r) for x in (left, right)]
    reach = (-1.2, EYE_LINE - 0.5, 1.2, EYE_LINE + 0.6)
    if person.glasses == "dark":
        canvas.lay(either(*lens), (32.0, 34.0, 44.0), reach)
        for x in (left, right):
            canvas.lay(stroke(((x - 0.14, y + 0.02), (x - 0.02, y - 0.12)), 0.03), (120.0, 130.0, 150.0), reach)
    else:
        canvas.lay(either(*lens), _WHITE, reach, 0.18)
        canvas.lay(either(*(band(outline, 0.045) for outline in lens)), frame, reach)
    arms = [
        stroke(((left + r, y - 0.04), (right - r, y - 0.04)), 0.04),
        stroke(((left - r, y - 0.04), (-person.head_width, y - 0.10)), 0.035),
        stroke(((right + r, y - 0.04), (person.head_width, y - 0.10)), 0.035),
    ]
    canvas.lay(either(*arms), frame, reach)


def _lens(style: str, x: float, y: float, r: float) -> Outline:
    if style == "round":
        return ellipse(x, y + 0.02, r, r)
    return box(x, y + 0.03, r, r * 0.78, 0.06 if style == "square" else 0.14)


def _around(x: float, y: float, reach: float) -> Box:
    return x - reach, y - reach, x + reach, y + reach
