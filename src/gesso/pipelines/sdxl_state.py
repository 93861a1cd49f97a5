"""What Stable Diffusion XL's pipeline passes around: the face of its text encoder, defaults, conditioning, and a state.

The verbs are in `sdxl`. Shapes as there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from gesso.pipelines.contract import Cost
from gesso.pipelines.planning import CuttingVocabulary
from gesso.request import GenerationRequest
from gesso.sampling import noise_schedulers
from gesso.sampling.noise_schedulers import NoiseScheduler

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from gesso.pipelines.sdxl_refiner import RefinerNetwork


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
class Texts:
    """A prompt as one network reads it, and what guidance pushes away from; None where nothing is."""

    prompt: ReadText
    negative: ReadText | None = None


@dataclass(frozen=True)
class SdxlConditioning:
    """Texts as the network reads them and as the refiner does, if there is one; and the given picture."""

    texts: Texts
    refined: tuple[RefinerNetwork, Texts] | None = None
    picture: GivenPicture | None = None


@dataclass(frozen=True, kw_only=True)
class Inpainting:
    """What is kept of a given picture: outside of the mask it is put back, with as much noise as there should be."""

    mask_11hw: Tensor
    clean_1Chw: Tensor
    noise_1Chw: Tensor

    def blend(self, latent_1Chw: Tensor, outside_1Chw: Tensor) -> Tensor:
        return (1 - self.mask_11hw) * outside_1Chw + self.mask_11hw * latent_1Chw


@dataclass(frozen=True, eq=False, kw_only=True)
class Leg:
    """Evaluations of one network, one after the other: a picture's whole way, or the refiner's part and the one before.

    `skipped` evaluations of the scheduler's whole schedule lie before the first. `sizes` are numbers about the
    picture's size that the network reads beside the prompt and beside the negative. Where `afresh`, new noise is laid
    over the latent before the first evaluation.
    """

    network: UNet2DConditionModel
    texts: Texts
    sizes: tuple[Sequence[float], Sequence[float]]
    scheduler: NoiseScheduler
    timesteps_N: Tensor
    skipped: int
    prediction: str
    afresh: bool = False


class Said(NamedTuple):
    """A network's last input and output `[1,C,h,w]`, how much noise there was to a part of signal, what it predicts."""

    seen_1Chw: Tensor
    output_1Chw: Tensor
    ratio: float
    prediction: str


@dataclass(eq=False, kw_only=True)
class SdxlState:
    """One picture on its way: its latent, its own schedulers, and the generator of what noise they still need.

    `guidance` has one value for each evaluation, of all legs. `kept` is given where the network does not itself see
    what is to be kept, and `beside` `[1,1+C,h,w]` where it does. `refiner` is the digest of one, or "".
    """

    request: GenerationRequest
    seed: int
    legs: tuple[Leg, ...]
    generator: torch.Generator
    guidance: tuple[float, ...]
    costs: tuple[Cost, ...]
    latent_1Chw: Tensor
    kept: Inpainting | None = None
    beside: Tensor | None = None
    refiner: str = ""
    said: Said | None = None
    index: int = 0
    _passed: int = 0  # evaluations of legs that are done

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
    def leg(self) -> Leg:
        """That of the next evaluation; the last one's at the end."""
        return self.legs[0]

    @property
    def doubled(self) -> bool:
        """Whether the next evaluation takes the negative prompt too."""
        return self.remaining > 0 and self.guidance[self.index] > 1

    @property
    def batch_key(self) -> Hashable:
        """A network takes a time a sample, and each state its own scheduler's step: only shapes have to agree."""
        features_1TE = self.leg.texts.prompt.features_1TE
        return (id(self.leg.network), tuple(self.latent_1Chw.shape), features_1TE.shape[1], self.doubled)

    @property
    def timestep(self) -> Tensor:
        """That of the next evaluation, on the CPU."""
        return self.leg.timesteps_N[self.index - self._passed]

    def network_input(self) -> Tensor:
        """The latent as the network wants it, `[1,C,h,w]`, of about unit variance."""
        return self.leg.scheduler.scale_model_input(self.latent_1Chw, self.timestep)

    def clean(self) -> Tensor:
        """About what the latent becomes, `[1,C,h,w]`: what the network last spoke of."""
        if not self.remaining:
            return self.latent_1Chw
        if self.said is None:
            return self.latent_1Chw / float(self.leg.scheduler.init_noise_sigma)
        clean_1Chw = noise_schedulers.estimated_clean(*self.said)
        return clean_1Chw if self.kept is None else self.kept.blend(clean_1Chw, self.kept.clean_1Chw)

    def advance(self, seen_1Chw: Tensor, output_1Chw: Tensor) -> None:
        """Take the scheduler's step along what the network said of `seen`, its input.

        Outside of a mask the given picture is put back, as in the loop of `StableDiffusionXLInpaintPipeline`.
        """
        leg, timestep, place = self.leg, self.timestep, self.index - self._passed
        ratio = noise_schedulers.noise_to_signal(leg.scheduler, timestep, leg.skipped + place)
        self.said = Said(seen_1Chw, output_1Chw, ratio, leg.prediction)
        latent_1Chw = noise_schedulers.step(leg.scheduler, output_1Chw, timestep, self.latent_1Chw, self.generator)
        self.index += 1
        handed_over = len(self.legs) > 1 and place + 1 == len(leg.timesteps_N)
        if handed_over:
            self.legs, self._passed = self.legs[1:], self.index
        afresh = handed_over and self.leg.afresh
        if (kept := self.kept) is not None:
            outside_1Chw = kept.clean_1Chw
            if self.remaining and not afresh:
                outside_1Chw = self.leg.scheduler.add_noise(kept.clean_1Chw, kept.noise_1Chw, self.timestep[None])
            latent_1Chw = kept.blend(latent_1Chw, outside_1Chw)
        if afresh:
            noise_1Chw = randn_tensor(
                tuple(latent_1Chw.shape), generator=self.generator, device=latent_1Chw.device, dtype=latent_1Chw.dtype
            )
            latent_1Chw = self.leg.scheduler.add_noise(latent_1Chw, noise_1Chw, self.timestep[None])
            if kept is not None:  # what is put back has the same noise as what is around it
                self.kept = replace(kept, noise_1Chw=noise_1Chw)
        self.latent_1Chw = latent_1Chw
