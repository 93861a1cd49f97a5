"""What Infinity's pipeline passes around: defaults, conditioning, a picture's state, and the company it steps in.

The verbs are in `infinity`. Shapes as there.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso.models.infinity.cache import CacheRow, KeyValueCache
from gesso.models.infinity.scales import ScaleSchedule
from gesso.models.infinity.transformer import Modulation, TextCondition, text_mask
from gesso.pipelines.contract import Cost
from gesso.pipelines.planning import Vocabulary
from gesso.request import GenerationRequest


class TextEncoder(Vocabulary, Protocol):
    """Prompts to features `[T,E]` each."""

    def features(self, prompts: Sequence[str]) -> list[Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a request's blanks are filled with; a tuple has one value a scale. A `distilled` model needs no guidance."""

    width: int
    height: int
    guidance: float | tuple[float, ...] = 3.0
    temperature: float | tuple[float, ...] = 0.5
    guidance_layer: int = 0
    top_k: int = 900
    top_p: float = 0.97
    init_strength: float = 0.6
    revisions: int = 0
    distilled: bool = False


@dataclass(frozen=True)
class InfinityConditioning:
    """A prompt, and what guidance pushes away from (None where nothing is guided), as single rows.

    `prefix` are the bits `[1,k,h,w]` of the scales that come from a given picture.
    """

    prompt: TextCondition
    null: TextCondition | None
    prefix: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Company:
    """Pictures that step together: their rows' text and cache. Rows are [prompts…, nulls of the guided…].

    `prompts` and `nulls` are the pictures' numbers. It does not hold the pictures: they hold it, and it goes with the
    last of them.
    """

    prompts: tuple[int, ...]
    nulls: tuple[int, ...]
    text: TextCondition
    cache: KeyValueCache


@dataclass(eq=False)
class InfinityState:
    """One picture on its way: codes summed so far, the bits of its scales, and where its keys and values lie.

    It is revised before `first_revised` and every scale after it.
    """

    request: GenerationRequest
    seed: int
    schedule: ScaleSchedule
    conditioning: InfinityConditioning
    guidance: tuple[float, ...]
    temperature: tuple[float, ...]
    costs: tuple[Cost, ...]
    generator: torch.Generator
    sum_kHW: Tensor
    first_revised: int
    bits: list[Tensor] = field(default_factory=list)
    inputs_nK: Tensor | None = None
    scale: int = 0
    company: Company | None = None
    prompt_row: CacheRow | None = None
    null_row: CacheRow | None = None
    last_guided: int = field(init=False)
    number: int = field(init=False, default_factory=itertools.count().__next__)  # of all pictures of this process

    def __post_init__(self) -> None:
        self.last_guided = last_guided(self.guidance)

    @property
    def total(self) -> int:
        return len(self.schedule)

    @property
    def remaining(self) -> int:
        return len(self.schedule) - self.scale

    @property
    def cost(self) -> Cost:
        return self.costs[self.scale]

    @property
    def doubled(self) -> bool:
        """Whether a null row runs in the next step: as long as its scale or a later one is guided."""
        return self.scale <= self.last_guided

    @property
    def batch_key(self) -> Hashable:
        """Same scale of the same schedule; guidance inside the network also needs the same rows to be guided."""
        layer = self.request.guidance_layer
        inside = (layer, self.doubled, self.doubled and self.guidance[self.scale] != 1) if layer else None
        return (self.schedule, self.scale, inside)


def last_guided(guidance: Sequence[float]) -> int:
    """The last scale that is guided, up to which null rows run; -1 for none."""
    return max((scale for scale, value in enumerate(guidance) if value != 1), default=-1)


def join_text(texts: Sequence[TextCondition]) -> TextCondition:
    """Single prompts as one batch, padded at the end and masked where they differ in length."""
    if len(texts) == 1:
        return texts[0]
    lengths = [text.keys_values[0][0].shape[2] for text in texts]
    longest = max(lengths)

    def pad(x_1HTD: Tensor) -> Tensor:
        return F.pad(x_1HTD, (0, 0, 0, longest - x_1HTD.shape[2]))

    layers = range(len(texts[0].keys_values))
    keys_values = [
        (
            torch.cat([pad(text.keys_values[layer][0]) for text in texts]),
            torch.cat([pad(text.keys_values[layer][1]) for text in texts]),
        )
        for layer in layers
    ]
    pooled_BC = torch.cat([text.pooled_BC for text in texts])
    modulations = [
        [torch.cat(parts) for parts in zip(*(text.modulations[layer] for text in texts), strict=True)]
        for layer in layers
    ]
    scale_B1C, shift_B1C = (torch.cat(parts) for parts in zip(*(text.head_modulation for text in texts), strict=True))
    return TextCondition(
        pooled_BC=pooled_BC,
        modulations=[Modulation(*parts) for parts in modulations],
        head_modulation=(scale_B1C, shift_B1C),
        keys_values=keys_values,
        mask_BT=text_mask(lengths, pooled_BC.device),
    )


def split_text(text: TextCondition, lengths: Sequence[int]) -> list[TextCondition]:
    """A batch as single prompts, each without the others' padding; the inverse of `join_text`."""
    return [
        TextCondition(
            pooled_BC=text.pooled_BC[row : row + 1],
            modulations=[Modulation(*(part[row : row + 1] for part in parts)) for parts in text.modulations],
            head_modulation=(text.head_modulation[0][row : row + 1], text.head_modulation[1][row : row + 1]),
            keys_values=[(k[row : row + 1, :, :length], v[row : row + 1, :, :length]) for k, v in text.keys_values],
            mask_BT=None,
        )
        for row, length in enumerate(lengths)
    ]
