"""Rotary positions on three axes: frame, row, column.

Source: RoFormer (arXiv:2104.09864). A head's pairs of adjacent features (2k, 2k+1) are shared out among the axes;
each turns by its position times its frequency. Angles are computed in float64 and rounded once.
Shapes: B samples, n tokens, H heads, D width of a head, P = D/2 pairs, L positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gesso.models.s3dit.config import S3DiTConfig


def turns(config: S3DiTConfig, positions_L3: Tensor) -> Tensor:
    """Cosine and sine of every pair at every position, float32 `[L,P,2]`.

    Raises ValueError for a position that is beyond `axes_lens`.
    """
    angles: list[Tensor] = []
    for axis, (width, length) in enumerate(zip(config.axes_dims, config.axes_lens, strict=True)):
        positions_L = positions_L3[:, axis].to(torch.float64)
        if len(positions_L) and positions_L.max() >= length:
            name = ("frame", "row", "column")[axis]
            raise ValueError(f"{name} {int(positions_L.max())} is beyond the network's {length} positions")
        frequencies = 1.0 / config.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles.append(torch.outer(positions_L, frequencies).float())
    angles_LP = torch.cat(angles, dim=-1)
    return torch.stack((angles_LP.cos(), angles_LP.sin()), dim=-1)


def rotate(x_BnHD: Tensor, turns_Bn1P2: Tensor) -> Tensor:
    """Turn each pair (a, b) to (a cos - b sin, a sin + b cos), in float32; the result has x's dtype.

    Changes `x_BnHD` itself where that is allowed: it is float32 and no gradient is asked for.
    """
    pairs_BnHP2 = x_BnHD.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # complex numbers are not fused by compilers; eagerly they are the fastest
        (a, b), (cos, sin) = pairs_BnHP2.unbind(-1), turns_Bn1P2.unbind(-1)
        turned_BnHP2 = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    else:
        x_BnHP, turns_Bn1P = torch.view_as_complex(pairs_BnHP2), torch.view_as_complex(turns_Bn1P2)
        turned_BnHP2 = torch.view_as_real(x_BnHP * turns_Bn1P if torch.is_grad_enabled() else x_BnHP.mul_(turns_Bn1P))
    return turned_BnHP2.flatten(-2).to(x_BnHD.dtype)
