"""What Stable Diffusion XL's pipeline passes around: the face of its text encoder, defaults, conditioning, and a state.

The verbs are in `sdxl`. Shapes as there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from gesso.pipelines.contract import Cost
from gesso.pipelines.planning import CuttingVocabulary
from gesso.request import GenerationRequest
from gesso.sampling import noise_schedulers
from gesso.sampling.noise_schedulers import NoiseScheduler

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


class TextEncoder(CuttingVocabulary, Protocol):
    """Prompts to features `[B,T,E]` of one length T = `max_tokens`, and one vector each, `[B,P]`."""

    @property
    def most_skipped(self) -> int: ...

    def encode(self, prompts: Sequence[str], skips: Sequence[int] = ()) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class SdxlDefaults:
    """What a request's blanks are filled with. `init_strength` is for a picture without a mask; with one it is 1."""

    width: int
    height: int
    steps: int = 30
    guidance: float = 7.0
    scheduler: str = "euler"
    init_strength: float = 0.6
    largest_edge: int = 4096


@dataclass(frozen=True)
class ReadText:
    """A prompt as the network reads it: features `[1,T,E]` and pooled `[1,P]`."""

    features_1TE: Tensor
    pooled_1P: Tensor


@dataclass(frozen=True)
class GivenPicture:
    """The posterior of the picture to start from; with a mask, where it is painted anew, `[1,1,h,w]` of ones.

    `rest` is the posterior of what stays of it, for networks that read that.
    """

    posterior: DiagonalGaussianDistribution
    mask_11hw: Tensor | None = None
    rest: DiagonalGaussianDistribution | None = None


@dataclass(frozen=True)
class SdxlConditioning:
    """A prompt, what guidance pushes away from (None where nothing is), and the given picture."""

    prompt: ReadText
    negative: ReadText | None = None
    picture: GivenPicture | None = None


@dataclass(frozen=True, kw_only=True)
class Inpainting:
    """What is kept of a given picture: outside of the mask it is put back, with as much noise as there should be."""

    mask_11hw: Tensor
    clean_1Chw: Tensor
    noise_1Chw: Tensor

    def blend(self, latent_1Chw: Tensor, outside_1Chw: Tensor) -> Tensor:
        return (1 - self.mask_11hw) * outside_1Chw + self.mask_11hw * latent_1Chw


@dataclass(eq=False, kw_only=True)
class SdxlState:
    """One picture on its way: its latent, its own scheduler, and the generator of what noise that still needs.

    `guidance` has one value for each evaluation; `skipped` evaluations of the whole schedule lie before the first.
    `kept` is given where the network does not itself see what is to be kept, and `beside` `[1,1+C,h,w]` where it does.
    `said` is the network's last input and output, and how much noise there was to a part of signal.
    """

    request: GenerationRequest
    seed: int
    conditioning: SdxlConditioning
    scheduler: NoiseScheduler
    generator: torch.Generator
    timesteps_N: Tensor
    skipped: int
    prediction: str
    guidance: tuple[float, ...]
    costs: tuple[Cost, ...]
    latent_1Chw: Tensor
    kept: Inpainting | None = None
    beside: Tensor | None = None
    said: tuple[Tensor, Tensor, float] | None = None
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
        """Whether the next evaluation takes the negative prompt too."""
        return self.remaining > 0 and self.guidance[self.index] > 1

    @property
    def batch_key(self) -> Hashable:
        """The network takes a time a sample, and each state its own scheduler's step: only shapes have to agree."""
        return (tuple(self.latent_1Chw.shape), self.conditioning.prompt.features_1TE.shape[1], self.doubled)

    @property
    def timestep(self) -> Tensor:
        """That of the next evaluation, on the CPU."""
        return self.timesteps_N[self.index]

    def network_input(self) -> Tensor:
        """The latent as the network wants it, `[1,C,h,w]`, of about unit variance."""
        return self.scheduler.scale_model_input(self.latent_1Chw, self.timestep)

    def clean(self) -> Tensor:
        """About what the latent becomes, `[1,C,h,w]`: what the network last spoke of."""
        if not self.remaining:
            return self.latent_1Chw
        if self.said is None:
            return self.latent_1Chw / float(self.scheduler.init_noise_sigma)
        seen_1Chw, output_1Chw, ratio = self.said
        clean_1Chw = noise_schedulers.estimated_clean(seen_1Chw, output_1Chw, ratio, self.prediction)
        return clean_1Chw if self.kept is None else self.kept.blend(clean_1Chw, self.kept.clean_1Chw)

    def advance(self, seen_1Chw: Tensor, output_1Chw: Tensor) -> None:
        """Take the scheduler's step along what the network said of `seen`, its input.

        Outside of a mask the given picture is put back, as in the loop of `StableDiffusionXLInpaintPipeline`.
        """
        ratio = noise_schedulers.noise_to_signal(self.scheduler, self.timestep, self.skipped + self.index)
        self.said = (seen_1Chw, output_1Chw, ratio)
        latent_1Chw = noise_schedulers.step(
            self.scheduler, output_1Chw, self.timestep, self.latent_1Chw, self.generator
        )
        self.index += 1
        if (kept := self.kept) is not None:
            outside_1Chw = kept.clean_1Chw
            if self.remaining:
                outside_1Chw = self.scheduler.add_noise(kept.clean_1Chw, kept.noise_1Chw, self.timestep[None])
            latent_1Chw = kept.blend(latent_1Chw, outside_1Chw)
        self.latent_1Chw = latent_1Chw
