"""InfuseNet: InfiniteYou's side network to FLUX, which adds a face to what every block of FLUX makes.

The network is diffusers' `FluxControlNetModel`, unchanged; what differs from an ordinary control net is what it is
given (arXiv:2503.16418, section 3.2): tokens of an identity for text, key points or black for the picture, and a
guidance of one whatever FLUX is guided by. FLUX adds residual i // ceil(blocks / residuals) after block i.
Not here: FLUX itself, the identity's tokens (`resampler`), when it acts (`sampling/windows`).
Shapes: B pictures, L picture tokens of D numbers, N identity tokens of width E, P pooled text, W inner width.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gesso.models.diffusers_parts import flux_control_network

if TYPE_CHECKING:
    from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel

GUIDANCE = 1.0
"""What InfuseNet is told of guidance, always."""
IDENTITY_TOKENS = 8
"""Of one person, as published."""


@dataclass(frozen=True)
class Residuals:
    """What is added to FLUX's picture tokens, `[B,L,W]` each: after its double blocks, and after its single ones."""

    double: Sequence[Tensor] | None
    single: Sequence[Tensor] | None

    def arguments(self) -> dict[str, Sequence[Tensor] | None]:
        """As diffusers' `FluxTransformer2DModel` takes them."""
        return {"controlnet_block_samples": self.double, "controlnet_single_block_samples": self.single}


def build(config: Mapping[str, Any]) -> FluxControlNetModel:
    """The network of a published configuration, with fresh weights. Raises MissingError without diffusers."""
    kind = flux_control_network()
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of where diffusers keeps its positions
        return kind(**config)


def residuals(
    network: FluxControlNetModel,
    *,
    tokens_BLD: Tensor,
    control_BLD: Tensor,
    identity_BNE: Tensor,
    pooled_BP: Tensor,
    time_B: Tensor,
    positions_L3: Tensor,
    scale: float,
) -> Residuals:
    """One evaluation. `time_B` is sigma; `control_BLD` are the control picture's latents, scaled and packed."""
    values: Any = network.config
    guidance_B = None
    if values["guidance_embeds"]:
        guidance_B = torch.full((len(tokens_BLD),), GUIDANCE, device=tokens_BLD.device, dtype=tokens_BLD.dtype)
    double, single = network(
        hidden_states=tokens_BLD,
        controlnet_cond=control_BLD,
        conditioning_scale=scale,
        encoder_hidden_states=identity_BNE,
        pooled_projections=pooled_BP,
        timestep=time_B,
        img_ids=positions_L3,
        txt_ids=identity_BNE.new_zeros(identity_BNE.shape[1], 3),
        guidance=guidance_B,
        return_dict=False,
    )
    return Residuals(double, single)
