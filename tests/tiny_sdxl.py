"""A tiny Stable Diffusion XL with random weights: its parts, the pipeline, diffusers' own, its folder and single file.

Tokenizers are built from a few words and letters, nothing is fetched. Not here: fixtures (the tests' own).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gesso.models import sdxl_checkpoint
from gesso.models.sdxl_text import SdxlText
from gesso.pipelines.sdxl import SdxlPipeline
from gesso.pipelines.sdxl_refiner import RefinerNetwork, SdxlRefiner
from gesso.pipelines.sdxl_state import SdxlDefaults
from tests.adapter_files import AdapterFile
from tests.tiny_flux import clip_tokenizer

SMALL_WIDTH, LARGE_WIDTH, POOLED_WIDTH, SIZE_WIDTH = 16, 24, 20, 8
CPU = torch.device("cpu")
_LORA_LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
DEFAULTS = SdxlDefaults(width=64, height=64, steps=4, guidance=3.0)
# The noise schedule of all of Stable Diffusion XL.
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def tiny_unet(*, in_channels: int = 4, seed: int = 0, **values: Any) -> UNet2DConditionModel:
    """The UNet, with `values` over its usual sizes."""
    torch.manual_seed(seed)
    usual: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": in_channels,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 2),
        "norm_num_groups": 4,
        "use_linear_projection": True,
        "cross_attention_dim": SMALL_WIDTH + LARGE_WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * SIZE_WIDTH,
    }
    network = UNet2DConditionModel(**usual | values)
    _strengthen(network)
    return network.eval().requires_grad_(False)


def tiny_refiner(*, zero_empty: bool = False, **schedule: Any) -> RefinerNetwork:
    """A refiner: four levels, read with the larger encoder alone, and five numbers."""
    values: dict[str, Any] = {
        "block_out_channels": (12, 16, 16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 2,
        "attention_head_dim": (1, 2, 2, 2),
        "cross_attention_dim": LARGE_WIDTH,
        "projection_class_embeddings_input_dim": POOLED_WIDTH + 5 * SIZE_WIDTH,
    }
    return RefinerNetwork(unet=tiny_unet(seed=3, **values), scheduler=SCHEDULE | schedule, zero_empty=zero_empty)


def tiny_guest(network: RefinerNetwork | None = None) -> SdxlRefiner:
    """The guest that has one refiner by every name."""
    made = network or tiny_refiner()
    return SdxlRefiner(load=lambda _: made, shapes=lambda _: made)


def tiny_autoencoder() -> AutoencoderKL:
    torch.manual_seed(1)
    values: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 8, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    }
    return AutoencoderKL(**values).eval().requires_grad_(False)


def tiny_text() -> SdxlText:
    words = clip_tokenizer()
    torch.manual_seed(2)
    values: dict[str, Any] = {
        "vocab_size": len(words),
        "num_attention_heads": 2,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    small = CLIPTextModel(CLIPTextConfig(hidden_size=SMALL_WIDTH, intermediate_size=32, num_hidden_layers=2, **values))
    sizes = {"hidden_size": LARGE_WIDTH, "intermediate_size": 48, "num_hidden_layers": 3}
    large = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, projection_dim=POOLED_WIDTH, **values))
    for network in (small, large):
        _strengthen(network)
        network.eval().requires_grad_(False)
    return SdxlText(small=small, large=large, tokenizers=(words, words), device=CPU)


def tiny_pipeline(
    defaults: SdxlDefaults = DEFAULTS,
    *,
    in_channels: int = 4,
    zero_empty: bool = True,
    refiner: SdxlRefiner | None = None,
    **schedule: Any,
) -> SdxlPipeline:
    """The pipeline in float32, straight from its parts; `schedule` stands over the usual values."""
    return SdxlPipeline(
        unet=tiny_unet(in_channels=in_channels),
        autoencoder=tiny_autoencoder(),
        text=tiny_text(),
        scheduler=SCHEDULE | schedule,
        defaults=defaults,
        device=CPU,
        dtype=torch.float32,
        name="tiny-sdxl",
        digest="none",
        zero_empty=zero_empty,
        refiner=refiner,
    )


def diffusers_pipeline(kind: Any, pipeline: SdxlPipeline, scheduler: Any = None) -> Any:
    """diffusers' own pipeline of that class over the same parts."""
    text = pipeline.text
    assert isinstance(text, SdxlText)
    made = kind(
        unet=pipeline.unet,
        vae=pipeline.autoencoder,
        text_encoder=text.small,
        text_encoder_2=text.large,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        scheduler=scheduler or EulerDiscreteScheduler.from_config(pipeline.scheduler),
        force_zeros_for_empty_prompt=pipeline.zero_empty,
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def diffusers_refiner(pipeline: SdxlPipeline, network: RefinerNetwork, scheduler: Any = None) -> Any:
    """diffusers' own refiner beside the model whose larger encoder and autoencoder it has."""
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
        StableDiffusionXLImg2ImgPipeline,
    )

    text = pipeline.text
    assert isinstance(text, SdxlText)
    parts: dict[str, Any] = {
        "text_encoder": None,
        "text_encoder_2": text.large,
        "tokenizer": None,
        "tokenizer_2": clip_tokenizer(),
        "scheduler": scheduler or EulerDiscreteScheduler.from_config(dict(network.scheduler)),
    }
    made: Any = StableDiffusionXLImg2ImgPipeline(
        unet=network.unet,
        vae=pipeline.autoencoder,
        force_zeros_for_empty_prompt=network.zero_empty,
        requires_aesthetics_score=True,
        add_watermarker=False,
        **parts,
    )
    made.set_progress_bar_config(disable=True)
    return made


def write_tiny_refiner(folder: Path) -> Path:
    """The refiner as diffusers writes one, in the layout of the official folder."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    diffusers_refiner(tiny_pipeline(), tiny_refiner()).save_pretrained(folder)
    return folder


def write_refiner_file(folder: Path) -> Path:
    """The refiner as a single file, with what such a file holds besides; beside it the sizes of a tiny one."""
    write_tiny_refiner(folder)
    for path in [folder / "model_index.json", *folder.rglob("*.safetensors")]:
        path.unlink()
    unet = tiny_refiner().unet
    state = unet.state_dict()
    tensors = {place.name: state[name] for name, place in sdxl_checkpoint.places("unet", unet).items()}
    tensors |= {"conditioner.embedders.0.model.ln_final.weight": torch.ones(LARGE_WIDTH)}
    tensors |= {"first_stage_model.decoder.conv_in.bias": torch.ones(2)}
    save_file(tensors, folder / "refiner.safetensors", metadata={"format": "pt"})
    return folder / "refiner.safetensors"


def write_tiny_sdxl(folder: Path, pipeline: SdxlPipeline | None = None) -> Path:
    """The model as diffusers writes one, in the layout of the official folders."""
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    diffusers_pipeline(StableDiffusionXLPipeline, pipeline or tiny_pipeline()).save_pretrained(folder)
    return folder


def original_tensors(pipeline: SdxlPipeline) -> dict[str, Tensor]:
    """All weights by the names of the original code, and a few that its checkpoints hold besides."""
    text = pipeline.text
    assert isinstance(text, SdxlText)
    networks = {
        "unet": pipeline.unet,
        "vae": pipeline.autoencoder,
        "text_encoder": text.small,
        "text_encoder_2": text.large,
    }
    found: dict[str, Tensor] = {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
    }
    thirds: dict[str, dict[int, Tensor]] = {}
    for part, network in networks.items():
        state = network.state_dict()
        for name, place in sdxl_checkpoint.places(part, network).items():
            value = state[name].T if place.turned else state[name]
            if ".mid.attn_1." in place.name and value.ndim == 2:
                value = value[:, :, None, None]
            if place.third is None:
                found[place.name] = value.contiguous().clone()
            else:
                thirds.setdefault(place.name, {})[place.third] = value
    return found | {name: torch.cat([parts[0], parts[1], parts[2]]) for name, parts in thirds.items()}


def write_single_file(folder: Path, pipeline: SdxlPipeline | None = None, name: str = "tiny.safetensors") -> Path:
    """A single-file checkpoint; beside it the configurations and tokenizers that a tiny one needs."""
    pipeline = pipeline or tiny_pipeline()
    write_tiny_sdxl(folder, pipeline)
    (folder / "model_index.json").unlink()
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    save_file(original_tensors(pipeline), folder / name, metadata={"format": "pt"})
    return folder / name


def write_sdxl_lora(path: Path) -> Path:
    """A LoRA of one layer, strong enough to be seen."""
    file = AdapterFile(tiny_unet())
    file.lora(f"unet.{_LORA_LAYER}", _LORA_LAYER, "peft")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value * 20 for name, value in file.tensors.items()}, path)
    return path


def _strengthen(network: nn.Module) -> None:
    """Text, time and sizes must show in the pictures: random weights as they come leave little of them."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "time_emb_proj" in name or "add_embedding" in name or "attn2" in name:
                parameter.mul_(3)
            elif "embeddings" in name:
                parameter.copy_(torch.randn_like(parameter))
