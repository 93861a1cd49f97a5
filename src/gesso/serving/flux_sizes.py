"""Sizes of FLUX-compatible SDXL predictors: an aspect ratio and an amount of megapixels to width and height.

A table has the sizes at one megapixel, which the models were trained at; others scale them and keep the ratio.
Not here: what a model allows.
"""

from __future__ import annotations

import math
from typing import Literal

AspectRatio = Literal["1:1", "2:3", "3:2", "4:3", "3:4", "4:5", "5:4", "16:9", "9:16", "21:9", "9:21"]
Megapixels = Literal["0.25", "0.5", "1", "2"]

# Width and height at one megapixel.
_AT_ONE: dict[AspectRatio, tuple[int, int]] = {
    "1:1": (1024, 1024),
    "2:3": (832, 1248),
    "3:2": (1248, 832),
    "4:3": (1152, 896),
    "3:4": (896, 1152),
    "4:5": (896, 1120),
    "5:4": (1120, 896),
    "16:9": (1344, 768),
    "9:16": (768, 1344),
    "21:9": (1536, 640),
    "9:21": (640, 1536),
}
_SQUARES: dict[Megapixels, int] = {"0.25": 512, "0.5": 704, "2": 1408}  # edges of squares with about so many pixels
_MULTIPLE = 8


def size_of(ratio: AspectRatio, megapixels: Megapixels) -> tuple[int, int]:
    """Width and height in pixels, multiples of 8, rounded up.

    Example:
        >>> size_of("16:9", "1"), size_of("16:9", "0.25")
        ((1344, 768), (680, 392))
    """
    width, height = _AT_ONE[ratio]
    if megapixels == "1":
        return width, height
    scale = _SQUARES[megapixels] / math.sqrt(width * height)
    return _rounded(width * scale), _rounded(height * scale)


def _rounded(edge: float) -> int:
    # Whole pixels first, as predictors do: 1064.3 is 1064, and not the next multiple.
    return math.ceil(int(edge) / _MULTIPLE) * _MULTIPLE
