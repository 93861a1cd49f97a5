"""What a safety checker is asked and what it answers, and the modes by strictness. Nothing heavy is imported.

Not here: checkers themselves, and what is done with an answer (`engine/safety`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

Mode = Literal["off", "blur", "reject"]

MODES: tuple[Mode, ...] = ("off", "blur", "reject")
"""What may become of a flagged picture, from lenient to strict: "off" looks at none."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A checker's answer for one picture.

    Attributes:
        flagged: whether it counts as unsafe.
        score: how unsafe it looks. Its scale is the checker's own; the larger, the less safe.
        reason: what it was flagged for, in the checker's words ("concept 3", "nsfw"); "" if it was not.
    """

    flagged: bool
    score: float
    reason: str = ""


class Checker(Protocol):
    """Looks at finished pictures.

    `network` is what has to lie on the device that it was made for when `check` is called; its owner may move it away
    in between.
    """

    network: nn.Module

    def check(self, pictures: Sequence[Image]) -> list[Decision]:
        """One decision a picture, in order. Pictures are RGB, of any size.

        Raises:
            RunError: the network's answer is no number; nothing is known of these pictures then.
        """
        ...


def stricter(one: Mode, other: Mode) -> Mode:
    """The one of two modes that lets less be seen.

    Example:
        >>> stricter("reject", "blur")
        'reject'
    """
    return one if MODES.index(one) > MODES.index(other) else other
