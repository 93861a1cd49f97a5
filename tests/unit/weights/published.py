"""Tiny random models in the layout that Infinity's authors publish: names, chunks, buffers, and a T5 folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gesso.models.infinity.autoencoder import AutoencoderConfig
from gesso.models.infinity.checkpoint import published_autoencoder_name, published_transformer_name
from tests.tiny_infinity import NETWORK, WORDS, tiny_tokenizer, tiny_transformer

TEXT_WIDTH = 16
TRANSFORMER = replace(NETWORK, depth=4, text_width=TEXT_WIDTH, text_length=24, scale_embeddings=15)
TOKENIZER = AutoencoderConfig(  # widths are multiples of the published 32 groups
    bits=8,
    width=32,
    encoder_multipliers=(1, 1, 1, 1, 1),
    decoder_multipliers=(1, 1, 1, 1, 1),
    residual_blocks=1,
    stride=16,
)


def published_transformer(blocks_per_chunk: int | None = 2) -> dict[str, Tensor]:
    """A transformer's tensors by published names, with the buffers of zeros that come with them."""
    state = {
        published_transformer_name(name, blocks_per_chunk): value.clone()
        for name, value in tiny_transformer(TRANSFORMER).state_dict().items()
    }
    biases = [name for name in state if name.endswith(".v_bias")]
    zeros = {name.replace("v_bias", "zero_k_bias"): torch.zeros_like(state[name]) for name in biases}
    return state | zeros


def published_tokenizer() -> dict[str, Tensor]:
    """A tokenizer's tensors by published names, with the quantizer's buffer of powers of two."""
    state = {
        published_autoencoder_name(name): value.clone()
        for name, value in tiny_tokenizer(TOKENIZER).state_dict().items()
    }
    mask = 2 ** torch.arange(TOKENIZER.bits)
    return state | {"quantize.lfq.mask": mask, "quantizer.lfq.mask": mask}


def write_text_encoder(folder: Path) -> Path:
    """A T5 encoder and its tokenizer, as transformers writes them: words of the tiny model, then letters."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = [(f"\N{LOWER ONE EIGHTH BLOCK}{word}", -1.0) for word in WORDS]
    letters = [(letter, -5.0) for letter in "\N{LOWER ONE EIGHTH BLOCK}abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *letters]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    torch.manual_seed(0)
    T5EncoderModel(config).eval().save_pretrained(folder)
    return folder


def write_published(folder: Path) -> None:
    """The whole of "infinity-2b", tiny, under the names of its files."""
    folder.mkdir(parents=True)
    torch.save(published_transformer(), folder / "infinity_2b_reg.pth")
    torch.save({"vae": published_tokenizer(), "trainer": {}}, folder / "infinity_vae_d32_reg.pth")
    write_text_encoder(folder / "flan-t5-xl")
