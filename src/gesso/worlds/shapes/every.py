"""The whole shapes world: every scene has a number, and a claim allows some of them.

In here: `scene_at` and `number` (one from the other), `training_numbers`, `allowed`. Not in here: drawing scenes by lot
(`scenes.py`), language (`captions.py`).

The world is finite: 299 thousand scenes. So it can be asked what no data set can: everything that a text allows.
Numbers count through three blocks, one a kind of scene, each a grid with an axis for everything that varies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, cast

import numpy as np
import numpy.typing as npt

from gesso.worlds.shapes.captions import Claim
from gesso.worlds.shapes.scenes import (
    COLOURS,
    GROUP_RADIUS,
    LATTICE,
    MIDDLE,
    NEAR,
    OPPOSITE,
    RADII,
    SHAPES,
    SIZES,
    Places,
    Scene,
    Thing,
    four_places,
    is_held_out,
    lone_places,
    three_places,
    two_places,
)

Numbers = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]

_LONE: Final = tuple((size, ((x, y),)) for size in SIZES for x in lone_places(size) for y in lone_places(size))
_PAIRS: Final = tuple(
    (relation, two_places(near, cross, upright=relation == "above"))
    for relation in ("left", "above")
    for near in NEAR
    for cross in MIDDLE
)
_COUNTS: Final[tuple[Places, ...]] = (
    *(places for _, places in _PAIRS),
    *(three_places(near, upended=upended) for near in NEAR for upended in (False, True)),
    *(four_places(left, top) for left in NEAR for top in NEAR),
)
_LOOK: Final = (len(SHAPES), len(COLOURS))


@dataclass(frozen=True)
class _Block:
    """Scenes of a kind: the number of the first, and the grid of background, shape and colour of each look, places."""

    first: int
    grid: tuple[int, ...]

    @property
    def after(self) -> int:
        return self.first + int(np.prod(self.grid))

    def numbers(self, *axes: Sequence[int] | npt.NDArray[np.intp]) -> Numbers:
        """Numbers of all that can be put together from these indices along the axes, in reading order, those left out
        where the grid has a place and the world has no scene.
        """
        grids = [axis.ravel() for axis in np.broadcast_arrays(*np.ix_(*axes))]
        background, *looks, _ = grids
        exists = np.logical_and.reduce([colour != background for colour in looks[1::2]])
        if len(looks) == 4:
            exists &= looks[0] != looks[2]
        return self.first + np.ravel_multi_index([axis[exists] for axis in grids], self.grid)


_SINGLE_BLOCK: Final = _Block(0, (len(COLOURS), *_LOOK, len(_LONE)))
_PAIR_BLOCK: Final = _Block(_SINGLE_BLOCK.after, (len(COLOURS), *_LOOK, *_LOOK, len(_PAIRS)))
_COUNT_BLOCK: Final = _Block(_PAIR_BLOCK.after, (len(COLOURS), *_LOOK, len(_COUNTS)))
_BLOCKS: Final = (_SINGLE_BLOCK, _PAIR_BLOCK, _COUNT_BLOCK)
END: Final = _COUNT_BLOCK.after
"""Numbers are below it. Some of them belong to no scene."""


def scene_at(number: int) -> Scene:
    """Return the scene of a number. Raises ValueError for one that belongs to none."""
    for block in _BLOCKS:
        if block.first <= number < block.after:
            scene = _scene(block, number)
            if _exists(scene):
                return scene
    raise ValueError(f"number {number} belongs to no scene")


def number(scene: Scene) -> int:
    """Return a scene's number. Raises ValueError for one that is not of this world."""
    if not _exists(scene):
        raise ValueError("a scene has an object of its background's colour, or a pair of one shape")
    things = scene.objects[::-1] if scene.relation in ("right", "below") else scene.objects
    places = tuple((round(thing.x * LATTICE), round(thing.y * LATTICE)) for thing in things)
    looks = [index for thing in things for index in (SHAPES.index(thing.shape), COLOURS.index(thing.colour))]
    background = COLOURS.index(scene.background)
    if scene.kind == "single":
        block, place = _SINGLE_BLOCK, _LONE.index((cast(str, scene.size), cast(tuple[tuple[int, int]], places)))
    elif scene.kind == "pair":
        relation = "left" if scene.relation in ("left", "right") else "above"
        block, place = _PAIR_BLOCK, _PAIRS.index((relation, places))
    else:
        block, place, looks = _COUNT_BLOCK, _COUNTS.index(places), looks[:2]
    return block.first + int(np.ravel_multi_index((background, *looks, place), block.grid))


@cache
def training_numbers() -> Numbers:
    """Return the numbers of all scenes that hold no held-out combination, rising. Takes seconds, once a process."""
    kept = [
        number
        for block in _BLOCKS
        for number in block.numbers(*map(range, block.grid)).tolist()
        if not is_held_out(_scene(block, number))
    ]
    return np.array(kept, dtype=np.int64)


def allowed(claim: Claim) -> tuple[Numbers, Shares]:
    """Return the numbers of all scenes of which a claim is true, and how often each is drawn among them, sum 1.

    They are those that a caption with this claim could be of. Held-out ones are among them.
    Raises ValueError for shapes and colours outside the world.
    """
    backgrounds = _index(COLOURS, claim.background)
    if len(claim.looks) == 2:
        numbers = np.concatenate([_pairs(claim, backgrounds, swapped=swapped) for swapped in (False, True)])
        return numbers, np.full(len(numbers), 1 / max(len(numbers), 1))
    ((shape, colour),) = claim.looks
    looks = _index(SHAPES, shape), _index(COLOURS, colour)
    if claim.number > 1:
        fitting = [index for index, places in enumerate(_COUNTS) if len(places) == claim.number]
        numbers = _COUNT_BLOCK.numbers(backgrounds, *looks, fitting)
        return numbers, np.full(len(numbers), 1 / max(len(numbers), 1))
    fitting = [index for index, (size, _) in enumerate(_LONE) if claim.size in (None, size)]
    numbers = _SINGLE_BLOCK.numbers(backgrounds, *looks, fitting)
    # Sizes are equally likely, and the places of each.
    often = np.array([1 / len(lone_places(size)) ** 2 for size, _ in _LONE])[numbers % len(_LONE)]
    return numbers, often / often.sum()


def _pairs(claim: Claim, backgrounds: Sequence[int], *, swapped: bool) -> Numbers:
    """The first thing named is the left or upper one or, `swapped`, the other."""
    relation = OPPOSITE[claim.relation] if claim.relation and swapped else claim.relation
    fitting = [index for index, (lies, _) in enumerate(_PAIRS) if relation in (None, lies)]
    first, second = claim.looks[::-1] if swapped else claim.looks
    looks = [axis for shape, colour in (first, second) for axis in (_index(SHAPES, shape), _index(COLOURS, colour))]
    return _PAIR_BLOCK.numbers(backgrounds, *looks, fitting)


def _index(words: Sequence[str], word: str | None) -> Sequence[int]:
    return range(len(words)) if word is None else [words.index(word)]


def _exists(scene: Scene) -> bool:
    shapes = [thing.shape for thing in scene.objects]
    alike = scene.kind == "pair" and shapes[0] == shapes[1]
    return not alike and all(thing.colour != scene.background for thing in scene.objects)


def _scene(block: _Block, number: int) -> Scene:
    """What a place in the grid stands for, also where there is no such scene."""
    indices: list[int] = []
    left = number - block.first
    for size in reversed(block.grid):
        left, index = divmod(left, size)
        indices.insert(0, index)
    background, *looks, place = indices
    kinds = [(SHAPES[shape], COLOURS[colour]) for shape, colour in zip(looks[::2], looks[1::2], strict=True)]
    if block is _SINGLE_BLOCK:
        size, places = _LONE[place]
        return Scene("single", COLOURS[background], _things(kinds, places, RADII[size]), size=size)
    if block is _PAIR_BLOCK:
        relation, places = _PAIRS[place]
        return Scene("pair", COLOURS[background], _things(kinds, places, GROUP_RADIUS), relation=relation)
    places = _COUNTS[place]
    return Scene("count", COLOURS[background], _things(kinds * len(places), places, GROUP_RADIUS))


def _things(kinds: Sequence[tuple[str, str]], places: Places, radius: float) -> tuple[Thing, ...]:
    return tuple(
        Thing(shape, colour, radius, x / LATTICE, y / LATTICE)
        for (shape, colour), (x, y) in zip(kinds, places, strict=True)
    )
