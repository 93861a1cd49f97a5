"""A cheap look at latents: one linear map from a cell's channels to a colour, fitted to the autoencoder at hand.

Here: the map, and the synthetic pictures it is fitted to. It costs one small matrix product a preview where a decoder
would cost as much as a step. Not here: which latents are shown (a pipeline's `preview` estimates the clean ones).
Shapes: B pictures, C latent channels, h w latent cells, S pixels along a synthetic picture's edge, n cells in all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Encode = Callable[[Tensor], Tensor]

_EDGE = 64  # S
_AT_ONCE = 8  # pictures encoded together: little memory beside a decoder's
_RIDGE = 1e-4  # keeps coefficients small where the pictures leave a direction of the latents untouched
_LONGEST = 256  # pixels of a preview's longer edge, unless the latents themselves have more cells


class LinearPreview:
    """Latents `[C,h,w]` to a picture of `h` by `w` cells, each a whole number of pixels wide.

    `encode` takes pictures `[B,3,S,S]` in [-1,1], float32 on the CPU, and returns the latents `[B,C,h,w]` that the
    network sees, scaling included, on any device. It is called at the first preview, never before.

    Example:
        >>> preview = LinearPreview(lambda image_B3SS: F.avg_pool2d(image_B3SS, 8), channels=3)
        >>> preview(torch.ones(3, 8, 8)).getpixel((0, 0))
        (255, 255, 255)
    """

    def __init__(self, encode: Encode, channels: int) -> None:
        self._encode = encode
        self.channels = channels
        self._fitted: tuple[Tensor, int] | None = None

    @classmethod
    def fit(cls, encode: Encode, channels: int) -> Self:
        """A preview that is fitted now instead of at its first use."""
        preview = cls(encode, channels)
        preview._fit()
        return preview

    @property
    def matrix(self) -> Tensor:
        """`[C+1,3]`, float32 on the CPU: each channel's share of red, green, blue in [-1,1]; the last row is added."""
        return self._fit()[0]

    @torch.inference_mode()
    def __call__(self, latent_CHW: Tensor) -> Image.Image:
        """The latents in colour, enlarged to at most 256 pixels and never beyond the pixels that they stand for."""
        matrix, stride = self._fit()
        latent_CHW = latent_CHW.detach().float().cpu()
        colour_HW3 = latent_CHW.permute(1, 2, 0) @ matrix[:-1] + matrix[-1]
        pixels_HW3 = (colour_HW3.nan_to_num(0.0).clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
        small = Image.fromarray(pixels_HW3.numpy())
        factor = max(1, min(stride, _LONGEST // max(small.size)))
        return small.resize((small.width * factor, small.height * factor), Image.Resampling.BILINEAR)

    @torch.inference_mode()
    def _fit(self) -> tuple[Tensor, int]:
        """The matrix, and how many pixels a cell is wide: least squares with a slight ridge, once."""
        if self._fitted is None:
            images_B3SS = synthetic_pictures()
            latents = [self._encode(chunk).float().cpu() for chunk in images_B3SS.split(_AT_ONCE)]
            latents_BChw = torch.cat(latents).double()
            stride = _EDGE // latents_BChw.shape[-1]
            colours_B3hw = F.avg_pool2d(images_B3SS.double(), stride)
            cells_nC = latents_BChw.permute(0, 2, 3, 1).reshape(-1, self.channels)
            colours_n3 = colours_B3hw.permute(0, 2, 3, 1).reshape(-1, 3)
            self._fitted = (_least_squares(cells_nC, colours_n3).float(), stride)
        return self._fitted


def _least_squares(cells_nC: Tensor, colours_n3: Tensor) -> Tensor:
    """`[C+1,3]`: the map from cells to colours with the least squared error; the constant is not held small."""
    cells_mean, colours_mean = cells_nC.mean(0), colours_n3.mean(0)
    x_nC, y_n3 = cells_nC - cells_mean, colours_n3 - colours_mean
    variance_CC = x_nC.T @ x_nC / len(x_nC)
    ridge = _RIDGE * variance_CC.diagonal().mean().clamp_min(1e-12)
    weights_C3 = torch.linalg.solve(
        variance_CC + ridge * torch.eye(len(variance_CC), dtype=x_nC.dtype), x_nC.T @ y_n3 / len(x_nC)
    )
    return torch.cat([weights_C3, (colours_mean - cells_mean @ weights_C3)[None]])


def synthetic_pictures() -> Tensor:
    """Plain colours, gradients and discs, `[B,3,S,S]` float32 in [-1,1]; the same whenever it is called."""
    colours_K3 = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)))
    plain = [colour[:, None, None].expand(3, _EDGE, _EDGE) for colour in colours_K3]
    along = torch.linspace(0, 1, _EDGE)
    ramps = (
        along[None, :].expand(_EDGE, _EDGE),
        along[:, None].expand(_EDGE, _EDGE),
        (along[None] + along[:, None]) / 2,
    )
    y_S1, x_1S = torch.meshgrid(along - 0.5, along - 0.5, indexing="ij")
    discs = tuple(((x_1S.square() + y_S1.square()).sqrt() < radius).float() for radius in (0.2, 0.3, 0.4))
    mixed = []
    for index, mask_SS in enumerate((*ramps, *discs) * 4):  # each mask with other colours in every round
        one = colours_K3[(7 * index) % len(colours_K3)][:, None, None]
        other = colours_K3[(11 * index + 13) % len(colours_K3)][:, None, None]
        mixed.append(one + (other - one) * mask_SS)
    return torch.stack([*plain, *mixed])
