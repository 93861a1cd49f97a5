"""A tiny Z-Image with random weights, made in a moment: its parts, the pipeline, and its folder as published.

The tokenizer is built from a few words and letters, nothing is fetched. Not here: fixtures (the tests' own), nano
models.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from gesso.models.qwen_text import QwenText, build, is_left_out
from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.transformer import S3DiT
from gesso.models.word_encoder import WordEncoder, WordEncoderConfig
from gesso.models.word_features import WordFeatures
from gesso.pipelines.z_image import ZImagePipeline
from gesso.pipelines.z_image_state import PictureEncoder, TextEncoder, ZImageDefaults
from gesso.sampling.flow import FlowSchedule

WORDS = ("a", "red", "blue", "star", "ring", "two", "rings", "on", "white")
TEXT_WIDTH = 24
NETWORK = S3DiTConfig(
    in_channels=4,
    dim=32,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    n_kv_heads=2,
    cap_feat_dim=TEXT_WIDTH,
    axes_dims=(4, 6, 6),
    axes_lens=(640, 16, 16),
)
DEFAULTS = ZImageDefaults(width=64, height=64, steps=4, guidance=3.0)
STRIDE = 8  # pixels along the edge of a latent cell

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
TEXT: dict[str, Any] = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 640,
}
AUTOENCODER: dict[str, Any] = {
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


def tiny_transformer(config: S3DiTConfig = NETWORK, seed: int = 0) -> S3DiT:
    """Every part at full strength, so that text, time and guidance show in the pictures."""
    network = S3DiT(config)
    randomize(network, seed)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def randomize(network: nn.Module, seed: int) -> None:
    """Weights that keep the size of what passes through them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(drawn / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(1 + 0.1 * drawn if name.endswith("weight") else 0.1 * drawn)


def tiny_autoencoder() -> AutoencoderKL:
    """Four levels, eight pixels a cell, as Z-Image's own."""
    torch.manual_seed(1)
    return AutoencoderKL(**AUTOENCODER).eval().requires_grad_(False)


def tiny_words() -> WordFeatures:
    """The text of a nano model."""
    torch.manual_seed(2)
    config = WordEncoderConfig(vocabulary=WORDS, width=TEXT_WIDTH, depth=1, heads=2, length=40)
    return WordFeatures(WordEncoder(config).eval().requires_grad_(False))


def tokenizer() -> PreTrainedTokenizerFast:
    """Letters and marks; every character is a token."""
    letters = [*"abcdefghijklmnopqrstuvwxyz \n"]
    words = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    words.add_special_tokens([AddedToken(mark, special=True) for mark in _MARKS])
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=_MARKS[0])
    fast.chat_template = TEMPLATE
    return fast


def text_config() -> Qwen3Config:
    return Qwen3Config(vocab_size=len(tokenizer()), **TEXT)


def full_text_network() -> Qwen3Model:
    """With its last layer and final norm, as published."""
    network = Qwen3Model(text_config())
    randomize(network, 3)
    return network.eval().requires_grad_(False)


def tiny_text(length: int = 512) -> QwenText:
    network = build(text_config())
    state = {
        name: value
        for name, value in full_text_network().state_dict().items()
        if not is_left_out(name, TEXT["num_hidden_layers"])
    }
    network.load_state_dict(state, strict=True, assign=True)
    return QwenText(network.eval().requires_grad_(False), tokenizer(), length)


def tiny_pipeline(
    defaults: ZImageDefaults = DEFAULTS,
    *,
    shift: FlowSchedule | None = None,
    network: S3DiTConfig = NETWORK,
    text: TextEncoder | None = None,
    pictures: PictureEncoder | None = None,
) -> ZImagePipeline:
    """The pipeline in float32, straight from its parts; a nano model's unless told otherwise."""
    return ZImagePipeline(
        transformer=tiny_transformer(network),
        autoencoder=tiny_autoencoder(),
        text=text or tiny_words(),
        shift=shift or FlowSchedule(shift=3.0),
        defaults=defaults,
        name="tiny",
        digest="none",
        pictures=pictures,
    )


def write_published(folder: Path, *, shift: float = 3.0, network: S3DiTConfig = NETWORK, shards: int = 2) -> Path:
    """The whole model, tiny, in diffusers' layout: the transformer in so many shards by an index."""
    folder.mkdir(parents=True)
    _write_json(folder / "model_index.json", {"_class_name": "ZImagePipeline", "_diffusers_version": "0.36.0"})
    scheduler = {"num_train_timesteps": 1000, "shift": shift, "use_dynamic_shifting": False}
    _write_json(
        folder / "scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"} | scheduler
    )
    _write_json(folder / "transformer/config.json", {"_class_name": "ZImageTransformer2DModel"} | asdict(network))
    write_shards(tiny_transformer(network).state_dict(), folder / "transformer", shards)
    autoencoder = tiny_autoencoder()
    _write_json(folder / "vae/config.json", {"_class_name": "AutoencoderKL"} | AUTOENCODER)
    save_file(autoencoder.state_dict(), folder / "vae/diffusion_pytorch_model.safetensors")
    text_config().save_pretrained(folder / "text_encoder")
    whole = {f"model.{name}": value for name, value in full_text_network().state_dict().items()}
    save_file(whole, folder / "text_encoder/model.safetensors")
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def write_shards(state: dict[str, Tensor], folder: Path, count: int, *, index: bool = True) -> None:
    """Tensors in files of diffusers' names, listed in an index unless told otherwise."""
    listed: dict[str, str] = {}
    for shard in range(count):
        name = f"diffusion_pytorch_model-{shard + 1:05}-of-{count:05}.safetensors"
        part = dict(list(state.items())[shard::count])
        save_file({key: value.contiguous() for key, value in part.items()}, folder / name)
        listed |= dict.fromkeys(part, name)
    if index:
        _write_json(folder / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": listed})


def editing_network() -> S3DiTConfig:
    """One that reads features of pictures."""
    return replace(NETWORK, siglip_feat_dim=10)


def _write_json(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
