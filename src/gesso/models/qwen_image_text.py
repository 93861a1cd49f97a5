"""Text as Qwen-Image reads it: features of Qwen2.5-VL's language model, of a prompt inside a fixed template.

The template's first 34 tokens are read and then dropped. Of the published encoder only the language model is kept: its
eyes and its word for what comes next are never used. Through transformers, from a folder in diffusers' layout;
safetensors and local files only. Not here: Qwen3 as Z-Image reads it (`qwen_text`), padding of a batch (`pipelines`).
Shapes: B prompts, T tokens of each, E width (3584 for the 7B).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gesso.errors import FileError, MissingError
from gesso.models import components
from gesso.models.diffusers_parts import INSTALL
from gesso.models.transformers_parts import check_tokenizer, quiet, read_network, read_tokenizer

# The template, as diffusers' `QwenImagePipeline` has it; the prompt goes between the two.
BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
DROPPED = 34  # tokens of BEFORE
LENGTH = 512  # tokens after those that the transformer is given
NOTHING = " "  # what the authors recommend for a negative prompt where there is none

_SHOWN = 1024 + DROPPED  # tokens that the language model is given, however few are kept
_TOKENIZERS = ("tokenizer.json", "vocab.json")


class QwenImageText:
    """Prompts to features `[T,E]` each, in the network's dtype. What is longer than `length` tokens is cut.

    `network` is the language model of a Qwen2.5-VL.
    """

    def __init__(self, network: nn.Module, tokenizer: Any, length: int = LENGTH) -> None:
        self.network = network
        self._tokenizer, self._length = tokenizer, length

    @property
    def max_tokens(self) -> int:
        """The template's tokens after the prompt included, those before it not."""
        return self._length

    @property
    def width(self) -> int:
        """E."""
        config: Any = self.network.config
        return config.hidden_size

    def count(self, prompt: str) -> int:
        """Tokens of a prompt and of the template after it, before any cut."""
        return len(self._tokenizer(BEFORE + prompt + AFTER, verbose=False)["input_ids"]) - DROPPED

    def unknown(self, prompt: str) -> list[str]:
        """None: its pieces spell any word."""
        return []

    def cut(self, prompt: str) -> str:
        """The tail of a prompt that is past what is read, "" where all of it is read."""
        tokens = self._tokenizer(BEFORE + prompt + AFTER, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in tokens["offset_mapping"]]
        if len(ends) <= DROPPED + self._length:
            return ""
        read = ends[DROPPED + self._length - 1] - len(BEFORE)
        return prompt[max(0, read) :].strip()

    @torch.no_grad()
    def features(self, prompts: Sequence[str], device: torch.device) -> list[Tensor]:
        """Features of each prompt, run as one batch that is padded at its end, without the padding.

        Mirrors `_get_qwen_prompt_embeds` and `encode_prompt` of diffusers' `QwenImagePipeline`.
        """
        tokens = self._tokenizer(
            [BEFORE + prompt + AFTER for prompt in prompts],
            max_length=_SHOWN,
            truncation=True,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        ).to(device)
        found = self.network(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)
        rows = zip(found.last_hidden_state, tokens.attention_mask.bool(), strict=True)
        return [features_TE[mask_T][DROPPED:][: self._length] for features_TE, mask_T in rows]


def load_qwen_image_text(folder: Path, *, dtype: torch.dtype, weights: bool = True) -> QwenImageText:
    """Encoder and tokenizer of a model folder in diffusers' layout.

    Without `weights` the network has its shapes and lies on the meta device, for planning.
    Raises MissingError without transformers, FileError for a part that is absent or something else, WeightsError for
    weights that are incomplete, too many, damaged or of the wrong shape.
    """
    try:
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    except ImportError as error:
        raise MissingError("transformers, which reads prompts for this model,", INSTALL) from error
    part, own = folder / "text_encoder", folder / "tokenizer"

    def language_model() -> nn.Module:
        whole: Any = read_network(Qwen2_5_VLForConditionalGeneration, part, dtype, weights=weights)
        return whole.model.language_model

    with quiet():
        tokenizer = read_tokenizer(AutoTokenizer, own, _TOKENIZERS)
        network = components.shared(part, "language model of Qwen2.5-VL", dtype, language_model)
    config: Any = network.config
    check_tokenizer(tokenizer, own, config.vocab_size, pads=True)
    if not tokenizer.is_fast:
        raise FileError(own, "holds a tokenizer that does not say where its tokens end", "fetch it again")
    found = len(tokenizer(BEFORE)["input_ids"])
    if found != DROPPED:
        problem = f"the template before a prompt has {found} tokens, not {DROPPED}"
        raise FileError(own, f"holds a tokenizer of another model ({problem})", "fetch it again")
    return QwenImageText(network, tokenizer)
