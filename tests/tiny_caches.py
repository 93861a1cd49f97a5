"""Tiny networks of every class that step caches know, and calls of them. Not here: pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuanimage import HunyuanImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from torch import Tensor, nn

from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.transformer import Prompt, S3DiT, size_of

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
ROWS = 4  # of latent tokens, and columns; 16 tokens in all but Z-Image
TEXT = 5

Times = float | Sequence[float]
Call = Callable[[nn.Module, Sequence[int], Times], Tensor]
"""The network's outputs `[B,...]` for rows of these seeds, at one time or one each."""


def _filled(network: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 0.3 if parameter.ndim == 1 else 1.5 / parameter[0].numel() ** 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return network.eval().requires_grad_(False)


def flux() -> nn.Module:
    axes: dict[str, Any] = {"axes_dims_rope": (4, 6, 6), "guidance_embeds": False}
    sizes: dict[str, Any] = {"in_channels": 8, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 12}
    return _filled(FluxTransformer2DModel(patch_size=1, pooled_projection_dim=8, **sizes, **axes, **HEADS))


def qwen() -> nn.Module:
    sizes: dict[str, Any] = {"in_channels": 8, "out_channels": 2, "num_layers": 3, "joint_attention_dim": 12}
    return _filled(QwenImageTransformer2DModel(**sizes, axes_dims_rope=(4, 6, 6), **HEADS))


def hunyuan_video() -> nn.Module:
    sizes: dict[str, Any] = {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 12}
    sizes |= {
        "patch_size": 1,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6),
        "guidance_embeds": False,
    }
    return _filled(HunyuanVideoTransformer3DModel(in_channels=4, out_channels=4, **sizes, **HEADS))


def hunyuan_image() -> nn.Module:
    sizes: dict[str, Any] = {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 12}
    sizes |= {
        "patch_size": (1, 1),
        "text_embed_2_dim": None,
        "rope_axes_dim": (8, 8),
        "guidance_embeds": False,
    }
    return _filled(HunyuanImageTransformer2DModel(in_channels=4, out_channels=4, **sizes, **HEADS))


def z_image() -> nn.Module:
    sizes: dict[str, Any] = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
    }
    config = S3DiTConfig(**sizes, cap_feat_dim=12, axes_dims=(4, 6, 6), axes_lens=(128, 32, 32))
    return _filled(S3DiT(config))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _times(seeds: Sequence[int], time: Times) -> Tensor:
    return torch.tensor([time] * len(seeds) if isinstance(time, int | float) else list(time))


def _moving(seeds: Sequence[int], time: Times, *shape: int) -> Tensor:
    """Latents that change with time."""
    return _rows(seeds, *shape) + _times(seeds, time).view(-1, *[1] * len(shape))


def _rows(seeds: Sequence[int], *shape: int) -> Tensor:
    return torch.stack([noise(seed, *shape) for seed in seeds])


def call_flux(network: nn.Module, seeds: Sequence[int], time: Times) -> Tensor:
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(ROWS).float(), torch.arange(ROWS).float())
    return network(
        hidden_states=_moving(seeds, time, ROWS * ROWS, 8),
        timestep=_times(seeds, time),
        encoder_hidden_states=_rows([seed + 100 for seed in seeds], TEXT, 12),
        pooled_projections=_rows([seed + 200 for seed in seeds], 8),
        img_ids=grid,
        txt_ids=torch.zeros(TEXT, 3),
        return_dict=False,
    )[0]


def call_qwen(network: nn.Module, seeds: Sequence[int], time: Times) -> Tensor:
    return network(
        hidden_states=_moving(seeds, time, ROWS * ROWS, 8),
        timestep=_times(seeds, time),
        encoder_hidden_states=_rows([seed + 100 for seed in seeds], TEXT, 12),
        encoder_hidden_states_mask=torch.ones(len(seeds), TEXT, dtype=torch.bool),
        img_shapes=[[(1, ROWS, ROWS)]] * len(seeds),
        return_dict=False,
    )[0]


def call_hunyuan_video(network: nn.Module, seeds: Sequence[int], time: Times) -> Tensor:
    return network(
        hidden_states=_moving(seeds, time, 4, 1, ROWS, ROWS),
        timestep=1000 * _times(seeds, time),
        encoder_hidden_states=_rows([seed + 100 for seed in seeds], TEXT, 12),
        encoder_attention_mask=torch.ones(len(seeds), TEXT, dtype=torch.int64),
        pooled_projections=_rows([seed + 200 for seed in seeds], 8),
        return_dict=False,
    )[0]


def call_hunyuan_image(network: nn.Module, seeds: Sequence[int], time: Times) -> Tensor:
    return network(
        hidden_states=_moving(seeds, time, 4, ROWS, ROWS),
        timestep=1000 * _times(seeds, time),
        encoder_hidden_states=_rows([seed + 100 for seed in seeds], TEXT, 12),
        encoder_attention_mask=torch.ones(len(seeds), TEXT, dtype=torch.int64),
        return_dict=False,
    )[0]


def call_z_image(network: nn.Module, seeds: Sequence[int], time: Times) -> Tensor:
    """Captions differ in length with the seed, so that samples lie packed in an order of their own."""
    assert isinstance(network, S3DiT)
    latents = list(_moving(seeds, time, 4, 1, 2 * ROWS, 2 * ROWS))
    prompts = [Prompt([noise(seed + 100, 70 - 40 * (seed % 2), 12)]) for seed in seeds]
    company = network.join([size_of(latent) for latent in latents], network.read(prompts))
    return torch.stack(network(latents, _times(seeds, time), company))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "flux": (flux, call_flux),
    "qwen": (qwen, call_qwen),
    "hunyuan_video": (hunyuan_video, call_hunyuan_video),
    "hunyuan_image": (hunyuan_image, call_hunyuan_image),
    "z_image": (z_image, call_z_image),
}
