"""Faces turned and scaled to where ArcFace expects them. Not here: finding them (`detection`), ArcFace (`models`).

Shapes: a similarity is `[2,3]`, from pixels of the picture to those of the aligned face.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gesso.identity.libraries import opencv

EDGE = 112
_INNER = (slice(36, 104), slice(24, 88))  # rows and columns about the template's points
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    dtype=np.float32,
)
"""Where the five points belong (arXiv:1801.07698; insightface `face_align.arcface_dst`)."""


def similarity(points_52: NDArray[np.float32]) -> NDArray[np.float64]:
    """The rotation, scale and shift that brings the points nearest to the template, by least squares.

    Umeyama's closed form (IEEE TPAMI 13(4), 1991, equations 40 to 43), in float32 where scikit-image reckons so, whose
    numbers the network was used with. Raises ValueError for points that all are one.
    """
    points = points_52.astype(np.float32)
    middle, aim = points.mean(axis=0), TEMPLATE.mean(axis=0)
    variance = (points - middle).var(axis=0).sum()
    if not np.isfinite(variance) or variance < 1e-6:
        raise ValueError("the five points of the face are one")
    left, values, right = np.linalg.svd((TEMPLATE - aim).T @ (points - middle) / len(points))
    mirrored = np.linalg.det(left) * np.linalg.det(right) < 0
    signs = np.array([1.0, -1.0 if mirrored else 1.0])  # a mirror is no rotation
    turn, scale = left @ np.diag(signs) @ right, 1.0 / variance * (values @ signs)
    return np.column_stack((turn * scale, aim - scale * (turn @ middle)))


def enlargement(matrix_23: NDArray[np.float64]) -> float:
    """How many times larger the face is once it is aligned."""
    return float(np.hypot(matrix_23[0, 0], matrix_23[1, 0]))


def aligned(image_HW3: NDArray[np.uint8], matrix_23: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The face `[112,112,3]`, channels as they were; what lies outside of the picture is black.

    Bilinear, in the integers of OpenCV 4's `warpAffine`, to the bit: places in 1/1024, rounded to 1/32 of a pixel.
    OpenCV 5 reckons otherwise, by up to four grey levels.
    """
    (a, b, c), (d, e, f) = matrix_23.tolist()
    share = 1 / (a * e - b * d)
    across_x, across_y, down_x, down_y = e * share, -b * share, -d * share, a * share
    left, top = -across_x * c - across_y * f, -down_x * c - down_y * f
    steps_E = np.arange(EDGE, dtype=np.float64)

    def places(x: float, y: float, start: float) -> NDArray[np.int64]:
        rows_E1 = np.rint((y * steps_E + start) * 1024)[:, None] + 16
        return (rows_E1 + np.rint(x * steps_E * 1024)).astype(np.int64) >> 5

    x_EE, y_EE = places(across_x, across_y, left), places(down_x, down_y, top)
    right_EE1, lower_EE1 = (x_EE & 31)[..., None], (y_EE & 31)[..., None]
    x_EE, y_EE = x_EE >> 5, y_EE >> 5
    total_EE3 = (
        (32 - lower_EE1) * (32 - right_EE1) * _pixels(image_HW3, x_EE, y_EE)
        + (32 - lower_EE1) * right_EE1 * _pixels(image_HW3, x_EE + 1, y_EE)
        + lower_EE1 * (32 - right_EE1) * _pixels(image_HW3, x_EE, y_EE + 1)
        + lower_EE1 * right_EE1 * _pixels(image_HW3, x_EE + 1, y_EE + 1)
    )
    return ((total_EE3 + 512) >> 10).astype(np.uint8)


def _pixels(image_HW3: NDArray[np.uint8], x_EE: NDArray[np.int64], y_EE: NDArray[np.int64]) -> NDArray[np.int64]:
    height, width = image_HW3.shape[:2]
    inside_EE = (x_EE >= 0) & (x_EE < width) & (y_EE >= 0) & (y_EE < height)
    found_EE3 = image_HW3[y_EE.clip(0, height - 1), x_EE.clip(0, width - 1)].astype(np.int64)
    return found_EE3 * inside_EE[..., None]


def face_input(face_EE3: NDArray[np.uint8]) -> Tensor:
    """ArcFace's input `[1,3,112,112]`: -1 to 1, channels as they were (blue, green, red)."""
    return 2 * (torch.from_numpy(np.ascontiguousarray(face_EE3)).permute(2, 0, 1)[None] / 255.0) - 1


def sharpness(face_EE3: NDArray[np.uint8]) -> float:
    """Variance of the Laplacian of the aligned face's grey levels: some hundreds for a sharp photograph, a few for a
    blurred one.

    Of eyes to mouth only: farther out the picture may end, and that edge is sharp whatever it shows.
    """
    cv2 = opencv()
    inner = np.ascontiguousarray(face_EE3[_INNER])
    return float(cv2.Laplacian(cv2.cvtColor(inner, cv2.COLOR_BGR2GRAY), cv2.CV_64F).var())
