"""How close a picture is to another of the same size: PSNR, SSIM, and the relative error of latents.

Not here: which pictures are compared (`evaluation/caches`).
Shapes: C channels, H W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SAME_PSNR = 100.0
"""Decibels that equal pictures are given, in place of infinity, so that means and files can hold it."""

_WINDOW, _SIGMA = 11, 1.5


def psnr(picture: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio in decibels, of pixels from 0 to 255."""
    error = float((pixels(picture) - pixels(other)).square().mean())
    return min(SAME_PSNR, 10 * math.log10(255**2 / error)) if error else SAME_PSNR


def ssim(picture: Image.Image, other: Image.Image) -> float:
    """Structural similarity, 1 for equal pictures: mean over pixels and channels (Wang et al., 2004).

    The window is Gaussian, 11 pixels wide with sigma 1.5, as there, and lies inside the picture; smaller pictures take
    a smaller one.
    """
    x_C1HW, y_C1HW = pixels(picture)[:, None], pixels(other)[:, None]
    size = min(_WINDOW, *x_C1HW.shape[-2:])
    steps = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-(steps**2) / (2 * _SIGMA**2))
    kernel_11kk = (line[:, None] * line / line.sum() ** 2)[None, None]

    def blurred(tensor: Tensor) -> Tensor:
        return F.conv2d(tensor, kernel_11kk)

    mean_x, mean_y = blurred(x_C1HW), blurred(y_C1HW)
    variance_x = blurred(x_C1HW**2) - mean_x**2
    variance_y = blurred(y_C1HW**2) - mean_y**2
    both = blurred(x_C1HW * y_C1HW) - mean_x * mean_y
    small, smaller = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + small) * (2 * both + smaller)
    similarity /= (mean_x**2 + mean_y**2 + small) * (variance_x + variance_y + smaller)
    return float(similarity.mean())


def relative_error(latent: Tensor, other: Tensor) -> float:
    """Root mean square of the difference over that of `other`."""
    other = other.double()
    return float((latent.double() - other).norm() / other.norm().clamp_min(1e-12))


def pixels(picture: Image.Image) -> Tensor:
    """`[C,H,W]`, 0 to 255."""
    data = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return data.view(picture.height, picture.width, 3).permute(2, 0, 1).double()
