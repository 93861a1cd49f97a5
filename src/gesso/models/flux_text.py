"""Text as FLUX.1 reads it: T5 gives one feature a token, always the same number of them, and CLIP one vector in all.

Through transformers, from a folder in diffusers' layout; safetensors and local files only. Not here: the word encoder
of nano models (`word_features`), Flan-T5 (`flan_t5`).
Shapes: B prompts, T tokens (512, or 256 for schnell), E = 4096 of T5-XXL, P = 768 of CLIP-L.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gesso.errors import MissingError
from gesso.models.diffusers_parts import INSTALL
from gesso.models.transformers_parts import check_tokenizer, quiet, read_network, read_tokenizer

_TOKENIZERS = {
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "tokenizer_2": ("tokenizer.json", "spiece.model"),
}


class FluxText(nn.Module):
    """Prompts to features `[B,T,E]` and pooled `[B,P]`, each in its encoder's dtype.

    What is longer than T tokens, or than CLIP's 77, is cut: `cut` and `cut_from_pooled` tell what.
    """

    def __init__(self, *, clip: nn.Module, t5: nn.Module, clip_tokenizer: Any, t5_tokenizer: Any, length: int) -> None:
        super().__init__()
        self.clip, self.t5 = clip, t5
        self._clip_tokenizer, self._t5_tokenizer = clip_tokenizer, t5_tokenizer
        self._length = length

    @property
    def max_tokens(self) -> int:
        """T, the end mark included."""
        return self._length

    @property
    def pooled_tokens(self) -> int:
        """The most tokens that CLIP reads, its two marks included."""
        clip: Any = self.clip.config
        return int(min(self._clip_tokenizer.model_max_length, clip.max_position_embeddings))

    @property
    def widths(self) -> tuple[int, int]:
        """E and P."""
        t5: Any = self.t5.config
        clip: Any = self.clip.config
        return t5.d_model, clip.hidden_size

    def count(self, prompt: str) -> int:
        """T5's tokens of a prompt, the end mark included, before any cut."""
        return len(_ids(self._t5_tokenizer, prompt))

    def unknown(self, prompt: str) -> list[str]:
        """None: both vocabularies spell any word."""
        return []

    def cut(self, prompt: str) -> str:
        """The tail that T5 does not read because the prompt is too long, "" where it reads all."""
        return _tail(self._t5_tokenizer, prompt, self.max_tokens)

    def cut_from_pooled(self, prompt: str) -> str:
        """The tail that CLIP does not read, "" where it reads all."""
        return _tail(self._clip_tokenizer, prompt, self.pooled_tokens)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features `[B,T,E]` and pooled `[B,P]` of prompts, padded and without a mask: FLUX was trained so.

        Mirrors `_get_clip_prompt_embeds` and `_get_t5_prompt_embeds` of diffusers' `FluxPipeline`.
        """
        clip_ids_BT = self._padded(self._clip_tokenizer, prompts, self.pooled_tokens)
        pooled_BP = self.clip(clip_ids_BT, output_hidden_states=False).pooler_output
        t5_ids_BT = self._padded(self._t5_tokenizer, prompts, self.max_tokens)
        return self.t5(t5_ids_BT, output_hidden_states=False)[0], pooled_BP

    def _padded(self, tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
        tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return tokens.input_ids.to(next(self.parameters()).device)


def load_flux_text(folder: Path, *, dtype: torch.dtype, length: int, weights: bool = True) -> FluxText:
    """Both encoders and tokenizers of a model folder in diffusers' layout.

    Without `weights` the networks have their shapes and lie on the meta device, for planning.
    Raises MissingError without transformers, FileError for a part that is absent or something else, WeightsError for
    weights that are incomplete, too many, damaged or of the wrong shape.
    """
    try:
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel
    except ImportError as error:
        raise MissingError("transformers, which reads prompts for this model,", INSTALL) from error
    with quiet():
        clip_tokenizer, t5_tokenizer = (
            read_tokenizer(AutoTokenizer, folder / name, files) for name, files in _TOKENIZERS.items()
        )
        clip: Any = read_network(CLIPTextModel, folder / "text_encoder", dtype, weights=weights)
        t5: Any = read_network(T5EncoderModel, folder / "text_encoder_2", dtype, weights=weights)
    check_tokenizer(clip_tokenizer, folder / "tokenizer", clip.config.vocab_size, pads=True)
    check_tokenizer(t5_tokenizer, folder / "tokenizer_2", t5.config.vocab_size, pads=True)
    text = FluxText(clip=clip, t5=t5, clip_tokenizer=clip_tokenizer, t5_tokenizer=t5_tokenizer, length=length)
    return text.eval().requires_grad_(False)


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    """All tokens of a prompt, with its marks; `verbose` would complain of long ones on its own."""
    return tokenizer(prompt, verbose=False)["input_ids"]


def _tail(tokenizer: Any, prompt: str, length: int) -> str:
    """What truncation to `length` tokens drops: the last kept token is the end mark's."""
    ids = _ids(tokenizer, prompt)
    return tokenizer.decode(ids[length - 1 : -1], skip_special_tokens=True).strip() if len(ids) > length else ""
