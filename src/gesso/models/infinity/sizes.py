"""The published sizes of Infinity, by name: transformers and tokenizers.

Source: `facts` of the published checkpoints and training code. Not here: files and where to get them
(`weights/catalogue`).
"""

from __future__ import annotations

from gesso.models.infinity.autoencoder import AutoencoderConfig
from gesso.models.infinity.transformer import InfinityConfig

TEXT_WIDTH, TEXT_LENGTH = 2048, 512  # google/flan-t5-xl


def transformer_size(name: str, bits: int | None = None) -> InfinityConfig:
    """A published transformer ("125M", "1B", "2B", "8B", …), for a tokenizer of `bits` (default 32; 8B: 14 x 2x2)."""
    depth, width, heads, pool_heads = _TRANSFORMERS[name]
    patchify = name == "8B"
    return InfinityConfig(
        depth=depth,
        width=width,
        heads=heads,
        pool_heads=pool_heads,
        bits=bits or (56 if patchify else 32),
        patchify=patchify,
        text_width=TEXT_WIDTH,
        text_length=TEXT_LENGTH,
    )


# name -> depth, width, heads, heads of the pooling attention (128 text channels each up to width 4096, then 64)
_TRANSFORMERS: dict[str, tuple[int, int, int, int]] = {
    "125M": (12, 768, 8, 16),
    "layer16": (16, 1152, 12, 16),
    "1B": (24, 1536, 16, 16),
    "2B": (32, 2048, 16, 16),
    "layer32": (32, 2080, 20, 16),
    "layer40": (40, 2688, 24, 16),
    "layer48": (48, 3360, 28, 16),
    "8B": (40, 3584, 28, 16),
    "20B": (58, 4608, 36, 32),
}
TRANSFORMERS: tuple[str, ...] = tuple(_TRANSFORMERS)


def tokenizer_size(bits: int, patchify: bool = False) -> AutoencoderConfig:
    """A published tokenizer: 16, 24, 32 or 64 bits at stride 16, or 14 bits at stride 8 (for patchified tokens)."""
    multipliers = (1, 2, 4, 4) if patchify else (1, 2, 4, 4, 4)
    return AutoencoderConfig(
        bits=bits,
        width=128,
        encoder_multipliers=multipliers,
        decoder_multipliers=multipliers,
        residual_blocks=2,
        stride=8 if patchify else 16,
    )
