"""A person's photograph to the face that counts in it and its vector; a pose picture to its key points. Both kept.

Here: which of several faces, what is too small, too blurred or not there, in words for the person who asked. What was
found is kept by the digest of the file, for the last pictures that were looked at. Not here: how a face is found
(`detection`), aligned (`alignment`) or drawn (`key_points`).
Shapes: H W pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gesso.errors import FileError
from gesso.identity import alignment
from gesso.identity.detection import Detections, FaceDetector
from gesso.identity.key_points import draw_key_points, fit_to_size
from gesso.metadata import file_digest
from gesso.pictures import check_file, read_pixels

_Value = TypeVar("_Value")

KEPT = 64
"""Pictures of which the face is remembered."""

_MOST_ENLARGED = 4.0  # times, to ArcFace's 112 pixels: a face of about 30 pixels
_MUCH_ENLARGED = 1.5
_LEAST_SHARP = 20.0
_NARROWEST = 16  # times as long as wide
_RETAKE = "use a photograph that shows one face from the front, sharp and large"


class Pose(NamedTuple):
    """Key points drawn for a picture of some size, with warnings about the picture that they are of."""

    picture: Image.Image
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Face:
    """The face that counts in a picture: its points `[5,2]` there, itself aligned `[112,112,3]` (blue, green, red)."""

    points_52: NDArray[np.float32]
    aligned_EE3: NDArray[np.uint8] = field(repr=False)
    warnings: tuple[str, ...] = ()


class _Kept:
    """A memory of the last `KEPT` things that were made, by key."""

    def __init__(self) -> None:
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        value = self._values.pop(key) if key in self._values else make()
        self._values[key] = value
        while len(self._values) > KEPT:
            self._values.popitem(last=False)
        return value

    def __len__(self) -> int:
        return len(self._values)


class FaceReader:
    """Photographs to faces and vectors, on the processor.

    `recogniser` makes the recognising network when the first vector is asked for: faces `[1,3,112,112]` to unit
    vectors `[1,512]`.
    """

    def __init__(self, detector: FaceDetector, recogniser: Callable[[], Callable[[Tensor], Tensor]]) -> None:
        self._detector, self._make_recogniser = detector, recogniser
        self._recogniser: Callable[[Tensor], Tensor] | None = None
        self._faces, self._vectors, self._poses = _Kept(), _Kept(), _Kept()

    def face(self, path: Path) -> Face:
        """The largest face of a photograph, with warnings about it.

        Raises FileError for what is no picture, shows no face, or one too small; MissingError without a detector.
        """
        found: Face = self._faces.get(_digest(path), lambda: self.face_of(read_pixels(path), path))
        return replace(found, warnings=tuple(f"{path}: {text}" for text in found.warnings))

    def face_of(self, image: Image.Image, source: Path | str) -> Face:
        """As `face`, of a picture in memory that a message calls `source`; its warnings do not name it."""
        image_HW3 = blue_first(image)
        faces = self._detector.find(image_HW3)
        if not len(faces):
            raise FileError(source, "shows no face that can be found", _RETAKE)
        points_52, width = faces.points_N52[faces.largest], _width(faces)
        try:
            matrix_23 = alignment.similarity(points_52)
        except ValueError as error:
            raise FileError(source, "shows no face that can be found", _RETAKE) from error
        enlarged = alignment.enlargement(matrix_23)
        if not np.isfinite(matrix_23).all() or enlarged > _MOST_ENLARGED:
            raise FileError(source, f"its face is only {width} pixels wide, too few to know it by", _RETAKE)
        aligned_EE3 = alignment.aligned(image_HW3, matrix_23)
        warnings = []
        if len(faces) > 1:
            warnings.append(_of_several(len(faces)))
        if enlarged > _MUCH_ENLARGED:
            warnings.append(f"its face is only {width} pixels wide, which costs likeness; {_RETAKE}")
        elif alignment.sharpness(aligned_EE3) < _LEAST_SHARP:
            warnings.append(f"its face looks blurred, which costs likeness; {_RETAKE}")
        return Face(points_52, aligned_EE3, tuple(warnings))

    def vector(self, path: Path) -> Tensor:
        """The unit vector `[512]`, float32, of the largest face. Raises as `face`, and as loading does."""
        return self._vectors.get(_digest(path), lambda: self._vector(self.face(path)))

    def vector_of(self, image: Image.Image, source: Path | str) -> Tensor:
        """As `vector`, of a picture in memory, which is not kept."""
        return self._vector(self.face_of(image, source))

    def _vector(self, face: Face) -> Tensor:
        if self._recogniser is None:
            self._recogniser = self._make_recogniser()
        with torch.inference_mode():
            return self._recogniser(alignment.face_input(face.aligned_EE3))[0]

    def pose(self, path: Path, width: int, height: int) -> Pose:
        """The key points of the largest face of a pose picture, once it is fitted to the size. Raises as `face`."""
        key = _digest(path), width, height
        points_52, count = self._poses.get(key, lambda: self._pose(path, width, height))
        warnings = (f"{path}: {_of_several(count)}",) if count > 1 else ()
        return Pose(draw_key_points((width, height), points_52), warnings)

    def _pose(self, path: Path, width: int, height: int) -> tuple[NDArray[np.float32], int]:
        """The points `[5,2]` of the largest face, and how many faces there are."""
        picture = read_pixels(path)
        if max(picture.size) > _NARROWEST * min(picture.size):
            raise FileError(path, f"is {picture.width}x{picture.height}, too narrow for a pose", "crop it")
        faces = self._detector.find(blue_first(fit_to_size(picture, width, height)))
        if not len(faces):
            again = "use one in which a face is large and from the front, or leave the pose out"
            raise FileError(path, f"shows no face that can be found once it is fitted to {width}x{height}", again)
        return faces.points_N52[faces.largest].copy(), len(faces)


def _digest(path: Path) -> str:
    check_file(path)  # first: reading what is no file might not end
    return file_digest(path)


def blue_first(image: Image.Image) -> NDArray[np.uint8]:
    """`[H,W,3]`, blue, green, red, as detectors and ArcFace read pictures."""
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])


def likeness(one_E: Tensor, other_E: Tensor) -> float:
    """Cosine of two faces' vectors: 1 for the same picture, about 0 for strangers, in between for one person."""
    return float(torch.nn.functional.cosine_similarity(one_E.double(), other_E.double(), dim=0))


def _of_several(count: int) -> str:
    return f"shows {count} faces; the largest is used, crop the picture to choose another"


def _width(faces: Detections) -> int:
    left, _, right, _ = faces.boxes_N4[faces.largest]
    return round(float(right - left))
