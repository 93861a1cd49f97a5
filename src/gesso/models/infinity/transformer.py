"""Infinity's transformer: text and coarse scales in, the bits of the next scale out.

Notable: next-scale prediction (every token sees all tokens of its own and earlier scales); two-dimensional rotary
positions; queries and keys of unit length with a learned scale a head; one shared adaptive layer norm plus a small
table a block; cross-attention to text; a head of two logits a bit (infinite-vocabulary classifier).
Source: Infinity, arXiv:2412.04431, sections 3.1-3.3.

Here: the network, for training (`forward`, all scales at once) and for generation (`step`, one scale over a cache).
Not here: sampling bits (`sampling/bits`), guidance between prompts (`pipelines/infinity`), published names
(`checkpoint`).

Shapes: B batch, L tokens of all scales, n tokens of one scale, C width, H heads, D head width, P = D/2 rotary pairs,
T text tokens, E text width, K bits a token. The residual stream is float32; matmuls run in the blocks' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.devices import CPU
from gesso.models.infinity.cache import KeyValueCache
from gesso.models.infinity.layers import (
    AttentionPool,
    CrossAttention,
    FeedForward,
    SelfAttention,
    drop_path,
)
from gesso.models.infinity.rotary import RotaryMode, Turns, rotary_table, turns
from gesso.models.infinity.scales import ScaleSchedule


@dataclass(frozen=True, kw_only=True)
class InfinityConfig:
    """Sizes and switches that change what the network computes. See `SIZES` for the published ones."""

    depth: int
    width: int
    heads: int
    bits: int
    text_width: int
    text_length: int
    pool_heads: int
    patchify: bool = False
    feed_forward_width: int | None = None
    scale_embeddings: int = 15
    scale_embedding_every: int = 0  # 0: added once, before block 0; k: before blocks 0, k, 2k, …
    rotary: RotaryMode | None = "normalized"
    drop_path: float = 0.0
    cross_attention_scale: float | None = None  # initial value of an optional learned gate on cross-attention

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % self.pool_heads or (self.width // self.heads) % 4:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads of a multiple of 4")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Width inside the feed-forward: about 4C, to the nearest multiple of 256 (ties to even) as published."""
        return self.feed_forward_width or max(1, round(4 * self.width / 256)) * 256


class Modulation(NamedTuple):
    """Gates, scales and shifts of one block, each `[B,1,C]`: first of the self-attention, then of the feed-forward.

    Scales are whole factors, 1 and what was learned.
    """

    gate1: Tensor
    gate2: Tensor
    scale1: Tensor
    scale2: Tensor
    shift1: Tensor
    shift2: Tensor


class TextCondition(NamedTuple):
    """All the network wants of prompts, computed once: pooled text, what it makes of every block's and the head's
    norms, and every block's keys and values.

    `modulations` and the head's scale and shift have a row a prompt; `mask_BT` is None where all are equally long.
    """

    pooled_BC: Tensor
    modulations: list[Modulation]
    head_modulation: tuple[Tensor, Tensor]
    keys_values: list[tuple[Tensor, Tensor]]
    mask_BT: Tensor | None


class Layout(NamedTuple):
    """A schedule as training sees it: every token's scale, which tokens it may look at, and its rotation."""

    scale_L: Tensor
    mask_LL: Tensor
    rotary: Turns | None


class LayerGuidance(NamedTuple):
    """Guidance inside the network: after `block`, hidden states of conditional rows are mixed with the others.

    Rows are `[conditional…, unconditional…]`, equally many; the mix replaces both.
    """

    block: int
    scale_B11: Tensor


class Block(nn.Module):
    """Self-attention, cross-attention to text, feed-forward."""

    def __init__(self, config: InfinityConfig, drop: float) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 1, 6, config.width))
        self.self_attention = SelfAttention(config.width, config.heads)
        self.cross_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.cross_attention = CrossAttention(config.width, config.heads)
        gate = config.cross_attention_scale
        self.cross_gate = None if gate is None else nn.Parameter(torch.full((config.width,), gate))
        self.feed_forward = FeedForward(config.width, config.hidden)
        self.drop = drop

    def modulation_by(self, shared_B16C: Tensor) -> Modulation:
        """This block's own table upon what all blocks share."""
        gate1, gate2, scale1, scale2, shift1, shift2 = (shared_B16C + self.modulation).unbind(2)
        return Modulation(gate1, gate2, 1 + scale1, 1 + scale2, shift1, shift2)

    def forward(
        self,
        x: Tensor,
        m: Modulation,
        rotary: Turns | None,
        text: tuple[Tensor, Tensor],
        text_mask: Tensor | None,
        past: KeyValueCache.Layer | Tensor | None,
    ) -> Tensor:
        h = self.self_attention(_modulated(x, m.scale1, m.shift1), rotary, past)
        x = torch.addcmul(x, drop_path(h, self.drop, self.training).to(x.dtype), m.gate1)
        h = self.cross_attention(self.cross_norm(x), text, text_mask)
        x = x + (h if self.cross_gate is None else h * self.cross_gate)
        h = self.feed_forward(_modulated(x, m.scale2, m.shift2))
        return torch.addcmul(x, drop_path(h, self.drop, self.training).to(x.dtype), m.gate2)


class InfinityTransformer(nn.Module):
    """The whole network. Make it with `InfinityConfig`, fill it with `initialize` (training) or a checkpoint.

    `repeated_blocks` are what is worth compiling.
    """

    repeated_blocks: ClassVar = (Block,)

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.null_text = nn.Parameter(torch.empty(config.text_length, config.text_width))
        self.text_norm = nn.RMSNorm(config.text_width, eps=1e-6)
        self.pool = AttentionPool(config.text_width, width, config.pool_heads)
        self.text_projection = FeedForward(config.text_width, width, width)
        self.start = nn.Parameter(torch.empty(1, 1, width))
        self.scale_embedding = nn.Embedding(config.scale_embeddings, width)
        self.code_embedding = nn.Linear(config.bits, width)
        self.modulation = nn.Linear(width, 6 * width)
        drops = [config.drop_path * index / max(1, config.depth - 1) for index in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, drop) for drop in drops)
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 2 * config.bits)

    # ---- text -------------------------------------------------------------------------------------------------------

    def read_text(self, features_BTE: Tensor, mask_BT: Tensor | None = None) -> TextCondition:
        """Project text features, `[B,T,E]` padded at the end, to what every block reads. Done once a prompt.

        `mask_BT` is true on real tokens (`text_mask`), None where there is no padding.
        """
        normed_BTE = self.text_norm(features_BTE.float())
        pooled_BC = self.pool(normed_BTE, mask_BT)
        source_BTC = self.text_projection(normed_BTE)
        blocks, shared_B16C = self._blocks(), self.shared_modulation(pooled_BC)
        scale_B1C, shift_B1C = self.head_modulation(F.silu(pooled_BC))[:, None].chunk(2, dim=-1)
        return TextCondition(
            pooled_BC=pooled_BC,
            modulations=[block.modulation_by(shared_B16C) for block in blocks],
            head_modulation=(1 + scale_B1C, shift_B1C),
            keys_values=[block.cross_attention.read(source_BTC) for block in blocks],
            mask_BT=mask_BT,
        )

    def drop_text(self, features_BTE: Tensor, dropped_B: Tensor) -> Tensor:
        """Replace the text of the dropped prompts by the first rows of the learned null text (a new tensor)."""
        null_1TE = self.null_text[None, : features_BTE.shape[1]].to(features_BTE.dtype)
        return torch.where(dropped_B[:, None, None], null_1TE, features_BTE)

    # ---- training: all scales at once -------------------------------------------------------------------------------

    def layout(self, schedule: ScaleSchedule) -> Layout:
        """What `forward` needs of a schedule; make it once and keep it."""
        device = self.start.device
        return Layout(
            scale_indices(schedule, device),
            scale_mask(schedule, device),
            self._rotary(schedule, 0, schedule.tokens, device),
        )

    def forward(self, inputs_BLK: Tensor, text: TextCondition, layout: Layout) -> Tensor:
        """Logits `[B,L,2K]` (pairs of zero, one) of every token from the codes of the scales before it.

        `inputs_BLK` are the tokens of scales 2….
        """
        embedded = self.code_embedding(inputs_BLK).float()
        x_BLC = torch.cat((self.first_token(text), embedded), dim=1)
        scale_LC = self.scale_embedding(layout.scale_L)
        for index, block in enumerate(self._blocks()):
            if self._embeds_scale(index):
                x_BLC = x_BLC + scale_LC
            m, keys_values = text.modulations[index], text.keys_values[index]
            x_BLC = block(x_BLC, m, layout.rotary, keys_values, text.mask_BT, layout.mask_LL)
        return self.logits(x_BLC, text)

    # ---- generation: one scale over a cache -------------------------------------------------------------------------

    def step(
        self,
        inputs_BnK: Tensor | None,
        text: TextCondition,
        schedule: ScaleSchedule,
        scale: int,
        cache: KeyValueCache,
        guidance: LayerGuidance | None = None,
    ) -> Tensor:
        """Logits `[B,n,2K]` of one scale; its keys and values join the cache unless it is the last.

        `inputs_BnK` is None on scale 0, whose one token is the pooled text.
        """
        x_BnC = self.first_token(text) if inputs_BnK is None else self.code_embedding(inputs_BnK).float()
        start, end = schedule.starts[scale], schedule.starts[scale + 1]
        rotary = self._rotary(schedule, start, end, x_BnC.device)
        keep = scale + 1 < len(schedule)
        for index, block in enumerate(self._blocks()):
            if self._embeds_scale(index):
                x_BnC = x_BnC + self.scale_embedding(torch.tensor(scale, device=x_BnC.device))
            past = cache.layer(index, start, keep)
            x_BnC = block(x_BnC, text.modulations[index], rotary, text.keys_values[index], text.mask_BT, past)
            if guidance is not None and index == guidance.block:
                prompt, null = x_BnC.chunk(2)
                mixed = guidance.scale_B11 * prompt + (1 - guidance.scale_B11) * null
                x_BnC = torch.cat((mixed, mixed))
        return self.logits(x_BnC, text)

    def cast_blocks(self, dtype: torch.dtype) -> InfinityTransformer:
        """Put the blocks' matmuls in `dtype`; norms, modulation, head, embeddings and text projection stay float32."""
        for block in self._blocks():
            for part in (block.self_attention, block.cross_attention, block.feed_forward):
                part.to(dtype)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """That of the blocks' matmuls, and of the cache."""
        return self._blocks()[0].self_attention.qkv.weight.dtype

    def empty_cache(self, rows: int, schedule: ScaleSchedule) -> KeyValueCache:
        """A cache for `rows` rows of a schedule, in the blocks' dtype. The last scale needs no room."""
        config, tokens = self.config, schedule.starts[-2]
        return KeyValueCache.empty(
            config.depth, rows, config.heads, tokens, config.head_width, self.dtype, self.start.device
        )

    # ---- parts ------------------------------------------------------------------------------------------------------

    def first_token(self, text: TextCondition) -> Tensor:
        return text.pooled_BC[:, None] + self.start

    def shared_modulation(self, pooled_BC: Tensor) -> Tensor:
        """What all blocks share of the adaptive layer norm, float32 `[B,1,6,C]`."""
        return self.modulation(F.silu(pooled_BC)).float().unflatten(-1, (6, -1))[:, None]

    def logits(self, x: Tensor, text: TextCondition) -> Tensor:
        """Two logits a bit, in float32."""
        return self.head(_modulated(x, *text.head_modulation)).float()

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def _embeds_scale(self, block: int) -> bool:
        every = self.config.scale_embedding_every
        return block % every == 0 if every else block == 0

    def _rotary(self, schedule: ScaleSchedule, start: int, end: int, device: torch.device) -> Turns | None:
        if self.config.rotary is None:
            return None
        table = rotary_table(schedule, self.config.head_width, self.config.rotary)[:, start:end]
        return turns(table.to(device))


def text_mask(lengths: Sequence[int], device: torch.device | str = CPU) -> Tensor | None:
    """True on the first `length` tokens of each prompt, bool `[B, longest]`; None where all are equally long."""
    if len(set(lengths)) == 1:
        return None
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


def scale_indices(schedule: ScaleSchedule, device: torch.device | str = CPU) -> Tensor:
    """Scale number of every token, int64 `[L]`."""
    lengths = torch.tensor([height * width for height, width in schedule.grids])
    return torch.repeat_interleave(torch.arange(len(schedule)), lengths).to(device)


def scale_mask(schedule: ScaleSchedule, device: torch.device | str = CPU) -> Tensor:
    """Training mask, bool `[L,L]`: a token (row) sees all tokens of its own and earlier scales."""
    index_L = scale_indices(schedule, device)
    return index_L[:, None] >= index_L


def _modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm without weights, then scaled and shifted."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale)
