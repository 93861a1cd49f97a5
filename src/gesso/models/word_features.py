"""The word encoder as the text encoder of nano flow models: features of prompts, and what of a prompt is cut off.

Z-Image reads the features of each prompt at its own length; FLUX reads all at one length, and a pooled vector.
Not here: the encoder itself (`word_encoder`), Qwen3, T5 and CLIP, which published models read.
Shapes: B prompts, T tokens, E width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from gesso.models.word_encoder import PAD, WordEncoder


class WordFeatures:
    """Text features for Z-Image: one row a word and one for the end, no padding."""

    def __init__(self, encoder: WordEncoder) -> None:
        self.encoder = encoder

    @property
    def max_tokens(self) -> int:
        return self.encoder.max_tokens

    @property
    def width(self) -> int:
        """E, of the features."""
        return self.encoder.config.width

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, the end mark included, before any cut."""
        return self.encoder.count(prompt)

    def unknown(self, prompt: str) -> list[str]:
        """Words of a prompt that the encoder has never met, in order, each once."""
        return self.encoder.unknown(prompt)

    def cut(self, prompt: str) -> str:
        """The tail of a prompt that is past what the encoder reads, "" where all of it is read.

        Example: an encoder of length 4 reads three words and the end, so of "a red star on white" it cuts "on white".
        """
        words = list(re.finditer(r"[^\W_]+", prompt))
        kept = self.max_tokens - 1
        return prompt[words[kept].start() :] if len(words) > kept else ""

    def features(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features of each prompt, `[T,E]` float32 with its own T; what is too long is cut."""
        return self.encoder.features(prompts)


class FluxWordFeatures(WordFeatures):
    """Text features for FLUX: always `max_tokens` rows, those past the end zero, and their mean."""

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features `[B,T,E]` and pooled `[B,E]`, float32."""
        ids_BT = self.encoder.token_ids(prompts, self.max_tokens).to(self.encoder.word_embedding.weight.device)
        features_BTE = self.encoder(ids_BT).float()
        return fixed_length(features_BTE, ids_BT != PAD)


def fixed_length(features_BTE: Tensor, real_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Features with zeros where there is padding, and the mean `[B,E]` of the rest.

    FLUX has no mask, so padding must mean nothing by itself; trainer and pipeline both come through here.
    """
    real_BT1 = real_BT[..., None].to(features_BTE.dtype)
    masked_BTE = features_BTE * real_BT1
    return masked_BTE, masked_BTE.sum(1) / real_BT1.sum(1)
