"""What Qwen-Image's pipeline passes around: the text encoder's face, defaults, conditioning, and a picture's state.

The verbs are in `qwen_image`. Shapes as there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from gesso.pipelines.planning import CuttingVocabulary
from gesso.pipelines.token_state import TokenState

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


class TextEncoder(CuttingVocabulary, Protocol):
    """Prompts to features `[T,E]` each, with its own T; what is longer than `max_tokens` is cut."""

    @property
    def network(self) -> nn.Module: ...

    def features(self, prompts: Sequence[str], device: torch.device) -> list[Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class QwenImageDefaults:
    """What a request's blanks are filled with. `guidance` is the scale of classifier-free guidance, off up to 1."""

    width: int = 1328
    height: int = 1328
    steps: int = 50
    guidance: float = 4.0
    scheduler: str = "euler"
    init_strength: float = 0.6
    largest_edge: int = 4096


@dataclass(frozen=True)
class QwenImageConditioning:
    """A prompt's features, what guidance pushes away from (None where nothing is), the given picture's posterior."""

    prompt_TE: Tensor
    negative_TE: Tensor | None = None
    picture: DiagonalGaussianDistribution | None = None


@dataclass(eq=False, kw_only=True)
class QwenImageState(TokenState):
    """One picture on its way; `guidance` has one value for each evaluation."""

    conditioning: QwenImageConditioning
    guidance: tuple[float, ...]

    @property
    def doubled(self) -> bool:
        """Whether this evaluation is followed by a second one, of the negative prompt."""
        return self.remaining > 0 and self.guidance[self.index] > 1

    @property
    def batch_key(self) -> Hashable:
        """The network takes a time a sample and texts of any length: pictures of one size step together.

        A step cache below the trunk keeps features of the text, padded like it; they serve it only at its own length.
        """
        cache = self.request.cache
        padded_alike = None if cache is None or cache.granularity == "trunk" else self._text_lengths
        return (self.size, self.doubled, padded_alike)

    @property
    def _text_lengths(self) -> tuple[int, ...]:
        """Of the texts that this evaluation reads."""
        negative = self.conditioning.negative_TE if self.doubled else None
        return tuple(len(text_TE) for text_TE in (self.conditioning.prompt_TE, negative) if text_TE is not None)
