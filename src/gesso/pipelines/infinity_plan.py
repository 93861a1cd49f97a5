"""What a request means for Infinity: blanks filled, sizes, lists, words and revisions checked, work and bytes counted.

Not here: the other verbs (`infinity`), the formulas of cost (`models/infinity/cost`).
Shapes as in `infinity`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import nn

from gesso.errors import RequestError
from gesso.models.infinity.autoencoder import Autoencoder
from gesso.models.infinity.cost import (
    cache_bytes,
    decode_flops,
    decode_peak_bytes,
    encode_flops,
    scale_flops,
    text_flops,
)
from gesso.models.infinity.scales import Grid, ScaleSchedule
from gesso.models.infinity.transformer import InfinityTransformer
from gesso.pipelines.contract import Cost, Plan
from gesso.pipelines.infinity_state import GenerationDefaults, TextEncoder, last_guided
from gesso.pipelines.planning import (
    check_list,
    picture_size,
    seed_or_drawn,
    unknown_words,
    value_or,
    without_effect,
)
from gesso.request import GenerationRequest

_UNUSED = ("steps", "scheduler", "true_guidance", "guidance_normalization", "guidance_truncation")
_UNUSED += ("frames", "fps", "mask", "clip_skip", "refiner")


class InfinityPlanner:
    """`plan` for one model, and what its other verbs ask of a plan. `schedules` is the pipeline's own mapping."""

    def __init__(
        self,
        transformer: InfinityTransformer,
        autoencoder: Autoencoder,
        text: TextEncoder,
        schedules: Mapping[tuple[int, int], ScaleSchedule],
        defaults: GenerationDefaults,
        name: str,
        dtype: torch.dtype,
    ) -> None:
        self._transformer, self._autoencoder, self._text, self._dtype = transformer, autoencoder, text, dtype
        self._config, self.schedules, self.defaults, self.name = transformer.config, schedules, defaults, name

    def plan(self, request: GenerationRequest) -> Plan:
        """Fill blanks, check sizes, lists and the prompt's length, and count the work. Raises RequestError."""
        schedule, size = self._schedule(request)
        filled = self._filled(request, size)
        for name in ("guidance", "temperature"):
            check_list(filled, name, len(schedule), "scale")
        layer = filled.guidance_layer or 0
        if layer and self._config.depth + layer <= 0:
            layers = f"0 or from {1 - self._config.depth} to -1" if self._config.depth > 1 else "0"
            raise RequestError("guidance_layer", layer, f"{layers} for {self.name}")
        if (filled.revisions or 0) >= len(schedule):
            allowed = f"from 0 to {len(schedule) - 1}" if len(schedule) > 1 else "0"
            raise RequestError("revisions", filled.revisions, f"{allowed} for {self.name} at this size")
        tokens = self._check_text("prompt", request.prompt)
        if request.negative:
            tokens = max(tokens, self._check_text("negative", request.negative))
        if request.init_image:
            picture_size("init_image", request.init_image)
        latent = schedule.latent_grids(self._config.patchify)[-1]
        ends = text_flops(self._config, tokens) + decode_flops(self._autoencoder.config, latent)
        cost = sum(self.costs(filled, schedule, tokens), Cost(flops=ends, bytes=0.0))
        peak = self._peak_bytes(schedule, latent, revised=self.first_revised(filled, schedule) < len(schedule))
        return Plan(request=filled, steps=len(schedule), cost=cost, peak_bytes=peak, warnings=self._warnings(filled))

    def _filled(self, request: GenerationRequest, size: tuple[int, int]) -> GenerationRequest:
        """The request without blanks."""
        defaults, picture = self.defaults, request.init_image
        return request.model_copy(
            update={
                "seed": seed_or_drawn(request),
                "width": size[1],
                "height": size[0],
                "guidance": value_or(request.guidance, defaults.guidance),
                "temperature": value_or(request.temperature, defaults.temperature),
                "guidance_layer": value_or(request.guidance_layer, defaults.guidance_layer),
                "top_k": value_or(request.top_k, defaults.top_k),
                "top_p": value_or(request.top_p, defaults.top_p),
                "init_strength": value_or(request.init_strength, defaults.init_strength) if picture else None,
                "revisions": value_or(request.revisions, min(defaults.revisions, len(self.schedules[size]) - 1)),
            }
        )

    def first_revised(self, request: GenerationRequest, schedule: ScaleSchedule) -> int:
        """The first scale before which a picture is revised: of the last `revisions`, after one that was painted."""
        return max(len(schedule) - (request.revisions or 0), self.given_scales(request, schedule) + 1)

    def given_scales(self, request: GenerationRequest, schedule: ScaleSchedule) -> int:
        """How many scales come from a given picture: the share that `init_strength` does not repaint."""
        strength = request.init_strength
        return 0 if request.init_image is None or strength is None else round((1 - strength) * len(schedule))

    def _schedule(self, request: GenerationRequest) -> tuple[ScaleSchedule, tuple[int, int]]:
        width, height = request.width, request.height
        if width is None and height is None:
            width, height = self.defaults.width, self.defaults.height
        sizes = self.schedules
        if width is None or height is None:  # one edge given: the other follows where only one size has it
            found = [size for size in sizes if size[1] == width or size[0] == height]
            if len(found) == 1:
                return sizes[found[0]], found[0]
            width, height = width or height or 0, height or width or 0
        if (height, width) in sizes:
            return sizes[height, width], (height, width)
        near = sorted(sizes, key=lambda size: abs(size[0] - height) + abs(size[1] - width))[:2]
        known = width in {size[1] for size in sizes}
        field = "height" if request.width is None or (known and request.height is not None) else "width"
        nearest = " or ".join(f"{found[1]}x{found[0]}" for found in near)
        value = height if field == "height" else width
        raise RequestError(field, value, f"part of a size that {self.name} paints", f"nearest: {nearest}")

    def _check_text(self, field: str, text: str) -> int:
        tokens, most = self._text.count(text), self._text.max_tokens
        if tokens > most:
            raise RequestError(
                field, text, f"at most {most} tokens long for {self.name}", f"it has {tokens}; shorten it"
            )
        return tokens

    def _warnings(self, request: GenerationRequest) -> tuple[str, ...]:
        words = unknown_words(self._text, request, self.name)
        guided = last_guided(per_scale(request.guidance, 1)) >= 0
        if request.negative and not guided:
            words += ("negative has no effect where guidance is 1",)
        if guided and self.defaults.distilled:
            words += (f"{self.name} is distilled: guidance doubles its work and harms the picture",)
        return words + without_effect(request, _UNUSED, self.name)

    def costs(self, request: GenerationRequest, schedule: ScaleSchedule, tokens: int) -> tuple[Cost, ...]:
        """Cost of each scale of one picture, with the revision after it."""
        last = last_guided(per_scale(request.guidance, len(schedule)))
        latent, config = schedule.latent_grids(self._config.patchify)[-1], self._autoencoder.config
        revision = Cost(
            flops=decode_flops(config, latent) + encode_flops(config, latent), bytes=float(self._tokenizer_bytes)
        )
        first_revised = self.first_revised(request, schedule)
        each = torch.finfo(self._dtype).bits // 8
        costs = []
        for scale in range(len(schedule)):
            rows = 2 if scale <= last else 1
            kept = self._config.depth * 2 * schedule.starts[scale + 1] * self._config.width * each
            flops = rows * scale_flops(self._config, schedule, scale, tokens)
            cost = Cost(flops=flops, bytes=float(self._block_parameters * each + rows * kept))
            costs.append(cost + revision if first_revised <= scale + 1 < len(schedule) else cost)
        return tuple(costs)

    def _peak_bytes(self, schedule: ScaleSchedule, latent: Grid, *, revised: bool) -> int:
        """A revision decodes beside the keys and values that later scales go on from."""
        each = torch.finfo(self._dtype).bits // 8
        n = schedule.starts[-1] - schedule.starts[-2]
        cache = cache_bytes(self._config, schedule, 2, each)
        stepping = cache + 2 * n * (self._config.hidden + 8 * self._config.width) * 4
        decoding = decode_peak_bytes(self._autoencoder.config, latent, 4)
        return self._weight_bytes + max(stepping, cache + decoding if revised else decoding)

    # Counted once: they are asked for with every request and every picture.

    @cached_property
    def _block_parameters(self) -> int:
        return sum(p.numel() for p in self._transformer.blocks.parameters())

    @cached_property
    def _tokenizer_bytes(self) -> int:
        return sum(p.nbytes for p in self._autoencoder.parameters())

    @cached_property
    def _weight_bytes(self) -> int:
        text = getattr(self._text, "network", self._text)  # or it is one itself
        parts = (self._transformer, self._autoencoder, text)
        return sum(p.nbytes for part in parts if isinstance(part, nn.Module) for p in part.parameters())


def is_guided(plan: Plan) -> bool:
    """Whether any scale is guided."""
    return last_guided(per_scale(plan.request.guidance, 1)) >= 0


def per_scale(value: float | tuple[float, ...] | None, scales: int) -> tuple[float, ...]:
    """A setting that is one number or one a scale, as the latter."""
    assert value is not None
    return value if isinstance(value, tuple) else (float(value),) * scales
