"""Shapes-score: GenEval's six categories asked of pictures of the shapes world, and judged strictly.

In here: held-out questions, the judge and the arithmetic of the score. Not in here: reading pictures
(`detector.py`) and generating them (the caller does).

A picture is right only if everything that the prompt states is right (shapes, colours, number, places, size,
background) and nothing else is in it. Categories as in GenEval (Ghosh and others, 2023, arXiv:2310.11513), whose
overall score is the mean of the categories.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Final

from gesso.worlds.dice import Dice
from gesso.worlds.shapes.captions import Claim, phrase
from gesso.worlds.shapes.detector import UNKNOWN, Detection, Found, detect
from gesso.worlds.shapes.drawing import Pixels
from gesso.worlds.shapes.scenes import (
    CATEGORIES,
    COLOURS,
    RADII,
    RELATIONS,
    SHAPES,
    SIZES,
    binding_key,
    colour_key,
    counting_keys,
    is_held_out_key,
    object_key,
    pair_key,
    position_key,
)

if TYPE_CHECKING:
    from PIL import Image

SIZE_TOLERANCE: Final = 0.35
"""Greatest relative difference of an object's radius from the one that its size word stands for."""
LEAST_SPACING: Final = 0.25
"""Least distance of two centres, in sides, along the axis that a relation is about."""
MOST_STRAY: Final = 0.01
"""Greatest share of the picture in marks that are too small to be objects."""

_ATTEMPTS: Final = 200


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out prompt: its category, its text, what it states, and the held-out combination in it."""

    category: str
    prompt: str
    claim: Claim
    key: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a picture answers a question; `reasons` says what is wrong, and is empty where it is right."""

    category: str
    right: bool
    reasons: tuple[str, ...]
    detection: Detection


def prompts(count: int, seed: int = 0) -> list[Question]:
    """Return `count` questions, the six categories in turn, each on a combination that training never holds.

    The same for the same seed; a longer list begins with the shorter one. No prompt's text comes twice while its
    category has fresh ones left to give. Raises ValueError for a negative count.
    """
    if count < 0:
        raise ValueError(f"count is {count}; it must be 0 or more")
    dice = Dice(seed, 2)
    asked: set[str] = set()
    questions: list[Question] = []
    for index in range(count):
        question = _question(CATEGORIES[index % len(CATEGORIES)], dice, asked)
        asked.add(question.prompt)
        questions.append(question)
    return questions


def judge(question: Question, image: Pixels | Image.Image) -> Verdict:
    """Judge a picture (uint8 [side, side, 3] or a PIL image, square) against a question."""
    return judge_detection(question, detect(image))


def judge_detection(question: Question, detection: Detection) -> Verdict:
    """Judge what was read from a picture against a question."""
    reasons = tuple(_faults(question.claim, detection))
    return Verdict(question.category, not reasons, reasons, detection)


def score(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Return the share of right pictures in each category asked, "overall" (mean of those) and "plain" (of all).

    Raises ValueError where there are no verdicts.
    """
    outcomes: dict[str, list[bool]] = {category: [] for category in CATEGORIES}
    for verdict in verdicts:
        outcomes[verdict.category].append(verdict.right)
    asked = {category: sum(right) / len(right) for category, right in outcomes.items() if right}
    if not asked:
        raise ValueError("there are no verdicts to score")
    every = [right for outcome in outcomes.values() for right in outcome]
    return {**asked, "overall": sum(asked.values()) / len(asked), "plain": sum(every) / len(every)}


def _question(category: str, dice: Dice, asked: set[str]) -> Question:
    """Return a question whose text is new, or the last one tried where a category has run dry."""
    question = None
    for _ in range(_ATTEMPTS):
        claim, key = _held_out_claim(_CLAIMS[category], dice)
        question = Question(category, phrase(claim, dice), claim, key)
        if question.prompt not in asked:
            break
    assert question is not None
    return question


def _held_out_claim(draw_claim: Callable[[Dice], tuple[Claim, tuple[str, ...]]], dice: Dice) -> tuple[Claim, str]:
    while True:
        claim, keys = draw_claim(dice)
        for key in keys:
            if is_held_out_key(key):
                return claim, key


def _one_object(dice: Dice) -> tuple[Claim, tuple[str, ...]]:
    size, shape, background = dice.pick(SIZES), dice.pick(SHAPES), dice.pick(COLOURS)
    return Claim(((shape, None),), size=size, background=background), (object_key(size, shape, background),)


def _two_objects(dice: Dice) -> tuple[Claim, tuple[str, ...]]:
    first, background = dice.pick(SHAPES), dice.pick(COLOURS)
    second = dice.other(SHAPES, first)
    return Claim(((first, None), (second, None)), background=background), (pair_key(first, second, background),)


def _counting(dice: Dice) -> tuple[Claim, tuple[str, ...]]:
    number, shape, background = dice.pick((2, 3, 4)), dice.pick(SHAPES), dice.pick(COLOURS)
    colour = dice.other(COLOURS, background)
    claim = Claim(((shape, colour),), number=number, background=background)
    return claim, counting_keys(number, colour, shape, background)


def _colours(dice: Dice) -> tuple[Claim, tuple[str, ...]]:
    shape, background = dice.pick(SHAPES), dice.pick(COLOURS)
    colour = dice.other(COLOURS, background)
    return Claim(((shape, colour),), background=background), (colour_key(colour, shape, background),)


def _position(dice: Dice) -> tuple[Claim, tuple[str, ...]]:
    claim = _coloured_pair(dice)
    (first, _), (second, _) = claim.looks
    relation, background = dice.pick(RELATIONS), claim.background or ""
    keys = (position_key(relation, first, second, background),)
    return Claim(claim.looks, relation=relation, background=claim.background), keys


def _colour_binding(dice: Dice) -> tuple[Claim, tuple[str, ...]]:
    # Two different colours: with equal ones there would be nothing to mix up.
    claim = _coloured_pair(dice)
    (first, first_colour), (second, second_colour) = claim.looks
    return claim, (binding_key((first_colour or "", first), (second_colour or "", second)),)


def _coloured_pair(dice: Dice) -> Claim:
    background, first = dice.pick(COLOURS), dice.pick(SHAPES)
    first_colour = dice.other(COLOURS, background)
    second_colour = dice.pick([colour for colour in COLOURS if colour not in (background, first_colour)])
    return Claim(((first, first_colour), (dice.other(SHAPES, first), second_colour)), background=background)


_CLAIMS: Final[dict[str, Callable[[Dice], tuple[Claim, tuple[str, ...]]]]] = {
    "one object": _one_object,
    "two objects": _two_objects,
    "counting": _counting,
    "colours": _colours,
    "position": _position,
    "colour binding": _colour_binding,
}


def _faults(claim: Claim, detection: Detection) -> list[str]:
    """Return what is wrong with a picture, in words."""
    faults: list[str] = []
    if claim.background is not None and detection.background != claim.background:
        faults.append(f"background is {detection.background}, not {claim.background}")
    elif detection.background == UNKNOWN:
        faults.append("background is not plain")
    if detection.stray > MOST_STRAY:
        faults.append(f"stray marks cover {detection.stray:.1%} of the picture")
    looks = claim.looks * claim.number
    if len(detection.objects) != len(looks):
        return [*faults, f"number of objects is {len(detection.objects)}, not {len(looks)}"]
    order = _best_order(looks, detection.objects)
    for (shape, colour), found in zip(looks, order, strict=True):
        faults.extend(_look_faults(shape, colour, found))
    if claim.size is not None:
        faults.extend(_size_faults(claim.size, order[0].radius))
    if claim.relation is not None and not _is_placed(claim.relation, order[0], order[1]):
        faults.append(f"the {looks[0][0]} is not {claim.relation} of the {looks[1][0]}")
    return faults


def _best_order(looks: tuple[tuple[str, str | None], ...], found: tuple[Found, ...]) -> tuple[Found, ...]:
    """Return the objects in the order that meets the looks asked for with fewest faults."""
    if len(set(looks)) == 1:
        return found
    return min(
        permutations(found),
        key=lambda order: sum(len(_look_faults(*look, one)) for look, one in zip(looks, order, strict=True)),
    )


def _look_faults(shape: str, colour: str | None, found: Found) -> list[str]:
    faults = []
    if found.shape != shape:
        faults.append(f"an object is a {found.shape}, not a {shape} (best overlap {found.confidence:.2f})")
    if colour is not None and found.colour != colour:
        faults.append(f"the {shape} is {found.colour}, not {colour}")
    elif found.colour == UNKNOWN:
        faults.append(f"the {shape} is not of one colour")
    return faults


def _size_faults(size: str, radius: float) -> list[str]:
    nearest = min(RADII, key=lambda name: abs(math.log(radius / RADII[name])))
    if nearest == size and abs(radius / RADII[size] - 1.0) <= SIZE_TOLERANCE:
        return []
    return [f"radius is {radius:.2f} of the side, nearest to {nearest}; {size} is {RADII[size]:.2f}"]


def _is_placed(relation: str, first: Found, second: Found) -> bool:
    """Say whether the first lies as the relation says: along its axis more than across it, and clearly apart."""
    dx, dy = second.x - first.x, second.y - first.y
    along, across = (dx, dy) if relation in ("left", "right") else (dy, dx)
    if relation in ("right", "below"):
        along = -along
    return along >= LEAST_SPACING and along > abs(across)
