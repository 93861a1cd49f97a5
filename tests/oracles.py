"""Slow, obvious versions of what the product does quickly, to test it against. See also `oracle` (the engine's)."""

from __future__ import annotations

import torch
from torch import Tensor


def filtered_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Top-k, then top-p, by sorting: logits `[…,V]` of any number of classes, what is dropped at minus infinity.

    Top-k drops logits strictly below the k-th largest (ties survive; 0 is off, k is capped at V). Top-p then sorts what
    is left in ascending order and drops while the cumulative probability is at most 1-top_p, never the largest (0 and
    1 are off).
    """
    if top_k > 0:
        lowest = logits.sort(dim=-1, descending=True, stable=True).values[..., min(top_k, logits.shape[-1]) - 1, None]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if 0 < top_p < 1:
        ascending = logits.sort(dim=-1, stable=True)
        dropped = ascending.values.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(dropped.scatter(-1, ascending.indices, dropped), -torch.inf)
    return logits
