"""What a request means to Qwen-Image: blanks filled, values checked, warnings, schedules, and the cost of it all.

Reads configurations and sizes of networks, never weights, so it works on the meta device. Not here: the other five
verbs (`qwen_image`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gesso.devices import CPU
from gesso.models import flux_cost, qwen_image_cost
from gesso.models.qwen_image_text import DROPPED, NOTHING
from gesso.pipelines.contract import Cost, Plan, StepShape
from gesso.pipelines.planning import (
    check_cached,
    check_edge,
    check_list,
    cut_text,
    picture_size,
    seed_or_drawn,
    text_networks,
    unknown_words,
    value_or,
    without_effect,
)
from gesso.pipelines.qwen_image_state import QwenImageDefaults, TextEncoder
from gesso.request import GenerationRequest
from gesso.sampling import schedulers
from gesso.sampling.schedulers import Scheduler

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

_UNUSED = ("revisions",)
_UNUSED += ("guidance_layer", "true_guidance", "guidance_normalization", "guidance_truncation")
_UNUSED += ("temperature", "top_k", "top_p", "frames", "fps", "mask", "clip_skip", "refiner")


class QwenImagePlanner:
    """`plan` for one model, and what its other verbs ask of a plan."""

    def __init__(
        self,
        transformer: QwenImageTransformer2DModel,
        autoencoder: AutoencoderKLQwenImage,
        text: TextEncoder,
        scheduler: Mapping[str, Any],
        defaults: QwenImageDefaults,
        name: str,
        dtype: torch.dtype,
    ) -> None:
        self.defaults, self.name = defaults, name
        self._transformer, self._autoencoder, self._text, self._scheduler = transformer, autoencoder, text, scheduler
        self._network: Any = transformer.config
        self._vae: Any = autoencoder.config
        self._bytes_each = dtype.itemsize
        self.stride: int = 2 ** len(self._vae["temperal_downsample"])

    @property
    def edge(self) -> int:
        """Pixels along the edge of a token; sizes are multiples of it."""
        return 2 * self.stride

    def plan(self, request: GenerationRequest) -> Plan:
        """Fill blanks, check sizes, scheduler, lists and the picture, and count the work. Raises RequestError."""
        picture = None if request.init_image is None else picture_size("init_image", request.init_image)
        filled = self._filled(request)
        assert filled.scheduler is not None
        stretched = bool(self._scheduler.get("shift_terminal"))
        schedulers.check_name(filled.scheduler, from_picture=picture is not None, stretched=stretched)
        check_cached(filled)
        _, timesteps_N = self.schedule(filled, CPU)
        evaluations = len(timesteps_N)
        check_list(filled, "guidance", evaluations, "evaluation")
        guidance = guidance_values(filled, evaluations)
        held = self._activations(filled, guidance)
        weights = flux_cost.weight_bytes([*text_networks(self._text), self._transformer, self._autoencoder])
        return Plan(
            request=filled,
            steps=evaluations,
            cost=self._cost(filled, guidance),
            peak_bytes=weights + max(held.values()),
            warnings=(
                *self._warnings(request, filled, guidance, picture),
                *cut_text(self._text, request, self.name),
                *unknown_words(self._text, request, self.name),
                *without_effect(request, _UNUSED, self.name),
            ),
            activations=held,
            shape=self._shape(filled, guidance),
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

    def step_costs(self, request: GenerationRequest, guidance: Sequence[float]) -> tuple[Cost, ...]:
        """Cost of each step of one picture: one evaluation, or two."""
        tokens, weights = self._tokens(request), flux_cost.weight_bytes([self._transformer])
        costs = [
            Cost(
                flops=qwen_image_cost.transformer_flops(self._network, tokens, text),
                bytes=qwen_image_cost.transformer_bytes(self._network, tokens, text, weights, self._bytes_each),
            )
            for text in (self._text_tokens(request.prompt), self._text_tokens(negative_text(request)))
        ]
        return tuple(costs[0] + costs[1] if value > 1 else costs[0] for value in guidance)

    # ---- blanks -----------------------------------------------------------------------------------------------------

    def _filled(self, request: GenerationRequest) -> GenerationRequest:
        defaults, picture = self.defaults, request.init_image
        width, height = value_or(request.width, defaults.width), value_or(request.height, defaults.height)
        for field, pixels in (("width", width), ("height", height)):
            check_edge(field, pixels, multiple=self.edge, largest=defaults.largest_edge, name=self.name)
        return request.model_copy(
            update={
                "seed": seed_or_drawn(request),
                "width": width,
                "height": height,
                "steps": value_or(request.steps, defaults.steps),
                "scheduler": value_or(request.scheduler, defaults.scheduler),
                "guidance": value_or(request.guidance, defaults.guidance),
                "init_strength": value_or(request.init_strength, defaults.init_strength) if picture else None,
            }
        )

    def _tokens(self, request: GenerationRequest) -> int:
        assert request.width is not None and request.height is not None
        return (request.width // self.edge) * (request.height // self.edge)

    def _text_tokens(self, text: str) -> int:
        return min(self._text.count(text), self._text.max_tokens)

    def _shape(self, filled: GenerationRequest, guidance: Sequence[float]) -> StepShape:
        assert filled.width is not None and filled.height is not None
        tokens, guided = self._tokens(filled), max(guidance) > 1
        texts = [filled.prompt, negative_text(filled)] if guided else [filled.prompt]
        return StepShape(
            image_tokens=tokens,
            text_tokens=max(self._text_tokens(text) for text in texts),
            grid=(filled.height // self.edge, filled.width // self.edge),
            output=(tokens, self._network["in_channels"]),
            branches=len(texts),
        )

    # ---- warnings ---------------------------------------------------------------------------------------------------

    def _warnings(
        self,
        request: GenerationRequest,
        filled: GenerationRequest,
        guidance: Sequence[float],
        picture: tuple[int, int] | None,
    ) -> tuple[str, ...]:
        """Of a given picture that has other proportions, and of guidance that does nothing."""
        assert filled.width is not None and filled.height is not None
        found = []
        if picture is not None and picture[0] * filled.height != picture[1] * filled.width:
            given, painted = f"{picture[0]}x{picture[1]}", f"{filled.width}x{filled.height}"
            found.append(f"init_image is {given} and is stretched to {painted}; crop it to keep its proportions")
        if isinstance(request.guidance, float) and 0 < request.guidance < 1:
            found.append("guidance has no effect unless it is above 1")
        if request.negative and max(guidance) <= 1:
            found.append("negative has no effect unless guidance is above 1")
        return tuple(found)

    # ---- cost -------------------------------------------------------------------------------------------------------

    def _cost(self, filled: GenerationRequest, guidance: Sequence[float]) -> Cost:
        """The whole of one picture: texts, given picture, steps, decoding."""
        assert filled.width is not None and filled.height is not None
        networks = text_networks(self._text)
        texts = [filled.prompt, negative_text(filled)] if max(guidance) > 1 else [filled.prompt]
        flops = sum(flux_cost.text_flops(networks, DROPPED + self._text_tokens(text)) for text in texts)
        flops += qwen_image_cost.decode_flops(self._vae, filled.width, filled.height)
        if filled.init_image is not None:
            flops += qwen_image_cost.encode_flops(self._vae, filled.width, filled.height)
        moved = flux_cost.weight_bytes([*networks, self._autoencoder])
        return sum(self.step_costs(filled, guidance), Cost(flops=flops, bytes=float(moved)))

    def _activations(self, filled: GenerationRequest, guidance: Sequence[float]) -> dict[str, int]:
        """Bytes that each stage holds beside weights."""
        assert filled.width is not None and filled.height is not None
        texts = [filled.prompt, negative_text(filled)] if max(guidance) > 1 else [filled.prompt]
        longest = max(self._text_tokens(text) for text in texts)
        each, size = self._bytes_each, (filled.width, filled.height)
        held = {
            "text": flux_cost.text_peak_bytes(text_networks(self._text), DROPPED + longest, each),
            "step": qwen_image_cost.transformer_peak_bytes(self._network, self._tokens(filled), longest, each),
            "decode": qwen_image_cost.decode_peak_bytes(self._vae, *size, each),
        }
        if filled.init_image is not None:
            held["picture"] = held["decode"]
        return held


def guidance_values(request: GenerationRequest, evaluations: int) -> tuple[float, ...]:
    """The scale of guidance of a filled request for each evaluation."""
    assert request.guidance is not None
    given = request.guidance
    return given if isinstance(given, tuple) else (float(given),) * evaluations


def negative_text(request: GenerationRequest) -> str:
    """What guidance pushes away from; where a request says nothing, what the authors recommend for that."""
    return request.negative or NOTHING
