"""Infinity's tokenizer network: a convolutional encoder and decoder around the (parameter-free) quantizer.

Names here are ours; `checkpoint` knows the published ones. Not here: quantization (`quantizer`), training.
Shapes: B batch, H W pixels, h w latent cells, K bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """`multipliers[i]` times `width` channels at level i; level 0 is pixels, each further one half the size."""

    bits: int
    width: int
    encoder_multipliers: tuple[int, ...]
    decoder_multipliers: tuple[int, ...]
    residual_blocks: int
    stride: int
    groups: int = 32

    def __post_init__(self) -> None:
        levels = self.stride.bit_length()
        if self.stride != 1 << (levels - 1) or len(self.encoder_multipliers) < levels:
            raise ValueError(f"stride {self.stride} needs {levels} levels and a power of two")


class Autoencoder(nn.Module):
    """Pixels in [-1,1] to raw features and back."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Raw features `[B,K,H/stride,W/stride]`, float32; they go to the quantizer without scale or shift."""
        return self.encoder(image_B3HW.to(self.dtype)).float()

    def decode(self, latent_BKhw: Tensor) -> Tensor:
        """Pixels `[B,3,h*stride,w*stride]` in float32, clamped to [-1,1]."""
        return self.decoder(latent_BKhw.to(self.dtype)).float().clamp(-1, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    def cast(self, dtype: torch.dtype) -> Autoencoder:
        """Put all weights in `dtype`, laid out as its convolutions run fastest. Returns itself."""
        return self.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


class Encoder(nn.Module):
    """Levels from pixels to latent, each ending with a stride-2 convolution until `stride` is reached."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.width * multiplier for multiplier in config.encoder_multipliers]
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1)
        self.levels = nn.ModuleList()
        previous = config.width
        for index, width in enumerate(widths):
            halves = index < config.stride.bit_length() - 1
            self.levels.append(DownLevel(previous, width, config.residual_blocks, halves, config.groups))
            previous = width
        self.middle = nn.ModuleList(ResidualBlock(previous, previous, config.groups) for _ in range(2))
        self.norm_out = nn.GroupNorm(config.groups, previous, eps=1e-6)
        self.conv_out = nn.Conv2d(previous, config.bits, 3, padding=1)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        x = self.conv_in(image_B3HW)
        for level in self.levels:
            x = level(x)
        for block in self.middle:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """The encoder's mirror, with one residual block more a level; `levels[i]` is level i, run from last to first."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.width * multiplier for multiplier in config.decoder_multipliers]
        previous = widths[-1]
        self.conv_in = nn.Conv2d(config.bits, previous, 3, padding=1)
        self.middle = nn.ModuleList(ResidualBlock(previous, previous, config.groups) for _ in range(2))
        levels: list[UpLevel] = []
        for index in reversed(range(len(widths))):
            doubles = 1 <= index < config.stride.bit_length()
            levels.append(UpLevel(previous, widths[index], config.residual_blocks + 1, doubles, config.groups))
            previous = widths[index]
        self.levels = nn.ModuleList(reversed(levels))
        self.norm_out = nn.GroupNorm(config.groups, previous, eps=1e-6)
        self.conv_out = nn.Conv2d(previous, 3, 3, padding=1)

    def forward(self, latent_BKhw: Tensor) -> Tensor:
        x = self.conv_in(latent_BKhw)
        for block in self.middle:
            x = block(x)
        for level in reversed(cast("list[nn.Module]", list(self.levels))):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class DownLevel(nn.Module):
    """Residual blocks, then (where it halves) a stride-2 convolution padded by one row and column at the far edges."""

    def __init__(self, width_in: int, width: int, blocks: int, halves: bool, groups: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(width_in if i == 0 else width, width, groups) for i in range(blocks))
        self.downsample = nn.Conv2d(width, width, 3, stride=2) if halves else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(F.pad(x, (0, 1, 0, 1)))


class UpLevel(nn.Module):
    """Residual blocks, then (where it doubles) nearest-neighbour enlargement and a convolution."""

    def __init__(self, width_in: int, width: int, blocks: int, doubles: bool, groups: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(width_in if i == 0 else width, width, groups) for i in range(blocks))
        self.upsample = nn.Conv2d(width, width, 3, padding=1) if doubles else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.upsample is None else self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResidualBlock(nn.Module):
    """Two normalised, activated 3x3 convolutions beside a shortcut."""

    def __init__(self, width_in: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


def to_uint8(image_B3HW: Tensor) -> Tensor:
    """Pixels in [-1,1] to bytes `[B,H,W,3]`, RGB, by truncation as the published code does."""
    return ((image_B3HW.float() + 1) / 2 * 255).to(torch.uint8).movedim(1, -1)
