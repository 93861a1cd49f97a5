"""Text as Stable Diffusion XL reads it: two CLIPs, each by its last layer but one, and the larger one's pooled vector.

Through transformers, from a folder in diffusers' layout; safetensors and local files only. Not here: texts of single
files (`engine/loading/sdxl` fills them), other families' (`flux_text`).
Shapes: B prompts, T = 77 tokens, E = 768 of CLIP-L + 1280 of OpenCLIP bigG, P = 1280.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gesso.errors import MissingError
from gesso.models.diffusers_parts import INSTALL
from gesso.models.transformers_parts import check_tokenizer, quiet, read_network, read_tokenizer

ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_LAYER = -2  # of the hidden states: the output of the last layer but one


class SdxlText:
    """Prompts to features `[B,T,E]` and pooled `[B,P]`, in the encoders' dtype. What is longer than T is cut.

    `device` is where the encoders work.
    """

    def __init__(self, *, small: nn.Module, large: nn.Module, tokenizers: Sequence[Any], device: torch.device) -> None:
        self.small, self.large, self.device = small, large, device
        self._tokenizers = tuple(tokenizers)

    @property
    def max_tokens(self) -> int:
        """T, the two marks included."""
        lengths = [each.model_max_length for each in self._tokenizers]
        configs: list[Any] = [network.config for network in (self.small, self.large)]
        return int(min(*lengths, *(config.max_position_embeddings for config in configs)))

    @property
    def widths(self) -> tuple[int, int]:
        """E and P."""
        small: Any = self.small.config
        large: Any = self.large.config
        return small.hidden_size + large.hidden_size, large.projection_dim

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, the marks included, before any cut; both encoders have one vocabulary."""
        return len(_ids(self._tokenizers[0], prompt))

    def unknown(self, prompt: str) -> list[str]:
        """None: the vocabulary spells any word."""
        return []

    def cut(self, prompt: str) -> str:
        """The tail that is not read because the prompt is too long, "" where all is read."""
        tokenizer, length = self._tokenizers[0], self.max_tokens
        ids = _ids(tokenizer, prompt)
        return tokenizer.decode(ids[length - 1 : -1], skip_special_tokens=True).strip() if len(ids) > length else ""

    @property
    def most_skipped(self) -> int:
        """How many layers may be left out besides the last, so that one of each encoder is read."""
        configs: list[Any] = [network.config for network in (self.small, self.large)]
        return min(config.num_hidden_layers for config in configs) - 1

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], skips: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Features `[B,T,E]` and pooled `[B,P]` of prompts. Mirrors `StableDiffusionXLPipeline.encode_prompt`.

        `skips` are how many layers each leaves out besides the last, `clip_skip` there; else 0.
        """
        made = [
            network(self._padded(tokenizer, prompts), output_hidden_states=True)
            for network, tokenizer in zip((self.small, self.large), self._tokenizers, strict=True)
        ]
        rows = [
            torch.cat([each.hidden_states[_LAYER - skip][row] for each in made], dim=-1)
            for row, skip in enumerate(skips or [0] * len(prompts))
        ]
        return torch.stack(rows), made[1].text_embeds

    def _padded(self, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids.to(self.device)


class Kinds(NamedTuple):
    """Classes of transformers: of the smaller and the larger encoder, and of what reads a tokenizer."""

    small: Any
    large: Any
    tokenizer: Any


def kinds() -> Kinds:
    """Raises MissingError without transformers."""
    try:
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection
    except ImportError as error:
        raise MissingError("transformers, which reads prompts for this model,", INSTALL) from error
    return Kinds(CLIPTextModel, CLIPTextModelWithProjection, AutoTokenizer)


def load_sdxl_text(folder: Path, *, device: torch.device, dtype: torch.dtype, weights: bool = True) -> SdxlText:
    """Both encoders and tokenizers of a model folder in diffusers' layout.

    Without `weights` the networks have their shapes and lie on the meta device, for planning.
    Raises MissingError without transformers, FileError for a part that is absent or something else, WeightsError for
    weights that are incomplete, too many, damaged or of the wrong shape.
    """
    with quiet():
        small, large = (
            read_network(kind, folder / name, dtype, weights=weights)
            for kind, name in zip(kinds()[:2], ENCODERS, strict=True)
        )
    return assemble(small, large, folder, device)


def assemble(small: nn.Module, large: nn.Module, folder: Path, device: torch.device) -> SdxlText:
    """Encoders with the tokenizers of a folder. Raises FileError where those are absent or do not fit."""
    tokenizers = []
    for name, network in zip(TOKENIZERS, (small, large), strict=True):
        config: Any = network.config
        tokenizer = read_tokenizer(kinds().tokenizer, folder / name, TOKENIZER_FILES)
        check_tokenizer(tokenizer, folder / name, config.vocab_size, pads=True)
        tokenizers.append(tokenizer)
    return SdxlText(small=small, large=large, tokenizers=tokenizers, device=device)


def restore_positions(network: nn.Module) -> None:
    """Give an encoder that was made without memory its count of positions, which no file holds."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta and name == "position_ids":
                module.register_buffer(name, torch.arange(buffer.numel())[None], persistent=False)


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    """All tokens of a prompt, with its marks; `verbose` would complain of long ones on its own."""
    return tokenizer(prompt, verbose=False)["input_ids"]
