"""Two-dimensional rotary positions over all scales of a schedule.

Half of a head's pairs turn with the row, half with the column. Source: RoFormer (arXiv:2104.09864); the normalisation
over scales is Infinity's, section 3.3. Pairs are adjacent elements (2j, 2j+1).
Shapes: L tokens of all scales, D width of a head.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso.models.infinity.scales import Grid, ScaleSchedule

RotaryMode = Literal["grid", "resized", "normalized"]
_LONGER_EDGE = 128


def positions(schedule: ScaleSchedule, mode: RotaryMode = "normalized") -> Tensor:
    """(row, column) of every token, float32 `[L,2]`: raw grid indices, or spread over the rotary grid and rounded.

    Rounding is half-to-even in float32: at template 1.250 positions such as 70/20 = 3.5 depend on it.
    """
    tokens: list[Tensor] = []
    for height, width in schedule.grids:
        rows, columns = torch.arange(height, dtype=torch.float32), torch.arange(width, dtype=torch.float32)
        if mode == "normalized":
            rows = (rows * (schedule.rotary_grid[0] / height)).round()
            columns = (columns * (schedule.rotary_grid[1] / width)).round()
        tokens.append(torch.cartesian_prod(rows, columns))
    return torch.cat(tokens)


@lru_cache(maxsize=64)
def rotary_table(schedule: ScaleSchedule, head_width: int, mode: RotaryMode = "normalized") -> Tensor:
    """Cosines and sines of every token, float32 `[2,L,D/2]`: D/4 columns of the row's angles, then the column's."""
    if mode == "resized":
        return _resized_table(schedule, head_width)
    angles_L2F = positions(schedule, mode)[:, :, None] * _frequencies(head_width)
    angles_LP = angles_L2F.flatten(1)
    return torch.stack((angles_LP.cos(), angles_LP.sin()))


class Turns(NamedTuple):
    """A table laid out for `rotate`: every pair's cosine twice, and its sine with both signs, `[n,1,1,D]`."""

    cos_n11D: Tensor
    sin_n11D: Tensor


def turns(table_2nP: Tensor) -> Turns:
    """Lay out a table, or a slice of it over tokens."""
    cos_nP, sin_nP = table_2nP
    cos_nD = cos_nP.repeat_interleave(2, dim=-1)
    sin_nD = torch.stack((-sin_nP, sin_nP), dim=-1).flatten(-2)
    return Turns(cos_nD[:, None, None], sin_nD[:, None, None])


def rotate(x_BnGHD: Tensor, by: Turns) -> Tensor:
    """Turn each adjacent pair (a, b) to (a cos - b sin, b cos + a sin). G holds queries and keys side by side."""
    swapped_BnGHD = x_BnGHD.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x_BnGHD * by.cos_n11D, swapped_BnGHD, by.sin_n11D)


def _frequencies(head_width: int) -> Tensor:
    half = head_width // 2
    return 1.0 / (10_000 ** (torch.arange(0, half, 2, dtype=torch.float32) / half))


def _resized_table(schedule: ScaleSchedule, head_width: int) -> Tensor:
    """Cosines and sines over one fine grid, resampled to each scale (rotary mode 1 of the published flags)."""
    fine = _fine_grid(schedule.rotary_grid)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in fine), indexing="ij")
    angles_hwP = (torch.stack((rows, columns), dim=-1)[..., None] * _frequencies(head_width)).flatten(2)
    table_2Phw = torch.stack((angles_hwP.cos(), angles_hwP.sin())).permute(0, 3, 1, 2)
    scales = [
        F.interpolate(table_2Phw, size=grid, mode="bilinear", align_corners=True).flatten(2).transpose(1, 2)
        for grid in schedule.grids
    ]
    return torch.cat(scales, dim=1)


def _fine_grid(final: Grid) -> Grid:
    """A grid of the final grid's aspect whose longer edge is 128."""
    height, width = final
    shorter = int(_LONGER_EDGE / max(height, width) * min(height, width))
    return (_LONGER_EDGE, shorter) if height >= width else (shorter, _LONGER_EDGE)
