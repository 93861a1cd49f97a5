"""Bitwise self-correction: training inputs in which some bits are wrong and later labels repair the damage.

Source: Infinity, section 3.4, algorithm 2. Not here: the loss (`training/infinity_loss`).
Shapes as in `quantizer`; N is the number of scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gesso.models.infinity.quantizer import codes, enlarge, shrink, to_tokens
from gesso.models.infinity.scales import Grid


@dataclass(frozen=True)
class TrainingTokens:
    """Inputs of scales 2…N, `[B, L - first scale, K]`, and the bits to predict at every token, bool `[B,L,K]`.

    `margins_BLK` says how far each bit was from being the other one: a wrong bit adds 4/sqrt(K) times its margin to the
    squared error of the sum of codes.
    """

    inputs_BLK: Tensor
    labels_BLK: Tensor
    margins_BLK: Tensor


def draw_flips(
    latent_BKHW: Tensor, grids: Sequence[Grid], *, strength: float, scales: int, generator: torch.Generator
) -> list[Tensor]:
    """Which bits to flip at each of the first `scales` scales, bool `[B,K,h,w]`.

    One probability a scale for the whole batch, uniform over the whole percents 0…100*strength; then each bit alone.
    """
    batch, bits = latent_BKHW.shape[:2]
    flips: list[Tensor] = []
    for grid in grids[:scales]:
        percent = torch.randint(0, round(100 * strength) + 1, (), generator=generator).item()
        drawn = torch.rand((batch, bits, *grid), generator=generator)
        flips.append((drawn < percent / 100).to(latent_BKHW.device))
    return flips


def training_tokens(
    latent_BKHW: Tensor,
    grids: Sequence[Grid],
    flips: Sequence[Tensor] = (),
    *,
    requantize: bool = True,
    patchify: bool = False,
) -> TrainingTokens:
    """Run the quantizer's loop from raw features with the given bits flipped.

    `grids` are the tokenizer's (`ScaleSchedule.latent_grids`). A scale's label is the sign of what is left *before* its
    own flips. With `requantize` the flipped code is what later scales see and must mend; without, flips do nothing.
    """
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    margins: list[Tensor] = []
    for index, scale in enumerate(walk_scales(latent_BKHW, grids, flips if requantize else ())):
        if index:
            inputs.append(to_tokens(enlarge(scale.sum_BKHW, grids[index]), patchify))
        labels.append(to_tokens((scale.residual_BKhw > 0).to(torch.uint8), patchify).bool())
        margins.append(to_tokens(scale.residual_BKhw.abs(), patchify))
    return TrainingTokens(torch.cat(inputs, dim=1), torch.cat(labels, dim=1), torch.cat(margins, dim=1))


class Scale(NamedTuple):
    """One scale of the quantizer's loop: the sum of codes before it, what that leaves over, and the bits it keeps."""

    sum_BKHW: Tensor
    residual_BKhw: Tensor
    bits_BKhw: Tensor


def walk_scales(latent_BKHW: Tensor, grids: Sequence[Grid], flips: Sequence[Tensor] = ()) -> Iterator[Scale]:
    """The quantizer's loop from raw features; `flips` are of the bits of the first scales."""
    sum_BKHW = torch.zeros_like(latent_BKHW)
    for index, grid in enumerate(grids):
        residual_BKhw = shrink(latent_BKHW - sum_BKHW, grid)
        bits_BKhw = residual_BKhw > 0
        if index < len(flips):
            bits_BKhw = bits_BKhw ^ flips[index]
        yield Scale(sum_BKHW, residual_BKhw, bits_BKhw)
        sum_BKHW = sum_BKHW + enlarge(codes(bits_BKhw, latent_BKHW.dtype), grids[-1])
