"""A tiny Infinity with random weights, made in a moment: its sizes, its parts, and its files as Gesso writes them.

Open gates and a head at full strength, so that text, guidance and every scale show in the pictures. Not here: fixtures
(`conftest`), the published layout (`unit/weights/published`).
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from gesso.models.infinity.autoencoder import Autoencoder, AutoencoderConfig
from gesso.models.infinity.initialization import InitialScales, initialize
from gesso.models.infinity.scales import ScaleSchedule
from gesso.models.infinity.transformer import InfinityConfig, InfinityTransformer
from gesso.models.word_encoder import WordEncoder, WordEncoderConfig
from gesso.pipelines.infinity import InfinityPipeline
from gesso.pipelines.infinity_state import GenerationDefaults
from gesso.training.export import save_model

WORDS = ("a", "red", "blue", "star", "ring", "on", "white", "black", "background", "two", "three", "large")
BITS = 8
SQUARE = ScaleSchedule(((1, 1), (2, 2), (3, 3), (4, 4), (4, 4)), rotary_grid=(4, 4))
WIDE = ScaleSchedule(((1, 1), (2, 3), (4, 6)), rotary_grid=(4, 6))
SCHEDULES = {(32, 32): SQUARE, (32, 48): WIDE}  # (height, width) in pixels
NETWORK = InfinityConfig(
    depth=2, width=32, heads=2, bits=BITS, text_width=16, text_length=12, pool_heads=2, feed_forward_width=64
)
TEXT = WordEncoderConfig(vocabulary=WORDS, width=16, depth=1, heads=2, length=12)
TOKENIZER = AutoencoderConfig(
    bits=BITS,
    width=4,
    encoder_multipliers=(1, 2, 2, 2),
    decoder_multipliers=(1, 2, 2, 2),
    residual_blocks=1,
    stride=8,
    groups=2,
)
DEFAULTS = GenerationDefaults(width=32, height=32, guidance=3.0, temperature=1.0, top_k=0, top_p=0.0)


def tiny_transformer(config: InfinityConfig = NETWORK, seed: int = 0) -> InfinityTransformer:
    torch.manual_seed(seed)
    network = InfinityTransformer(config)
    initialize(network, InitialScales(head=1.0, modulation=1.0, gate_noise=1.0, gate=1.0))
    return network.eval().requires_grad_(False)


def tiny_tokenizer(config: AutoencoderConfig = TOKENIZER, seed: int = 1) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(config).eval().requires_grad_(False)


def tiny_word_encoder(seed: int = 2) -> WordEncoder:
    torch.manual_seed(seed)
    return WordEncoder(TEXT).eval().requires_grad_(False)


def tiny_pipeline(
    defaults: GenerationDefaults = DEFAULTS, *, patchify: bool = False, dtype: torch.dtype = torch.float32
) -> InfinityPipeline:
    """The pipeline straight from its parts; patchified, the same pictures from four times as few cells.

    `dtype` is that of the blocks.
    """
    network = replace(NETWORK, patchify=patchify, bits=BITS * (4 if patchify else 1))
    tokenizer = replace(TOKENIZER, stride=4) if patchify else TOKENIZER
    return InfinityPipeline(
        transformer=tiny_transformer(network).cast_blocks(dtype),
        autoencoder=tiny_tokenizer(tokenizer),
        text=tiny_word_encoder(),
        schedules=SCHEDULES,
        defaults=defaults,
        name="tiny",
        digest="none",
        dtype=dtype,
    )


def tiny_config() -> dict[str, object]:
    """What lies in `config.json`."""
    return {
        "family": "infinity",
        "network": asdict(NETWORK),
        "text": asdict(TEXT),
        "tokenizer": asdict(TOKENIZER),
        "schedules": {f"{width}x{height}": asdict(schedule) for (height, width), schedule in SCHEDULES.items()},
        "generation": asdict(DEFAULTS),
    }


def write_tiny_infinity(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the model as `gesso train` exports one; usable wherever a model's path is."""
    parts = {
        "transformer": tiny_transformer().state_dict(),
        "text": tiny_word_encoder().state_dict(),
        "tokenizer": tiny_tokenizer().state_dict(),
    }
    save_model(folder, parts, tiny_config(), {"made": "at random"}, dtype)
    return folder
