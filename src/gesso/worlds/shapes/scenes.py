"""Scenes of the shapes world: what is in a picture, how it is drawn by lot, and which combinations training never sees.

In here: the words of the world (shapes, colours, sizes, relations), `Scene` and `Thing`, sampling by seed, and the
held-out rule. Not in here: pixels (`drawing.py`), language (`captions.py`), judging (`detector.py`, `scoring.py`).

All lengths are fractions of the picture's side, so a scene can be drawn at any size. Centres lie on a lattice of
1/16 of the side and radii come from a short list: the world is rich in words and poor in continuous nuisance, so that
a model of a few million parameters can learn it exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import Final, Literal

from gesso.worlds.dice import Dice

Kind = Literal["single", "pair", "count"]
Places = tuple[tuple[int, int], ...]
"""Centres on the lattice."""

SHAPES: Final = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
COLOURS: Final = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
SIZES: Final = ("small", "medium", "large")
RELATIONS: Final = ("left", "right", "above", "below")
OPPOSITE: Final = {"left": "right", "right": "left", "above": "below", "below": "above"}
CATEGORIES: Final = ("one object", "two objects", "counting", "colours", "position", "colour binding")

LATTICE: Final = 16
"""Lattice steps on a side; every centre is a whole number of these."""
RADII: Final = {"small": 0.17, "medium": 0.24, "large": 0.34}
"""Radius of a lone object by size word; neighbours differ by a factor of about the square root of two."""
GROUP_RADIUS: Final = 0.17
"""Radius of every object in a pair or a count: the small one, so that outlines are shared with lone objects."""

NEAR: Final = (4, 5)
"""Where the left or upper one of a group may lie on the lattice, along the way to the other."""
MIDDLE: Final = (7, 8, 9)
"""Where a pair may lie across that way."""

_SINGLE_REACH: Final = {"small": 2, "medium": 2, "large": 1}
_SPAN: Final = 7
_HELD_OUT_MODULUS: Final = 12
# Of 300 tried, the split under which each word occurs most evenly among the held-out keys of every category. Changing
# it or the modulus would make old models' scores meaningless: they would have been trained on the new questions.
_HELD_OUT_SPLIT: Final = b"split 8"
# Counts are learnt long before outlines and pairs are, so these get most of the lot.
_SINGLE_SHARE: Final = 0.40
_PAIR_SHARE: Final = 0.50


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: centre (x right, y down) and radius are fractions of the side."""

    shape: str
    colour: str
    radius: float
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture holds.

    `relation` says where `objects[0]` lies as seen from `objects[1]` (pairs only); `size` is the size word of a lone
    object (singles only).
    """

    kind: Kind
    background: str
    objects: tuple[Thing, ...]
    relation: str | None = None
    size: str | None = None


def scene(seed: int) -> Scene:
    """Return the scene of this seed (0 or more); it may be a held-out one."""
    return _draw(Dice(seed))


def training_scene(seed: int) -> Scene:
    """Return the first scene in this seed's stream that holds no held-out combination."""
    return next(drawn for drawn in _stream(seed) if not is_held_out(drawn))


def held_out_scene(seed: int) -> Scene:
    """Return the first scene in this seed's stream that holds a held-out combination."""
    return next(drawn for drawn in _stream(seed) if is_held_out(drawn))


def is_held_out(drawn: Scene) -> bool:
    """Say whether any combination in the scene is kept from training."""
    return any(is_held_out_key(key) for key in combinations(drawn))


def combinations(drawn: Scene) -> frozenset[str]:
    """Return the keys of the combinations in a scene, for each GenEval category that it can be asked in."""
    first = drawn.objects[0]
    if drawn.kind == "single":
        keys = [colour_key(first.colour, first.shape, drawn.background)]
        if drawn.size is not None:
            keys.append(object_key(drawn.size, first.shape, drawn.background))
        return frozenset(keys)
    if drawn.kind == "count":
        return frozenset(counting_keys(len(drawn.objects), first.colour, first.shape, drawn.background))
    second = drawn.objects[1]
    keys = [
        pair_key(first.shape, second.shape, drawn.background),
        binding_key((first.colour, first.shape), (second.colour, second.shape)),
    ]
    if drawn.relation is not None:
        keys.append(position_key(drawn.relation, first.shape, second.shape, drawn.background))
    return frozenset(keys)


def object_key(size: str, shape: str, background: str) -> str:
    """Return the key for category "one object"."""
    return f"one object: {size} {shape} on {background}"


def colour_key(colour: str, shape: str, background: str) -> str:
    """Return the key for category "colours"."""
    return f"colours: {colour} {shape} on {background}"


def pair_key(first: str, second: str, background: str) -> str:
    """Return the key for category "two objects"; the order of the two shapes does not matter."""
    low, high = sorted((first, second))
    return f"two objects: {low} and {high} on {background}"


def binding_key(first: tuple[str, str], second: tuple[str, str]) -> str:
    """Return the key for category "colour binding" from two (colour, shape) in any order."""
    low, high = sorted((first, second))
    return f"colour binding: {low[0]} {low[1]} and {high[0]} {high[1]}"


def position_key(relation: str, first: str, second: str, background: str) -> str:
    """Return the key for category "position"; "A right of B" is written as "B left of A"."""
    if relation in ("right", "below"):
        relation, first, second = OPPOSITE[relation], second, first
    return f"position: {first} {relation} {second} on {background}"


def counting_keys(number: int, colour: str, shape: str, background: str) -> tuple[str, str]:
    """Return the two keys for category "counting"."""
    return f"counting: {number} {shape} on {background}", f"counting: {number} {colour} {shape}"


@cache
def is_held_out_key(key: str) -> bool:
    """Say whether a combination is kept from training: one in twelve is, by a hash that never changes."""
    digest = blake2b(key.encode(), digest_size=8, person=_HELD_OUT_SPLIT).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_MODULUS == 0


def lone_places(size: str) -> range:
    """Return where on the lattice a lone object of a size word may lie, along either axis."""
    reach = _SINGLE_REACH[size]
    return range(LATTICE // 2 - reach, LATTICE // 2 + reach + 1)


def two_places(near: int, cross: int, *, upright: bool) -> Places:
    """Return the places (x, y) of two: the left or, `upright`, the upper one first."""
    if upright:
        return (cross, near), (cross, near + _SPAN)
    return (near, cross), (near + _SPAN, cross)


def three_places(near: int, *, upended: bool) -> Places:
    """Return the places of three: one in the middle of the top row or, `upended`, the bottom row, two in the other."""
    apex, base = (near + _SPAN, near) if upended else (near, near + _SPAN)
    return (8, apex), (4, base), (12, base)


def four_places(left: int, top: int) -> Places:
    """Return the places of four, row by row."""
    return (left, top), (left + _SPAN, top), (left, top + _SPAN), (left + _SPAN, top + _SPAN)


def _stream(seed: int) -> Iterator[Scene]:
    dice = Dice(seed)
    while True:
        yield _draw(dice)


def _draw(dice: Dice) -> Scene:
    lot = dice.unit()
    background = dice.pick(COLOURS)
    if lot < _SINGLE_SHARE:
        return _draw_single(dice, background)
    if lot < _SINGLE_SHARE + _PAIR_SHARE:
        return _draw_pair(dice, background)
    return _draw_count(dice, background)


def _draw_single(dice: Dice, background: str) -> Scene:
    size = dice.pick(SIZES)
    places = lone_places(size)
    shape, colour = dice.pick(SHAPES), dice.other(COLOURS, background)
    thing = Thing(shape, colour, RADII[size], dice.pick(places) / LATTICE, dice.pick(places) / LATTICE)
    return Scene("single", background, (thing,), size=size)


def _draw_pair(dice: Dice, background: str) -> Scene:
    shape = dice.pick(SHAPES)
    looks = (
        (shape, dice.other(COLOURS, background)),
        (dice.other(SHAPES, shape), dice.other(COLOURS, background)),
    )
    relation = dice.pick(RELATIONS)
    places = two_places(dice.pick(NEAR), dice.pick(MIDDLE), upright=relation in ("above", "below"))
    if relation in ("right", "below"):
        places = places[::-1]
    things = tuple(
        Thing(shape, colour, GROUP_RADIUS, x / LATTICE, y / LATTICE)
        for (shape, colour), (x, y) in zip(looks, places, strict=True)
    )
    return Scene("pair", background, things, relation=relation)


def _draw_count(dice: Dice, background: str) -> Scene:
    number = dice.pick((2, 3, 4))
    shape, colour = dice.pick(SHAPES), dice.other(COLOURS, background)
    if number == 2:
        upright = dice.chance(0.5)
        places = two_places(dice.pick(NEAR), dice.pick(MIDDLE), upright=upright)
    elif number == 3:
        places = three_places(dice.pick(NEAR), upended=dice.chance(0.5))
    else:
        places = four_places(dice.pick(NEAR), dice.pick(NEAR))
    things = tuple(Thing(shape, colour, GROUP_RADIUS, x / LATTICE, y / LATTICE) for x, y in places)
    return Scene("count", background, things)
