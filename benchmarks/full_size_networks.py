"""Published models at their full size with random weights: our pipeline, and diffusers' own call over equal parts.

Imported by `benchmarks.full_size`, which is the command. Each family's function makes its networks on the device, in
their dtype, in seconds and with nothing fetched; where the setting is `short` they are the tests' tiny ones, of the
same classes and made likewise. Text is fixed on both sides. Only `flux_to_place`, for memory modes, has text encoders,
random ones too. Not here: what is measured (`full_size`), Infinity (`infinity_125m`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline as TheirQwenImage
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline as TheirZImage
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from benchmarks.identity_memory import AUTOENCODER, CLIP, NETWORK, T5
from benchmarks.loop_overhead import SCHEDULER, FixedText, Paint, by_diffusers
from gesso.models.flux_text import FluxText
from gesso.models.qwen_image_autoencoder import PictureAutoencoder
from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.transformer import S3DiT
from gesso.pipelines.flux import FluxPipeline
from gesso.pipelines.flux_state import FluxDefaults
from gesso.pipelines.qwen_image import QwenImagePipeline
from gesso.pipelines.qwen_image_state import QwenImageDefaults
from gesso.pipelines.sdxl import SdxlPipeline
from gesso.pipelines.sdxl_state import SdxlDefaults
from gesso.pipelines.z_image import ZImagePipeline
from gesso.pipelines.z_image_state import TURBO
from gesso.request import GenerationRequest
from gesso.sampling.flow import FlowSchedule
from gesso.weights.configuration import read_config
from gesso.weights.sdxl_file import CONFIGURATIONS
from tests import tiny_flux, tiny_qwen_image, tiny_sdxl, tiny_z_image

REQUEST = GenerationRequest(prompt="a picture", seed=0)
PROMPT_TOKENS = 64  # where prompts keep their length: a long sentence
FLUX_TOKENS, SDXL_TOKENS = 512, 77  # where they are padded
DOUBLE_BLOCKS, SINGLE_BLOCKS = 19, 38  # of FLUX.1
TURBO_SHIFT = 3.0
QWEN_IMAGE: dict[str, Any] = {
    "num_layers": 60,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 3584,
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is painted, where, and in which dtype; `short` takes tiny networks."""

    device: str
    dtype: torch.dtype
    side: int
    steps: int
    short: bool = False


class Sides(NamedTuple):
    """Our pipeline, the network that it runs at every step and theirs (mostly the same one), and diffusers' call."""

    pipeline: Any
    network: nn.Module
    their_network: Any
    their_paint: Paint


class FullText(FixedText):
    """Random features in place of any family's text encoder: one prompt's, and other ones for every other text."""

    most_skipped = 0
    network: nn.Module = nn.Identity()  # of the class: no part of the model that would be weighed

    def __init__(self, tokens: int, width: int, dtype: torch.dtype, pooled_width: int = 1) -> None:
        generator = torch.Generator().manual_seed(2)
        self.max_tokens = tokens
        self.features_1TE = torch.randn(1, tokens, width, generator=generator).to(dtype)
        self.pooled_1P = torch.randn(1, pooled_width, generator=generator).to(dtype)

    def count(self, prompt: str) -> int:
        return self.max_tokens

    def encode(self, prompts: Sequence[str], skips: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """As FLUX and SDXL ask."""
        return torch.stack(self.features(prompts)), self.pooled_1P.expand(len(prompts), -1)

    def features(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> list[Tensor]:
        """As Z-Image and Qwen-Image ask."""
        return [self.features_of(prompt)[0].to(device) for prompt in prompts]

    def features_of(self, prompt: str) -> Tensor:
        return self.features_1TE if prompt == REQUEST.prompt else self.features_1TE.flip(1)


# ---- networks -------------------------------------------------------------------------------------------------------


def made(make: Callable[[], Any], device: str, dtype: torch.dtype) -> Any:
    """A network made in place and filled: nothing of it is ever in another dtype or on another device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network = make()
    finally:
        torch.set_default_dtype(before)
    fill(network)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """Weights that keep the size of what passes through, so that no sum overflows; modulation at full strength."""
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(mean=1.0 if name.endswith("weight") else 0.0, std=0.1)


def twin(kind: Any, config: dict[str, Any], network: nn.Module) -> Any:
    """diffusers' own class over the very tensors of a network of ours."""
    with torch.device("meta"):
        theirs = kind(**config)
    theirs.load_state_dict(network.state_dict(), assign=True)
    return theirs.eval().requires_grad_(False)


def call(theirs: Any, setting: Setting, **given: Any) -> Paint:
    """diffusers' own call for one picture of the request."""
    theirs.set_progress_bar_config(disable=True)

    def paint() -> Any:
        generator = torch.Generator().manual_seed(REQUEST.seed or 0)
        size = {"width": setting.side, "height": setting.side, "num_inference_steps": setting.steps}
        return theirs(**size, generator=generator, **given).images

    return paint


# ---- families -------------------------------------------------------------------------------------------------------


def z_image(setting: Setting) -> Sides:
    """Z-Image-Turbo, 6.15 B. The autoencoder is in float32 on both sides, as we load it."""
    config = tiny_z_image.NETWORK if setting.short else S3DiTConfig()
    autoencoder = tiny_z_image.AUTOENCODER if setting.short else AUTOENCODER
    transformer = made(lambda: S3DiT(config), setting.device, setting.dtype)
    text = FullText(PROMPT_TOKENS, config.cap_feat_dim, setting.dtype)
    pipeline = ZImagePipeline(
        transformer=transformer,
        autoencoder=made(lambda: AutoencoderKL.from_config(autoencoder), setting.device, torch.float32),
        text=text,
        shift=FlowSchedule(shift=TURBO_SHIFT),
        defaults=replace(TURBO, width=setting.side, height=setting.side, steps=setting.steps),
        name="z-image-random",
        digest="",
        device=setting.device,
        dtype=setting.dtype,
    )
    nothing: Any = None
    theirs = TheirZImage(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=TURBO_SHIFT),
        vae=pipeline.autoencoder,
        text_encoder=nothing,
        tokenizer=nothing,
        transformer=twin(ZImageTransformer2DModel, asdict(config), transformer),
    )
    prompt = [text.features_1TE[0].to(setting.device)]
    paint = call(theirs, setting, prompt_embeds=prompt, guidance_scale=TURBO.guidance)
    return Sides(pipeline, transformer, theirs.transformer, paint)


def flux(setting: Setting) -> Sides:
    """FLUX.1 [dev], 11.9 B."""
    transformer, autoencoder = _flux_parts(setting)
    values: Any = transformer.config
    tokens = tiny_flux.LENGTH if setting.short else FLUX_TOKENS
    text = FullText(tokens, values["joint_attention_dim"], setting.dtype, values["pooled_projection_dim"])
    pipeline = _flux_pipeline(setting, transformer, autoencoder, text)
    return Sides(pipeline, transformer, transformer, by_diffusers(pipeline, setting.device, REQUEST))


def flux_to_place(setting: Setting) -> tuple[FluxPipeline, dict[str, nn.Module]]:
    """FLUX.1 [dev] with T5-XXL and CLIP, all in host memory, and its parts by role, to be put where a mode wants them.

    They are made on the device, which draws numbers faster, and then brought.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_words, t5_words = tiny_flux.clip_tokenizer(), tiny_flux.t5_tokenizer()
    marks: dict[str, Any] = {"bos_token_id": clip_words.bos_token_id, "eos_token_id": clip_words.eos_token_id}
    clip_config = CLIPTextConfig(**CLIP, **marks)
    t5_config = T5Config(**T5, feed_forward_proj="gated-gelu")
    if setting.short:
        small: Any = tiny_flux.tiny_text()
        clip_config, t5_config = small.clip.config, small.t5.config
    transformer, autoencoder = _flux_parts(setting)
    clip = made(lambda: CLIPTextModel(clip_config), setting.device, setting.dtype)
    t5 = made(lambda: T5EncoderModel(t5_config), setting.device, setting.dtype)
    parts = {"text_encoder": clip, "text_encoder_2": t5, "transformer": transformer, "autoencoder": autoencoder}
    for part in parts.values():
        nn.Module.to(part, "cpu")
    length = tiny_flux.LENGTH if setting.short else FLUX_TOKENS
    text = FluxText(clip=clip, t5=t5, clip_tokenizer=clip_words, t5_tokenizer=t5_words, length=length)
    return _flux_pipeline(setting, transformer, autoencoder, text), parts


def _flux_pipeline(
    setting: Setting, transformer: FluxTransformer2DModel, autoencoder: AutoencoderKL, text: FullText | FluxText
) -> FluxPipeline:
    return FluxPipeline(
        transformer=transformer,
        autoencoder=autoencoder,
        text=text,
        scheduler=SCHEDULER,
        defaults=FluxDefaults(width=setting.side, height=setting.side, steps=setting.steps),
        name="flux-random",
        digest="",
        device=setting.device,
        dtype=setting.dtype,
    )


def _flux_parts(setting: Setting) -> tuple[FluxTransformer2DModel, AutoencoderKL]:
    network: Any = NETWORK | {"num_layers": DOUBLE_BLOCKS, "num_single_layers": SINGLE_BLOCKS}
    values: Any = AUTOENCODER
    if setting.short:
        network, values = tiny_flux.tiny_transformer().config, tiny_flux.tiny_autoencoder().config
    return (
        made(lambda: FluxTransformer2DModel.from_config(network), setting.device, setting.dtype),
        made(lambda: AutoencoderKL.from_config(values), setting.device, setting.dtype),
    )


def qwen_image(setting: Setting) -> Sides:
    """Qwen-Image, 20.4 B, guided: two evaluations a step."""
    network: Any = tiny_qwen_image.tiny_transformer().config if setting.short else QWEN_IMAGE
    values: Any = dict(tiny_qwen_image.tiny_autoencoder().config) if setting.short else {}
    values = {name: value for name, value in values.items() if not name.startswith("_")}
    transformer = made(lambda: QwenImageTransformer2DModel.from_config(network), setting.device, setting.dtype)
    autoencoder = made(lambda: PictureAutoencoder(**values), setting.device, setting.dtype)
    text = FullText(PROMPT_TOKENS, transformer.config["joint_attention_dim"], setting.dtype)
    defaults = QwenImageDefaults(width=setting.side, height=setting.side, steps=setting.steps)
    pipeline = QwenImagePipeline(
        transformer=transformer,
        autoencoder=autoencoder,
        text=text,
        scheduler=tiny_qwen_image.STRETCHED,  # the published one
        defaults=defaults,
        name="qwen-image-random",
        digest="",
        device=torch.device(setting.device),
        dtype=setting.dtype,
    )
    nothing: Any = None
    theirs = TheirQwenImage(
        scheduler=FlowMatchEulerDiscreteScheduler(**tiny_qwen_image.STRETCHED),
        vae=twin(AutoencoderKLQwenImage, values, autoencoder),
        text_encoder=nothing,
        tokenizer=nothing,
        transformer=transformer,
    )
    every = torch.ones(1, PROMPT_TOKENS, dtype=torch.long, device=setting.device)
    paint = call(
        theirs,
        setting,
        prompt_embeds=text.features_of(REQUEST.prompt).to(setting.device),
        prompt_embeds_mask=every,
        negative_prompt_embeds_mask=every,
        negative_prompt_embeds=text.features_of("").to(setting.device),
        true_cfg_scale=defaults.guidance,
    )
    return Sides(pipeline, transformer, transformer, paint)


def sdxl(setting: Setting) -> Sides:
    """Stable Diffusion XL, 2.57 B, guided: a batch of two each step, its empty negative prompt zeros.

    In float16 diffusers makes its autoencoder float32 for each picture and half again; ours is float32 from the start,
    with the same numbers.
    """
    config: Any = tiny_sdxl.tiny_unet().config if setting.short else read_config(CONFIGURATIONS / "unet")
    values: Any = tiny_sdxl.tiny_autoencoder().config if setting.short else read_config(CONFIGURATIONS / "vae")
    unet = made(lambda: UNet2DConditionModel.from_config(config), setting.device, setting.dtype)
    autoencoder = made(lambda: AutoencoderKL.from_config(values), setting.device, setting.dtype)
    pooled = unet.config["projection_class_embeddings_input_dim"] - 6 * unet.config["addition_time_embed_dim"]
    text = FullText(SDXL_TOKENS, unet.config["cross_attention_dim"], setting.dtype, pooled)
    defaults = SdxlDefaults(width=setting.side, height=setting.side, steps=setting.steps)
    nothing: Any = None
    scheduler: Any = EulerDiscreteScheduler.from_config(tiny_sdxl.SCHEDULE)
    theirs = StableDiffusionXLPipeline(
        vae=copy.deepcopy(autoencoder),
        text_encoder=nothing,
        text_encoder_2=nothing,
        tokenizer=nothing,
        tokenizer_2=nothing,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
    nn.Module.to(autoencoder, torch.float32)
    pipeline = SdxlPipeline(
        unet=unet,
        autoencoder=autoencoder,
        text=text,
        scheduler=tiny_sdxl.SCHEDULE,
        defaults=defaults,
        device=torch.device(setting.device),
        dtype=setting.dtype,
        name="sdxl-random",
        digest="",
    )
    paint = call(
        theirs,
        setting,
        prompt_embeds=text.features_1TE.to(setting.device),
        pooled_prompt_embeds=text.pooled_1P.to(setting.device),
        guidance_scale=defaults.guidance,
    )
    return Sides(pipeline, unet, unet, paint)
