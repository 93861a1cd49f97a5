"""Attention of diffusers' U-Net by a kernel that can be chosen: its own processor knows PyTorch's function alone.

Not here: the kernels, which are diffusers', and who chooses (`engine/loading/accelerate`). Imports diffusers.
Shapes: B rows, n tokens, m tokens of the text, H heads, d head width, C width.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import Tensor


class DispatchingProcessor:
    """What `AttnProcessor2_0` computes in the blocks of a U-Net, through diffusers' dispatcher.

    Those blocks have tokens in, no norms of queries, keys or groups, no mask, and add what comes out themselves.
    diffusers' `set_attention_backend` sets `_attention_backend`, of which None is what the process has.
    """

    _attention_backend: AttentionBackendName | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """`[B,n,C]` from `hidden_states` `[B,n,C]` and, where they attend to text, `[B,m,E]`."""
        if attention_mask is not None:
            raise ValueError("a U-Net's attention that is chosen takes no mask")
        layers: Any = attn
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q_BnHd, k_BmHd, v_BmHd = (
            part.unflatten(-1, (attn.heads, -1))
            for part in (layers.to_q(hidden_states), layers.to_k(source), layers.to_v(source))
        )
        if q_BnHd.is_cpu:  # for FlexAttention, as in `models/attention`; it costs little beside the rest
            q_BnHd, k_BmHd, v_BmHd = (_by_heads(part) for part in (q_BnHd, k_BmHd, v_BmHd))
        y_BnC = dispatch_attention_fn(q_BnHd, k_BmHd, v_BmHd, backend=self._attention_backend).flatten(2)
        out: Any = attn.to_out
        return out[1](out[0](y_BnC))


def _by_heads(x_BnHd: Tensor) -> Tensor:
    """The same numbers, copied so that those of a head lie together."""
    return x_BnHd.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
