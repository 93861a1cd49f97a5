"""InfiniteYou's Perceiver resampler: the vector of a face to the few tokens that InfuseNet reads instead of text.

Learned queries attend to the projected input and to themselves, layer by layer; the input never changes. The form is
Flamingo's (arXiv:2204.14198, section 3.1) as InfiniteYou (arXiv:2503.16418) publishes it, names as in its files.
Not here: the vector (`arcface`), reading files (`weights/infinite_you`).
Shapes: B faces, N input tokens, E their width, Q queries, D inner width, H heads, d width of a head, O output width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_PUBLISHED_HEAD = 64


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """Sizes; the defaults are the published network's. `ff_mult` is the feed-forward's width in inner widths."""

    dim: int = 1280
    depth: int = 4
    dim_head: int = 64
    heads: int = 20
    num_queries: int = 8
    embedding_dim: int = 512
    output_dim: int = 4096
    ff_mult: float = 4

    def __post_init__(self) -> None:
        for name in ("dim", "dim_head", "heads", "num_queries", "embedding_dim", "output_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.depth < 0 or int(self.dim * self.ff_mult) < 1:
            raise ValueError("depth must not be negative, and ff_mult must leave a width")


class QueryAttention(nn.Module):
    """Queries attend to the input followed by themselves; normalised apart, keys and values from one projection."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        inner = config.heads * config.dim_head
        self.norm1 = nn.LayerNorm(config.dim)
        self.norm2 = nn.LayerNorm(config.dim)
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        self.to_kv = nn.Linear(config.dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, config.dim, bias=False)

    def forward(self, x_BND: Tensor, queries_BQD: Tensor) -> Tensor:
        x_BND, queries_BQD = self.norm1(x_BND), self.norm2(queries_BQD)
        keys, values = self.to_kv(torch.cat((x_BND, queries_BQD), dim=1)).chunk(2, dim=-1)
        query_BHQd, key_BHMd, value_BHMd = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q(queries_BQD), keys, values)
        )
        scale = query_BHQd.shape[-1] ** -0.25  # on both sides, which keeps half precision from overflowing
        scores_BHQM = (query_BHQd * scale) @ (key_BHMd * scale).transpose(-2, -1)
        weights_BHQM = scores_BHQM.float().softmax(dim=-1).to(scores_BHQM.dtype)
        return self.to_out((weights_BHQM @ value_BHMd).transpose(1, 2).flatten(2))


def _feed_forward(config: ResamplerConfig) -> nn.Sequential:
    width = int(config.dim * config.ff_mult)
    return nn.Sequential(
        nn.LayerNorm(config.dim),
        nn.Linear(config.dim, width, bias=False),
        nn.GELU(),
        nn.Linear(width, config.dim, bias=False),
    )


class Resampler(nn.Module):
    """Input `[B,N,E]` to tokens `[B,Q,O]`."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(torch.randn(1, config.num_queries, config.dim) / config.dim**0.5)
        self.proj_in = nn.Linear(config.embedding_dim, config.dim)
        self.proj_out = nn.Linear(config.dim, config.output_dim)
        self.norm_out = nn.LayerNorm(config.output_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([QueryAttention(config), _feed_forward(config)]) for _ in range(config.depth)
        )

    def forward(self, x_BNE: Tensor) -> Tensor:
        queries_BQD = self.latents.expand(len(x_BNE), -1, -1)
        x_BND = self.proj_in(x_BNE)
        for attention, feed_forward in self.layers:  # pyright: ignore[reportGeneralTypeIssues]
            queries_BQD = attention(x_BND, queries_BQD) + queries_BQD
            queries_BQD = feed_forward(queries_BQD) + queries_BQD
        return self.norm_out(self.proj_out(queries_BQD))


def infer_config(state: Mapping[str, Tensor], head: int = _PUBLISHED_HEAD) -> ResamplerConfig:
    """Sizes as the tensors of a published file tell them; of heads they tell only all together, `head` is one's width.

    Raises KeyError or ValueError where the tensors are of something else.
    """
    _, queries, width = state["latents"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("layers.")})
    inner, hidden = width, 4 * width
    if depth:
        inner, hidden = state["layers.0.0.to_q.weight"].shape[0], state["layers.0.1.1.weight"].shape[0]
    if inner % head:
        raise ValueError(f"{inner} is no multiple of a head's {head}")
    return ResamplerConfig(
        dim=width,
        depth=depth,
        dim_head=head,
        heads=inner // head,
        num_queries=queries,
        embedding_dim=state["proj_in.weight"].shape[1],
        output_dim=state["proj_out.weight"].shape[0],
        ff_mult=hidden / width,
    )
