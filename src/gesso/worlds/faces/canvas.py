"""A picture that a face is painted on: outlines as signed distances, and colour laid where they are.

In here: ellipses, boxes, strokes and bands as distances, and `Canvas`, which lays a colour inside of one. Not in here:
what a face is made of (`drawing.py`, `hair.py`).

Distances are in half heights of the head, negative inside; those of ellipses are exact at the outline and near enough
around it. A pixel's coverage is 1/2 minus its centre's distance in pixels, cut to 0..1 and rounded, so that machines
whose square roots differ in the last bit still agree on every byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

Field = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]
Colour = tuple[float, float, float]
Outline = Callable[[Field, Field], Field]
"""Points x (right) and y (down) to signed distances."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom on the face."""

_LINE_SHADE: Final = 0.55


class Canvas:
    """A square picture in one colour, and the face's place in it."""

    def __init__(
        self, side: int, ground: Colour, middle: tuple[float, float], size: float, rotation: tuple[float, float]
    ) -> None:
        """`middle` and `size` are fractions of the side; `rotation` is cosine and sine of the head's tilt."""
        self._picture = np.empty((side, side, 3), dtype=np.float64)
        self._picture[...] = ground
        self._scale = size * side
        self._middle = (middle[0] * side, middle[1] * side)
        self._cosine, self._sine = rotation
        places = np.arange(side, dtype=np.float64) + 0.5
        across = ((places - self._middle[0]) / self._scale)[None, :]
        down = ((places - self._middle[1]) / self._scale)[:, None]
        self._x = across * self._cosine + down * self._sine
        self._y = down * self._cosine - across * self._sine

    def lay(self, outline: Outline, colour: Colour, box: Box, share: float = 1.0) -> None:
        """Lay a colour inside of an outline, which nowhere leaves the box (left, top, right, bottom).

        `share` is how much the colour hides of what lies under it.
        """
        rows, columns = self._window(box)
        if rows.start < rows.stop and columns.start < columns.stop:
            distance = outline(self._x[rows, columns], self._y[rows, columns])
            self._cover(self._picture[rows, columns], distance, colour, share)

    def lay_lined(self, outline: Outline, colour: Colour, half_width: float, box: Box) -> None:
        """Lay a colour with a darker line of it along the outline, half of which lies outside."""
        rows, columns = self._window(box)
        if rows.start < rows.stop and columns.start < columns.stop:
            distance = outline(self._x[rows, columns], self._y[rows, columns])
            under = self._picture[rows, columns]
            self._cover(under, distance - half_width, shade(colour, _LINE_SHADE))
            self._cover(under, distance + half_width, colour)

    def _cover(self, under: Field, distance: Field, colour: Colour, share: float = 1.0) -> None:
        cover = np.round(np.clip(0.5 - distance * self._scale, 0.0, 1.0) * share, 6)[..., None]
        under += cover * (np.array(colour) - under)

    def pixels(self) -> Pixels:
        """Return the picture, uint8 [side, side, 3]."""
        return np.rint(np.round(self._picture, 3)).astype(np.uint8)

    def _window(self, box: Box) -> tuple[slice, slice]:
        """Return the rows and columns of pixels that a box on the tilted face can reach."""
        left, top, right, bottom = box
        corners = [(x, y) for x in (left, right) for y in (top, bottom)]
        across = [self._middle[0] + self._scale * (x * self._cosine - y * self._sine) for x, y in corners]
        down = [self._middle[1] + self._scale * (x * self._sine + y * self._cosine) for x, y in corners]
        return _span(down, len(self._picture)), _span(across, len(self._picture))


def _span(places: Sequence[float], side: int) -> slice:
    first, last = math.floor(min(places)) - 2, math.ceil(max(places)) + 2
    return slice(max(0, min(side, first)), max(0, min(side, last)))


def ellipse(x: float, y: float, across: float, down: float) -> Outline:
    """Return an ellipse about (x, y) by its half axes."""

    def distance(px: Field, py: Field) -> Field:
        u, v = (px - x) / across, (py - y) / down
        near = np.sqrt(u * u + v * v)
        slope = np.sqrt((u / across) ** 2 + (v / down) ** 2)
        return np.where(slope > 1e-9, near * (near - 1.0) / np.maximum(slope, 1e-9), -min(across, down))

    return distance


def superellipse(x: float, y: float, across: float, down: float, squareness: float) -> Outline:
    """Return an ellipse that `squareness` 1 brings half way to its box; distances are about right near its edge."""

    def distance(px: Field, py: Field) -> Field:
        u, v = ((px - x) / across) ** 2, ((py - y) / down) ** 2
        round_ = np.sqrt(u + v)
        boxed = np.sqrt(np.sqrt(u * u + v * v))  # no other powers than squares: libraries differ in those
        return ((1 - squareness) * round_ + squareness * boxed - 1.0) * min(across, down)

    return distance


def box(x: float, y: float, across: float, down: float, corner: float) -> Outline:
    """Return a box about (x, y) by its half edges, with round corners."""

    def distance(px: Field, py: Field) -> Field:
        u, v = np.abs(px - x) - (across - corner), np.abs(py - y) - (down - corner)
        outside = np.sqrt(np.maximum(u, 0.0) ** 2 + np.maximum(v, 0.0) ** 2)
        return outside + np.minimum(np.maximum(u, v), 0.0) - corner

    return distance


def stroke(points: Sequence[tuple[float, float]], half_width: float) -> Outline:
    """Return a line along points, with round ends."""

    def distance(px: Field, py: Field) -> Field:
        nearest = np.full(px.shape, np.inf)
        for (ax, ay), (bx, by) in pairwise(points):
            ex, ey = bx - ax, by - ay
            along = np.clip(((px - ax) * ex + (py - ay) * ey) / max(ex * ex + ey * ey, 1e-9), 0.0, 1.0)
            nearest = np.minimum(nearest, (px - ax - along * ex) ** 2 + (py - ay - along * ey) ** 2)
        return np.sqrt(nearest) - half_width

    return distance


def spike(x: float, y: float, half_width: float, height: float, lean: float) -> Outline:
    """Return a spike that stands on (x, y) and leans to the right by `lean` of its height."""

    def distance(px: Field, py: Field) -> Field:
        up = y - py
        side = np.abs(px - x - lean * up) - half_width * (1.0 - up / height)
        return np.maximum(side * 0.9, -up - half_width)

    return distance


def below(level: float) -> Outline:
    """Return all that lies below a level line."""
    return lambda px, py: level - py


def above(level: float) -> Outline:
    """Return all that lies above a level line."""
    return lambda px, py: py - level


def both(*outlines: Outline) -> Outline:
    """Return what all outlines have in common."""
    return lambda px, py: np.maximum.reduce([outline(px, py) for outline in outlines])


def either(*outlines: Outline) -> Outline:
    """Return what any of the outlines holds."""
    return lambda px, py: np.minimum.reduce([outline(px, py) for outline in outlines])


def without(outline: Outline, *others: Outline) -> Outline:
    """Return an outline less others."""
    return lambda px, py: np.maximum.reduce([outline(px, py), *(-other(px, py) for other in others)])


def grown(outline: Outline, by: float) -> Outline:
    """Return an outline moved outwards."""
    return lambda px, py: outline(px, py) - by


def band(outline: Outline, half_width: float) -> Outline:
    """Return a line along an outline."""
    return lambda px, py: np.abs(outline(px, py)) - half_width


def shade(colour: Colour, factor: float) -> Colour:
    """Return a colour darkened by a factor below 1, or lightened towards white by one above."""
    if factor <= 1:
        return colour[0] * factor, colour[1] * factor, colour[2] * factor
    share = factor - 1
    return tuple(value + (255 - value) * share for value in colour)  # type: ignore[return-value]
