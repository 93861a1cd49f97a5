"""Portraits of the faces world to vectors and key points, by one small recogniser: what `reader` is for photographs.

A portrait is one face that fills the picture, so nothing is detected or aligned: a picture is cut to a square about
its middle and brought to the recogniser's size. It cannot say that a picture shows no face. Not here: the network
(`models/face_recogniser`).
Shapes: V numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from gesso.identity.key_points import COLOURS, DIMMED, LIMBS
from gesso.identity.reader import Face, Pose
from gesso.models.face_recogniser import FaceRecogniser
from gesso.pictures import check_file, read_pixels

_RADIUS = 0.03  # of the side


class NanoFaceReader:
    """Faces for `InfiniteYou`, of the faces world. `load` makes the recogniser when the first face is read."""

    def __init__(self, load: Callable[[], FaceRecogniser]) -> None:
        self._load = load

    @cached_property
    def _recogniser(self) -> FaceRecogniser:
        return self._load()

    def face(self, path: Path) -> Face:
        """The face of a portrait. Raises FileError for what is no picture."""
        check_file(path)
        picture = read_pixels(path)
        points_52 = self._read(picture)[1] * min(picture.size)
        points_52 += [(edge - min(picture.size)) / 2 for edge in picture.size]
        aligned_EE3 = np.asarray(self._square(picture))[..., ::-1]
        return Face(points_52.astype(np.float32), aligned_EE3, _warnings(path, picture))

    def vector(self, path: Path) -> Tensor:
        """The unit vector `[V]` of a portrait. Raises FileError."""
        check_file(path)
        return self._read(read_pixels(path))[0]

    def vector_of(self, image: Image.Image, source: Path | str) -> Tensor:
        """As `vector`, of a picture in memory."""
        return self._read(image)[0]

    def pose(self, path: Path, width: int, height: int) -> Pose:
        """The key points of a pose picture, in the square in the middle of a picture of this size. Raises FileError."""
        check_file(path)
        picture = read_pixels(path)
        return Pose(draw_points((width, height), self._read(picture)[1]), _warnings(path, picture))

    def _square(self, image: Image.Image) -> Image.Image:
        edge, side = min(image.size), self._recogniser.config.side
        left, top = (image.width - edge) / 2, (image.height - edge) / 2
        box = (left, top, left + edge, top + edge)
        return image.convert("RGB").resize((side, side), Image.Resampling.BOX, box=box)

    @torch.inference_mode()
    def _read(self, image: Image.Image) -> tuple[Tensor, NDArray[np.float64]]:
        pixels_1HW3 = torch.from_numpy(np.array(self._square(image)))[None]
        vector_1V, points_152 = self._recogniser.vectors_and_points(pixels_1HW3.movedim(-1, 1).float() / 127.5 - 1)
        return vector_1V[0], points_152[0].double().numpy()


def _warnings(path: Path, picture: Image.Image) -> tuple[str, ...]:
    if picture.width == picture.height:
        return ()
    return (f"{path}: is {picture.width}x{picture.height}; the square in its middle is used",)


def draw_points(size: tuple[int, int], points_52: NDArray[np.float64] | Sequence[Sequence[float]]) -> Image.Image:
    """Limbs at six tenths of their colours, then discs in full, on black; points are fractions of the middle's square.

    As `key_points.draw_key_points`, in proportion to the picture and not in pixels, for pictures of 64.
    """
    side = min(size)
    left, top = ((edge - side) / 2 for edge in size)
    points = [(left + float(x) * side, top + float(y) * side) for x, y in np.asarray(points_52)]
    radius = max(1.0, _RADIUS * side)
    picture = Image.new("RGB", size)
    pencil = ImageDraw.Draw(picture)
    for first, second in LIMBS:
        dimmed = tuple(int(value * DIMMED) for value in COLOURS[first])
        pencil.line((*points[first], *points[second]), fill=dimmed, width=max(1, round(radius)))
    for colour, (x, y) in zip(COLOURS, points, strict=True):
        pencil.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return picture
