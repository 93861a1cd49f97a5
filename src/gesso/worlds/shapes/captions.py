"""Language of the shapes world: truthful captions in many phrasings, and the closed list of words they are made of.

In here: `Claim` (what a text states about a picture), `caption`, `stated`, `phrase`, `VOCABULARY` and `words`. Not in
here: scenes (`scenes.py`), held-out questions and judging (`scoring.py`).

A caption never says anything false, but it often says less than all: size, colours or background may be left out,
since people's prompts do so too. Of two things side by side it may name the left one first and say no more about where
they are; that one lies above the other is always said.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from gesso.worlds.dice import Dice
from gesso.worlds.shapes.scenes import COLOURS, OPPOSITE, SHAPES, Scene

NUMBER_WORDS: Final = {1: ("one", "1"), 2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
SIZE_WORDS: Final = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium",),
    "large": ("large", "large", "big", "huge"),
}
RELATION_PHRASES: Final = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under", "beneath"),
}

_LEADS: Final = (
    "a picture of ", "an image of ", "a drawing of ", "a photo of ", "draw ", "paint ",
)  # fmt: skip
_TAILS: Final = (
    " on a {} background", " on a {} background", " on a {} background", ", {} background", " on {}",
    " against a {} background", " in front of a {} background",
)  # fmt: skip
_OTHER_WORDS: Final = (
    "a", "an", "and", "with", "is", "are", "that", "there", "of", "on", "in", "at", "to", "the", "against", "front",
    "background", "picture", "image", "drawing", "photo", "draw", "paint", "single", "exactly", "pair", "group",
    "left", "right", "above", "over", "below", "under", "beneath", "top", "bottom",
)  # fmt: skip

# About as often as the six kinds of questions say these: what captions seldom leave open is not learned open.
_COLOURS_SHARE: Final = 0.60
_BACKGROUND_SHARE: Final = 0.89
_SIZE_SHARE: Final = 0.55
_ORDER_SHARE: Final = 0.70  # of pairs side by side


@dataclass(frozen=True, slots=True)
class Claim:
    """What a text states about a picture.

    `looks` is (shape, colour) of each object named, two for a pair and one otherwise; `number` is how many there are of
    each look (1 for a pair); None stands for what is left unsaid. `relation` is where the first lies, seen from the
    second; `by_order`, if the text says so only by naming the left one first.
    """

    looks: tuple[tuple[str, str | None], ...]
    number: int = 1
    size: str | None = None
    relation: str | None = None
    background: str | None = None
    by_order: bool = False


def caption(scene: Scene, seed: int) -> str:
    """Return a caption of the scene in lower case: what it leaves out and how it is phrased depend on the seed."""
    return stated(scene, seed)[1]


def stated(scene: Scene, seed: int) -> tuple[Claim, str]:
    """Return what the caption of this seed states of the scene, and the caption."""
    # The second number keeps these draws apart from those that made the scene of the same seed.
    dice = Dice(seed, 1)
    claim = _claim(scene, dice)
    return claim, phrase(claim, dice)


def phrase(claim: Claim, dice: Dice) -> str:
    """Return one of the many ways to say a claim, in lower case. Raises KeyError for words outside the world."""
    if len(claim.looks) == 2:
        subject = _pair_phrase(claim, dice)
    elif claim.number > 1:
        subject = _count_phrase(claim, dice)
    else:
        subject = _single_phrase(claim, dice)
    verb = "there are " if claim.number > 1 else "there is "
    return _framed(subject, verb, claim.background, dice)


def words(text: str) -> list[str]:
    """Split a prompt into words: lower case, punctuation dropped; words outside `VOCABULARY` are kept as they are."""
    return re.findall(r"[^\W_]+", text.lower())


def plural(shape: str) -> str:
    """Return the plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


def with_article(noun: str) -> str:
    """Return the noun phrase with "a" or "an" before it."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


VOCABULARY: Final[tuple[str, ...]] = tuple(
    dict.fromkeys(
        (
            *_OTHER_WORDS,
            *COLOURS,
            *SHAPES,
            *(plural(shape) for shape in SHAPES),
            *(word for group in SIZE_WORDS.values() for word in group),
            *(word for group in NUMBER_WORDS.values() for word in group),
        )
    )
)
"""Every word that captions and questions are made of, in an order that later versions may only append to."""


def _claim(scene: Scene, dice: Dice) -> Claim:
    """Return a true claim about a scene, some of it left out."""
    with_colours = dice.chance(_COLOURS_SHARE)
    background = scene.background if dice.chance(_BACKGROUND_SHARE) else None
    named = scene.objects if scene.kind == "pair" else scene.objects[:1]
    looks = tuple((thing.shape, thing.colour if with_colours else None) for thing in named)
    if scene.kind == "pair":
        by_order = dice.chance(_ORDER_SHARE) and scene.relation in ("left", "right")
        return Claim(looks, relation=scene.relation, background=background, by_order=by_order)
    if scene.kind == "count":
        return Claim(looks, number=len(scene.objects), background=background)
    return Claim(looks, size=scene.size if dice.chance(_SIZE_SHARE) else None, background=background)


def _framed(subject: str, verb: str, background: str | None, dice: Dice) -> str:
    """Return the subject with the background said before or after it, perhaps with a lead such as "a picture of"."""
    lot = dice.unit()
    if background is None:
        if lot < 0.20:
            return verb + subject
        return dice.pick(_LEADS) + subject if lot < 0.40 else subject
    if lot < 0.08:
        return f"{with_article(background)} background with {subject}"
    if lot < 0.16:
        return f"on {with_article(background)} background {dice.pick(('', verb))}{subject}"
    tail = dice.pick(_TAILS).replace("a {}", with_article(background)).replace("{}", background)
    if lot < 0.28:
        return verb + subject + tail
    return (dice.pick(_LEADS) if lot < 0.45 else "") + subject + tail


def _single_phrase(claim: Claim, dice: Dice) -> str:
    ((shape, colour),) = claim.looks
    size = dice.pick(SIZE_WORDS[claim.size]) if claim.size else None
    lot = dice.unit()
    if colour and lot < 0.12:
        return f"{with_article(_joined(size, shape))} that is {colour}"
    noun = _joined(size, colour, shape)
    if lot < 0.24:
        return f"{dice.pick(NUMBER_WORDS[1])} {noun}"
    return with_article(f"single {noun}") if lot < 0.28 else with_article(noun)


def _count_phrase(claim: Claim, dice: Dice) -> str:
    ((shape, colour),) = claim.looks
    number = dice.pick(NUMBER_WORDS[claim.number])
    lot = dice.unit()
    if colour and lot < 0.12:
        return f"{number} {plural(shape)} that are {colour}"
    noun = _joined(colour, plural(shape))
    if lot < 0.20:
        return f"exactly {number} {noun}"
    if lot < 0.28:
        return f"a pair of {noun}" if claim.number == 2 else f"a group of {number} {noun}"
    return f"{number} {noun}"


def _pair_phrase(claim: Claim, dice: Dice) -> str:
    (first, second), relation = claim.looks, claim.relation
    turned = dice.chance(0.5)
    if claim.by_order:
        turned = relation == "right"
    if turned:
        first, second = second, first
        relation = OPPOSITE[relation] if relation else None
    clause = dice.chance(0.08)
    one, two = (_pair_noun(shape, colour, clause=clause) for shape, colour in (first, second))
    if relation is None or claim.by_order:
        return f"{one} {dice.pick(('and', 'and', 'with'))} {two}"
    if dice.chance(0.15):
        here, there = _ends(relation)
        return f"{one} {here} and {two} {there}"
    return f"{one} {dice.pick(('', '', '', 'is '))}{dice.pick(RELATION_PHRASES[relation])} {two}"


def _pair_noun(shape: str, colour: str | None, *, clause: bool) -> str:
    if colour and clause:
        return f"{with_article(shape)} that is {colour}"
    return with_article(_joined(colour, shape))


def _ends(relation: str) -> tuple[str, str]:
    """Return where the two of a pair lie in the picture, as in "a ring at the top and a star at the bottom"."""
    ends = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}
    return ends[relation], ends[OPPOSITE[relation]]


def _joined(*parts: str | None) -> str:
    return " ".join(part for part in parts if part)
