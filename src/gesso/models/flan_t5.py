"""Flan-T5 text features, as published Infinity reads them: the encoder of google/flan-t5-xl, through transformers.

Not here: the word encoder of nano models (`word_encoder`).
Shapes: T tokens of a prompt, E = 2048.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gesso.devices import META
from gesso.errors import FileError, MissingError, WeightsError
from gesso.models import components
from gesso.models.transformers_parts import quiet, read_automatic

_LENGTH = 512
_TOKENIZERS = ("tokenizer.json", "spiece.model")


class FlanT5:
    """Prompts to features `[T,E]` float32, padding dropped. A pipeline refuses prompts longer than 512 tokens.

    Without `weights` the network has its shapes and lies on the meta device: prompts can be counted and nothing else.
    Raises MissingError without transformers, FileError for a folder that is no T5, WeightsError for one that lacks
    tensors of the encoder or has them in other shapes.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, weights: bool = True) -> None:
        if not any((folder / name).is_file() for name in _TOKENIZERS):  # transformers would make up an empty one
            raise FileError(folder, f"holds no tokenizer ({' or '.join(_TOKENIZERS)})", "fetch it again")
        try:
            from transformers import AutoTokenizer

            with quiet():
                self._tokenizer = read_automatic(AutoTokenizer, folder)
                self.network: Any = _read(folder, dtype) if weights else _shapes(folder, dtype)
        except (FileError, WeightsError):
            raise
        except ImportError as error:
            command = "pip install 'gesso[diffusion]'"
            raise MissingError("transformers, which reads prompts for this model,", command) from error
        except (MemoryError, RuntimeError):  # says nothing about the folder
            raise
        except Exception as error:  # whatever its many readers raise for a folder that is damaged or of something else
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise FileError(folder, f"holds no T5 encoder ({reason})", "fetch it again") from error

    @property
    def max_tokens(self) -> int:
        return _LENGTH

    @property
    def width(self) -> int:
        """E, of the features."""
        return self.network.config.d_model

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, the end mark included, before any cut."""
        return len(self._tokenizer(prompt, verbose=False)["input_ids"])

    def unknown(self, prompt: str) -> list[str]:
        """None: its pieces spell any word."""
        return []

    @torch.no_grad()
    def features(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features of each prompt with its own T. Padding to the longest is masked, so it changes only rounding."""
        if not prompts:  # which tokenizers do not take
            return []
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=_LENGTH, return_tensors="pt"
        ).to(self.network.device)
        features_BTE = self.network(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        lengths = tokens["attention_mask"].sum(1).tolist()
        return [row[:length].float() for row, length in zip(features_BTE, lengths, strict=True)]


def _read(folder: Path, dtype: torch.dtype) -> nn.Module:
    return components.shared(folder, "the encoder of Flan-T5", dtype, lambda: _encoder(folder, dtype))


def _shapes(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The network as its configuration has it, without memory."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config.from_pretrained(folder, local_files_only=True)
    with torch.device(META):
        network = T5EncoderModel(config)
    return nn.Module.to(network, dtype=dtype).eval().requires_grad_(False)


def _encoder(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The network, its own tensors all there; those of the decoder are left where they are."""
    from transformers import T5EncoderModel

    network, loading = T5EncoderModel.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        folder,
        local_files_only=True,
        trust_remote_code=False,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    if loading["missing_keys"] or loading["mismatched_keys"]:  # these transformers has filled with random numbers
        mismatched = sorted(
            f"{name}: {tuple(found)} where {tuple(wanted)} is wanted"
            for name, found, wanted in loading["mismatched_keys"]
        )
        raise WeightsError(folder, missing=sorted(loading["missing_keys"]), mismatched=mismatched)
    return network.eval().requires_grad_(False)
