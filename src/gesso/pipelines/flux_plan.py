"""What a request means to FLUX: blanks filled, values checked, warnings, schedules, and the cost of it all.

Reads configurations and sizes of networks, never weights, so it works on the meta device. Not here: the other five
verbs (`flux`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gesso.devices import CPU
from gesso.models import flux_cost
from gesso.pipelines.contract import Cost, Plan, StepShape
from gesso.pipelines.flux_state import FluxDefaults, TextEncoder, TwoTextEncoders
from gesso.pipelines.planning import (
    check_cached,
    check_edge,
    check_list,
    cut_text,
    picture_size,
    quoted,
    scheduler_of,
    seed_or_drawn,
    swapped_scheduler,
    text_networks,
    unknown_words,
    untrained_size,
    value_or,
    without_effect,
)
from gesso.request import GenerationRequest
from gesso.sampling import schedulers
from gesso.sampling.schedulers import Scheduler

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    from gesso.pipelines.infinite_you import InfiniteYou

_UNUSED = ("revisions",)
_UNUSED += ("guidance_layer", "guidance_normalization", "guidance_truncation", "temperature", "top_k", "top_p")
_UNUSED += ("frames", "fps", "mask", "clip_skip", "refiner")


class FluxPlanner:
    """`plan` for one model, and what its other verbs ask of a plan."""

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        autoencoder: AutoencoderKL,
        text: TextEncoder,
        scheduler: Mapping[str, Any],
        defaults: FluxDefaults,
        name: str,
        guest: InfiniteYou | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.defaults, self.name, self._guest, self._bytes_each = defaults, name, guest, dtype.itemsize
        self._transformer, self._autoencoder, self._text, self._scheduler = transformer, autoencoder, text, scheduler
        self._network: Any = transformer.config
        self._vae: Any = autoencoder.config
        self.stride: int = 2 ** (len(self._vae["block_out_channels"]) - 1)
        self.embeds_guidance: bool = self._network["guidance_embeds"]

    @property
    def edge(self) -> int:
        """Pixels along the edge of a token; sizes are multiples of it."""
        return 2 * self.stride

    @property
    def guides_truly(self) -> bool:
        """Whether a request's plain guidance is classifier-free guidance here."""
        return not (self.embeds_guidance or self.defaults.distilled)

    def plan(self, request: GenerationRequest) -> Plan:
        """Fill blanks, check sizes, scheduler, lists and the picture, and count the work. Raises RequestError."""
        filled = self._filled(request)
        assert filled.scheduler is not None
        schedulers.check_name(filled.scheduler, from_picture=filled.init_image is not None)
        check_cached(filled)
        _, timesteps_N = self.schedule(filled, CPU)
        evaluations = len(timesteps_N)
        check_list(filled, "guidance", evaluations, "evaluation")
        plan = Plan(request=filled, steps=evaluations, cost=Cost(flops=0.0, bytes=0.0), peak_bytes=0)
        true_guidance = guidance_values(plan, self)[1]
        held = self._activations(filled, true_guidance)
        warnings = (*self._size_warnings(filled), *self._guidance_warnings(request, true_guidance))
        if filled.identity is not None and self._guest is not None:
            warnings += self._guest.warnings(filled, evaluations)
        warnings += swapped_scheduler(request, filled, self.defaults.scheduler)
        unused = without_effect(request, _UNUSED, self.name, paints_people=self._guest is not None)
        return Plan(
            request=filled,
            steps=evaluations,
            cost=self._cost(filled, true_guidance),
            peak_bytes=self._weight_bytes(filled) + max(held.values()),
            activations=held,
            guests=self._guest.roles if filled.identity is not None and self._guest is not None else (),
            warnings=(*warnings, *self._text_warnings(request), *unused),
            shape=self._shape(filled, true_guidance),
        )

    def schedule(
        self, request: GenerationRequest, device: torch.device | str, generator: torch.Generator | None = None
    ) -> tuple[Scheduler, Tensor]:
        """A fresh scheduler for one picture of a filled request, and the timestep of each evaluation, `[N]`.

        `generator` is the picture's own, from which some schedulers draw; to plan, none is needed.
        """
        assert request.scheduler is not None and request.steps is not None
        return schedulers.make_scheduler(
            request.scheduler,
            self._scheduler,
            steps=request.steps,
            tokens=self._tokens(request),
            strength=1.0 if request.init_strength is None else request.init_strength,
            device=device,
            generator=generator,
        )

    def step_costs(self, request: GenerationRequest, true_guidance: tuple[float, ...]) -> tuple[Cost, ...]:
        """Cost of each step of one picture: one evaluation, or two."""
        tokens, text = self._tokens(request), self._text.max_tokens
        weights = flux_cost.weight_bytes([self._transformer])
        once = Cost(
            flops=flux_cost.transformer_flops(self._network, tokens, text),
            bytes=flux_cost.transformer_bytes(self._network, tokens, text, weights, self._bytes_each),
        )
        own = tuple(once + once if value > 1 else once for value in true_guidance)
        if request.identity is None or self._guest is None:
            return own
        added = self._guest.costs(request, tokens, len(own))
        return tuple(cost + more for cost, more in zip(own, added, strict=True))

    # ---- blanks and checks ------------------------------------------------------------------------------------------

    def _filled(self, request: GenerationRequest) -> GenerationRequest:
        defaults, picture = self.defaults, request.init_image
        width, height = value_or(request.width, defaults.width), value_or(request.height, defaults.height)
        for field, pixels in (("width", width), ("height", height)):
            check_edge(field, pixels, multiple=self.edge, largest=defaults.largest_edge, name=self.name)
        guidance, true_guidance = value_or(request.guidance, defaults.guidance), value_or(request.true_guidance, 1.0)
        if self.guides_truly:  # the two are one thing here, so either fills the other
            guidance = value_or(request.guidance, value_or(request.true_guidance, defaults.guidance))
            alone = guidance if isinstance(guidance, float) else None
            true_guidance = value_or(request.true_guidance, alone)
        return request.model_copy(
            update={
                "seed": seed_or_drawn(request),
                "width": width,
                "height": height,
                "steps": value_or(request.steps, defaults.steps),
                "scheduler": scheduler_of(request, defaults.scheduler),
                "guidance": guidance,
                "true_guidance": true_guidance,
                "init_strength": value_or(request.init_strength, defaults.init_strength) if picture else None,
                "identity": self._guest.filled(request.identity) if request.identity and self._guest else None,
            }
        )

    def _tokens(self, request: GenerationRequest) -> int:
        assert request.width is not None and request.height is not None
        return (request.width // self.edge) * (request.height // self.edge)

    def _shape(self, filled: GenerationRequest, true_guidance: tuple[float, ...]) -> StepShape:
        assert filled.width is not None and filled.height is not None
        tokens = self._tokens(filled)
        return StepShape(
            image_tokens=tokens,
            text_tokens=self._text.max_tokens,
            grid=(filled.height // self.edge, filled.width // self.edge),
            output=(tokens, self._network["in_channels"]),
            branches=2 if max(true_guidance) > 1 else 1,
        )

    # ---- warnings ---------------------------------------------------------------------------------------------------

    def _size_warnings(self, filled: GenerationRequest) -> tuple[str, ...]:
        """Of a size that the model was not trained at, and of a given picture that has other proportions."""
        assert filled.width is not None and filled.height is not None
        found = list(untrained_size(filled, self.defaults.sizes, self.name))
        if filled.init_image is not None:
            width, height = picture_size("init_image", filled.init_image)
            if width * filled.height != height * filled.width:
                given, painted = f"{width}x{height}", f"{filled.width}x{filled.height}"
                found.append(f"init_image is {given} and is stretched to {painted}; crop it to keep its proportions")
        return tuple(found)

    def _guidance_warnings(self, request: GenerationRequest, true_guidance: tuple[float, ...]) -> tuple[str, ...]:
        found = []
        given = request.guidance if isinstance(request.guidance, tuple) else (request.guidance,)
        if self.defaults.distilled and not self.embeds_guidance and any(value not in (None, 0, 1) for value in given):
            found.append(f"guidance has no effect: {self.name} is distilled and paints without it")
        if self.defaults.distilled and not self.embeds_guidance and max(true_guidance) > 1:
            found.append(f"{self.name} is distilled: true_guidance doubles its work and harms the picture")
        both = request.guidance is not None and request.true_guidance is not None
        if self.guides_truly and both and request.guidance != request.true_guidance:
            found.append(f"true_guidance is taken: it is what guidance means to {self.name}")
        if request.negative and max(true_guidance) <= 1:
            field = "guidance" if self.guides_truly else "true_guidance"
            found.append(f"negative has no effect unless {field} is above 1")
        return tuple(found)

    def _text_warnings(self, request: GenerationRequest) -> tuple[str, ...]:
        """Of what is cut off because it is too long, and of words that the model has never met."""
        text, found = self._text, list(cut_text(self._text, request, self.name))
        if isinstance(text, TwoTextEncoders):
            length = f"the {text.pooled_tokens} tokens that CLIP reads for the picture's overall style"
            for field, words in (("prompt", request.prompt), ("negative", request.negative)):
                if tail := text.cut_from_pooled(words):
                    found.append(f"{field} is longer than {length}; cut off there: {quoted(tail)}")
        return (*found, *unknown_words(text, request, self.name))

    # ---- cost -------------------------------------------------------------------------------------------------------

    def _cost(self, filled: GenerationRequest, true_guidance: tuple[float, ...]) -> Cost:
        """The whole of one picture: texts, given picture, steps, decoding."""
        assert filled.width is not None and filled.height is not None
        texts = 2 if max(true_guidance) > 1 else 1
        flops = texts * flux_cost.text_flops(text_networks(self._text), self._text.max_tokens)
        flops += flux_cost.decode_flops(self._vae, filled.width, filled.height)
        pictures = (filled.init_image is not None) + (filled.identity is not None)
        flops += pictures * flux_cost.encode_flops(self._vae, filled.width, filled.height)
        moved = flux_cost.weight_bytes([*text_networks(self._text), self._autoencoder])
        return sum(self.step_costs(filled, true_guidance), Cost(flops=flops, bytes=float(moved)))

    def _weight_bytes(self, filled: GenerationRequest) -> int:
        weights = flux_cost.weight_bytes([*text_networks(self._text), self._transformer, self._autoencoder])
        if filled.identity is not None and self._guest is not None:
            weights += self._guest.weight_bytes(filled.identity)
        return weights

    def _activations(self, filled: GenerationRequest, true_guidance: tuple[float, ...]) -> dict[str, int]:
        """Bytes that each stage holds beside weights."""
        assert filled.width is not None and filled.height is not None
        each, length, size = self._bytes_each, self._text.max_tokens, (filled.width, filled.height)
        texts = 2 if max(true_guidance) > 1 else 1
        held = {
            "text": texts * flux_cost.features_bytes(self._network, length, each)
            + flux_cost.text_peak_bytes(text_networks(self._text), length, each),
            "step": flux_cost.transformer_peak_bytes(self._network, self._tokens(filled), length, each),
            "decode": flux_cost.decode_peak_bytes(self._vae, *size, each),
        }
        if filled.identity is not None and self._guest is not None:
            held["step"] = self._guest.step_bytes(filled.identity, self._tokens(filled), held["step"])
        if filled.init_image is not None or filled.identity is not None:
            held["picture"] = flux_cost.encode_peak_bytes(self._vae, *size, each)
        return held


def guidance_values(plan: Plan, planner: FluxPlanner) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """For each evaluation: the guidance that goes into the network, and the scale of classifier-free guidance."""
    request = plan.request
    assert request.guidance is not None
    embedded = request.guidance if isinstance(request.guidance, tuple) else (float(request.guidance),) * plan.steps
    if request.true_guidance is not None:
        return embedded, (float(request.true_guidance),) * plan.steps
    return embedded, embedded if planner.guides_truly else (1.0,) * plan.steps
