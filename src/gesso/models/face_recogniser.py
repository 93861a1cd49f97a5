"""A nano recogniser of the faces world: a picture to a unit vector that says whose face it is, and to key points.

A small residual network without batch statistics, so that one picture alone gives what it gives in company; a linear
layer makes the vector of the last feature map, so that place counts, another one the key points. What ArcFace is to
photographs (`arcface`). Not here: its training (`training/face_recogniser`), files (`weights/face_recogniser`).
Shapes: B pictures, C channels, h w cells, V numbers of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POINTS = 5
"""Left and right eye, tip of the nose, left and right corner of the mouth, as seen."""
_GROUPS = 4


@dataclass(frozen=True, kw_only=True)
class FaceRecogniserConfig:
    """Each of `widths` halves the sides once; `side` pixels come in, `vector` numbers go out."""

    side: int = 64
    widths: tuple[int, ...] = (16, 32, 64, 64)
    vector: int = 64

    def __post_init__(self) -> None:
        if not self.widths or any(width < _GROUPS or width % _GROUPS for width in self.widths):
            raise ValueError(f"widths must be multiples of {_GROUPS}, one at least")
        if self.side < 2 ** len(self.widths) or self.side % 2 ** len(self.widths):
            raise ValueError(f"side must be a multiple of {2 ** len(self.widths)}")
        if self.vector < 1:
            raise ValueError("vector must be at least 1")


class _Stage(nn.Module):
    """A strided convolution, then one beside a shortcut."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(inputs, channels, 3, 2, 1)
        self.norm1 = nn.GroupNorm(_GROUPS, channels)
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)
        self.norm2 = nn.GroupNorm(_GROUPS, channels)

    def forward(self, x_BChw: Tensor) -> Tensor:
        x_BChw = F.silu(self.norm1(self.down(x_BChw)))
        return x_BChw + F.silu(self.norm2(self.conv(x_BChw)))


class FaceRecogniser(nn.Module):
    """Pictures `[B,3,side,side]` in [-1,1], red, green, blue, to unit vectors `[B,V]`."""

    def __init__(self, config: FaceRecogniserConfig) -> None:
        super().__init__()
        self.config = config
        inputs = (3, *config.widths)
        self.stages = nn.Sequential(*(_Stage(*pair) for pair in zip(inputs, config.widths, strict=False)))
        features = config.widths[-1] * (config.side // 2 ** len(config.widths)) ** 2
        self.to_vector = nn.Linear(features, config.vector)
        self.to_points = nn.Linear(features, 2 * POINTS)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        return self.vectors_and_points(image_B3HW)[0]

    def vectors_and_points(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors `[B,V]`, and key points `[B,5,2]`: x (right) and y (down) as fractions of the side."""
        features = self.stages(image_B3HW).flatten(1)
        vector_BV = F.normalize(self.to_vector(features).float(), dim=1)
        return vector_BV, 0.5 + self.to_points(features).float().unflatten(1, (POINTS, 2)) / 2


def build(config: FaceRecogniserConfig) -> FaceRecogniser:
    """The network with fresh weights; every picture's points begin in the middle."""
    network = FaceRecogniser(config)
    with torch.no_grad():
        nn.init.zeros_(network.to_points.weight)
        nn.init.zeros_(network.to_points.bias)
    return network
