"""Portraits of the faces world: a person as held, lit by a mood, in a shirt before a plain ground; and the key points.

In here: the words for what varies from picture to picture of one person, `Portrait`, sampling by seed, and where the
features of a face lie, which drawing and key points share. Not in here: who there is (`identities.py`), pixels
(`drawing.py`), language (`captions.py`).

In a picture lengths are fractions of its side; on a face they are half heights of the head, x right and y down from
its middle, before the head is tilted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gesso.worlds.dice import Dice
from gesso.worlds.faces.identities import Identity, held_out_identity, identity, training_identity

EXPRESSIONS: Final = ("calm", "smiling", "laughing", "sad", "surprised", "angry")
FACINGS: Final = ("left", "ahead", "right")
BACKGROUNDS: Final = ("blue", "green", "yellow", "pink", "purple", "orange", "white", "grey")
SHIRTS: Final = ("red", "blue", "green", "yellow", "purple", "black", "white")

LATTICE: Final = 32
"""Lattice steps on a side; the middle of every head is a whole number of these."""

_ACROSS: Final = (15, 16, 17)
_DOWN: Final = (15, 16, 17)
_SIZES: Final = (0.27, 0.30, 0.33)
_TILTS: Final = (-10, -5, 0, 5, 10)
_TURN: Final = {"left": -1.0, "ahead": 0.0, "right": 1.0}
# How far features move across the head when it turns; the nose is nearest to whoever looks, ears farthest.
_FEATURES_SHIFT: Final = 0.15
_NOSE_SHIFT: Final = 0.24
EYE_LINE: Final = 0.02
NOSE_TOP: Final = 0.10
MOUTH_LINE: Final = 0.60

# By expression: how far corners of the mouth rise, how wide it is, how far it is open.
_MOUTHS: Final = {
    "calm": (0.02, 0.9, 0.0),
    "smiling": (0.13, 1.15, 0.0),
    "laughing": (0.12, 1.15, 0.20),
    "sad": (-0.12, 0.9, 0.0),
    "surprised": (0.0, 0.5, 0.17),
    "angry": (-0.06, 1.0, 0.0),
}


@dataclass(frozen=True, slots=True)
class Portrait:
    """A picture of one person: the middle of the head (x, y), half its height (`size`), its tilt in degrees."""

    person: Identity
    x: float
    y: float
    size: float
    tilt: int
    facing: str
    expression: str
    background: str
    shirt: str


@dataclass(frozen=True, slots=True)
class Mouth:
    """Where a mouth is: half its width, how far its corners rise, how far it is open."""

    x: float
    half_width: float
    rise: float
    opening: float


def portrait(seed: int) -> Portrait:
    """Return the portrait of this seed (0 or more): a person of their own, who may be held out."""
    return portrait_of(identity(seed), seed)


def training_portrait(seed: int) -> Portrait:
    """Return the portrait of a person who is not held out."""
    return portrait_of(training_identity(seed), seed)


def held_out_portrait(seed: int) -> Portrait:
    """Return the portrait of a person who is held out."""
    return portrait_of(held_out_identity(seed), seed)


def portrait_of(person: Identity, seed: int) -> Portrait:
    """Return a person in a pose, an expression, a shirt and before a ground that depend on the seed alone."""
    # The second number keeps these draws apart from those that made the person of the same seed.
    dice = Dice(seed, 4)
    return Portrait(
        person,
        x=dice.pick(_ACROSS) / LATTICE,
        y=dice.pick(_DOWN) / LATTICE,
        size=dice.pick(_SIZES),
        tilt=dice.pick(_TILTS),
        facing=dice.pick(FACINGS),
        expression=dice.pick(EXPRESSIONS),
        background=dice.pick(BACKGROUNDS),
        shirt=dice.pick(SHIRTS),
    )


def turn(drawn: Portrait) -> float:
    """Return -1 for a head that faces left in the picture, 1 for right, 0 for ahead."""
    return _TURN[drawn.facing]


def eyes(drawn: Portrait) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the middles of the left and the right eye, as seen, on the face."""
    middle, apart = _FEATURES_SHIFT * turn(drawn), drawn.person.eye_spacing
    return (middle - apart, EYE_LINE), (middle + apart, EYE_LINE)


def nose_tip(drawn: Portrait) -> tuple[float, float]:
    """Return the tip of the nose on the face."""
    return _NOSE_SHIFT * turn(drawn), NOSE_TOP + drawn.person.nose_length


def mouth(drawn: Portrait) -> Mouth:
    """Return the mouth, by person and expression."""
    rise, wide, opening = _MOUTHS[drawn.expression]
    return Mouth(_FEATURES_SHIFT * turn(drawn) * 1.1, drawn.person.mouth_width * wide, rise, opening)


def rotation(drawn: Portrait) -> tuple[float, float]:
    """Return cosine and sine of the tilt, clockwise; rounded, for libraries differ in the last bit."""
    angle = math.radians(drawn.tilt)
    return round(math.cos(angle), 12), round(math.sin(angle), 12)


def key_points(drawn: Portrait) -> npt.NDArray[np.float64]:
    """Return where left eye, right eye, nose tip, and left and right corner of the mouth lie in the picture, `[5,2]`.

    Left and right are as seen; x (right) and y (down) are fractions of the side.
    """
    lips = mouth(drawn)
    corners = [(lips.x + sign * lips.half_width, MOUTH_LINE - lips.rise) for sign in (-1, 1)]
    points_52 = np.array([*eyes(drawn), nose_tip(drawn), *corners], dtype=np.float64)
    cosine, sine = rotation(drawn)
    across = points_52[:, 0] * cosine - points_52[:, 1] * sine
    down = points_52[:, 0] * sine + points_52[:, 1] * cosine
    return np.stack([drawn.x + drawn.size * across, drawn.y + drawn.size * down], axis=1)
