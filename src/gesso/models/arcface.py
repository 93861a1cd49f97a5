"""ArcFace IR-SE50: an aligned face to a vector that says whose face it is, in the layout of its published weights.

A residual network of 24 units with squeeze-and-excitation, trained with an angular margin (arXiv:1801.07698;
arXiv:1709.01507 for the excitation); the layout is facexlib's `recognition_arcface_ir_se50.pth`.
Not here: finding and aligning the face (`identity`), reading files (`weights/infinite_you`).
Shapes: B faces, C channels, h w cells of a feature map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

EDGE = 112
"""Pixels along the edge of the aligned face."""
EMBEDDING = 512
"""Numbers of a face's vector."""

_FIRST = 64
_STAGES = ((64, 3), (128, 4), (256, 14), (512, 3))  # channels, units; each stage halves the sides
_REDUCTION = 16
_HALVINGS = 4


class Excitation(nn.Module):
    """Every channel scaled by what all channels say on average."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // _REDUCTION, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // _REDUCTION, channels, 1, bias=False)

    def forward(self, x_BChw: Tensor) -> Tensor:
        mean_BC11 = x_BChw.mean(dim=(2, 3), keepdim=True)
        return x_BChw * torch.sigmoid(self.fc2(torch.relu(self.fc1(mean_BC11))))


class Unit(nn.Module):
    """Two convolutions and an excitation beside a shortcut; the second convolution strides."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if inputs != channels:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, channels, 3, 1, 1, bias=False),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            Excitation(channels),
        )

    def forward(self, x_BChw: Tensor) -> Tensor:
        return self.res_layer(x_BChw) + self.shortcut_layer(x_BChw)


class ArcFace(nn.Module):
    """Aligned faces `[B,3,112,112]` in [-1,1], channels in the order blue, green, red, to unit vectors `[B,512]`."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, _FIRST, 3, 1, 1, bias=False), nn.BatchNorm2d(_FIRST), nn.PReLU(_FIRST)
        )
        units, inputs = [], _FIRST
        for channels, count in _STAGES:
            for unit in range(count):
                units.append(Unit(inputs, channels, 2 if unit == 0 else 1))
                inputs = channels
        self.body = nn.Sequential(*units)
        cells = (EDGE // 2**_HALVINGS) ** 2
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Dropout(),  # holds the place of the one it was trained with: names count on
            nn.Flatten(),
            nn.Linear(inputs * cells, EMBEDDING),
            nn.BatchNorm1d(EMBEDDING),
        )

    def forward(self, face_B3HW: Tensor) -> Tensor:
        return functional.normalize(self.output_layer(self.body(self.input_layer(face_B3HW))), dim=1)
