"""Attention as our own networks call it: by a kernel that is chosen from outside, PyTorch's own unless it was.

Here: the kernels, and the layer that has one. Not here: which of them this machine has and what they need
(`engine/attention`), who sets them (`engine/loading/accelerate`), diffusers' networks, which have a dispatcher of
their own, text encoders and autoencoders, which always take PyTorch's.
Shapes: B rows, H heads, n queries, m keys, d head width.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Kernel(Protocol):
    """softmax(scale q k^T) v, `[B,H,n,d]`, of queries `[B,H,n,d]`, keys and values `[B,H,m,d]`.

    `mask` is boolean, true where a query looks at a key, and broadcasts to `[B,H,n,m]`; `scale` is 1/sqrt(d) if not
    given.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor: ...


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """PyTorch's own choice among its kernels."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def sdpa_math(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """PyTorch's kernel that writes every score down: slow, and what others are held against."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """cuDNN's kernel, through PyTorch."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def flex(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """PyTorch's FlexAttention. It is fused only inside of what is compiled; elsewhere it writes every score down.

    `mask` must say the same of every head and every query: `[B,1,1,m]`.
    """
    from torch.nn.attention import flex_attention

    seen_Bm = None if mask is None else mask[:, 0, 0]

    def hidden(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert seen_Bm is not None
        return torch.where(seen_Bm[row, key], score, -float("inf"))

    if q.is_cpu:  # PyTorch 2.13 cannot compile it for the CPU where these are views of what a linear has made
        q, k, v = (x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    change = None if mask is None else hidden
    return flex_attention.flex_attention(q, k, v, score_mod=change, scale=scale)  # pyright: ignore[reportReturnType]


def dispatched(plain: str, masked: str) -> Kernel:
    """A kernel of diffusers' dispatcher by its names there: without a mask, and with one.

    `mask` must say the same of every head and every query: `[B,1,1,m]`. Raises ImportError without diffusers.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    without, with_mask = AttentionBackendName(plain), AttentionBackendName(masked)

    def kernel(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        q_BnHd, k_BmHd, v_BmHd = (x.transpose(1, 2) for x in (q, k, v))
        chosen = without if mask is None else with_mask
        y_BnHd = dispatch_attention_fn(q_BnHd, k_BmHd, v_BmHd, attn_mask=mask, scale=scale, backend=chosen)
        return y_BnHd.transpose(1, 2)

    return kernel


class Attending(nn.Module):
    """A layer that attends by its `kernel`."""

    kernel: Kernel = staticmethod(sdpa)
