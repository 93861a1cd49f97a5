"""What HunyuanVideo's pipeline passes around: the text encoder's face, defaults, conditioning, and a video's state.

The verbs are in `hunyuan_video`. Shapes as there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gesso.pipelines.contract import Cost
from gesso.pipelines.planning import CuttingVocabulary
from gesso.request import GenerationRequest
from gesso.sampling.schedulers import Scheduler


class TextEncoder(CuttingVocabulary, Protocol):
    """Prompts to features `[B,T,E]` of T = `max_tokens`, a mask `[B,T]` that is 1 where text is, and pooled `[B,P]`.

    `read_tokens` are what its larger network goes through for one prompt; the smaller one reads `pooled_tokens`.
    """

    llama: torch.nn.Module
    clip: torch.nn.Module

    @property
    def read_tokens(self) -> int: ...

    @property
    def pooled_tokens(self) -> int: ...

    def cut_from_pooled(self, prompt: str) -> str: ...

    def encode(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoDefaults:
    """What a request's blanks are filled with, and how far the model goes.

    `guidance` goes into the network. Above `trained_frames` a warning is given; `largest_frames` are the most.
    """

    width: int = 1280
    height: int = 720
    frames: int = 129
    fps: float = 24.0
    steps: int = 50
    guidance: float = 6.0
    scheduler: str = "euler"
    largest_edge: int = 2048
    trained_frames: int = 129
    largest_frames: int = 257


@dataclass(frozen=True)
class ReadText:
    """A prompt as the network reads it: features `[1,T,E]`, mask `[1,T]` and pooled `[1,P]`."""

    features_1TE: Tensor
    mask_1T: Tensor
    pooled_1P: Tensor


@dataclass(frozen=True)
class HunyuanVideoConditioning:
    """A prompt, and what guidance pushes away from (None where nothing is)."""

    prompt: ReadText
    negative: ReadText | None = None


@dataclass(eq=False, kw_only=True)
class HunyuanVideoState:
    """One video on its way: its latent, its own scheduler, and where its last step pointed.

    `guidance` has one value for each evaluation.
    """

    request: GenerationRequest
    seed: int
    conditioning: HunyuanVideoConditioning
    scheduler: Scheduler
    timesteps_N: Tensor
    guidance: tuple[float, ...]
    true_guidance: float
    step_cost: Cost
    latent_1Cfhw: Tensor
    clean_1Cfhw: Tensor | None = None
    index: int = 0

    @property
    def total(self) -> int:
        return len(self.guidance)

    @property
    def remaining(self) -> int:
        return self.total - self.index

    @property
    def cost(self) -> Cost:
        return self.step_cost

    @property
    def doubled(self) -> bool:
        """Whether each evaluation is followed by a second one, of the negative prompt."""
        return self.conditioning.negative is not None

    @property
    def time(self) -> Tensor:
        """When this step is, 0 to 1000, rounded to the latent's dtype as diffusers' pipeline hands it over."""
        return self.timesteps_N[self.index].to(self.latent_1Cfhw.dtype).float()

    @property
    def batch_key(self) -> Hashable:
        """The network takes a time a sample, so videos of one size step together wherever they are on their way."""
        return (tuple(self.latent_1Cfhw.shape), self.doubled)

    def clean_latent(self) -> Tensor:
        """About what the video becomes, `[1,C,f,h,w]`: where the last step pointed."""
        return self.latent_1Cfhw if self.clean_1Cfhw is None else self.clean_1Cfhw

    def advance(self, velocity_1Cfhw: Tensor) -> None:
        """Take the scheduler's step along this velocity."""
        timestep = self.timesteps_N[self.index]
        self.clean_1Cfhw = self.latent_1Cfhw - timestep / 1000 * velocity_1Cfhw
        (self.latent_1Cfhw,) = self.scheduler.step(velocity_1Cfhw, timestep, self.latent_1Cfhw, return_dict=False)
        self.index += 1
