"""What FLUX's pipeline passes around: the text encoder's face, defaults, conditioning, and a picture's state.

The verbs are in `flux`. Shapes as there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from gesso.pipelines.contract import Cost
from gesso.pipelines.planning import CuttingVocabulary
from gesso.request import GenerationRequest
from gesso.sampling.schedulers import Scheduler

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


class TextEncoder(CuttingVocabulary, Protocol):
    """Prompts to features `[B,T,E]` of one length T = `max_tokens`, and one vector each, `[B,P]`."""

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class TwoTextEncoders(Protocol):
    """What a text encoder offers besides where the pooled vector comes from a network that reads less (CLIP)."""

    @property
    def pooled_tokens(self) -> int: ...

    def cut_from_pooled(self, prompt: str) -> str: ...


@dataclass(frozen=True, kw_only=True)
class FluxDefaults:
    """What a request's blanks are filled with, and what the model is.

    `guidance` goes into the network where that has an embedding for it (FLUX.1 dev). Where it has none, a `distilled`
    model has no use for it (schnell), and for any other it is classifier-free guidance with a second evaluation.
    `sizes` (width, height) are those that the model was trained at, if it was trained at few.
    """

    width: int
    height: int
    steps: int = 28
    guidance: float = 3.5
    scheduler: str = "euler"
    init_strength: float = 0.6
    distilled: bool = False
    largest_edge: int = 4096
    sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ReadText:
    """A prompt as the network reads it: features `[1,T,E]` and pooled `[1,P]`."""

    features_1TE: Tensor
    pooled_1P: Tensor


@dataclass(frozen=True)
class FluxConditioning:
    """A prompt, what guidance pushes away from (None where nothing is), and the given picture's posterior."""

    prompt: ReadText
    negative: ReadText | None = None
    picture: DiagonalGaussianDistribution | None = None


@dataclass(eq=False, kw_only=True)
class FluxState:
    """One picture on its way: its tokens, its own scheduler, and the network's last word on it.

    `guidance` and `true_guidance` have one value for each evaluation; `size` is in latent cells.
    """

    request: GenerationRequest
    seed: int
    size: tuple[int, int]
    conditioning: FluxConditioning
    scheduler: Scheduler
    timesteps_N: Tensor
    guidance: tuple[float, ...]
    true_guidance: tuple[float, ...]
    costs: tuple[Cost, ...]
    positions_L3: Tensor
    tokens_1LD: Tensor
    velocity_1LD: Tensor | None = None
    index: int = 0

    @property
    def total(self) -> int:
        return len(self.guidance)

    @property
    def remaining(self) -> int:
        return self.total - self.index

    @property
    def cost(self) -> Cost:
        return self.costs[self.index]

    @property
    def doubled(self) -> bool:
        """Whether this evaluation is followed by a second one, of the negative prompt."""
        return self.remaining > 0 and self.true_guidance[self.index] > 1

    @property
    def batch_key(self) -> Hashable:
        """The network takes a time a sample, so pictures of one size step together wherever they are on their way."""
        return (self.size, self.conditioning.prompt.features_1TE.shape[1], self.doubled)

    def clean_tokens(self) -> Tensor:
        """About what the picture becomes, `[1,L,D]`: without the noise that the network last saw in it."""
        if self.velocity_1LD is None:
            return self.tokens_1LD
        sigma = (
            self.timesteps_N[self.index] / 1000 if self.remaining else torch.zeros((), device=self.tokens_1LD.device)
        )
        return self.tokens_1LD - sigma.to(self.tokens_1LD.dtype) * self.velocity_1LD

    def advance(self, velocity_1LD: Tensor) -> None:
        """Take the scheduler's step along this velocity."""
        timestep = self.timesteps_N[self.index]
        (self.tokens_1LD,) = self.scheduler.step(velocity_1LD, timestep, self.tokens_1LD, return_dict=False)
        self.velocity_1LD = velocity_1LD
        self.index += 1
