"""Drawing of the shapes world: scenes to pixels.

In here: the palette, the outline of each shape as a signed distance, coverage masks and `draw`. Not in here: what is
drawn (`scenes.py`) and reading pictures back (`detector.py`, which uses these same outlines).

Edges are anti-aliased by distance: a pixel's coverage is 1/2 minus the distance of its centre to the outline in
pixels, cut to 0..1. Since centres lie on a lattice and radii on a short list, every coloured patch is made once and
then only pasted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from gesso.worlds.shapes.scenes import SHAPES, Scene, Thing

Pixels = npt.NDArray[np.uint8]
Field = npt.NDArray[np.float64]

PALETTE: Final[dict[str, tuple[int, int, int]]] = {
    "red": (225, 20, 30),
    "green": (20, 165, 60),
    "blue": (15, 80, 240),
    "yellow": (255, 230, 0),
    "orange": (255, 128, 0),
    "purple": (150, 30, 180),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
"""Red, green and blue of each colour, 0..255; every two are at least 100 apart."""

EXTENT: Final = 1.1
"""No outline reaches further than this many radii from its centre along either axis."""

_ROUND: Final = 0.95
_RING_MIDDLE: Final = 0.70
_RING_HALF_WIDTH: Final = 0.25


def draw(scenes: Sequence[Scene], side: int = 64) -> Pixels:
    """Return the pictures of scenes, uint8 [N, side, side, 3], red green blue.

    Later objects cover earlier ones where they overlap (sampled scenes never do). Raises ValueError where `side` is
    less than 8.
    """
    if side < 8:
        raise ValueError(f"side is {side}; it must be 8 or more")
    pictures = np.empty((len(scenes), side, side, 3), dtype=np.uint8)
    for picture, scene in zip(pictures, scenes, strict=True):
        picture[...] = _ground(scene.background, side)
        apart = _are_apart(scene.objects, side)
        for thing in scene.objects:
            _paste(picture, thing, scene.background if apart else None)
    return pictures


def distance(shape: str, x: Field, y: Field) -> Field:
    """Return the signed distance to a shape's outline (negative inside), at points around its centre.

    `x` (right), `y` (down) and the result are in radii of the shape. Raises KeyError for an unknown shape.
    """
    if shape == "circle":
        return np.hypot(x, y) - _ROUND
    if shape == "ring":
        return np.abs(np.hypot(x, y) - _RING_MIDDLE) - _RING_HALF_WIDTH
    return _polygon_distance(_corners(shape), x, y)


def coverage(shape: str, radius: float, x: Field, y: Field) -> Field:
    """Return how much of each pixel a shape covers, 0..1, from the pixel centres' place around it, in pixels."""
    return np.clip(0.5 - distance(shape, x / radius, y / radius) * radius, 0.0, 1.0)


def _paste(picture: Pixels, thing: Thing, background: str | None) -> None:
    """Put an object into a picture; `background` is the plain colour all around it, None where that is not sure."""
    side = picture.shape[0]
    centre_x, centre_y = thing.x * side, thing.y * side
    left, top = math.floor(centre_x), math.floor(centre_y)
    key = (thing.shape, thing.radius * side, centre_x - left, centre_y - top)
    size = 2 * _half_window(thing.radius * side) + 1
    x0, y0 = left - size // 2, top - size // 2
    x1, y1 = x0 + size, y0 + size
    if background is not None and x0 >= 0 and y0 >= 0 and x1 <= side and y1 <= side:
        picture[y0:y1, x0:x1] = _patch(*key, thing.colour, background)
        return
    seen = _mask(*key)[max(0, -y0) : size - max(0, y1 - side), max(0, -x0) : size - max(0, x1 - side)]
    region = picture[max(0, y0) : max(0, min(side, y1)), max(0, x0) : max(0, min(side, x1))]
    if region.size:
        region[...] = _blend(region, seen, thing.colour)


def _are_apart(things: Sequence[Thing], side: int) -> bool:
    """Say whether the windows of all objects are disjoint, so that each lies on plain background."""
    for index, one in enumerate(things):
        for other in things[:index]:
            reach = _half_window(one.radius * side) + _half_window(other.radius * side) + 2
            if max(abs(one.x - other.x), abs(one.y - other.y)) * side < reach:
                return False
    return True


def _half_window(radius: float) -> int:
    """Return how many pixels the window of a shape reaches from the pixel of its centre."""
    return math.ceil(radius * EXTENT) + 1


def _blend(under: npt.NDArray[np.uint8], mask: Field, colour: str) -> Pixels:
    base = under.astype(np.float64)
    mixed = base + mask[..., None] * (np.array(PALETTE[colour], dtype=np.float64) - base)
    return np.rint(mixed).astype(np.uint8)


@lru_cache(maxsize=256)
def _ground(background: str, side: int) -> Pixels:
    return np.full((side, side, 3), PALETTE[background], dtype=np.uint8)


@lru_cache(maxsize=4096)
def _patch(shape: str, radius: float, shift_x: float, shift_y: float, colour: str, background: str) -> Pixels:
    mask = _mask(shape, radius, shift_x, shift_y)
    return _blend(np.full((*mask.shape, 3), PALETTE[background], dtype=np.uint8), mask, colour)


@lru_cache(maxsize=1024)
def _mask(shape: str, radius: float, shift_x: float, shift_y: float) -> Field:
    """Return the coverage of a shape in a square window around the pixel that its centre lies in."""
    half = _half_window(radius)
    places = np.arange(-half, half + 1, dtype=np.float64) + 0.5
    cover = coverage(shape, radius, (places - shift_x)[None, :], (places - shift_y)[:, None])
    # Rounded, so that machines whose square roots differ in the last bit still agree on every byte.
    return np.round(cover, 6)


@lru_cache(maxsize=len(SHAPES))
def _corners(shape: str) -> tuple[tuple[float, float], ...]:
    """Return the corners of a shape in radii, x right and y down, in order around it."""
    if shape == "square":
        return (-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)
    if shape == "diamond":
        return (0.0, -1.02), (0.76, 0.0), (0.0, 1.02), (-0.76, 0.0)
    if shape == "triangle":
        return (0.0, -0.95), (1.02, 0.82), (-1.02, 0.82)
    if shape == "cross":
        arm, reach = 0.34, 0.96
        quarter = ((arm, -reach), (arm, -arm), (reach, -arm))
        return tuple(_turned(corner, turns) for turns in range(4) for corner in quarter)
    if shape == "star":
        rays = ((math.pi * step / 5, 0.52 if step % 2 else 1.06) for step in range(10))
        return tuple((length * math.sin(angle), 0.05 - length * math.cos(angle)) for angle, length in rays)
    if shape == "heart":
        angles = (2 * math.pi * step / 60 for step in range(60))
        return tuple(_heart_point(angle) for angle in angles)
    raise KeyError(shape)


def _turned(corner: tuple[float, float], turns: int) -> tuple[float, float]:
    """Return a corner turned about the centre by quarter turns, exactly."""
    x, y = corner
    for _ in range(turns):
        x, y = -y, x
    return x, y


def _heart_point(angle: float) -> tuple[float, float]:
    """Return a point of the well-known heart curve x = 16 sin³t, scaled to about one radius."""
    height = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)
    return math.sin(angle) ** 3, -(height + 2.5) / 16


def _polygon_distance(corners: tuple[tuple[float, float], ...], x: Field, y: Field) -> Field:
    """Return the signed distance to a polygon: the nearest edge's distance, negative where the winding is odd."""
    nearest = np.full(np.broadcast(x, y).shape, np.inf)
    inside = np.zeros(nearest.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        nearest = np.minimum(nearest, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
        if ay != by:
            crossing = (ay > y) != (by > y)
            inside ^= crossing & (x < ax + (y - ay) * ex / ey)
    return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)
