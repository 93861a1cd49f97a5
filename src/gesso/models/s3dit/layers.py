"""What a block of S3-DiT is made of: norms, attention within samples, gated feed-forward, modulation by time.

Where no gradient is asked for, tensors that nobody else holds are changed in place: it saves memory traffic, and on
processors the first touch of fresh memory, which there costs more than the arithmetic.
Not here: which tokens lie where (`layout`), the network (`transformer`).
Shapes: B rows of n tokens, D width, H heads, I rows of the time table, M width of the time embedding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.models.attention import Attending, Kernel, sdpa
from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.layout import Rows
from gesso.models.s3dit.rotary import rotate

_HEAD_EPS = 1e-5  # of the norms of queries and keys, whatever the configuration says
_FREQUENCIES = 128
_LONGEST_PERIOD = 10_000
_TIME_HIDDEN = 1024


class Factors(NamedTuple):
    """What a block multiplies by, `[D]`, `[B,1,D]` or `[B,n,D]`: before and after attention, before and after the
    feed-forward. A norm's weight, times one plus the scale before, or the gate after.
    """

    before_attention: Tensor
    after_attention: Tensor
    before_feed_forward: Tensor
    after_feed_forward: Tensor


class Attention(Attending):
    """Self-attention within each sample; queries and keys are normalised head by head, then rotated."""

    def __init__(self, config: S3DiTConfig) -> None:
        super().__init__()
        width = config.dim
        self.heads = config.n_heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])
        self.norm_q = nn.RMSNorm(config.head_width, eps=_HEAD_EPS) if config.qk_norm else None
        self.norm_k = nn.RMSNorm(config.head_width, eps=_HEAD_EPS) if config.qk_norm else None

    def forward(self, x_BnD: Tensor, rows: Rows) -> Tensor:
        q_BnHd = self._placed(self.to_q(x_BnD), self.norm_q, rows)
        k_BnHd = self._placed(self.to_k(x_BnD), self.norm_k, rows)
        v_BnHd = self.to_v(x_BnD).unflatten(-1, (self.heads, -1))
        y_BnD = attend(q_BnHd, k_BnHd, v_BnHd, rows.groups, self.kernel).flatten(-2)
        return self.to_out[0](y_BnD)

    def _placed(self, x_BnD: Tensor, norm: nn.RMSNorm | None, rows: Rows) -> Tensor:
        x_BnHd = x_BnD.unflatten(-1, (self.heads, -1))
        if norm is not None:
            x_BnHd = times(over_rms(x_BnHd, _HEAD_EPS, own=True), norm.weight)
        return rotate(x_BnHd, rows.turns_Bn1P2)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: S3DiTConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w2 = nn.Linear(config.hidden, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden, bias=False)

    def forward(self, x_BnD: Tensor) -> Tensor:
        gate = F.silu(self.w1(x_BnD), inplace=not torch.is_grad_enabled())
        return self.w2(times(gate, self.w3(x_BnD)))


class ScaledNorm(nn.RMSNorm):
    """RMS norm whose weight is already in the factor that it is called with."""

    def forward(self, x: Tensor, *, factor: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert self.eps is not None
        return times(over_rms(x, self.eps), factor)


class Block(nn.Module):
    """Attention and feed-forward, each between two norms ("sandwich"), modulated by time unless told otherwise.

    x += tanh(gate) * norm2(attention(norm1(x) * (1 + scale))), then the same with the feed-forward.
    """

    def __init__(self, config: S3DiTConfig, *, modulated: bool = True) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = ScaledNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm1 = ScaledNorm(config.dim, eps=config.norm_eps)
        self.attention_norm2 = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm2 = nn.RMSNorm(config.dim, eps=config.norm_eps)
        if modulated:
            self.adaLN_modulation = nn.ModuleList([nn.Linear(config.modulation_width, 4 * config.dim)])
        else:
            self.adaLN_modulation = None

    def forward(self, x_BnD: Tensor, rows: Rows, time_IM: Tensor | None = None) -> Tensor:
        """A new tensor; `x_BnD` stays as it is. `time_IM` is left out of blocks that are not modulated."""
        factors = self._factors(rows, time_IM)
        h_BnD = self.attention_norm1(x_BnD, factor=factors.before_attention)
        h_BnD = over_rms(self.attention(h_BnD, rows), self.eps, own=True)
        x_BnD = torch.addcmul(x_BnD, h_BnD, factors.after_attention)
        h_BnD = self.ffn_norm1(x_BnD, factor=factors.before_feed_forward)
        h_BnD = over_rms(self.feed_forward(h_BnD), self.eps, own=True)
        if torch.is_grad_enabled():
            return torch.addcmul(x_BnD, h_BnD, factors.after_feed_forward)
        return x_BnD.addcmul_(h_BnD, factors.after_feed_forward)

    def _factors(self, rows: Rows, time_IM: Tensor | None) -> Factors:
        norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
        weights = tuple(norm.weight for norm in norms)
        if self.adaLN_modulation is None:
            return Factors(*weights)
        assert time_IM is not None and rows.time_B1 is not None
        scale1, gate1, scale2, gate2 = self.adaLN_modulation[0](time_IM).chunk(4, dim=-1)
        by_time = (1 + scale1, gate1.tanh(), 1 + scale2, gate2.tanh())
        table_I4D = torch.stack([weight * factor for weight, factor in zip(weights, by_time, strict=True)], dim=1)
        return Factors(*table_I4D[rows.time_B1].unbind(-2))


class FinalLayer(nn.Module):
    """Layer norm, scaled by time, to the numbers of a patch."""

    def __init__(self, config: S3DiTConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, config.patch_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.modulation_width, config.dim))

    def forward(self, x_BnD: Tensor, time_IM: Tensor, time_B1: Tensor) -> Tensor:
        factor_ID = 1 + self.adaLN_modulation(time_IM)
        return self.linear(times(F.layer_norm(x_BnD, x_BnD.shape[-1:], eps=1e-6), factor_ID[time_B1]))


class TimeEmbedder(nn.Module):
    """Times to vectors `[I,M]`."""

    def __init__(self, config: S3DiTConfig) -> None:
        super().__init__()
        self.scale = config.t_scale
        self.mlp = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES, _TIME_HIDDEN), nn.SiLU(), nn.Linear(_TIME_HIDDEN, config.modulation_width)
        )

    def forward(self, time_I: Tensor) -> Tensor:
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(time_features(time_I.float() * self.scale).to(dtype))


def time_features(time_I: Tensor) -> Tensor:
    """Cosines, then sines, of a time at 128 frequencies from 1 down to nearly 1/10000, float32 `[I,256]`.

    Source: DDPM (arXiv:2006.11239), after "Attention is all you need".
    """
    steps_K = torch.arange(_FREQUENCIES, dtype=torch.float32, device=time_I.device)
    angles_IK = time_I[:, None] * torch.exp(-math.log(_LONGEST_PERIOD) * steps_K / _FREQUENCIES)
    return torch.cat((angles_IK.cos(), angles_IK.sin()), dim=-1)


def attend(
    q_BnHd: Tensor, k_BnHd: Tensor, v_BnHd: Tensor, groups: tuple[tuple[int, int], ...], kernel: Kernel = sdpa
) -> Tensor:
    """Every token looks at all tokens of its own sample and at no other, `[B,n,H,d]`: one batch a group of equals."""
    if len(groups) == 1:
        return _attend_equals(q_BnHd, k_BnHd, v_BnHd, kernel)
    parts: list[Tensor] = []
    begin = 0
    for samples, tokens in groups:
        end = begin + samples * tokens
        q, k, v = (x_1THd[0, begin:end].unflatten(0, (samples, tokens)) for x_1THd in (q_BnHd, k_BnHd, v_BnHd))
        parts.append(_attend_equals(q, k, v, kernel).flatten(0, 1))
        begin = end
    return torch.cat(parts)[None]


def over_rms(x: Tensor, eps: float, *, own: bool = False) -> Tensor:
    """x over the root of its mean square along the last axis. `own`: nobody else holds x, so it may be changed."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cpu:
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    factor = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x, factor, out=x if own else torch.empty_like(x))


def times(own: Tensor, factor: Tensor) -> Tensor:
    """own * factor; changes `own`, which nobody else may hold, where no gradient is asked for."""
    return own * factor if torch.is_grad_enabled() else own.mul_(factor)


def _attend_equals(q_BnHd: Tensor, k_BnHd: Tensor, v_BnHd: Tensor, kernel: Kernel) -> Tensor:
    q, k, v = (x_BnHd.transpose(1, 2) for x_BnHd in (q_BnHd, k_BnHd, v_BnHd))
    return kernel(q, k, v).transpose(1, 2)
