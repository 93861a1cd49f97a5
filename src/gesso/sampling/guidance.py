"""Classifier-free guidance (arXiv:2207.12598) as arithmetic. Not here: which rows are guided, and when (pipelines)."""

from __future__ import annotations

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """scale*conditional + (1-scale)*unconditional: 1 is no guidance, more pulls away from the unconditional."""
    return scale * conditional + (1 - scale) * unconditional
