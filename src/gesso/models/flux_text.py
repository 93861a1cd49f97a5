"""Text as FLUX.1 reads it: T5 gives one feature a token, always the same number of them, and CLIP one vector in all.

Through transformers, from a folder in diffusers' layout; safetensors and local files only. Not here: the word encoder
of nano models (`word_features`), Flan-T5 (`flan_t5`).
Shapes: B prompts, T tokens (512, or 256 for schnell), E = 4096 of T5-XXL, P = 768 of CLIP-L.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gesso.errors import FileError, MissingError, WeightsError

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
        return self._clip_tokenizer.model_max_length

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


def load_flux_text(folder: Path, *, device: str, dtype: torch.dtype, length: int, weights: bool = True) -> FluxText:
    """Both encoders and tokenizers of a model folder in diffusers' layout.

    Without `weights` the networks have their shapes and lie on the meta device, for planning.
    Raises MissingError without transformers, FileError for a part that is absent or something else, WeightsError for
    weights that are incomplete, too many, damaged or of the wrong shape.
    """
    try:
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel
    except ImportError as error:
        command = "pip install 'gesso[diffusion]'"
        raise MissingError("transformers, which reads prompts for this model,", command) from error
    with _quiet():
        tokenizers = {name: _tokenizer(AutoTokenizer, folder / name, files) for name, files in _TOKENIZERS.items()}
        clip = _network(CLIPTextModel, folder / "text_encoder", dtype, weights)
        t5 = _network(T5EncoderModel, folder / "text_encoder_2", dtype, weights)
    text = FluxText(
        clip=clip,
        t5=t5,
        clip_tokenizer=tokenizers["tokenizer"],
        t5_tokenizer=tokenizers["tokenizer_2"],
        length=length,
    )
    return (text.to(device) if weights else text).eval().requires_grad_(False)


def _tokenizer(automatic: Any, folder: Path, files: tuple[str, ...]) -> Any:
    if not any((folder / name).is_file() for name in files):  # transformers would make up an empty one
        raise FileError(folder, f"holds no tokenizer ({' or '.join(files)})", "fetch it again")
    try:
        return automatic.from_pretrained(folder, local_files_only=True)
    except (MemoryError, RuntimeError):  # says nothing about the folder
        raise
    except Exception as error:  # whatever its many readers raise for files that are damaged
        raise FileError(folder, f"holds no tokenizer that can be read ({_reason(error)})", "fetch it again") from error


def _network(kind: Any, folder: Path, dtype: torch.dtype, weights: bool) -> nn.Module:
    """An encoder of transformers, strictly filled; on the meta device without `weights`."""
    if not (folder / "config.json").is_file():  # transformers would take its own defaults
        raise FileError(folder, "holds no config.json", "fetch it again")
    try:
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        if kind.__name__ not in (config.architectures or [kind.__name__]):
            raise FileError(folder, f"holds {', '.join(config.architectures)}, not {kind.__name__}", "fetch it again")
        if not weights:
            with torch.device("meta"):
                return kind(config).to(dtype)
        if not any(folder.glob("*.safetensors")):
            raise FileError(folder, "holds no .safetensors", "other formats are not read; fetch it again")
        network, loading = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (FileError, MemoryError, RuntimeError):
        raise
    except Exception as error:  # whatever its many readers raise for a folder that is damaged or of something else
        raise WeightsError(folder, detail=f"no {kind.__name__} can be read ({_reason(error)})") from error
    _refuse_misfits(folder, loading)
    return network


def _refuse_misfits(folder: Path, loading: Mapping[str, Any]) -> None:
    """Raise WeightsError for what transformers has filled with random numbers, or left over."""
    mismatched = sorted(
        f"{name}: {tuple(found)} where {tuple(wanted)} is wanted" for name, found, wanted in loading["mismatched_keys"]
    )
    missing, unexpected = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    if missing or unexpected or mismatched:
        raise WeightsError(folder, missing=missing, unexpected=unexpected, mismatched=mismatched)


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    """All tokens of a prompt, with its marks; `verbose` would complain of long ones on its own."""
    return tokenizer(prompt, verbose=False)["input_ids"]


def _tail(tokenizer: Any, prompt: str, length: int) -> str:
    """What truncation to `length` tokens drops: the last kept token is the end mark's."""
    ids = _ids(tokenizer, prompt)
    return tokenizer.decode(ids[length - 1 : -1], skip_special_tokens=True).strip() if len(ids) > length else ""


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and reports on stderr: what is wrong with a folder is raised."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
