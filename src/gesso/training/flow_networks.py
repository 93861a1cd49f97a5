"""Flow networks as one thing to train: noisy latents, sigma and text features in, velocity out.

One adapter a network, which holds its conventions of time, sign, tokens and text. Everywhere outside sigma is 1 for
noise and 0 for clean, a noisy latent is (1 - sigma) * clean + sigma * noise, and the velocity is noise - clean.
Not here: the networks (`models`), the loss (`flow`).
Shapes: B pictures, C latent channels, h w latent cells, T tokens of text (padding included), E text features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gesso.models import flux_network
from gesso.models.flux_network import FluxConfig
from gesso.models.infusenet import Residuals
from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.initialization import initialize
from gesso.models.s3dit.layout import Layout
from gesso.models.s3dit.transformer import Company, Prompt, S3DiT
from gesso.models.word_features import fixed_length

NetworkConfig = FluxConfig | S3DiTConfig


class FluxVelocity(nn.Module):
    """FLUX: time is sigma itself and the output is the velocity; text has one length, with zeros where it is short."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.transformer = flux_network.build(config)
        flux_network.initialize(self.transformer)
        # Time is cast to the dtype of embedded tokens: under bfloat16 autocast it would be off by up to 2 of 1000.
        embed_in_float32(self.transformer)
        # Schedulers cast latents to the dtype of the velocity, and times to that of the latents: the same again.
        self.transformer.proj_out.register_forward_hook(_in_float32)

    def heavy_modules(self) -> list[nn.Module]:
        """What is worth compiling."""
        return [self]

    def forward(
        self,
        latent_BChw: Tensor,
        sigma_B: Tensor,
        features_BTE: Tensor,
        real_BT: Tensor,
        added: Residuals | None = None,
    ) -> Tensor:
        """Velocity `[B,C,h,w]`; `real_BT` is false where there is padding, `added` is what a side network adds."""
        height, width = latent_BChw.shape[-2:]
        features_BTE, pooled_BE = fixed_length(features_BTE, real_BT)
        (velocity_BLD,) = self.transformer(
            hidden_states=flux_network.pack(latent_BChw),
            timestep=sigma_B,
            encoder_hidden_states=features_BTE,
            pooled_projections=pooled_BE,
            img_ids=flux_network.positions(height, width),
            txt_ids=torch.zeros(features_BTE.shape[1], 3),
            return_dict=False,
            **(added.arguments() if added is not None else {}),
        )
        return flux_network.unpack(velocity_BLD, height, width)


def embed_in_float32(network: Any) -> None:
    """Keep embedded tokens of FLUX, or of its side network, in float32, by hooks on the module."""
    for embedder in (network.x_embedder, network.context_embedder):
        embedder.register_forward_hook(_in_float32)


def _in_float32(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.float()


class ZImageVelocity(nn.Module):
    """Z-Image: time is 1 - sigma and the output clean - noise, the velocity negated; each text has its own length."""

    def __init__(self, config: S3DiTConfig) -> None:
        super().__init__()
        self.transformer = S3DiT(config)
        initialize(self.transformer)
        self._layouts: dict[object, Layout] = {}

    def heavy_modules(self) -> list[nn.Module]:
        """Not the adapter itself: captions have other lengths in every batch."""
        return [self.transformer]

    def forward(self, latent_BChw: Tensor, sigma_B: Tensor, features_BTE: Tensor, real_BT: Tensor) -> Tensor:
        """Velocity `[B,C,h,w]`; `real_BT` is false where there is padding, which comes last."""
        lengths = real_BT.sum(dim=1).tolist()
        captions = [row_TE[:length] for row_TE, length in zip(features_BTE, lengths, strict=True)]
        company = self._company(latent_BChw, captions)
        outputs = self.transformer(list(latent_BChw[:, :, None].unbind()), 1 - sigma_B, company)
        return -torch.stack(outputs)[:, :, 0]

    def _company(self, latent_BChw: Tensor, captions: list[Tensor]) -> Company:
        """These samples as a company; where tokens lie depends on lengths only after padding, and is kept."""
        contexts = self.transformer.read([Prompt([caption_TE]) for caption_TE in captions])
        height, width = latent_BChw.shape[-2:]
        key = (height, width, *(context.shape.caption_tokens for context in contexts))
        if key in self._layouts:
            tokens_ND, conditions_MD = (torch.cat(parts) for parts in zip(*(c[:2] for c in contexts), strict=True))
            return Company(self._layouts[key], tokens_ND, conditions_MD)
        company = self.transformer.join([(1, height, width)] * len(captions), contexts)
        self._layouts = {key: company.layout}
        return company


VelocityNetwork = FluxVelocity | ZImageVelocity

FAMILIES: dict[type, tuple[str, Callable[..., VelocityNetwork]]] = {
    FluxConfig: ("flux", FluxVelocity),
    S3DiTConfig: ("z-image", ZImageVelocity),
}
"""By a configuration's class: the family's name, and its adapter."""
