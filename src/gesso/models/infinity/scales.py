"""The grids of a picture, coarse to fine: Infinity's published tables, and schedules of any other kind.

Said once, here: the quantizer, the transformer's rotary tables, the trainer and the sampler all read a `ScaleSchedule`.
Not here: what is done on a scale (see `quantizer`, `transformer`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

Grid = tuple[int, int]

# Height/width template -> the grids of its 13 scales, in latent cells of 16 pixels (paper, table of dynamic
# resolutions). Lower resolutions use a prefix; templates below 1 are these, transposed.
_UPRIGHT_GRIDS: dict[str, tuple[Grid, ...]] = {
    "1.000": (
        (1, 1), (2, 2), (4, 4), (6, 6), (8, 8), (12, 12), (16, 16), (20, 20), (24, 24), (32, 32), (40, 40), (48, 48),
        (64, 64),
    ),
    "1.250": (
        (1, 1), (2, 2), (3, 3), (5, 4), (10, 8), (15, 12), (20, 16), (25, 20), (30, 24), (35, 28), (45, 36), (55, 44),
        (70, 56),
    ),
    "1.333": (
        (1, 1), (2, 2), (4, 3), (8, 6), (12, 9), (16, 12), (20, 15), (24, 18), (28, 21), (36, 27), (48, 36), (60, 45),
        (72, 54),
    ),
    "1.500": (
        (1, 1), (2, 2), (3, 2), (6, 4), (9, 6), (15, 10), (21, 14), (27, 18), (33, 22), (39, 26), (48, 32), (63, 42),
        (78, 52),
    ),
    "1.750": (
        (1, 1), (2, 2), (3, 3), (7, 4), (11, 6), (14, 8), (21, 12), (28, 16), (35, 20), (42, 24), (56, 32), (70, 40),
        (84, 48),
    ),
    "2.000": (
        (1, 1), (2, 2), (4, 2), (6, 3), (10, 5), (16, 8), (22, 11), (30, 15), (38, 19), (46, 23), (60, 30), (74, 37),
        (90, 45),
    ),
    "2.500": (
        (1, 1), (2, 2), (5, 2), (10, 4), (15, 6), (20, 8), (25, 10), (30, 12), (40, 16), (50, 20), (65, 26), (80, 32),
        (100, 40),
    ),
    "3.000": (
        (1, 1), (2, 2), (6, 2), (9, 3), (15, 5), (21, 7), (27, 9), (36, 12), (45, 15), (54, 18), (72, 24), (90, 30),
        (111, 37),
    ),
}  # fmt: skip

# A template below 1 is named by its reciprocal cut (not rounded) to three digits: 1/1.5 -> "0.666".
TEMPLATES: dict[str, tuple[Grid, ...]] = {}
for _name, _grids in _UPRIGHT_GRIDS.items():
    TEMPLATES[_name] = _grids
    if _name != "1.000":
        TEMPLATES[f"{int(1000 / float(_name)) / 1000:.3f}"] = tuple((width, height) for height, width in _grids)

SCALES_BY_PIXELS: dict[str, int] = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
PIXELS_PER_CELL = 16


@dataclass(frozen=True)
class ScaleSchedule:
    """The grids of one picture, coarse to fine, in transformer tokens.

    `rotary_grid` is the grid that positions are measured on: the final grid at one megapixel of the same template,
    whatever resolution is made, so that a network moves between resolutions.
    """

    grids: tuple[Grid, ...]
    rotary_grid: Grid

    def __post_init__(self) -> None:
        if not self.grids or any(height < 1 or width < 1 for height, width in self.grids):
            raise ValueError(f"a schedule needs grids of at least one cell, got {self.grids}")

    def __len__(self) -> int:
        return len(self.grids)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Index of each scale's first token in the sequence of all scales; one more entry, the sequence's length."""
        starts = [0]
        for height, width in self.grids:
            starts.append(starts[-1] + height * width)
        return tuple(starts)

    @property
    def tokens(self) -> int:
        """Length of the sequence of all scales."""
        return self.starts[-1]

    @property
    def final_grid(self) -> Grid:
        return self.grids[-1]

    def latent_grids(self, patchify: bool) -> tuple[Grid, ...]:
        """Grids the tokenizer works on: twice as fine where a transformer token carries 2x2 latent cells."""
        factor = 2 if patchify else 1
        return tuple((factor * height, factor * width) for height, width in self.grids)


def schedule(template: str, pixels: str) -> ScaleSchedule:
    """The published schedule of a height/width template ("1.000", "0.666", …) at "0.06M", "0.25M", "0.60M" or "1M".

    Raises KeyError for a name that is not in `TEMPLATES` or `SCALES_BY_PIXELS`.
    """
    grids = TEMPLATES[template]
    return ScaleSchedule(grids[: SCALES_BY_PIXELS[pixels]], rotary_grid=grids[-1])


def nearest_template(height_over_width: float) -> str:
    """The template whose ratio is nearest; the first of two equally near wins."""
    return min(TEMPLATES, key=lambda name: abs(float(name) - height_over_width))


def schedule_of_grids(grids: Iterable[Grid]) -> ScaleSchedule:
    """The published schedule with these grids, or else a schedule of its own, measured on its own final grid."""
    wanted = tuple((int(height), int(width)) for height, width in grids)
    for full in TEMPLATES.values():
        if full[: len(wanted)] == wanted and len(wanted) in SCALES_BY_PIXELS.values():
            return ScaleSchedule(wanted, rotary_grid=full[-1])
    return ScaleSchedule(wanted, rotary_grid=wanted[-1])


def pixel_sizes() -> dict[tuple[int, int], ScaleSchedule]:
    """(height, width) in pixels -> schedule, for every template and resolution published."""
    sizes: dict[tuple[int, int], ScaleSchedule] = {}
    for pixels in SCALES_BY_PIXELS:
        for template in TEMPLATES:
            found = schedule(template, pixels)
            height, width = found.final_grid
            sizes[height * PIXELS_PER_CELL, width * PIXELS_PER_CELL] = found
    return sizes
