"""Text as Z-Image reads it: features from inside Qwen3, of a prompt wrapped in its chat template.

Z-Image takes what enters the last decoder layer, so that layer and the final norm are never made. Padding is at the
end, where a causal network does not look at it, so no mask is needed and prompts run at the longest one's length.
Not here: files (`weights/z_image`), the word encoder of nano models (`word_features`).
Shapes: B prompts, T tokens, E width (2560 for Qwen3-4B).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gesso.devices import META

if TYPE_CHECKING:
    from transformers import Qwen3Config, Qwen3Model

LENGTH = 512
_PREFIX = "model."  # of files that hold the whole language model
_HEAD = "lm_head.weight"  # likewise; it is the embedding once more

# The chat template of one message, with pictures in it. Source: diffusers' `ZImageOmniPipeline`.
_USER, _END, _ASSISTANT = "<|im_start|>user\n", "<|im_end|>", "\n<|im_start|>assistant\n"
_PICTURE, _PICTURE_END = "<|vision_start|>", "<|vision_end|>"


class QwenText:
    """Prompts to features `[T,E]` float32 each, with its own T. What is longer than `length` tokens is cut."""

    def __init__(self, network: Qwen3Model, tokenizer: Any, length: int = LENGTH) -> None:
        self.network = network
        self._tokenizer, self._length = tokenizer, length

    @property
    def max_tokens(self) -> int:
        """The template's tokens included."""
        return self._length

    @property
    def width(self) -> int:
        """E."""
        return self.network.config.hidden_size

    def count(self, prompt: str, pictures: int = 0) -> int:
        """Tokens of a prompt in its template, before any cut; about pictures, those of the piece that it is in."""
        return len(self._ids(self._around(prompt, pictures)[0]))

    def unknown(self, prompt: str) -> list[str]:
        """None: its pieces spell any word."""
        return []

    def cut(self, prompt: str, pictures: int = 0) -> str:
        """The tail of a prompt that is past what is read, "" where all of it is read."""
        text, begin = self._around(prompt, pictures)
        ends = self._tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        if len(ends) <= self._length:
            return ""
        return prompt[max(0, ends[self._length - 1][1] - begin) :]

    def _around(self, prompt: str, pictures: int) -> tuple[str, int]:
        """What is read with a prompt in it, and where in that the prompt begins."""
        text = self._asked(prompt) if pictures else self.templated(prompt)
        return text, len(_PICTURE_END) if pictures else text.index(prompt)

    def templated(self, prompt: str) -> str:
        """A prompt as one message of a user, and the assistant's turn begun."""
        message = [{"role": "user", "content": prompt}]
        return self._tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    def features(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features of each prompt."""
        return self._read([self.templated(prompt) for prompt in prompts])

    def pieces(self, prompt: str, pictures: int) -> list[Tensor]:
        """Features of a prompt about so many pictures, in pieces: one before each, one with the prompt, one after."""
        if not pictures:
            return self._read([_USER + prompt + _END + _ASSISTANT])
        between = [_PICTURE_END + _PICTURE] * (pictures - 1)
        return self._read([_USER + _PICTURE, *between, self._asked(prompt), _PICTURE_END + _END])

    def _asked(self, prompt: str) -> str:
        """The piece of a prompt about pictures that has the prompt in it; each piece has all the tokens to itself."""
        return _PICTURE_END + prompt + _END + _ASSISTANT + _PICTURE

    def features_of_ids(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Features of texts that are tokens already."""
        if not ids:
            return []
        rows_BT = pad_sequence([torch.tensor(row) for row in ids], batch_first=True).to(self.network.device)
        with torch.no_grad():
            features_BTE = self.network(input_ids=rows_BT, use_cache=False).last_hidden_state
        return [features_TE[: len(row)].float() for features_TE, row in zip(features_BTE, ids, strict=True)]

    def _read(self, texts: Sequence[str]) -> list[Tensor]:
        return self.features_of_ids([self._ids(text)[: self._length] for text in texts])

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, verbose=False)["input_ids"]


def build(config: Qwen3Config) -> Qwen3Model:
    """Qwen3 on the meta device, without its last layer and its final norm."""
    from transformers import Qwen3Model

    shorter = deepcopy(config)
    shorter.num_hidden_layers -= 1
    shorter.layer_types = list(config.layer_types or [])[: shorter.num_hidden_layers]
    with torch.device(META):
        network = Qwen3Model(shorter)
    network.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    network.rotary_emb = type(network.rotary_emb)(config=shorter)  # computed, not read, and always float32
    return network


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors by the names of `Qwen3Model`, whether it holds that or the whole language model."""
    return {name.removeprefix(_PREFIX): value for name, value in state.items() if name != _HEAD}


def is_left_out(name: str, layers: int) -> bool:
    """Whether a tensor of a Qwen3 of so many layers is one that `build` does not make."""
    return name == "norm.weight" or name.startswith(f"layers.{layers - 1}.")
