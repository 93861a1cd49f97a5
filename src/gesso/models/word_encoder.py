"""A small text encoder over a closed list of words, for nano models. Trained with the network that reads it.

Pre-norm transformer (arXiv:2002.04745) over word embeddings. Not here: Flan-T5, which published Infinity reads
(`flan_t5`).
Shapes: B prompts, T tokens, E width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD, UNKNOWN, END = 0, 1, 2
_SPECIAL = 3


@dataclass(frozen=True, kw_only=True)
class WordEncoderConfig:
    """`length` counts tokens, the end mark included."""

    vocabulary: tuple[str, ...]
    width: int
    depth: int
    heads: int
    length: int

    def __post_init__(self) -> None:
        for name in ("width", "heads", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.depth < 0:
            raise ValueError("depth must be at least 0")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of {self.heads} heads")
        if len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError("vocabulary must hold each word once")


class WordEncoder(nn.Module):
    """Prompts to features `[T,E]` each, one row a word and one for the end."""

    def __init__(self, config: WordEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.ids = {word: _SPECIAL + index for index, word in enumerate(config.vocabulary)}
        self.word_embedding = nn.Embedding(_SPECIAL + len(config.vocabulary), config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)
        self.layers = nn.ModuleList(_Layer(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    @property
    def max_tokens(self) -> int:
        return self.config.length

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, the end mark included, before any cut."""
        return len(split_words(prompt)) + 1

    def unknown(self, prompt: str) -> list[str]:
        """Words of a prompt that the encoder has never met, in order, each once."""
        return [word for word in dict.fromkeys(split_words(prompt)) if word not in self.ids]

    def token_ids(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        """Ids `[B,T]`, padded with `PAD` to the longest prompt or to `length`; unknown words are `UNKNOWN`."""
        words = [split_words(prompt)[: self.config.length - 1] for prompt in prompts]
        rows = [[*(self.ids.get(word, UNKNOWN) for word in row), END] for row in words]
        width = length or max(len(row) for row in rows)
        return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Features `[B,T,E]`; those of padding mean nothing."""
        mask_B11T = (ids_BT != PAD)[:, None, None]
        x_BTE = self.word_embedding(ids_BT) + self.position_embedding.weight[: ids_BT.shape[1]]
        for layer in self.layers:
            x_BTE = layer(x_BTE, mask_B11T)
        return self.norm(x_BTE)

    @torch.no_grad()
    def features(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features of each prompt, `[T,E]` float32 with its own T."""
        if not prompts:
            return []
        ids_BT = self.token_ids(prompts).to(self.word_embedding.weight.device)
        features_BTE = self(ids_BT).float()
        return [row[ids != PAD] for row, ids in zip(features_BTE, ids_BT, strict=True)]


class _Layer(nn.Module):
    """Self-attention and feed-forward, each after a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_BTE: Tensor, mask_B11T: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x_BTE)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B11T)
        x_BTE = x_BTE + self.out(y.transpose(1, 2).flatten(2))
        return x_BTE + self.fc2(F.gelu(self.fc1(self.norm2(x_BTE)), approximate="tanh"))


def split_words(text: str) -> list[str]:
    """Lower-case words and numbers of a text; punctuation is dropped."""
    return re.findall(r"[^\W_]+", text.lower())
