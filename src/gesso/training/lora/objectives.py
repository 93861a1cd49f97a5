"""What a LoRA learns, by family: the velocity of a flow, the noise in a latent, or the bits of Infinity.

Each hands the base network a batch as its pipeline does at a step, on the pipeline's device and in its dtype, and
compares in float32. A `share` from 0 to 1 says which part of all times is meant, so that a batch can be drawn evenly
and measured evenly. Not here: latents and text (`material`), the loop's task (`task`).
Shapes: B pictures, C latent channels, h w latent cells, T text tokens, E text features, K bits a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gesso.errors import RequestError
from gesso.models import flux_network
from gesso.models.infinity.correction import draw_flips, training_tokens
from gesso.models.infinity.transformer import text_mask
from gesso.training.flow import bent_sigmas
from gesso.training.infinity_loss import bitwise_loss, margin_weights, scale_weights
from gesso.training.lora.material import RememberedText, Row
from gesso.training.lora.settings import BitsLoraSettings, FlowLoraSettings, LoraSettings

Velocity = Callable[[Tensor, Tensor, Sequence[Row]], Tensor]
"""Noisy latents `[B,C,h,w]`, sigmas `[B]` and texts to velocities `[B,C,h,w]`, noise less clean."""


class Objective(Protocol):
    """What is learned of a batch of latents and texts."""

    def loss(self, latent_BChw: Tensor, texts: Sequence[Row], shares_B: Tensor, generator: torch.Generator) -> Tensor:
        """A scalar; all that is random is the generator's, which is on the CPU."""
        ...

    def unprompted(self, text: Row) -> Row:
        """What is read in place of this text where there is no prompt."""
        ...


def objective(family: str, pipeline: Any, text: RememberedText, settings: LoraSettings) -> Objective:
    """That of a family's pipeline. Raises RequestError for a network that reads more than a latent and a text."""
    if isinstance(settings, FlowLoraSettings):
        return _Flow(_VELOCITIES[family](pipeline, settings), text.row(_UNPROMPTED.get(family, "")), pipeline, settings)
    if isinstance(settings, BitsLoraSettings):
        return _Bits(pipeline, settings)
    return _Noise(pipeline, text)


class _Flow:
    """Rectified flow (arXiv:2209.03003): sigma is 1 for noise, and the velocity is noise less clean."""

    def __init__(self, velocity: Velocity, nothing: Row, pipeline: Any, settings: FlowLoraSettings) -> None:
        self.velocity, self.nothing, self.device, self.settings = velocity, nothing, pipeline.device, settings

    def loss(self, latent_BChw: Tensor, texts: Sequence[Row], shares_B: Tensor, generator: torch.Generator) -> Tensor:
        settings = self.settings
        sigma_B = bent_sigmas(
            shares_B, mean=settings.time_mean, deviation=settings.time_std, shift=settings.time_shift
        ).to(self.device)
        noise_BChw = torch.randn(latent_BChw.shape, generator=generator).to(self.device)
        clean_BChw, sigma_B111 = latent_BChw.to(self.device), sigma_B[:, None, None, None]
        noisy_BChw = (1 - sigma_B111) * clean_BChw + sigma_B111 * noise_BChw
        velocity_BChw = self.velocity(noisy_BChw, sigma_B, texts)
        return F.mse_loss(velocity_BChw.float(), noise_BChw - clean_BChw)

    def unprompted(self, text: Row) -> Row:
        return self.nothing


def _flux(pipeline: Any, settings: FlowLoraSettings) -> Velocity:
    """As `pipelines/flux` calls it."""

    def velocity(latent_BChw: Tensor, sigma_B: Tensor, texts: Sequence[Row]) -> Tensor:
        features_BTE, pooled_BP = (part.to(pipeline.device, pipeline.dtype) for part in _stacked(texts))
        size = latent_BChw.shape[-2:]
        guidance_B = torch.full_like(sigma_B, settings.guidance) if pipeline.planner.embeds_guidance else None
        (velocity_BLD,) = pipeline.transformer(
            hidden_states=flux_network.pack(latent_BChw.to(pipeline.dtype)),
            timestep=sigma_B,
            guidance=guidance_B,
            pooled_projections=pooled_BP,
            encoder_hidden_states=features_BTE,
            txt_ids=features_BTE.new_zeros(features_BTE.shape[1], 3),
            img_ids=flux_network.positions(*size).to(pipeline.device, pipeline.dtype),
            return_dict=False,
        )
        return flux_network.unpack(velocity_BLD, *size)

    return velocity


def _qwen_image(pipeline: Any, settings: FlowLoraSettings) -> Velocity:
    """As `pipelines/qwen_image` calls it."""
    from gesso.pipelines.qwen_image import padded

    def velocity(latent_BChw: Tensor, sigma_B: Tensor, texts: Sequence[Row]) -> Tensor:
        height, width = latent_BChw.shape[-2:]
        features_BTE, mask_BT = padded([text[0].to(pipeline.device, pipeline.dtype) for text in texts])
        (velocity_BLD,) = pipeline.transformer(
            hidden_states=flux_network.pack(latent_BChw.to(pipeline.dtype)),
            timestep=sigma_B,
            encoder_hidden_states=features_BTE,
            encoder_hidden_states_mask=mask_BT,
            img_shapes=[[(1, height // 2, width // 2)]] * len(texts),
            return_dict=False,
        )
        return flux_network.unpack(velocity_BLD, height, width)

    return velocity


def _z_image(pipeline: Any, settings: FlowLoraSettings) -> Velocity:
    """As `pipelines/z_image` calls it: time is 1 - sigma, and the output is clean less noise."""
    from gesso.models.s3dit.transformer import Prompt

    network, editing = pipeline.transformer, pipeline.defaults.editing

    def velocity(latent_BChw: Tensor, sigma_B: Tensor, texts: Sequence[Row]) -> Tensor:
        contexts = network.read([Prompt([text[0].to(pipeline.device)], editing=editing) for text in texts])
        company = network.join([(1, *latent_BChw.shape[-2:])] * len(texts), contexts)
        outputs = network(list(latent_BChw[:, :, None].to(pipeline.dtype).unbind()), 1 - sigma_B, company)
        return -torch.stack(outputs)[:, :, 0]

    return velocity


def _hunyuan_video(pipeline: Any, settings: FlowLoraSettings) -> Velocity:
    """As `pipelines/hunyuan_video` calls it, for videos of one frame."""

    def velocity(latent_BChw: Tensor, sigma_B: Tensor, texts: Sequence[Row]) -> Tensor:
        features_BTE, mask_BT, pooled_BP = (part.to(pipeline.device, pipeline.dtype) for part in _stacked(texts))
        (velocity_BC1hw,) = pipeline.transformer(
            hidden_states=latent_BChw[:, :, None].to(pipeline.dtype),
            timestep=sigma_B * 1000,
            encoder_hidden_states=features_BTE,
            encoder_attention_mask=mask_BT,
            pooled_projections=pooled_BP,
            guidance=torch.full_like(sigma_B, settings.guidance * 1000.0, dtype=pipeline.dtype),
            return_dict=False,
        )
        return velocity_BC1hw[:, :, 0]

    return velocity


_VELOCITIES: dict[str, Callable[[Any, FlowLoraSettings], Velocity]] = {
    "flux": _flux,
    "qwen-image": _qwen_image,
    "z-image": _z_image,
    "hunyuan-video": _hunyuan_video,
}
_UNPROMPTED = {"qwen-image": " "}  # what its authors recommend where there is no prompt; others read ""


class _Noise:
    """Noise, or velocity (arXiv:2202.00512), at the times of the model's own schedule (arXiv:2006.11239)."""

    def __init__(self, pipeline: Any, text: RememberedText) -> None:
        from gesso.sampling.noise_schedulers import make_noise_scheduler

        if pipeline.planner.sees_mask:
            raise RequestError("model", pipeline.name, "one that reads nothing beside the latent", "it paints by masks")
        self.pipeline = pipeline
        self.scheduler: Any = make_noise_scheduler("ddpm", pipeline.scheduler, steps=1)[0]
        self.predicts_velocity = pipeline.scheduler.get("prediction_type") == "v_prediction"
        self.nothing = tuple(map(torch.zeros_like, text.row("-"))) if pipeline.zero_empty else text.row("")

    def loss(self, latent_BChw: Tensor, texts: Sequence[Row], shares_B: Tensor, generator: torch.Generator) -> Tensor:
        pipeline, steps = self.pipeline, len(self.scheduler.alphas_cumprod)
        time_B = (shares_B * steps).long().clamp(max=steps - 1)
        noise_BChw = torch.randn(latent_BChw.shape, generator=generator)
        noisy_BChw = self.scheduler.add_noise(latent_BChw, noise_BChw, time_B)
        wanted_BChw = noise_BChw
        if self.predicts_velocity:
            wanted_BChw = self.scheduler.get_velocity(latent_BChw, noise_BChw, time_B)
        features_BTE, pooled_BP = (part.to(pipeline.device, pipeline.dtype) for part in _stacked(texts))
        output_BChw = pipeline.unet(
            noisy_BChw.to(pipeline.device, pipeline.dtype),
            time_B.to(pipeline.device),
            encoder_hidden_states=features_BTE,
            added_cond_kwargs={"text_embeds": pooled_BP, "time_ids": self._sizes(latent_BChw)},
            return_dict=False,
        )[0]
        return F.mse_loss(output_BChw.float(), wanted_BChw.to(pipeline.device))

    def _sizes(self, latent_BChw: Tensor) -> Tensor:
        """Those of pictures that were whole at this size, as the pipeline says at sampling, `[B,6]`."""
        size = [float(edge * self.pipeline.stride) for edge in latent_BChw.shape[-2:]]
        return torch.tensor([[*size, 0.0, 0.0, *size]] * len(latent_BChw), device=self.pipeline.device)

    def unprompted(self, text: Row) -> Row:
        return self.nothing


class _Bits:
    """The bits of every scale from the scales before it, some of which are wrong (arXiv:2412.04431, section 3.4).

    Times do not matter here: all scales are learned at once.
    """

    def __init__(self, pipeline: Any, settings: BitsLoraSettings) -> None:
        self.pipeline, self.settings = pipeline, settings

    def loss(self, latent_BChw: Tensor, texts: Sequence[Row], shares_B: Tensor, generator: torch.Generator) -> Tensor:
        settings, network = self.settings, self.pipeline.transformer
        schedule = self._schedule(latent_BChw)
        grids = schedule.latent_grids(network.config.patchify)
        flips = draw_flips(
            latent_BChw, grids, strength=settings.flip_strength, scales=settings.flip_scales, generator=generator
        )
        tokens = training_tokens(latent_BChw, grids, flips, patchify=network.config.patchify)
        device = self.pipeline.device
        features = [text[0].to(device).float() for text in texts]
        mask_BT = text_mask([len(text_TE) for text_TE in features], device)
        text = network.read_text(pad_sequence(features, batch_first=True), mask_BT)
        logits_BLV = network(tokens.inputs_BLK.to(device), text, network.layout(schedule))
        weights_L = scale_weights(schedule, device) if settings.reweight else None
        weights_BLK = margin_weights(tokens.margins_BLK).to(device) if settings.weigh_margins else None
        return bitwise_loss(logits_BLV, tokens.labels_BLK.to(device), weights_L, weights_BLK)

    def _schedule(self, latent_BChw: Tensor) -> Any:
        stride = self.pipeline.autoencoder.config.stride
        height, width = latent_BChw.shape[-2:]
        return self.pipeline.schedules[height * stride, width * stride]

    def unprompted(self, text: Row) -> Row:
        """The learned null text, as long as the prompt's, as the pipeline has it."""
        return (self.pipeline.transformer.null_text[: len(text[0])].detach(),)


def _stacked(texts: Sequence[Row]) -> Row:
    return tuple(torch.stack(column) for column in zip(*texts, strict=True))
