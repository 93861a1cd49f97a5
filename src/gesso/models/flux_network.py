"""FLUX's network at a small size: its configuration, a start to train from, and latents as its tokens.

The network is diffusers' `FluxTransformer2DModel`. Convention, here and in all of FLUX: time is sigma, 1 noise … 0
clean (the network itself multiplies by 1000), and its output is the velocity noise - clean. There is no mask for
text: every prompt has the same number of tokens, and positions of text are all zero.
Not here: the sampling loop (`pipelines/flux`), files (`weights`).
Shapes: B pictures, C latent channels, h w latent cells, L = h/2 * w/2 tokens of 2 x 2 cells, D = 4C.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gesso.models.diffusers_parts import flux_transformer

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

_MODULATION = ("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear")


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """Sizes by diffusers' names. `axes_dims_rope` split a head's features among (frame, row, column)."""

    in_channels: int
    num_layers: int
    num_single_layers: int
    num_attention_heads: int
    attention_head_dim: int
    joint_attention_dim: int
    pooled_projection_dim: int
    axes_dims_rope: tuple[int, int, int]
    guidance_embeds: bool = False

    def __post_init__(self) -> None:
        if self.in_channels < 4 or self.in_channels % 4:
            raise ValueError(f"in_channels {self.in_channels} is not four times the latent's channels")
        for name in ("num_attention_heads", "attention_head_dim", "joint_attention_dim", "pooled_projection_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if min(self.num_layers, self.num_single_layers) < 0 or self.num_layers + self.num_single_layers < 1:
            raise ValueError("there must be at least one layer")
        if any(size < 2 or size % 2 for size in self.axes_dims_rope):
            raise ValueError("every one of axes_dims_rope must be even and at least 2")
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"attention_head_dim {self.attention_head_dim} is not the sum of axes_dims_rope, "
                f"{sum(self.axes_dims_rope)}"
            )

    @property
    def latent_channels(self) -> int:
        return self.in_channels // 4

    @property
    def text_width(self) -> int:
        return self.joint_attention_dim


def build(config: FluxConfig) -> FluxTransformer2DModel:
    """The network with fresh weights. Raises MissingError without diffusers."""
    return flux_transformer()(**asdict(config))


@torch.no_grad()
def initialize(network: FluxTransformer2DModel) -> None:
    """Every block begins as the identity and the output as zero (adaLN-Zero, arXiv:2212.09748, section 3.2)."""
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        nn.init.zeros_(module.bias)
        if name == "proj_out" or name.endswith(_MODULATION):
            nn.init.zeros_(module.weight)
        elif name.startswith("time_text_embed."):
            nn.init.normal_(module.weight, std=0.02)
        else:
            nn.init.xavier_uniform_(module.weight)


def pack(latent_BChw: Tensor) -> Tensor:
    """Latents as tokens `[B,L,D]` of 2 x 2 cells in order of rows; inside a token the channel is slowest."""
    batch, channels, height, width = latent_BChw.shape
    cells = latent_BChw.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpack(tokens_BLD: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, `[B,C,height,width]`."""
    cells = tokens_BLD.unflatten(1, (height // 2, width // 2)).unflatten(-1, (-1, 2, 2))
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def positions(height: int, width: int) -> Tensor:
    """Positions `[L,3]` of the tokens of a latent `height` by `width` cells: (0, row, column)."""
    rows, columns = torch.arange(height // 2), torch.arange(width // 2)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros(len(grid), 1), grid.float()], dim=1)
