"""A small random S3-DiT for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.packing import Size
from gesso.models.s3dit.transformer import Prompt, S3DiT, size_of

TEXT_WIDTH, PICTURE_WIDTH = 10, 6


def small_config(**switches: object) -> S3DiTConfig:
    sizes: dict[str, object] = {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1}
    sizes |= {"n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": TEXT_WIDTH, "siglip_feat_dim": PICTURE_WIDTH}
    sizes |= {"axes_dims": (4, 6, 6), "axes_lens": (512, 64, 64)}
    return S3DiTConfig(**(sizes | switches))  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def small_s3dit(**switches: object) -> S3DiT:
    """Weights at full strength, so that every part shows in the output."""
    network = S3DiT(small_config(**switches))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(values / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(1 + 0.1 * values if name.endswith("weight") else 0.1 * values)
    return network.eval()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents_of(*sizes: Size) -> list[Tensor]:
    """One a size, each another."""
    return [drawn(4, *size, seed=10 + index) for index, size in enumerate(sizes)]


def captions_of(*lengths: int) -> list[Tensor]:
    """Features of one caption a length, each another."""
    return [drawn(length, TEXT_WIDTH, seed=20 + index) for index, length in enumerate(lengths)]


def times_of(count: int) -> Tensor:
    """One a picture, each another."""
    return torch.linspace(0.1, 0.9, count)


def evaluate(
    network: S3DiT,
    latents: Sequence[Tensor],
    prompts: Sequence[Prompt],
    times: Tensor,
    image_of: Sequence[int] | None = None,
) -> list[Tensor]:
    """Read, joined and forwarded; with gradients if they are enabled."""
    company = network.join([size_of(latent) for latent in latents], network.read(prompts), image_of)
    return network(latents, times, company)
