"""Hair of the faces world: by style, what falls behind the head and what lies on it.

In here: outlines. Not in here: colours, and the order in which a face is painted (`drawing.py`).
Lengths are in half heights of the head; `w` is half its width, `t` how far the hair's parts move as the head turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gesso.worlds.faces.canvas import (
    Outline,
    above,
    below,
    both,
    box,
    either,
    ellipse,
    spike,
    stroke,
    superellipse,
    without,
)

BOX: Final = (-1.75, -1.75, 1.75, 1.75)
"""No hair reaches further."""


def back(style: str, w: float, t: float) -> Outline | None:
    """Return what is seen of the hair behind the head, None where there is nothing."""
    if style == "long":
        return either(ellipse(0, -0.25, w + 0.30, 0.98), box(0, 0.45, w + 0.30, 0.95, 0.30))
    if style == "bob":
        return either(ellipse(0, -0.25, w + 0.26, 0.95), box(0, 0.18, w + 0.34, 0.58, 0.26))
    if style == "curly":
        return either(
            ellipse(-w - 0.12, -0.05, 0.36, 0.36),
            ellipse(w + 0.12, -0.05, 0.36, 0.36),
            ellipse(-w + 0.02, -0.55, 0.40, 0.40),
            ellipse(w - 0.02, -0.55, 0.40, 0.40),
            ellipse(-0.42, -0.95, 0.38, 0.36),
            ellipse(0.42, -0.95, 0.38, 0.36),
            ellipse(0, -1.08, 0.40, 0.34),
        )
    if style == "pigtails":
        return either(
            ellipse(-w - 0.30, 0.30, 0.27, 0.50),
            ellipse(w + 0.30, 0.30, 0.27, 0.50),
            ellipse(-w - 0.18, -0.18, 0.18, 0.18),
            ellipse(w + 0.18, -0.18, 0.18, 0.18),
        )
    if style == "bun":
        return ellipse(-0.12 * t, -1.22, 0.36, 0.32)
    return None


def front(style: str, w: float, t: float) -> Outline | None:
    """Return the hair that lies on the head, None for a bald one. Raises KeyError for an unknown style."""
    if style == "bald":
        return None
    if style == "mohawk":
        crest = both(box(0.12 * t, -0.90, 0.25, 0.46, 0.18), above(-0.48))
        return either(crest, *(spike(0.12 * t + x, -1.18, 0.14, 0.36, 0.25) for x in (-0.15, 0.0, 0.15)))
    cap = superellipse(0, -0.16, w + 0.09, 0.96, 0.25)
    if style == "spiky":
        cap = either(cap, *_spikes(w))
    if style == "curly":
        locks = (ellipse(-0.42, -0.72, 0.34, 0.24), ellipse(0.42, -0.72, 0.34, 0.24), ellipse(0, -0.76, 0.36, 0.24))
        cap = either(cap, *locks)
    return without(cap, *_BARE[style](w, t))


def _long(w: float, t: float) -> tuple[Outline, ...]:
    across = 0.54 * w + 0.08
    halves = (ellipse(sign * 0.40 + 0.12 * t, 0.34, across, 0.88) for sign in (-1, 1))
    return *halves, below(0.45)


def _parted(w: float, t: float) -> tuple[Outline, ...]:
    swept = (ellipse(0.42 + 0.12 * t, 0.22, w + 0.06, 0.86), ellipse(-w + 0.18 + 0.12 * t, 0.10, 0.40, 0.52))
    return *swept, below(0.10)


def _forehead(w: float, t: float) -> Outline:
    return ellipse(0.12 * t, 0.28, w - 0.02, 0.92)


def _parting(t: float) -> Outline:
    return stroke(((0.10 * t, -1.3), (0.12 * t, -0.5)), 0.03)


# By style, what a cap of hair leaves bare.
_BARE: Final[dict[str, Callable[[float, float], tuple[Outline, ...]]]] = {
    "short": lambda w, t: (superellipse(0.12 * t, 0.22, w - 0.02, 0.78, 0.5), below(0.05)),
    "parted": _parted,
    "spiky": lambda w, t: (superellipse(0.12 * t, 0.24, w - 0.02, 0.76, 0.5), below(0.0)),
    "fringe": lambda w, t: (box(0.08 * t, 0.42, w - 0.08, 0.74, 0.10), below(0.30)),
    "bob": lambda w, t: (box(0.08 * t, 0.42, w - 0.10, 0.70, 0.16), below(0.50)),
    "long": _long,
    "curly": lambda w, t: (superellipse(0.12 * t, 0.26, w - 0.08, 0.78, 0.1), below(0.0)),
    "bun": lambda w, t: (_forehead(w, t), below(0.0)),
    "pigtails": lambda w, t: (_forehead(w, t), _parting(t), below(0.05)),
}


def _spikes(w: float) -> list[Outline]:
    """Return spikes that stand up from a head, in order from left to right."""
    places = ((-0.85, 0.45), (-0.45, 0.75), (0.0, 0.85), (0.45, 0.75), (0.85, 0.45))
    return [spike(w * x, -0.55 - 0.25 * (1 - x * x), 0.26, height, 0.25 + 0.35 * x) for x, height in places]
