"""Finding faces by SCRFD (arXiv:2105.04714), the detector of InsightFace's packs, with plain onnxruntime.

Here: the pack's file, a picture to the network's input, its outputs to boxes and five points, and the sizes that are
tried. Numbers are those of insightface 0.7.3, which InfiniteYou uses. Not here: which face counts and what is wrong
with it (`reader`), alignment.
Shapes: H W pixels, S edge of the network's square input, N candidates or faces. A box is (left, top, right, bottom);
points are left eye, right eye, nose, left and right corner of the mouth, as seen in the picture; all in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gesso.errors import FileError, MissingError
from gesso.identity.libraries import onnxruntime, opencv

SIZES = (640, 320, 160)
"""Edges of the input, tried in this order until there is a face: large faces are found at the small ones."""
THRESHOLD = 0.5
OVERLAP = 0.4

_DETECTORS = ("*scrfd*.onnx", "det_*.onnx")
_POINTS = 5
_FIRST_STRIDE = 8
_LARGEST_MODEL = 1 << 29  # bytes; SCRFD has 17 million
_MOST_CANDIDATES = 4096  # that overlap is looked at; the best come first

Floats = NDArray[np.floating[Any]]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Detections:
    """Faces, the surest first: boxes `[N,4]`, scores `[N]`, points `[N,5,2]`."""

    boxes_N4: Floats
    scores_N: Floats
    points_N52: Floats

    def __len__(self) -> int:
        return len(self.scores_N)

    @property
    def largest(self) -> int:
        """The face with the largest box; of equal ones the last, as in the reference."""
        sides_N2 = self.boxes_N4[:, 2:] - self.boxes_N4[:, :2]
        return int(np.argsort(sides_N2[:, 0] * sides_N2[:, 1], kind="stable")[-1])


def letterbox(image_HW3: Bytes, size: int) -> tuple[Bytes, float]:
    """The picture (blue, green, red) in the top left of a black square, and how much smaller it is there."""
    height, width = image_HW3.shape[:2]
    if height > width:
        inner_height, inner_width = size, max(1, int(size / (height / width)))
    else:
        inner_height, inner_width = max(1, int(size * (height / width))), size
    canvas_SS3 = np.zeros((size, size, 3), dtype=np.uint8)
    canvas_SS3[:inner_height, :inner_width] = opencv().resize(image_HW3, (inner_width, inner_height))
    return canvas_SS3, inner_height / height


def network_input(canvas_SS3: Bytes) -> Floats:
    """`[1,3,S,S]`: red, green, blue, about -1 to 1."""
    pixels_SS3 = (canvas_SS3[..., ::-1].astype(np.float32) - np.float32(127.5)) / np.float32(128)
    return pixels_SS3.transpose(2, 0, 1)[None].astype(np.float32, copy=False)


def faces_of(outputs: Sequence[NDArray[Any]], size: int, scale: float) -> Detections:
    """The network's outputs as faces of the picture: sure enough, and none much overlapped by a surer one.

    `outputs` are scores, boxes and points of every stride, 8, 16, …: scores of all first. A cell's anchors are at its
    top left corner; distances are in strides. Raises ValueError where they have other shapes.
    """
    levels = len(outputs) // 3
    if not levels or len(outputs) != 3 * levels:
        raise ValueError(f"{len(outputs)} outputs, not three for every stride")
    kept: list[tuple[Floats, Floats, Floats]] = []
    for level in range(levels):
        stride = _FIRST_STRIDE * 2**level
        scores_N = _rows(outputs[level], 1)[:, 0]
        boxes_N4, points_N10 = _rows(outputs[levels + level], 4), _rows(outputs[2 * levels + level], 2 * _POINTS)
        anchors_N2 = _anchors(size // stride, stride, len(scores_N))
        if not len(scores_N) == len(boxes_N4) == len(points_N10) == len(anchors_N2):
            raise ValueError(f"outputs of stride {stride} do not have one row an anchor")
        sure = np.flatnonzero(scores_N >= THRESHOLD)
        anchors_N2, ways_N4 = anchors_N2[sure], boxes_N4[sure] * stride
        corners_N4 = np.concatenate((anchors_N2 - ways_N4[:, :2], anchors_N2 + ways_N4[:, 2:]), axis=1)
        points_N52 = anchors_N2[:, None] + (points_N10[sure] * stride).reshape(-1, _POINTS, 2)
        kept.append((corners_N4, scores_N[sure], points_N52))
    boxes_N4, scores_N, points_N52 = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    order = scores_N.argsort()[::-1][:_MOST_CANDIDATES]
    shrunk = np.float32(scale)
    boxes_N4, scores_N, points_N52 = boxes_N4[order] / shrunk, scores_N[order], points_N52[order] / shrunk
    finite = np.isfinite(boxes_N4).all(axis=1) & np.isfinite(points_N52).all(axis=(1, 2))
    boxes_N4, scores_N, points_N52 = boxes_N4[finite], scores_N[finite], points_N52[finite]
    chosen = _without_overlap(boxes_N4)
    return Detections(boxes_N4[chosen], scores_N[chosen], points_N52[chosen])


def _rows(output: NDArray[Any], width: int) -> Floats:
    array = np.asarray(output, dtype=np.float32)
    if array.ndim == 0 or array.shape[-1] != width:
        raise ValueError(f"an output of shape {array.shape} where {width} numbers a row are wanted")
    return array.reshape(-1, width)


def _anchors(cells: int, stride: int, rows: int) -> Floats:
    """`[N,2]`, x and y: as many at every cell as there are rows for."""
    row_YX, column_YX = np.mgrid[:cells, :cells]
    grid_N2 = np.column_stack((column_YX.ravel(), row_YX.ravel())).astype(np.float32) * np.float32(stride)
    return np.repeat(grid_N2, max(1, rows // max(1, cells * cells)), axis=0)


def _without_overlap(boxes_N4: Floats) -> list[int]:
    """Which of the boxes, the surest first, stay: greedy, by intersection over union with edges counted as pixels."""
    left, top, right, bottom = boxes_N4.T
    areas = (right - left + 1) * (bottom - top + 1)
    rest, chosen = np.arange(len(boxes_N4)), []
    while len(rest):
        best, rest = rest[0], rest[1:]
        chosen.append(int(best))
        width = np.minimum(right[best], right[rest]) - np.maximum(left[best], left[rest]) + 1
        height = np.minimum(bottom[best], bottom[rest]) - np.maximum(top[best], top[rest]) + 1
        shared = np.maximum(0, width) * np.maximum(0, height)
        rest = rest[shared / (areas[best] + areas[rest] - shared) <= OVERLAP]
    return chosen


class FaceDetector:
    """The detector of a pack, on the processor; its file is read when the first picture is looked at."""

    def __init__(self, pack: Path) -> None:
        self.pack = pack
        self._session: Any = None

    def require(self) -> Path:
        """The detector's file. Raises MissingError that says where a pack comes from and what it may be used for."""
        for folder in (self.pack, self.pack / self.pack.name):  # the published archive unpacks one folder deeper
            for pattern in _DETECTORS:
                if found := sorted(folder.glob(pattern)):
                    return found[0]
        what = (
            f"a face detector (scrfd_10g_bnkps.onnx of InsightFace's pack antelopev2, in {self.pack}; its licence is "
            "for non-commercial research, so Gesso neither ships nor fetches it)"
        )
        archive = "https://github.com/deepinsight/insightface/releases/download/v0.7/antelopev2.zip"
        raise MissingError(what, f"curl -LO {archive} && unzip antelopev2.zip -d {self.pack.parent}")

    def find(self, image_HW3: Bytes) -> Detections:
        """Faces of a picture (blue, green, red), at the first size that has any; of none, there are none.

        Raises MissingError without a pack or onnxruntime, FileError for a damaged or foreign detector.
        """
        session = self._opened()
        given: Any = session.get_inputs()[0]
        fixed = given.shape[-1]
        found = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros((0, 5, 2), np.float32))
        for size in (fixed,) if isinstance(fixed, int) and fixed > 0 else SIZES:
            canvas_SS3, scale = letterbox(image_HW3, size)
            try:
                found = faces_of(session.run(None, {given.name: network_input(canvas_SS3)}), size, scale)
            except Exception as error:  # onnxruntime has an error of its own for each of its many states
                raise self._unusable(error) from error
            if len(found):
                break
        return found

    def _opened(self) -> Any:
        if self._session is None:
            path, library = self.require(), onnxruntime()
            options = library.SessionOptions()
            options.log_severity_level = 4  # what is fatal is raised
            try:
                if path.stat().st_size > _LARGEST_MODEL:
                    raise ValueError(f"{path.stat().st_size} bytes")
                # Its way of trying again would be told on standard output.
                self._session = library.InferenceSession(
                    str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
                )
            except Exception as error:  # as above, and OSError
                raise self._unusable(error) from error
        return self._session

    def _unusable(self, error: Exception) -> FileError:
        first = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        return FileError(self.require(), f"is damaged, or no SCRFD face detector ({first})", "unpack antelopev2 again")
