"""Infinity's loss: every bit is a question of two answers. Not here: the network, the optimizer.

Source: Infinity, section 3.2 (infinite-vocabulary classifier). Shapes: B batch, L tokens of all scales, K bits a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso.devices import CPU
from gesso.models.infinity.scales import ScaleSchedule


def bitwise_loss(
    logits_BLV: Tensor,
    labels_BLK: Tensor,
    weights_L: Tensor | None = None,
    weights_BLK: Tensor | None = None,
) -> Tensor:
    """Mean cross entropy of a bit in nats, a scalar.

    `logits_BLV` is `[B,L,2K]`, pairs of (zero, one); `labels_BLK` bool. `weights_L` (sum 1, see `scale_weights`) weighs
    the tokens, `weights_BLK` (mean 1, see `margin_weights`) the bits.
    """
    tokens_BL = token_losses(logits_BLV, labels_BLK, weights_BLK)
    return tokens_BL.mean() if weights_L is None else (tokens_BL * weights_L).sum(dim=-1).mean()


def token_losses(logits_BLV: Tensor, labels_BLK: Tensor, weights_BLK: Tensor | None = None) -> Tensor:
    """Cross entropy of each token, float32 `[B,L]`, mean over its bits; labels may be chances.

    Two-way cross entropy depends only on the difference of the two logits, which spares half of the memory.
    """
    zero, one = logits_BLV.unflatten(-1, (-1, 2)).unbind(-1)
    bits_BLK = F.binary_cross_entropy_with_logits((one - zero).float(), labels_BLK.float(), reduction="none")
    return (bits_BLK if weights_BLK is None else bits_BLK * weights_BLK).mean(dim=-1)


def divergence(
    logits_BLV: Tensor,
    chances_BLK: Tensor,
    weights_L: Tensor | None = None,
    weights_BLK: Tensor | None = None,
) -> Tensor:
    """Mean divergence of a bit from the chances that it should be one, in nats, `[B]`.

    It is the cross entropy less what is left of it where the network answers with these very chances, which is none;
    weights as in `bitwise_loss`.
    """
    entropies_BLK = torch.special.entr(chances_BLK) + torch.special.entr(1 - chances_BLK)
    left_BL = (entropies_BLK if weights_BLK is None else entropies_BLK * weights_BLK).mean(dim=-1)
    tokens_BL = token_losses(logits_BLV, chances_BLK, weights_BLK) - left_BL
    return tokens_BL.mean(dim=-1) if weights_L is None else (tokens_BL * weights_L).sum(dim=-1)


def margin_weights(margins_BLK: Tensor) -> Tensor:
    """Weights of the bits in proportion to their margins (`correction.TrainingTokens`), mean 1 at each place.

    A residual near zero is as badly coded by one bit as by the other: learning which it is costs capacity and gains
    nothing. A margin counts as 1 at most, so that few cells do not outweigh the rest.
    """
    clamped_BLK = margins_BLK.float().clamp(max=1.0)
    return clamped_BLK / clamped_BLK.mean(dim=(0, 2), keepdim=True).clamp(min=1e-6)


def scale_weights(schedule: ScaleSchedule, device: torch.device | str = CPU) -> Tensor:
    """Weight of every token, float32 `[L]` with sum 1, proportional to 1/sqrt(area of its scale).

    With it the many tokens of fine scales do not drown the few that decide what the picture is of.
    """
    areas = torch.tensor([height * width for height, width in schedule.grids])
    weights_L = torch.repeat_interleave(areas.float().rsqrt(), areas)
    return (weights_L / weights_L.sum()).to(device)
