"""What Z-Image's pipeline passes around: faces of its encoders, defaults, conditioning, and a picture's state.

The verbs are in `z_image`. Shapes as there.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from gesso.models.s3dit.transformer import Company, Context
from gesso.pipelines.contract import Cost
from gesso.pipelines.planning import CuttingVocabulary
from gesso.request import GenerationRequest
from gesso.sampling.flow import STOCHASTIC, estimated_clean, euler_step, share_of_way, stochastic_step


class TextEncoder(CuttingVocabulary, Protocol):
    """Prompts to features `[T,E]` each, with its own T; what is longer than `max_tokens` is cut."""

    def features(self, prompts: Sequence[str]) -> list[Tensor]: ...


@runtime_checkable
class EditingTextEncoder(Protocol):
    """What a text encoder offers besides where pictures are edited: a prompt in pieces about so many pictures.

    `count` and `cut` are of the piece that the prompt is in.
    """

    @property
    def max_tokens(self) -> int: ...

    def unknown(self, prompt: str) -> list[str]: ...

    def count(self, prompt: str, pictures: int = 0) -> int: ...

    def cut(self, prompt: str, pictures: int = 0) -> str: ...

    def pieces(self, prompt: str, pictures: int) -> list[Tensor]: ...


class PictureEncoder(Protocol):
    """Pictures to features `[rows,columns,width]` for editing, at most `max_tokens` places each."""

    @property
    def max_tokens(self) -> int: ...

    def features(self, image: Image.Image) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class ZImageDefaults:
    """What a request's blanks are filled with, and what the model is.

    A `distilled` model paints without guidance. An `editing` one takes the given picture as a condition instead of a
    start. `sizes` (width, height) are those that the model was trained at, if it was trained at few.
    """

    width: int = 1024
    height: int = 1024
    steps: int = 50
    guidance: float = 5.0
    guidance_normalization: float = 0.0
    guidance_truncation: float = 1.0
    scheduler: str = "euler"
    init_strength: float = 0.6
    distilled: bool = False
    editing: bool = False
    sizes: tuple[tuple[int, int], ...] = ()


BASE = ZImageDefaults()
TURBO = ZImageDefaults(steps=8, guidance=0.0, distilled=True)
EDIT = ZImageDefaults(editing=True)


@dataclass(frozen=True)
class ZImageConditioning:
    """A prompt as the network has read it, what guidance pushes away from (None where nothing is guided), and the
    latent `[C,1,h,w]` of a picture to start from.
    """

    prompt: Context
    negative: Context | None = None
    start_C1hw: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Together:
    """Pictures that step together, by number, those of them that are guided, and how the network sees them.

    It does not hold the pictures: they hold it, and it goes with the last of them.
    """

    pictures: tuple[int, ...]
    guided: tuple[int, ...]
    company: Company


@dataclass(eq=False, kw_only=True)
class ZImageState:
    """One picture on its way. `sigmas_N` are where its steps begin and, last, 0; `guidance` has one value a step.

    `generator` has drawn its first noise; only a stochastic scheduler asks it for more.
    """

    request: GenerationRequest
    seed: int
    conditioning: ZImageConditioning
    sigmas_N: Tensor
    guidance: tuple[float, ...]
    costs: tuple[Cost, ...]
    latent_C1hw: Tensor
    generator: torch.Generator
    velocity_C1hw: Tensor | None = None
    clean_C1hw: Tensor | None = None
    index: int = 0
    together: Together | None = None
    number: int = field(init=False, default_factory=itertools.count().__next__)  # of all pictures of this process

    @property
    def total(self) -> int:
        return len(self.sigmas_N) - 1

    @property
    def remaining(self) -> int:
        return self.total - self.index

    @property
    def cost(self) -> Cost:
        return self.costs[self.index]

    @property
    def sigma(self) -> float:
        """Where it is: 1 is noise, 0 is clean."""
        return float(self.sigmas_N[self.index])

    @property
    def time(self) -> float:
        """Where the network sees it: 0 is noise, 1 is clean."""
        return float(share_of_way(self.sigmas_N[self.index]))

    @property
    def guided(self) -> bool:
        """Whether its negative prompt takes part in the next step."""
        return self.remaining > 0 and self.guidance[self.index] > 1

    @property
    def batch_key(self) -> Hashable:
        """Any pictures may step together: the network takes a time, a size and a prompt of its own for each.

        With a step cache only those that are guided alike: a negative that begins late has its whole call computed.
        """
        return ("z-image", None if self.request.cache is None else self.guided)

    def estimate(self) -> Tensor:
        """About what the latent becomes: where the last step pointed."""
        return self.latent_C1hw if self.clean_C1hw is None else self.clean_C1hw

    def advance(self, velocity_C1hw: Tensor) -> None:
        """Take a step along this velocity."""
        next_sigma = float(self.sigmas_N[self.index + 1])
        self.clean_C1hw = estimated_clean(self.latent_C1hw, velocity_C1hw, self.sigma)
        if self.request.scheduler == STOCHASTIC and next_sigma > 0:
            noise_C1hw = torch.randn(self.latent_C1hw.shape, generator=self.generator).to(self.latent_C1hw.device)
            self.latent_C1hw = stochastic_step(self.latent_C1hw, velocity_C1hw, self.sigma, next_sigma, noise_C1hw)
        else:
            self.latent_C1hw = euler_step(self.latent_C1hw, velocity_C1hw, self.sigma, next_sigma)
        self.velocity_C1hw = velocity_C1hw
        self.index += 1
        if not self.remaining:
            self.together = None


def guidance_of_steps(request: GenerationRequest, sigmas_N: Tensor) -> tuple[float, ...]:
    """Guidance of each step of a filled request, 0 where it is off: up to 1, and past the truncation."""
    assert request.guidance is not None and request.guidance_truncation is not None
    times = share_of_way(sigmas_N[:-1]).tolist()
    given = request.guidance if isinstance(request.guidance, tuple) else (float(request.guidance),) * len(times)
    last = request.guidance_truncation
    return tuple(value if value > 1 and time <= last else 0.0 for value, time in zip(given, times, strict=True))
