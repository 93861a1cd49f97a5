"""The picture that tells InfuseNet how a face is to be held: five key points on black; and fitting a pose picture.

Rounding and order are InfiniteYou's, to the pixel. Not here: finding the points (`detection`).
Shapes: H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gesso.identity.libraries import opencv

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
LIMBS = ((0, 2), (1, 2), (3, 2), (4, 2))  # each eye and corner of the mouth to the nose
_HALF_WIDTH = 4
_RADIUS = 10
DIMMED = 0.6
_FARTHEST = 1 << 20  # pixels; points beyond are no face's, and OpenCV's integers end


def draw_key_points(size: tuple[int, int], points_52: NDArray[np.float32] | Sequence[Sequence[float]]) -> Image.Image:
    """Limbs at six tenths of their colours, then discs in full, on black; `size` is width and height.

    Points outside of the picture are cut off at its edge. Raises ValueError for points that are not finite.
    """
    cv2 = opencv()
    points = np.asarray(points_52)  # in its own precision: int() decides about pixels
    if not np.isfinite(points).all() or np.abs(points).max(initial=0) > _FARTHEST:
        raise ValueError("key points are not finite")
    width, height = size
    drawn_HW3 = np.zeros((height, width, 3), dtype=np.uint8)
    for first, second in LIMBS:
        across, down = points[first] - points[second]
        middle = (points[first] + points[second]) / 2
        length = (across**2 + down**2) ** 0.5
        polygon = cv2.ellipse2Poly(
            (int(middle[0]), int(middle[1])),
            (int(length / 2), _HALF_WIDTH),
            int(math.degrees(math.atan2(down, across))),
            0,
            360,
            1,
        )
        cv2.fillConvexPoly(drawn_HW3, polygon, [int(value * DIMMED) for value in COLOURS[first]])
    for colour, (x, y) in zip(COLOURS, points, strict=True):
        cv2.circle(drawn_HW3, (int(x), int(y)), _RADIUS, colour, -1)
    return Image.fromarray(drawn_HW3)


def fit_to_size(image: Image.Image, width: int, height: int) -> Image.Image:
    """A pose picture on a white one of this size: as wide for portraits and squares, as high for landscapes.

    Scaled by Lanczos about its middle; what is too long is cut off, what is too short stays white.
    """
    if width <= height:
        across, down = width, int(width * (image.height / image.width))  # the quotient first: it decides rounding
    else:
        across, down = int(height * (image.width / image.height)), height
    across, down = max(1, across), max(1, down)
    fitted = Image.new("RGB", (width, height), "white")
    scaled = image.convert("RGB").resize((across, down), Image.Resampling.LANCZOS)
    fitted.paste(scaled, ((width - across) // 2, (height - down) // 2))
    return fitted
