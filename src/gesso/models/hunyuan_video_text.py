"""Text as HunyuanVideo reads it: features from inside Llama 3 of a prompt in its template, and one vector of CLIP.

The transformer takes what leaves the third layer from Llama's end and is told by a mask how much of it is text. The
template's first 95 tokens are read and then dropped. Through transformers, from a folder in diffusers' layout;
safetensors and local files only. Not here: what the features are for (`pipelines`).
Shapes: B prompts, T = 256 tokens, E = 4096 of Llama 3 8B, P = 768 of CLIP-L.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gesso.errors import FileError, MissingError
from gesso.models.diffusers_parts import INSTALL
from gesso.models.transformers_parts import check_tokenizer, quiet, read_network, read_tokenizer

# The template, as diffusers' `HunyuanVideoPipeline` has it; the prompt goes between the two.
BEFORE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n"
)
AFTER = "<|eot_id|>"
DROPPED = 95  # tokens of BEFORE, the mark at the very beginning included
LENGTH = 256  # tokens after those that the transformer is given
UNUSED_LAYERS = 2  # of Llama, after the one whose output is taken; another model may use them, so they stay

_LLAMA_TOKENIZERS = ("tokenizer.json",)
_CLIP_TOKENIZERS = ("tokenizer.json", "vocab.json")


class HunyuanVideoText:
    """Prompts to features `[B,T,E]`, their mask `[B,T]` and pooled `[B,P]`; `cut` tells what of them is too long."""

    def __init__(self, *, llama: nn.Module, clip: nn.Module, llama_tokenizer: Any, clip_tokenizer: Any) -> None:
        self.llama, self.clip = llama, clip
        self._llama_tokenizer, self._clip_tokenizer = llama_tokenizer, clip_tokenizer

    @property
    def max_tokens(self) -> int:
        """T: the prompt's tokens and the template's after it."""
        return LENGTH

    @property
    def read_tokens(self) -> int:
        """What Llama goes through for one prompt, the template before it included."""
        return DROPPED + LENGTH

    @property
    def pooled_tokens(self) -> int:
        """The most tokens that CLIP reads, its two marks included."""
        clip: Any = self.clip.config
        return int(min(self._clip_tokenizer.model_max_length, clip.max_position_embeddings))

    @property
    def widths(self) -> tuple[int, int]:
        """E and P."""
        llama: Any = self.llama.config
        clip: Any = self.clip.config
        return llama.hidden_size, clip.hidden_size

    def count(self, prompt: str) -> int:
        """Tokens of a prompt and of the template after it, before any cut."""
        return len(self._llama_tokenizer(BEFORE + prompt + AFTER, verbose=False)["input_ids"]) - DROPPED

    def unknown(self, prompt: str) -> list[str]:
        """None: both vocabularies spell any word."""
        return []

    def cut(self, prompt: str) -> str:
        """The tail of a prompt that Llama does not read, "" where it reads all."""
        tokens = self._llama_tokenizer(BEFORE + prompt + AFTER, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in tokens["offset_mapping"]]
        if len(ends) <= self.read_tokens:
            return ""
        return prompt[max(0, ends[self.read_tokens - 1] - len(BEFORE)) :].strip()

    def cut_from_pooled(self, prompt: str) -> str:
        """The tail that CLIP does not read, "" where it reads all."""
        ids, most = self._clip_tokenizer(prompt, verbose=False)["input_ids"], self.pooled_tokens
        kept = ids[most - 1 : -1] if len(ids) > most else []  # the last that is kept is the end mark
        return self._clip_tokenizer.decode(kept, skip_special_tokens=True).strip()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Features, mask and pooled of prompts as one batch, each in its network's dtype, the mask in whole numbers.

        Mirrors `_get_llama_prompt_embeds` and `_get_clip_prompt_embeds` of diffusers' `HunyuanVideoPipeline`.
        """
        templated = [BEFORE + prompt + AFTER for prompt in prompts]
        tokens = _padded(self._llama_tokenizer, templated, self.read_tokens).to(device)
        found = self.llama(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            output_hidden_states=True,
            use_cache=False,
        )
        features_BTE = found.hidden_states[-(UNUSED_LAYERS + 1)]
        clip_ids_BT = _padded(self._clip_tokenizer, prompts, self.pooled_tokens).input_ids.to(device)
        pooled_BP = self.clip(clip_ids_BT, output_hidden_states=False).pooler_output
        return features_BTE[:, DROPPED:], tokens.attention_mask[:, DROPPED:], pooled_BP


def _padded(tokenizer: Any, texts: Sequence[str], length: int) -> Any:
    return tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def load_hunyuan_video_text(folder: Path, *, dtype: torch.dtype, weights: bool = True) -> HunyuanVideoText:
    """Both encoders and tokenizers of a model folder in diffusers' layout.

    Without `weights` the networks have their shapes and lie on the meta device, for planning.
    Raises MissingError without transformers, FileError for a part that is absent or something else, WeightsError for
    weights that are incomplete, too many, damaged or of the wrong shape.
    """
    try:
        from transformers import AutoTokenizer, CLIPTextModel, LlamaModel, PreTrainedTokenizerFast
    except ImportError as error:
        raise MissingError("transformers, which reads prompts for this model,", INSTALL) from error
    own, clip_own = folder / "tokenizer", folder / "tokenizer_2"
    with quiet():
        # As its file has it: what is named in its configuration is, of late, the reader of an older Llama's.
        llama_tokenizer = read_tokenizer(PreTrainedTokenizerFast, own, _LLAMA_TOKENIZERS)
        clip_tokenizer = read_tokenizer(AutoTokenizer, clip_own, _CLIP_TOKENIZERS)
        llama: Any = read_network(LlamaModel, folder / "text_encoder", dtype, weights=weights)
        clip: Any = read_network(CLIPTextModel, folder / "text_encoder_2", dtype, weights=weights)
    check_tokenizer(llama_tokenizer, own, llama.config.vocab_size, pads=True)
    check_tokenizer(clip_tokenizer, clip_own, clip.config.vocab_size, pads=True)
    if (found := len(llama_tokenizer(BEFORE)["input_ids"])) != DROPPED:
        problem = f"the template before a prompt has {found} tokens, not {DROPPED}"
        raise FileError(own, f"holds a tokenizer of another model ({problem})", "fetch it again")
    if (layers := llama.config.num_hidden_layers) <= UNUSED_LAYERS:
        problem = f"holds a network of {layers} layers, the last {UNUSED_LAYERS} of which are not used"
        raise FileError(folder / "text_encoder", problem, "fetch it again")
    return HunyuanVideoText(llama=llama, clip=clip, llama_tokenizer=llama_tokenizer, clip_tokenizer=clip_tokenizer)
