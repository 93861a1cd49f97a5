"""Forgetting what blocks hold for the way back, and computing it again there: less memory, a third more work.

Source: arXiv:1604.06174, as PyTorch does it. Not here: which networks are trained (`task`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(network: Any) -> None:
    """Do so in every block of a network: by diffusers' own way where it has one, else block by block."""
    if hasattr(network, "enable_gradient_checkpointing"):
        network.enable_gradient_checkpointing()
        return
    kinds: tuple[type[nn.Module], ...] = network.repeated_blocks
    for block in network.modules():
        if isinstance(block, kinds):
            block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Tensor], *inputs: Any, **named: Any) -> Tensor:
    """What a block says; where nothing is learned there is no way back."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, **named)  # pyright: ignore[reportReturnType]
