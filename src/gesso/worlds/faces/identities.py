"""Who there is in the faces world: an identity is a vector of parameters, drawn by lot, some kept from training.

In here: `Identity`, the words and steps that its parameters come from, sampling by seed, and the held-out rule. Not in
here: how a person is held or looks at the moment (`portraits.py`), pixels (`drawing.py`).

Lengths are in half heights of a head. The looks that one sees first come from short lists; the rest of a face, which
tells those with the same looks apart, from a few steps each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cache
from hashlib import blake2b
from typing import Final

from gesso.worlds.dice import Dice

SKINS: Final = ("ivory", "rose", "sand", "honey", "bronze", "chestnut", "umber", "ebony")
HAIRSTYLES: Final = (
    "bald", "short", "parted", "spiky", "mohawk", "curly", "fringe", "bob", "long", "bun", "pigtails",
)  # fmt: skip
HAIR_COLOURS: Final = ("black", "brown", "auburn", "ginger", "blond", "silver", "teal", "pink")
BEARDS: Final = ("none", "none", "none", "moustache", "goatee", "full")
GLASSES: Final = ("none", "none", "round", "square", "dark")
FRAMES: Final = ("black", "red", "gold", "blue")
EYES: Final = ("brown", "blue", "green", "grey")

_HEAD_WIDTHS: Final = (0.74, 0.80, 0.86, 0.92, 0.98)
_JAWS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
_EYE_SIZES: Final = (0.17, 0.20, 0.23, 0.26)
_EYE_SPACINGS: Final = (0.33, 0.38, 0.43)
_BROW_WEIGHTS: Final = (0.035, 0.055, 0.08)
_BROW_SLOPES: Final = (-0.08, 0.0, 0.08)
_NOSE_WIDTHS: Final = (0.09, 0.14, 0.19)
_NOSE_LENGTHS: Final = (0.20, 0.28, 0.36)
_MOUTH_WIDTHS: Final = (0.26, 0.33, 0.40)
_LIPS: Final = (0.03, 0.045, 0.06)
_EARS: Final = (0.14, 0.19, 0.24)
_FRECKLED_SHARE: Final = 0.25
_ROSY_SHARE: Final = 0.4
_HELD_OUT_MODULUS: Final = 12
# Changing it or the modulus would make old models' scores meaningless: they would have been trained on those asked for.
_HELD_OUT_SPLIT: Final = b"faces split 1"


@dataclass(frozen=True, slots=True)
class Identity:
    """One person. `jaw` is 0 for a pointed chin, 1 for a square one; slopes are positive where brows rise outwards."""

    skin: str
    hair: str
    hair_colour: str
    beard: str
    glasses: str
    frame: str
    eyes: str
    freckled: bool
    rosy: bool
    head_width: float
    jaw: float
    eye_size: float
    eye_spacing: float
    brow_weight: float
    brow_slope: float
    nose_width: float
    nose_length: float
    mouth_width: float
    lip: float
    ear: float


def identity(seed: int) -> Identity:
    """Return the person of this seed (0 or more), who may be held out."""
    return _draw(Dice(seed, 3))


def training_identity(seed: int) -> Identity:
    """Return the first person in this seed's stream who is not held out."""
    return next(drawn for drawn in _stream(seed) if not is_held_out(drawn))


def held_out_identity(seed: int) -> Identity:
    """Return the first person in this seed's stream who is held out."""
    return next(drawn for drawn in _stream(seed) if is_held_out(drawn))


def is_held_out(person: Identity) -> bool:
    """Say whether a person's looks are kept from training."""
    return is_held_out_key(looks_key(person))


def looks_key(person: Identity) -> str:
    """Return the key of the looks that one sees first: skin, hair, beard and glasses together."""
    return (
        f"{person.skin} skin, {person.hair_colour} hair {person.hair}, beard {person.beard}, glasses {person.glasses}"
    )


@cache
def is_held_out_key(key: str) -> bool:
    """Say whether looks are kept from training: one in twelve is, by a hash that never changes."""
    digest = blake2b(key.encode(), digest_size=8, person=_HELD_OUT_SPLIT).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_MODULUS == 0


def differences(one: Identity, other: Identity) -> int:
    """Return in how many parameters two people differ."""
    return sum(here != there for here, there in zip(astuple(one), astuple(other), strict=True))


def _stream(seed: int) -> Iterator[Identity]:
    dice = Dice(seed, 3)
    while True:
        yield _draw(dice)


def _draw(dice: Dice) -> Identity:
    glasses = dice.pick(GLASSES)
    return Identity(
        skin=dice.pick(SKINS),
        hair=dice.pick(HAIRSTYLES),
        hair_colour=dice.pick(HAIR_COLOURS),
        beard=dice.pick(BEARDS),
        glasses=glasses,
        # What is not seen has one value only, so that people who look the same are the same.
        frame=dice.pick(FRAMES) if glasses in ("round", "square") else "black",
        eyes=dice.pick(EYES) if glasses != "dark" else "brown",
        freckled=dice.chance(_FRECKLED_SHARE),
        rosy=dice.chance(_ROSY_SHARE),
        head_width=dice.pick(_HEAD_WIDTHS),
        jaw=dice.pick(_JAWS),
        eye_size=dice.pick(_EYE_SIZES),
        eye_spacing=dice.pick(_EYE_SPACINGS),
        brow_weight=dice.pick(_BROW_WEIGHTS),
        brow_slope=dice.pick(_BROW_SLOPES),
        nose_width=dice.pick(_NOSE_WIDTHS),
        nose_length=dice.pick(_NOSE_LENGTHS),
        mouth_width=dice.pick(_MOUTH_WIDTHS),
        lip=dice.pick(_LIPS),
        ear=dice.pick(_EARS),
    )
