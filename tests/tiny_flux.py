"""A tiny FLUX with random weights, made in a moment: its parts, the pipeline, diffusers' own pipelines, and its folder.

Tokenizers are built from a few words and letters, nothing is fetched. Not here: fixtures (the tests' own), nano models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from gesso.models.flux_text import FluxText
from gesso.pipelines.flux import FluxPipeline
from gesso.pipelines.flux_state import FluxDefaults
from gesso.pipelines.infinite_you import InfiniteYou

WORDS = ("a", "red", "blue", "star", "ring", "two", "rings")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"

LENGTH = 20  # text tokens, unless a test says otherwise
TEXT_WIDTH, POOLED_WIDTH = 24, 16
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
STATIC = {"shift": 1.0, "use_dynamic_shifting": False}
DEFAULTS = FluxDefaults(width=64, height=64, steps=4, guidance=3.5)


def tiny_transformer(*, guidance_embeds: bool = True) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    )
    _strengthen(network)
    return network.eval().requires_grad_(False)


def tiny_autoencoder() -> AutoencoderKL:
    """Four levels, eight pixels a cell, as FLUX's own."""
    torch.manual_seed(1)
    values: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return AutoencoderKL(**values).eval().requires_grad_(False)


def clip_tokenizer() -> CLIPTokenizer:
    """Letters, and the longer words in one piece."""
    pieces = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        rest = [*word[:-1], f"{word[-1]}</w>"]
        while len(rest) > 1:
            merges.append((rest[0], rest[1]))
            rest = [rest[0] + rest[1], *rest[2:]]
            pieces.append(rest[0])
    names = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: index for index, name in enumerate(names)}
    values: dict[str, Any] = {"vocab": vocabulary, "merges": list(dict.fromkeys(merges)), "model_max_length": 77}
    return CLIPTokenizer(**values)


def t5_tokenizer() -> T5Tokenizer:
    words = [(_WORD_START + word, -1.0) for word in WORDS]
    letters = [(letter, -5.0) for letter in _WORD_START + _LETTERS]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *letters], extra_ids=0)


def tiny_text(length: int = LENGTH) -> FluxText:
    clip_words, t5_words = clip_tokenizer(), t5_tokenizer()
    torch.manual_seed(2)
    values: dict[str, Any] = {
        "vocab_size": len(clip_words),
        "hidden_size": POOLED_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "bos_token_id": clip_words.bos_token_id,
        "eos_token_id": clip_words.eos_token_id,
    }
    clip = CLIPTextModel(CLIPTextConfig(**values))
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(t5_words), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    for network in (clip, t5):
        _strengthen(network)
    text = FluxText(clip=clip, t5=t5, clip_tokenizer=clip_words, t5_tokenizer=t5_words, length=length)
    return text.eval().requires_grad_(False)


def tiny_pipeline(
    defaults: FluxDefaults = DEFAULTS,
    *,
    guidance_embeds: bool = True,
    scheduler: dict[str, Any] = DYNAMIC,
    text: FluxText | None = None,
    guest: InfiniteYou | None = None,
) -> FluxPipeline:
    """The pipeline in float32, straight from its parts: dev's kind, or with the arguments schnell's or a nano's."""
    return FluxPipeline(
        transformer=tiny_transformer(guidance_embeds=guidance_embeds),
        autoencoder=tiny_autoencoder(),
        text=text or tiny_text(),
        scheduler=scheduler,
        defaults=defaults,
        name="tiny-flux",
        digest="none",
        guest=guest,
    )


def diffusers_pipeline(kind: Any, pipeline: FluxPipeline, scheduler: Any = None) -> Any:
    """diffusers' own pipeline of that class over the same parts."""
    text = pipeline.text
    assert isinstance(text, FluxText)
    made = kind(
        transformer=pipeline.transformer,
        vae=pipeline.autoencoder,
        text_encoder=text.clip,
        text_encoder_2=text.t5,
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(**pipeline.scheduler),
    )
    made.set_progress_bar_config(disable=True)
    return made


def write_tiny_flux(folder: Path, pipeline: FluxPipeline | None = None) -> Path:
    """The model as diffusers writes one, in the layout of the official folders."""
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline as TheirPipeline
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    diffusers_pipeline(TheirPipeline, pipeline or tiny_pipeline()).save_pretrained(folder)
    return folder


def _strengthen(network: nn.Module) -> None:
    """Text, time and guidance must show in the pictures: random weights as they come leave little of them."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "time_text_embed" in name or ("norm" in name and name.endswith("linear.weight")):
                parameter.mul_(3)
            elif "embeddings" in name or name.startswith("shared"):
                parameter.copy_(torch.randn_like(parameter))
