"""The small autoencoder of nano flow models: its sizes, and pictures to scaled latents and back.

The network is diffusers' `AutoencoderKL`; a posterior's mean is taken for the latent. Flow models see latents scaled
by `(z - shift_factor) * scaling_factor`, the convention of FLUX's and Z-Image's own autoencoders, so that over training
pictures their mean is 0 and their standard deviation 1. Not here: training (`training/kl_autoencoder`), files
(`weights/flow_nano`).
Shapes: B pictures, C latent channels, H W pixels, h w latent cells.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from gesso.models.diffusers_parts import autoencoder_kl

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class KLAutoencoderConfig:
    """`widths` are the channels of each level, finest first; every level but the last halves the sides.

    `groups` normalise together, each of at least two channels: one channel a group hides the colour of flat ground.
    """

    latent_channels: int
    widths: tuple[int, ...]
    residual_blocks: int = 1
    groups: int = 4
    shift_factor: float = 0.0
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("latent_channels", "residual_blocks", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if not self.widths or any(width < 1 or width % self.groups for width in self.widths):
            raise ValueError(f"every one of widths must be a multiple of {self.groups} groups")
        if problem := scaling_problem(self.scaling_factor, self.shift_factor):
            raise ValueError(problem)

    @property
    def stride(self) -> int:
        """Pixels along the edge of a latent cell."""
        return 2 ** (len(self.widths) - 1)


def scaling_problem(scaling_factor: object, shift_factor: object) -> str:
    """What keeps latents from being scaled by these, "" if nothing does; a shift of None is none."""
    if not _is_number(scaling_factor) or not scaling_factor > 0:
        return f"scaling_factor {json.dumps(scaling_factor)} is not a finite number above 0"
    if shift_factor is not None and not _is_number(shift_factor):
        return f"shift_factor {json.dumps(shift_factor)} is not a finite number"
    return ""


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def build(config: KLAutoencoderConfig) -> AutoencoderKL:
    """The network with fresh weights. Raises MissingError without diffusers."""
    levels = len(config.widths)
    return autoencoder_kl()(
        down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        block_out_channels=config.widths,  # pyright: ignore[reportArgumentType]
        layers_per_block=config.residual_blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        shift_factor=config.shift_factor,
        scaling_factor=config.scaling_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def encode(autoencoder: AutoencoderKL, image_B3HW: Tensor) -> Tensor:
    """Scaled latents `[B,C,h,w]` of pictures in [-1,1]: the posterior's mean, shifted and scaled."""
    mean_BChw, _ = moments(autoencoder, image_B3HW)
    return (mean_BChw - autoencoder.config["shift_factor"]) * autoencoder.config["scaling_factor"]


def sample(autoencoder: AutoencoderKL, moments_BChw: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """Scaled latents `[B,C,h,w]`, a sample of each posterior of these `moments`; draws as many numbers from CPU."""
    mean_BChw, log_variance_BChw = moments_BChw
    noise_BChw = torch.randn(mean_BChw.shape, generator=generator)
    sample_BChw = mean_BChw + (0.5 * log_variance_BChw).exp() * noise_BChw
    return (sample_BChw - autoencoder.config["shift_factor"]) * autoencoder.config["scaling_factor"]


def decode(autoencoder: AutoencoderKL, latent_BChw: Tensor) -> Tensor:
    """Pictures `[B,3,H,W]`, about [-1,1], of scaled latents."""
    unscaled_BChw = latent_BChw / autoencoder.config["scaling_factor"] + autoencoder.config["shift_factor"]
    return autoencoder.decoder(unscaled_BChw)


def moments(autoencoder: AutoencoderKL, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and logarithm of the variance of the posterior, `[B,C,h,w]` each, unscaled."""
    mean_BChw, log_variance_BChw = torch.chunk(autoencoder.encoder(image_B3HW), 2, dim=1)
    return mean_BChw, log_variance_BChw.clamp(-30.0, 20.0)
