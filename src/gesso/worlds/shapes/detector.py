"""Reading of shapes pictures: from pixels back to background, objects, colours and places.

In here: `detect` and what it returns. Not in here: whether a prompt was met (`scoring.py`).

The way: the background is the palette colour of the picture's frame; what differs from it falls into connected
components; each component's colour is that of its inside, which must be of one colour; its coverage (how far each
pixel is from background to colour) is laid against the outline of every shape, placed and sized by area and centre
of mass. The best overlap names the shape if it is good enough, clearly better than the next, and has as many holes as
it should; otherwise the object is "unknown". Nothing is learned, so on drawn scenes the answer is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from gesso.worlds.shapes.components import label_components, thickened, thinned
from gesso.worlds.shapes.drawing import EXTENT, PALETTE, Field, Pixels, distance
from gesso.worlds.shapes.scenes import COLOURS, SHAPES

if TYPE_CHECKING:
    from PIL import Image

UNKNOWN: Final = "unknown"

MINIMUM_OVERLAP: Final = 0.80
"""Least overlap (intersection over union, soft at the edge) at which a component counts as a shape."""
MINIMUM_LEAD: Final = 0.05
"""Least distance in overlap to the second-best shape."""
COLOUR_TOLERANCE: Final = 60.0
"""Greatest distance in RGB (0..255) of a region's typical colour from its palette colour."""
BACKGROUND_CONTRAST: Final = 50.0
"""A pixel this far from the background in RGB is foreground; half of the least distance between two colours."""
FRAME_PURITY: Final = 0.90
"""Least share of the frame that must be of the background's colour."""
OBJECT_PURITY: Final = 0.90
"""Least share of an object's pixels that must be of its colour, or a mixture of that and the background."""
GREATEST_SPOT: Final = 0.001
"""Greatest share of the picture for solid spots of another colour inside an object, rims a few pixels wide aside."""
DEEP_COVER: Final = 0.75
"""Least coverage of an object's pixels away from its edge; paler ones are of another colour."""
LEAST_HOLE: Final = 0.0015
"""Share of the picture from which an enclosed gap in an object counts as a hole; the least ring's is 0.018."""
MINIMUM_AREA: Final = 0.003
"""Share of the picture below which a component is a stray mark and no object; the least object has about 0.03."""

_BOARD: Final = np.array([PALETTE[colour] for colour in COLOURS], dtype=np.float64)
_TABLE_HALF: Final = 300
_TABLE_REACH: Final = 1.5
_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Found:
    """An object read from a picture.

    `shape` and `colour` may be "unknown"; centre and radius are fractions of the side; `confidence` is the overlap
    (0..1) with the best shape, also where that was not good enough.
    """

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    confidence: float


@dataclass(frozen=True, slots=True)
class Detection:
    """What a picture holds: `background` may be "unknown"; `stray` is the share of pixels in marks too small to be
    objects. Objects are in reading order of their first pixel."""

    background: str
    objects: tuple[Found, ...]
    stray: float


def detect(image: Pixels | Image.Image) -> Detection:
    """Read a square picture (uint8 [side, side, 3] or a PIL image; side 16 or more).

    Raises ValueError for arrays of another shape or type.
    """
    pixels = _checked(image).astype(np.float64)
    background = _frame_colour(pixels)
    if background is None:
        return Detection(UNKNOWN, (), 0.0)
    contrast = np.sqrt(((pixels - _BOARD[background]) ** 2).sum(axis=-1))
    labels, count = label_components(contrast > BACKGROUND_CONTRAST)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    least = MINIMUM_AREA * labels.size
    found = tuple(_read(pixels, labels, label, background) for label in range(1, count + 1) if areas[label] >= least)
    stray = float(sum(area for area in areas[1:] if area < least)) / labels.size
    return Detection(COLOURS[background], found, stray)


def _checked(image: Pixels | Image.Image) -> Pixels:
    pixels = image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB"))
    shape = pixels.shape
    if pixels.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or shape[0] != shape[1] or shape[0] < 16:
        raise ValueError(f"picture is {pixels.dtype} {list(shape)}; it must be uint8 [side, side, 3], side 16 or more")
    return pixels


def _nearest(colours: Field) -> npt.NDArray[np.intp]:
    """Return the index of the nearest palette colour for colours [..., 3]."""
    return ((colours[..., None, :] - _BOARD) ** 2).sum(axis=-1).argmin(axis=-1)


def _named(colours: Field) -> int | None:
    """Return the palette colour of a region [N, 3] by its median, None where that is near to no colour."""
    typical = np.median(colours, axis=0)
    index = int(_nearest(typical))
    return index if math.dist(typical, _BOARD[index]) <= COLOUR_TOLERANCE else None


def _frame_colour(pixels: Field) -> int | None:
    """Return the colour of the picture's frame, None where the frame is not plain."""
    width = max(1, pixels.shape[0] // 64)
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[width:-width, width:-width] = False
    rim = pixels[frame]
    index = _named(rim)
    if index is None or (_nearest(rim) == index).mean() < FRAME_PURITY:
        return None
    return index


def _read(pixels: Field, labels: npt.NDArray[np.int32], label: int, background: int) -> Found:
    """Read one component."""
    rows, columns = np.nonzero(labels == label)
    side = labels.shape[0]
    top, left = max(0, int(rows.min()) - 3), max(0, int(columns.min()) - 3)
    window = slice(top, min(side, int(rows.max()) + 4)), slice(left, min(side, int(columns.max()) + 4))
    own = labels[window] == label
    colour = _inside_colour(pixels[window], own, background, side)
    cover = _cover(pixels[window], labels[window], own, background, colour)
    shape, radius, x, y, overlap = _best_shape(cover)
    if _holes(cover, LEAST_HOLE * side * side) != (1 if shape == "ring" else 0):
        shape = UNKNOWN
    return Found(
        shape=shape,
        colour=UNKNOWN if colour is None else COLOURS[colour],
        x=(left + x) / side,
        y=(top + y) / side,
        radius=radius / side,
        confidence=overlap,
    )


def _inside_colour(pixels: Field, own: _Mask, background: int, side: int) -> int | None:
    """Return the colour of a component, None where it is of several colours or near to none.

    The colour is that of its inside, peeled from the edge while a fifth of it is left. It is of one colour where
    nearly all its pixels are mixtures of that colour and the background, as soft edges are.
    """
    inside, least = own, 0.2 * own.sum()
    for _ in range(max(2, own.shape[0] // 8)):
        peeled = thinned(inside)
        if peeled.sum() < least:
            break
        inside = peeled
    colour = _named(pixels[inside])
    if colour is None or colour == background:
        return None
    share, spot = _foreign(pixels, own, background, colour, max(1, side // 64))
    return colour if share <= 1.0 - OBJECT_PURITY and spot <= GREATEST_SPOT * side * side else None


def _foreign(pixels: Field, own: _Mask, background: int, colour: int, rim: int) -> tuple[float, int]:
    """Return the share of a component's pixels that are of another colour, and how many of those make solid spots.

    Mixtures of colour and background, as soft edges are, belong to the colour, but not deep inside.
    """
    way = _BOARD[colour] - _BOARD[background]
    offsets = pixels - _BOARD[background]
    cover = np.clip(offsets @ way / (way @ way), 0.0, 1.0)
    foreign = own & (((offsets - cover[..., None] * way) ** 2).sum(axis=-1) > COLOUR_TOLERANCE**2)
    share = float(foreign.sum() / own.sum())
    deep = own
    for _ in range(2 * rim):
        deep = thinned(deep)
    spot = foreign | (deep & (cover < DEEP_COVER))
    # Colours may bleed along an edge, as in a JPEG; what is left after thinning is a spot.
    for _ in range(rim):
        spot = thinned(spot)
    return share, int(spot.sum())


def _cover(pixels: Field, labels: npt.NDArray[np.int32], own: _Mask, background: int, colour: int | None) -> Field:
    """Return how much of each pixel the component covers, 0..1, by its place between background and colour."""
    if colour is None:
        return own.astype(np.float64)
    way = _BOARD[colour] - _BOARD[background]
    cover = np.clip((pixels - _BOARD[background]) @ way / (way @ way), 0.0, 1.0)
    near = thickened(thickened(own)) & ((labels == 0) | own)
    return np.where(near, cover, 0.0)


def _holes(cover: Field, least: float) -> int:
    """Return how many gaps of at least `least` pixels the component encloses."""
    labels, count = label_components(cover < 0.5)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    open_air = {*labels[0].tolist(), *labels[-1].tolist(), *labels[:, 0].tolist(), *labels[:, -1].tolist()}
    return sum(areas[label] >= least for label in range(1, count + 1) if label not in open_air)


def _best_shape(cover: Field) -> tuple[str, float, float, float, float]:
    """Return shape (or "unknown"), radius, centre x and y in pixels of the window, and overlap."""
    area = float(cover.sum())
    columns = np.arange(cover.shape[1], dtype=np.float64) + 0.5
    rows = np.arange(cover.shape[0], dtype=np.float64) + 0.5
    mass_x, mass_y = float(cover.sum(axis=0) @ columns) / area, float(cover.sum(axis=1) @ rows) / area
    crisp = _crisp(cover)
    fits: list[tuple[float, str, float, float, float]] = []
    for shape in SHAPES:
        unit_area, unit_x, unit_y = _moments(shape)
        radius = math.sqrt(area / unit_area)
        x, y = mass_x - radius * unit_x, mass_y - radius * unit_y
        ideal = _crisp(_ideal(shape, radius, columns - x, rows - y))
        overlap = float(np.minimum(crisp, ideal).sum() / np.maximum(crisp, ideal).sum())
        fits.append((overlap, shape, radius, x, y))
    fits.sort(reverse=True)
    overlap, shape, radius, x, y = fits[0]
    if overlap < MINIMUM_OVERLAP or overlap - fits[1][0] < MINIMUM_LEAD:
        shape = UNKNOWN
    return shape, radius, x, y, overlap


def _crisp(cover: Field) -> Field:
    """Return coverage with edges twice as steep, so that softness of a decoder is not taken for a wrong outline."""
    return np.clip(2.0 * cover - 0.5, 0.0, 1.0)


def _ideal(shape: str, radius: float, x: Field, y: Field) -> Field:
    """Return a shape's coverage at columns `x` and rows `y` around its centre in pixels, from the table."""
    scale = _TABLE_HALF / (_TABLE_REACH * radius)
    columns, rows = (
        np.clip(np.rint(places * scale) + _TABLE_HALF, 0, 2 * _TABLE_HALF).astype(np.intp) for places in (x, y)
    )
    return np.clip(0.5 - _table(shape)[rows[:, None], columns[None, :]] * radius, 0.0, 1.0)


@cache
def _table(shape: str) -> Field:
    """Return a shape's signed distances on a fine square grid that reaches beyond its outline."""
    places = np.linspace(-_TABLE_REACH, _TABLE_REACH, 2 * _TABLE_HALF + 1)
    assert _TABLE_REACH > EXTENT
    return distance(shape, places[None, :], places[:, None])


@cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Return a shape's area and centre of mass (x, y) at radius 1."""
    step = _TABLE_REACH / _TABLE_HALF
    inside = np.clip(0.5 - _table(shape) / step, 0.0, 1.0)
    places = np.linspace(-_TABLE_REACH, _TABLE_REACH, 2 * _TABLE_HALF + 1)
    total = float(inside.sum())
    return total * step * step, float(inside.sum(axis=0) @ places) / total, float(inside.sum(axis=1) @ places) / total
