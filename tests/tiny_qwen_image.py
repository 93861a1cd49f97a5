"""A tiny Qwen-Image with random weights, made in a moment: its parts, the pipeline, diffusers' own, and its folder.

The tokenizer is built from the words of the template and a few more, nothing is fetched. Not here: fixtures (the tests'
own).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gesso.models.qwen_image_autoencoder import PictureAutoencoder
from gesso.models.qwen_image_text import AFTER, BEFORE, LENGTH, QwenImageText
from gesso.pipelines.qwen_image import QwenImagePipeline
from gesso.pipelines.qwen_image_state import QwenImageDefaults

WORDS = ("a", "red", "blue", "star", "ring", "two", "rings")
_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

TEXT_WIDTH = 24
# The published schedule, and one that is not stretched.
STRETCHED: dict[str, Any] = {
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
STATIC: dict[str, Any] = {"shift": 3.0}
DEFAULTS = QwenImageDefaults(width=64, height=64, steps=4)


def tiny_transformer() -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    network = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    _strengthen(network)
    return network.eval().requires_grad_(False)


def tiny_autoencoder(kind: type[AutoencoderKLQwenImage] = PictureAutoencoder) -> AutoencoderKLQwenImage:
    """Four levels, eight pixels a cell, as the published one."""
    torch.manual_seed(1)
    values: dict[str, Any] = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
        "latents_mean": [-0.7, 0.1, 0.5, -0.2],
        "latents_std": [1.5, 0.8, 1.2, 2.0],
    }
    network = kind(**values)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith("decoder") and parameter.ndim > 1:
                parameter.mul_(1.6)  # else every picture is grey
    return network.eval().requires_grad_(False)


def tiny_tokenizer() -> Qwen2Tokenizer:
    """Bytes, and the template's words and a few more in one piece each, with and without a space before them."""
    letters = bytes_to_unicode()
    plain = re.sub(r"<\|.*?\|>", "\n", BEFORE + AFTER)
    words = dict.fromkeys([*re.findall(r" ?[A-Za-z]+", plain), *WORDS, *(f" {word}" for word in WORDS)])
    names, merges = list(letters.values()), []
    for word in words:
        rest = [letters[byte] for byte in word.encode()]
        while len(rest) > 1:
            merges.append((rest[0], rest[1]))
            rest = [rest[0] + rest[1], *rest[2:]]
            names.append(rest[0])
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys([*names, *_MARKS]))}
    values: dict[str, Any] = {"vocab": vocabulary, "merges": list(dict.fromkeys(merges)), "model_max_length": 2048}
    return Qwen2Tokenizer(**values, additional_special_tokens=list(_MARKS[1:]))


def tiny_encoder() -> Qwen2_5_VLForConditionalGeneration:
    """The whole of it, with eyes and a last matrix, as it is published."""
    torch.manual_seed(2)
    text: dict[str, Any] = {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"mrope_section": [2, 2, 2], "rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    vision = {"depth": 1, "hidden_size": 16, "out_hidden_size": TEXT_WIDTH, "num_heads": 2, "intermediate_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)  # pyright: ignore[reportArgumentType]
    network = Qwen2_5_VLForConditionalGeneration(config)
    _strengthen(network)
    return network.eval().requires_grad_(False)


def tiny_text(length: int = LENGTH) -> QwenImageText:
    return QwenImageText(tiny_encoder().model.language_model, tiny_tokenizer(), length)


def tiny_pipeline(
    defaults: QwenImageDefaults = DEFAULTS,
    *,
    scheduler: dict[str, Any] = STRETCHED,
    text: QwenImageText | None = None,
    dtype: torch.dtype = torch.float32,
) -> QwenImagePipeline:
    """The pipeline on the CPU, straight from its parts."""
    transformer, autoencoder, text = tiny_transformer(), tiny_autoencoder(), text or tiny_text()
    for part in (transformer, autoencoder, text.network):
        nn.Module.to(part, dtype)
    return QwenImagePipeline(
        transformer=transformer,
        autoencoder=autoencoder,
        text=text,
        scheduler=scheduler,
        defaults=defaults,
        name="tiny-qwen-image",
        digest="none",
        device=torch.device("cpu"),
        dtype=dtype,
    )


def diffusers_pipeline(kind: Any, scheduler: Any = None, transformer: QwenImageTransformer2DModel | None = None) -> Any:
    """diffusers' own pipeline of that class over the same weights."""
    made = kind(
        transformer=transformer or tiny_transformer(),
        vae=tiny_autoencoder(AutoencoderKLQwenImage),
        text_encoder=tiny_encoder(),
        tokenizer=tiny_tokenizer(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(**STRETCHED),
    )
    made.set_progress_bar_config(disable=True)
    return made


def write_tiny_qwen_image(folder: Path) -> Path:
    """The model as diffusers writes one, in the layout of the official folder."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline as TheirPipeline
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    diffusers_pipeline(TheirPipeline).save_pretrained(folder)
    return folder


def _strengthen(network: nn.Module) -> None:
    """Text and time must show in the pictures: random weights as they come leave little of them."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "_mod." in name or "time_text_embed" in name or "norm_out" in name:
                parameter.mul_(3)
            elif "embed_tokens" in name:
                parameter.copy_(torch.randn_like(parameter))
