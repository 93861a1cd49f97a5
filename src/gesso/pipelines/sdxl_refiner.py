"""SDXL's refiner as a guest of Stable Diffusion XL: a second network that finishes what the first began.

Here: what a request's `refiner` means. It reads the prompt by the larger of the model's two text encoders alone, and
beside the picture's size how beautiful it shall be. It takes over what noise is left ("ensemble of experts", appendix
D of arXiv:2307.01952) or begins anew from the finished latent (section 2.5), as diffusers does where
`StableDiffusionXLPipeline` hands latents to `…Img2ImgPipeline`. Not here: the model (`sdxl`), files
(`engine/loading/sdxl_refiner`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from gesso.errors import RequestError
from gesso.pipelines.planning import value_or
from gesso.pipelines.sdxl_state import ReadText, Texts
from gesso.request import GenerationRequest
from gesso.request_parts import Refiner
from gesso.sampling import noise_schedulers
from gesso.sampling.noise_schedulers import NoiseScheduler

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

REFINER = "refiner"
"""The role of its network, by which memory is foreseen."""
_START = 0.8
# How beautiful the picture shall be and the negative's shall not, on the scale of LAION's judge; as in diffusers.
_BEAUTY, _NEGATIVE_BEAUTY = 6.0, 2.5
# What both networks must have been trained with in common where one goes on from the other's noise.
_COMMON = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "timestep_spacing", "steps_offset")
_COMMON += ("rescale_betas_zero_snr",)


class Schedule(NamedTuple):
    """A scheduler, the timestep `[N]` of each evaluation, and how many of its whole schedule lie before the first."""

    scheduler: NoiseScheduler
    timesteps_N: Tensor
    skipped: int


@dataclass(frozen=True, eq=False, kw_only=True)
class RefinerNetwork:
    """A refiner: its UNet, the values of its `scheduler_config.json`, and whether an empty negative is zeros to it.

    `digest` is that of its files, "" where it has no weights.
    """

    unet: UNet2DConditionModel
    scheduler: Mapping[str, Any]
    zero_empty: bool
    digest: str = ""

    def texts(self, prompt: ReadText, negative: ReadText | None) -> Texts:
        """Of what the model reads, the larger encoder's part, which comes last."""
        return Texts(self._larger(prompt), None if negative is None else self._larger(negative))

    def _larger(self, text: ReadText) -> ReadText:
        config: Any = self.unet.config
        return ReadText(text.features_1TE[..., -config["cross_attention_dim"] :], text.pooled_1P)


class SdxlRefiner:
    """What Stable Diffusion XL asks of its guest. It is handed its network.

    `load` reads a refiner by its name; that is done when a picture wants another one than the last did, and the last is
    held until its pictures are done. `shapes` makes it on the meta device, for planning.
    """

    def __init__(self, *, load: Callable[[str], RefinerNetwork], shapes: Callable[[str], RefinerNetwork]) -> None:
        self._load, self._make_shapes = load, shapes
        self._shapes: dict[str, RefinerNetwork] = {}
        self._name = ""
        self._network: RefinerNetwork | None = None

    def filled(self, refiner: Refiner) -> Refiner:
        """Without blanks, but for what belongs to the way that was not chosen."""
        if refiner.strength is not None:
            return refiner
        return refiner.model_copy(update={"start": value_or(refiner.start, _START)})

    def shapes(self, refiner: Refiner) -> RefinerNetwork:
        """The network without weights. Raises as `load`."""
        if refiner.model not in self._shapes:
            self._shapes[refiner.model] = self._make_shapes(refiner.model)
        return self._shapes[refiner.model]

    def network(self, refiner: Refiner) -> RefinerNetwork:
        """The network, read if it is not here. Raises MissingError, FileError, WeightsError."""
        if self._network is None or self._name != refiner.model:
            self._network = None  # before the next is read: both need not fit
            self._name, self._network = refiner.model, self._load(refiner.model)
        return self._network

    def schedules(
        self, filled: GenerationRequest, own: Schedule, trained: Mapping[str, Any]
    ) -> tuple[Schedule, Schedule]:
        """The model's part of its `own` schedule, and the refiner's; `trained` are the values of the model's.

        Raises RequestError where either is left without a step, and where their noise is not alike.
        """
        assert filled.refiner is not None and filled.scheduler is not None and filled.steps is not None
        refiner, values = filled.refiner, self.shapes(filled.refiner).scheduler
        if refiner.start is not None:
            own = _up_to(refiner.start, own, trained)
            _check_alike(refiner, values, trained)
        try:
            scheduler, timesteps_N = noise_schedulers.make_noise_scheduler(
                filled.scheduler,
                values,
                steps=value_or(refiner.steps, filled.steps),
                strength=value_or(refiner.strength, 1.0),
                start=value_or(refiner.start, 0.0),
            )
        except RequestError as error:
            names = {"init_strength": "refiner.strength", "start": "refiner.start"}
            names |= {} if refiner.steps is None else {"steps": "refiner.steps"}
            raise RequestError(names.get(error.field, error.field), error.value, error.allowed, error.hint) from None
        return own, Schedule(scheduler, timesteps_N, len(scheduler.timesteps) - len(timesteps_N))


def sizes(height: int, width: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the refiner reads beside prompt and negative: the size, what was cut off, and how beautiful it shall be."""
    size = (float(height), float(width), 0.0, 0.0)
    return (*size, _BEAUTY), (*size, _NEGATIVE_BEAUTY)


def _up_to(start: float, own: Schedule, trained: Mapping[str, Any]) -> Schedule:
    """As much of a schedule as lies before the refiner's part. Raises RequestError where that is nothing."""
    count = noise_schedulers.before(start, own.scheduler, own.timesteps_N, trained["num_train_timesteps"])
    if not count:
        allowed = f"high enough to leave the model one of {len(own.timesteps_N)} evaluations"
        raise RequestError("refiner.start", start, allowed, "raise it, or give refiner.strength")
    return own._replace(timesteps_N=own.timesteps_N[:count])


def _check_alike(refiner: Refiner, values: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
    """Whether one may go on from the other's noise. Raises RequestError."""
    for name in _COMMON:
        if values.get(name) != trained.get(name):
            problem = f"usable with a model whose {name} is {trained.get(name)} and not {values.get(name)}"
            raise RequestError("refiner.start", refiner.start, problem, "give refiner.strength")
