"""Language of the faces world: what a portrait shows besides who it is, and the closed list of words for that.

In here: `caption`, `full_caption`, `VOCABULARY`. Not in here: portraits (`portraits.py`).

A caption never says whose face it is: no word of it depends on the person. It never says anything false, and often
less than all.
"""

from __future__ import annotations

import re
from typing import Final

from gesso.worlds.dice import Dice
from gesso.worlds.faces.portraits import BACKGROUNDS, EXPRESSIONS, FACINGS, SHIRTS, Portrait

_SUBJECTS: Final = ("a person", "a person", "somebody", "a portrait of a person", "a picture of a person")
_EXPRESSION_WORDS: Final = {
    "calm": ("with a calm face", "looking calm"),
    "smiling": ("with a smiling face", "smiling", "with a smile"),
    "laughing": ("with a laughing face", "laughing"),
    "sad": ("with a sad face", "looking sad"),
    "surprised": ("with a surprised face", "looking surprised"),
    "angry": ("with an angry face", "looking angry"),
}
_FACING_WORDS: Final = {
    "left": ("facing left", "turned to the left"),
    "ahead": ("facing ahead", "seen from the front"),
    "right": ("facing right", "turned to the right"),
}
_EXPRESSION_SHARE: Final = 0.85
_SHIRT_SHARE: Final = 0.7
_BACKGROUND_SHARE: Final = 0.85
_FACING_SHARE: Final = 0.7


def caption(portrait: Portrait, seed: int) -> str:
    """Return a caption of the portrait in lower case: what it leaves out and how it is put depend on the seed."""
    # The second number keeps these draws apart from those that made the portrait of the same seed.
    dice = Dice(seed, 5)
    parts = [dice.pick(_SUBJECTS)]
    if dice.chance(_EXPRESSION_SHARE):
        parts.append(dice.pick(_EXPRESSION_WORDS[portrait.expression]))
    if dice.chance(_SHIRT_SHARE):
        parts.append(f"{dice.pick(('in', 'wearing'))} {_article(portrait.shirt)} shirt")
    if dice.chance(_BACKGROUND_SHARE):
        parts.append(f"{dice.pick(('on', 'before'))} {_article(portrait.background)} background")
    text = " ".join(parts)
    return f"{text}, {dice.pick(_FACING_WORDS[portrait.facing])}" if dice.chance(_FACING_SHARE) else text


def full_caption(portrait: Portrait) -> str:
    """Return the plainest caption that leaves nothing out but who it is."""
    expression = _EXPRESSION_WORDS[portrait.expression][0]
    shirt, ground = _article(portrait.shirt), _article(portrait.background)
    return f"a person {expression} in {shirt} shirt on {ground} background, {_FACING_WORDS[portrait.facing][0]}"


def _article(colour: str) -> str:
    return ("an " if colour[0] in "aeiou" else "a ") + colour


def _words(*texts: str) -> list[str]:
    return [word for text in texts for word in re.findall(r"[^\W_]+", text)]


VOCABULARY: Final[tuple[str, ...]] = tuple(
    dict.fromkeys(
        _words(
            *_SUBJECTS,
            *(text for texts in _EXPRESSION_WORDS.values() for text in texts),
            *(text for texts in _FACING_WORDS.values() for text in texts),
            *EXPRESSIONS,
            *FACINGS,
            *BACKGROUNDS,
            *SHIRTS,
            "an in wearing shirt on before background",
        )
    )
)
"""Every word that captions are made of, in an order that later versions may only append to."""
