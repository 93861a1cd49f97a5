"""A tiny HunyuanVideo with random weights, made in a moment: its parts, the pipeline, diffusers' own, and its folder.

Its Llama tokenizer splits text as Llama 3's does and knows the words of the template, so that the template has as many
tokens as in the published model. Nothing is fetched. Not here: fixtures (the tests' own).
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from gesso.models.hunyuan_video_text import BEFORE, HunyuanVideoText
from gesso.pipelines.hunyuan_video import HunyuanVideoPipeline
from gesso.pipelines.hunyuan_video_state import HunyuanVideoDefaults
from tests.tiny_flux import WORDS, clip_tokenizer

TEXT_WIDTH, POOLED_WIDTH = 16, 16
SCHEDULER = {"shift": 7.0, "use_dynamic_shifting": False}
DEFAULTS = HunyuanVideoDefaults(width=32, height=32, frames=5, fps=8.0, steps=3)

_SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>")
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tiny_transformer(**changes: Any) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": TEXT_WIDTH,
        "pooled_projection_dim": POOLED_WIDTH,
        "rope_axes_dim": (4, 6, 6),
        **changes,
    }
    network = HunyuanVideoTransformer3DModel(**values)
    _strengthen(network)
    return network.eval().requires_grad_(False)


def tiny_autoencoder(tile: int = 256, stride: int = 192) -> AutoencoderKLHunyuanVideo:
    """Eight pixels and four frames a latent cell, as the published one; its tiles may be smaller."""
    torch.manual_seed(1)
    values: dict[str, Any] = {
        "latent_channels": 4,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    network = AutoencoderKLHunyuanVideo(**values)
    network.tile_sample_min_height = network.tile_sample_min_width = tile
    network.tile_sample_stride_height = network.tile_sample_stride_width = stride
    return network.eval().requires_grad_(False)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    known = BEFORE
    for mark in _SPECIAL:
        known = known.replace(mark, "\0")
    words = [word for part in known.split("\0") for word, _ in split.pre_tokenize_str(part)]
    words += [spelled for word in WORDS for spelled in (word, f"Ġ{word}")]
    names = dict.fromkeys([*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words])
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
    begin = _SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])]
    )
    tokenizer.add_special_tokens(list(_SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token="<|eot_id|>", pad_token="<pad>", model_max_length=4096
    )


def tiny_llama() -> LlamaModel:
    torch.manual_seed(2)
    values: dict[str, Any] = {
        "vocab_size": len(llama_tokenizer()),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    network = LlamaModel(LlamaConfig(**values))
    _strengthen(network)
    return network.eval().requires_grad_(False)


def tiny_clip() -> CLIPTextModel:
    words = clip_tokenizer()
    torch.manual_seed(3)
    values: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": POOLED_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    network = CLIPTextModel(CLIPTextConfig(**values))
    _strengthen(network)
    return network.eval().requires_grad_(False)


def tiny_text() -> HunyuanVideoText:
    return HunyuanVideoText(
        llama=tiny_llama(),
        clip=tiny_clip(),
        llama_tokenizer=llama_tokenizer(),
        clip_tokenizer=clip_tokenizer(),
    )


def tiny_pipeline(
    defaults: HunyuanVideoDefaults = DEFAULTS, *, tile: int = 256, stride: int = 192
) -> HunyuanVideoPipeline:
    """The pipeline in float32, straight from its parts."""
    return HunyuanVideoPipeline(
        transformer=tiny_transformer(),
        autoencoder=tiny_autoencoder(tile, stride),
        text=tiny_text(),
        scheduler=SCHEDULER,
        defaults=defaults,
        device=torch.device("cpu"),
        dtype=torch.float32,
        name="tiny-hunyuan-video",
        digest="none",
    )


def diffusers_pipeline(pipeline: HunyuanVideoPipeline) -> Any:
    """diffusers' own pipeline over the same parts; it decodes in tiles, one video at a time."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline as TheirPipeline

    made = TheirPipeline(
        transformer=pipeline.transformer,
        vae=deepcopy(pipeline.autoencoder),
        text_encoder=tiny_llama(),
        tokenizer=llama_tokenizer(),  # pyright: ignore[reportArgumentType]
        text_encoder_2=tiny_clip(),
        tokenizer_2=clip_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**pipeline.scheduler),
    )
    made.vae.enable_tiling()
    made.vae.use_slicing = True
    made.set_progress_bar_config(disable=True)
    return made


def write_tiny_hunyuan_video(folder: Path, pipeline: HunyuanVideoPipeline | None = None) -> Path:
    """The model as diffusers writes one, in the layout of the official folder."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    diffusers_pipeline(pipeline or tiny_pipeline()).save_pretrained(folder)
    return folder


def _strengthen(network: nn.Module) -> None:
    """Text, time and guidance must show in the videos: random weights as they come leave little of them."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "time_text_embed" in name or ("norm" in name and name.endswith("linear.weight")):
                parameter.mul_(3)
            elif "embed_tokens" in name or "embeddings" in name:
                parameter.copy_(torch.randn_like(parameter))
