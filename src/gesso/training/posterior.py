"""What the shapes world itself would answer a network: an expectation over all scenes that a prompt may be of.

The world is finite, so the expectation that a network learns from samples can be had without any: over every training
scene that a claim allows, weighed by how likely it makes what the network sees. As a target it has the least variance
there is (arXiv:2302.00670 takes a batch for the world), and it says also what is right where no true picture leads: on
the network's own way. Not here: scenes and latents (`world_latents`), networks, losses (`flow_on_policy`,
`infinity_on_policy`).
Shapes: K scenes that a claim allows, B noisy latents, N their numbers, C channels, k bits a cell, h w a scale's cells,
H W the final ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gesso.devices import CPU
from gesso.models.infinity.quantizer import shrink
from gesso.models.infinity.scales import Grid
from gesso.training.world_latents import WorldLatents
from gesso.worlds.shapes import Claim

_LEAST_WEIGHT = 1e-7  # of thousands of scenes mostly a few weigh more
_BEYOND_REPAIR = 100.0  # nats: finer scales have thousands of bits, and can overrule what the first ones said
_SOFTNESS = 0.1  # a code is +-0.25 in every bit, and a network errs where residuals are as small as this
_ERRORS = 0.03  # share of bits that are wrong for no reason


# ---- of noisy latents -----------------------------------------------------------------------------------------------


@torch.no_grad()
def expected_latents(world: WorldLatents, noisy_BChw: Tensor, sigma_B: Tensor, claims: Sequence[Claim]) -> Tensor:
    """Expected clean latents `[B,C,h,w]` given the noisy ones and what is claimed of each. sigma is above 0, and every
    claim true of some training scene.

    A noisy latent is (1 - sigma) * clean + sigma * noise. Up to a constant, the logarithm of what a scene is worth is
    that of its share plus (1 - sigma) / sigma^2 <noisy, clean> - ((1 - sigma) / sigma)^2 |clean|^2 / 2.
    """
    rows = zip(noisy_BChw, sigma_B.tolist(), claims, strict=True)
    with torch.autocast(CPU, enabled=False):
        return torch.stack([_expected_latent(world, *row) for row in rows])


def _expected_latent(world: WorldLatents, noisy_Chw: Tensor, sigma: float, claim: Claim) -> Tensor:
    clean_KChw, share_K = world.allowed(claim)
    clean_KN = clean_KChw.flatten(1)
    signal = (1 - sigma) / sigma
    fit_K = clean_KN @ noisy_Chw.flatten() * (signal / sigma) - clean_KN.square().sum(1) * (signal**2 / 2)
    weight_K = torch.softmax(share_K.log() + fit_K, dim=0)
    likely = weight_K > _LEAST_WEIGHT
    mean_N = weight_K[likely] @ clean_KN[likely] / weight_K[likely].sum()
    return mean_N.view_as(noisy_Chw)


# ---- of bits --------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """Of a scale's every bit, `[k,h,w]`: the chance that it should be one, and how much is at stake.

    `margin` is the expected size of the residual, where one above 1 counts as 1 (`infinity_loss.margin_weights`);
    `chance` is the share of it that asks for a one. So it is what a loss weighed by margins would learn from samples.
    """

    chance_khw: Tensor
    margin_khw: Tensor


@torch.no_grad()
def expected_bits(
    world: WorldLatents, sums: Sequence[Tensor], bits: Sequence[Tensor], grids: Sequence[Grid], claim: Claim
) -> list[Answer]:
    """What every scale's bits should be, given those of the scales before it and what is claimed of the picture.

    `sums` `[k,H,W]` are the sums of codes before each scale, `bits` `[k,h,w]` what was chosen there, bool. A scene
    asks for the sign of its residual; of what the scenes still possible ask for, each counts by how large its residual
    is, for so much would a wrong bit cost. What was chosen speaks for the scenes that asked for it: a scene's bits are
    taken to be chosen with the chance sigmoid(±residual / 0.1), and three of a hundred to be wrong for no reason.
    """
    clean_KkHW, share_K = world.allowed(claim)
    weight_K = share_K.log()
    answers: list[Answer] = []
    with torch.autocast(CPU, enabled=False):
        for sum_kHW, bits_khw, grid in zip(sums, bits, grids, strict=True):
            residual_Kkhw = shrink(clean_KkHW - sum_kHW, grid)
            answers.append(_answer(residual_Kkhw, torch.softmax(weight_K, dim=0)))
            asked_Kkhw = torch.where(bits_khw, residual_Kkhw, -residual_Kkhw)
            chance_Kkhw = _ERRORS + (1 - 2 * _ERRORS) * torch.sigmoid(asked_Kkhw / _SOFTNESS)
            weight_K = weight_K + chance_Kkhw.log().sum(dim=(1, 2, 3))
            possible = weight_K > weight_K.max() - _BEYOND_REPAIR
            clean_KkHW, weight_K = clean_KkHW[possible], weight_K[possible]
    return answers


def _answer(residual_Kkhw: Tensor, share_K: Tensor) -> Answer:
    likely = share_K > _LEAST_WEIGHT
    counted_Kkhw, share_K = residual_Kkhw[likely].clamp(-1, 1), share_K[likely] / share_K[likely].sum()
    one_khw = torch.einsum("K,Kkhw->khw", share_K, counted_Kkhw.clamp(min=0))
    margin_khw = torch.einsum("K,Kkhw->khw", share_K, counted_Kkhw.abs())
    return Answer(one_khw / margin_khw.clamp(min=1e-9), margin_khw)
