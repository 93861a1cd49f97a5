"""Flan-T5 text features, as published Infinity reads them: the encoder of google/flan-t5-xl, through transformers.

Not here: the word encoder of nano models (`word_encoder`).
Shapes: T tokens of a prompt, E = 2048.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gesso.errors import FileError, MissingError

_LENGTH = 512


class FlanT5:
    """Prompts to features `[T,E]` float32, padding dropped. A prompt longer than 512 tokens is refused by the pipeline."""

    def __init__(self, folder: Path, *, device: str, dtype: torch.dtype) -> None:
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError as error:
            raise MissingError("transformers, which reads prompts for this model,", "pip install 'gesso[diffusion]'") \
                from error  # fmt: skip
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = T5EncoderModel.from_pretrained(folder, local_files_only=True, dtype=dtype)
        except (OSError, ValueError) as error:
            raise FileError(folder, f"holds no T5 encoder ({str(error).splitlines()[0]})", "fetch it again") from error
        self._model = model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]

    @property
    def max_tokens(self) -> int:
        return _LENGTH

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, the end mark included, before any cut."""
        return len(self._tokenizer(prompt)["input_ids"])

    @torch.no_grad()
    def features(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features of each prompt with its own T. Padding to the longest is masked, so it changes only rounding."""
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=_LENGTH, return_tensors="pt"
        ).to(self._model.device)
        features_BTE = self._model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        lengths = tokens["attention_mask"].sum(1).tolist()
        return [row[:length].float() for row, length in zip(features_BTE, lengths, strict=True)]
