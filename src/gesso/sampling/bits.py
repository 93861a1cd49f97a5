"""Drawing bits from two logits each: temperature, top-k, top-p, and one random draw.

With two classes nothing needs sorting: both filters are thresholds on the rarer value. The sorting version for any
number of classes is kept in the tests as the oracle. Guidance is in `guidance`.
Shapes: B pictures, n tokens, K bits; logits are `[B,n,2K]`, pairs of (zero, one).
"""

from __future__ import annotations

import torch
from torch import Tensor


def exponential_noise(tokens: int, bits: int, generator: torch.Generator) -> Tensor:
    """Exp(1) noise `[n,2K]` of one picture's scale from its own CPU generator, in torch.multinomial's order."""
    return torch.empty(tokens, 2 * bits).exponential_(generator=generator)


def choose_bits(logits_BnV: Tensor, noise_BnV: Tensor | None, top_k: Tensor | int, top_p: Tensor | float) -> Tensor:
    """Bits, bool `[B,n,K]`: one where p1/e1 > p0/e0, which is a draw from the filtered distribution.

    `top_k` 1 keeps the likelier value (0, or 2 and more, change nothing); `top_p` in (0,1) drops the rarer value where
    its probability is at most 1-top_p (0 and 1 change nothing). Both may be tensors that broadcast over `[B,n,K]`.
    `noise_BnV` None takes the likelier value always.
    """
    zero, one = logits_BnV.float().unflatten(-1, (-1, 2)).unbind(-1)
    margin = one - zero
    likelier = margin > 0
    if noise_BnV is None:
        return likelier
    noise_zero, noise_one = noise_BnV.unflatten(-1, (-1, 2)).unbind(-1)
    drawn = margin + noise_zero.log() - noise_one.log() > 0
    return torch.where(is_certain(margin, top_k, top_p), margin >= 0, drawn)  # of two equals, sorting keeps the last


def is_certain(margin: Tensor, top_k: Tensor | int, top_p: Tensor | float) -> Tensor:
    """Where only the likelier of two values is left after filtering; `margin` is the difference of their logits.

    Ties survive top-k, as they do in the published code, but not top-p.
    """
    top_k, top_p = torch.as_tensor(top_k, device=margin.device), torch.as_tensor(top_p, device=margin.device)
    by_k = (top_k == 1) & (margin != 0)
    rarer = torch.sigmoid(-margin.abs())
    return by_k | ((top_p > 0) & (top_p < 1) & (rarer <= 1 - top_p))
