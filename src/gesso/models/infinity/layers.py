"""The layers of Infinity's transformer: attention over scales, attention to text, pooling, feed-forward.

Shapes as in `transformer`. Not here: how layers make a block, and anything about scales.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.models.attention import Attending
from gesso.models.infinity.cache import KeyValueCache
from gesso.models.infinity.rotary import Turns, rotate

_MAX_LOG_SCALE = 4.605170185988092  # log 100


class SelfAttention(Attending):
    """Attention with unit queries and keys, rotated; a learned factor a head scales the queries.

    The published code scales before it rotates; the two commute.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.log_scale = nn.Parameter(torch.empty(1, heads, 1, 1))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_bias = nn.Parameter(torch.empty(width))
        self.value_bias = nn.Parameter(torch.empty(width))
        self.out = nn.Linear(width, width)

    def forward(self, x_BnC: Tensor, rotary: Turns | None, past: KeyValueCache.Layer | Tensor | None) -> Tensor:
        """`past` is the cache while generating, the mask of scales while training, None for full attention."""
        bias = torch.cat((self.query_bias, torch.zeros_like(self.query_bias), self.value_bias))
        qkv_Bn3HD = with_bias(self.qkv, x_BnC.to(self.qkv.weight.dtype), bias).unflatten(-1, (3, self.heads, -1))
        v = qkv_Bn3HD[:, :, 2].transpose(1, 2)
        qk_Bn2HD = F.normalize(qkv_Bn3HD[:, :, :2].float(), dim=-1)
        if rotary is not None:
            qk_Bn2HD = rotate(qk_Bn2HD, rotary)
        q, k = (part.transpose(1, 2) for part in qk_Bn2HD.unbind(2))
        q = q * self.log_scale.float().clamp(max=_MAX_LOG_SCALE).exp()
        q, k = q.to(v.dtype), k.to(v.dtype)
        mask = None
        if isinstance(past, KeyValueCache.Layer):
            k, v = past.extend(k, v)
        else:
            mask = past
        y = self.kernel(q, k, v, mask=mask, scale=1.0)
        return self.out(y.transpose(1, 2).flatten(2))


class CrossAttention(Attending):
    """Attention to text; its keys and values are read once a prompt (`read`)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.value_bias = nn.Parameter(torch.empty(width))
        self.out = nn.Linear(width, width)

    def read(self, source_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the projected text, each `[B,H,T,D]`."""
        bias = torch.cat((torch.zeros_like(self.value_bias), self.value_bias))
        both = with_bias(self.key_value, source_BTC.to(self.key_value.weight.dtype), bias)
        k, v = both.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return k, v

    def forward(self, x_BnC: Tensor, text: tuple[Tensor, Tensor], mask_BT: Tensor | None) -> Tensor:
        k, v = text
        q = self.query(x_BnC.to(self.query.weight.dtype)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mask = None if mask_BT is None else mask_BT[:, None, None]
        y = self.kernel(q, k, v, mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class AttentionPool(nn.Module):
    """One learned query a head gathers a prompt's tokens into one vector."""

    def __init__(self, width_in: int, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, heads, width // heads))
        self.key_value = nn.Linear(width_in, 2 * width, bias=False)
        self.value_bias = nn.Parameter(torch.empty(width))
        self.out = nn.Linear(width, width)

    def forward(self, text_BTE: Tensor, mask_BT: Tensor | None) -> Tensor:
        heads = self.query.shape[1]
        bias = torch.cat((torch.zeros_like(self.value_bias), self.value_bias))
        both = with_bias(self.key_value, text_BTE, bias)
        k, v = both.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.query[:, :, None].to(k.dtype).expand(len(text_BTE), -1, -1, -1)
        mask = None if mask_BT is None else mask_BT[:, None, None]
        y_BH1D = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y_BH1D.flatten(1)).float()


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, width: int, hidden: int, width_out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width if width_out is None else width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x.to(self.fc1.weight.dtype)), approximate="tanh"))


def with_bias(layer: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    """layer(x) + bias for a layer whose bias is put together at each call; in one operation where nothing is attached.

    Adapters attach to layers by hooks, or in training as a layer around the layer (PEFT's `base_layer`).
    """
    if layer._forward_hooks or hasattr(layer, "base_layer"):
        return layer(x) + bias
    return F.linear(x, layer.weight, bias)  # pyright: ignore[reportArgumentType]


def drop_path(branch: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth (arXiv:1603.09382): drop a sample's whole branch with probability `rate`, rescale the others."""
    if not training or rate == 0:
        return branch
    keep = torch.rand(len(branch), 1, 1, device=branch.device) >= rate
    return branch * keep / (1 - rate)
