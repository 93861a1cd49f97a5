"""Multi-scale residual binary spherical quantization (BSQ): bits from a latent, and the latent from its bits.

Pure functions of tensors, any number of bits; nothing here is learned. Source: Infinity, section 3.2 (bitwise
multi-scale residual quantizer); BSQ, arXiv:2406.07548.

Shapes: B batch, K bits a latent cell carries, h w the grid of one scale, H W the final grid.
Bits are torch.bool, channels second: `bits_BKhw`. A code is a unit vector of entries +-1/sqrt(K).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso.models.infinity.scales import Grid


@dataclass(frozen=True)
class Quantized:
    """`sum_BKHW` is the decoder's input; one entry a scale in the lists.

    `residuals` are what each scale saw (resampled, before normalisation).
    """

    sum_BKHW: Tensor
    bits: list[Tensor]
    residuals: list[Tensor]


def quantize(latent_BKHW: Tensor, grids: Sequence[Grid]) -> Quantized:
    """Quantize a latent scale by scale, each scale coding what the earlier ones left over.

    Differentiable: the forward value of a code is its sign vector, its gradient that of the normalised residual
    (straight-through); the residual passed on is detached.
    """
    residual_BKHW, sum_BKHW = latent_BKHW, torch.zeros_like(latent_BKHW)
    bits: list[Tensor] = []
    residuals: list[Tensor] = []
    for grid in grids:
        residual_BKhw = shrink(residual_BKHW, grid)
        unit_BKhw = F.normalize(residual_BKhw, dim=1, eps=1e-12)
        bits_BKhw = unit_BKhw > 0
        code_BKhw = unit_BKhw + (codes(bits_BKhw, unit_BKhw.dtype) - unit_BKhw).detach()
        code_BKHW = enlarge(code_BKhw, grids[-1])
        sum_BKHW = sum_BKHW + code_BKHW
        residual_BKHW = residual_BKHW - code_BKHW.detach()
        bits.append(bits_BKhw)
        residuals.append(residual_BKhw)
    return Quantized(sum_BKHW, bits, residuals)


def codes(bits_BKhw: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit vectors of the bits: 2*bit-1 over sqrt(K)."""
    return (2 * bits_BKhw.to(dtype) - 1) * bits_BKhw.shape[1] ** -0.5


def sum_of_codes(bits: Sequence[Tensor], final_grid: Grid) -> Tensor:
    """Decoder input `[B,K,H,W]` from bits alone, one tensor of bits a scale."""
    first = enlarge(codes(bits[0]), final_grid)
    return first + sum((enlarge(codes(scale), final_grid) for scale in bits[1:]), torch.zeros_like(first))


def shrink(x_BKHW: Tensor, grid: Grid) -> Tensor:
    """Area-resample to a coarser grid; a tensor already on it is returned as it is."""
    return x_BKHW if x_BKHW.shape[-2:] == grid else F.interpolate(x_BKHW, size=grid, mode="area")


def enlarge(x_BKhw: Tensor, grid: Grid) -> Tensor:
    """Bilinear resample (trilinear over one frame is the same); also used, without antialiasing, to go down."""
    if x_BKhw.shape[-2:] == grid:
        return x_BKhw
    return F.interpolate(x_BKhw, size=grid, mode="bilinear", align_corners=False)


def to_tokens(x_BKhw: Tensor, patchify: bool) -> Tensor:
    """Cells of a grid, row by row, as a transformer's tokens `[B,n,K]`; `patchify`: 2x2 cells a token, `[B,n,4K]`."""
    if patchify:
        x_BKhw = F.pixel_unshuffle(x_BKhw, 2)
    return x_BKhw.flatten(2).transpose(1, 2)


def from_tokens(tokens_BnK: Tensor, grid: Grid, patchify: bool) -> Tensor:
    """The inverse of `to_tokens`; `grid` counts tokens."""
    x_BKhw = tokens_BnK.transpose(1, 2).unflatten(2, grid)
    return F.pixel_shuffle(x_BKhw, 2) if patchify else x_BKhw


def entropy(unit_BKhw: Tensor, temperature: float = 100.0) -> tuple[Tensor, Tensor, Tensor]:
    """Soft bit entropy in nats (BSQ, section 4): mean over cells, of the codebook, and mean bit odds `[K,2]`.

    `unit_BKhw` is a normalised residual; probability of a zero bit is sigmoid(-4 z / sqrt(K) * temperature).
    """
    bits = unit_BKhw.shape[1]
    zero = torch.sigmoid(-4 * unit_BKhw.movedim(1, -1).reshape(-1, bits) * bits**-0.5 * temperature)
    odds_nK2 = torch.stack((zero, 1 - zero), dim=-1)
    mean_K2 = odds_nK2.mean(dim=0)
    return _entropy(odds_nK2).sum(-1).mean(), _entropy(mean_K2).sum(), mean_K2


def _entropy(odds: Tensor) -> Tensor:
    return -(odds * torch.log(odds + 1e-8)).sum(-1)
