"""What a request means for Infinity: blanks filled, sizes, lists, words and revisions checked, work and bytes counted.

Not here: the other verbs (`infinity`), the formulas of cost (`models/infinity/cost`).
Shapes as in `infinity`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        revisions, kept = self.revisions(filled, schedule)
        steps = len(schedule) + revisions * (len(schedule) - kept)
        tokens = self._check_text("prompt", request.prompt)
        if request.negative:
            tokens = max(tokens, self._check_text("negative", request.negative))
        if request.init_image:
            picture_size("init_image", request.init_image)
        latent = schedule.latent_grids(self._config.patchify)[-1]
        ends = text_flops(self._config, tokens) + decode_flops(self._autoencoder.config, latent)
        costs = self.costs(filled, schedule, tokens)
        again = [self.revision_cost(filled, schedule, costs, kept), *costs[kept + 1 :]] * revisions
        cost = sum([*costs, *again], Cost(flops=ends, bytes=0.0))
        peak = self._peak_bytes(schedule, latent, schedule.starts[kept + 1] if revisions else 0)
        return Plan(request=filled, steps=steps, cost=cost, peak_bytes=peak, warnings=self._warnings(request))

    def _filled(self, request: GenerationRequest, size: tuple[int, int]) -> GenerationRequest:
        """The request without blanks; guidance inside the network goes without revisions unless they are asked for."""
        defaults, layer = self.defaults, value_or(request.guidance_layer, self.defaults.guidance_layer)
        picture = request.init_image
        return request.model_copy(
            update={
                "seed": seed_or_drawn(request),
                "width": size[1],
                "height": size[0],
                "guidance": value_or(request.guidance, defaults.guidance),
                "temperature": value_or(request.temperature, defaults.temperature),
                "guidance_layer": layer,
                "top_k": value_or(request.top_k, defaults.top_k),
                "top_p": value_or(request.top_p, defaults.top_p),
                "init_strength": value_or(request.init_strength, defaults.init_strength) if picture else None,
                "revisions": value_or(request.revisions, 0 if layer else defaults.revisions),
                "revision_strength": value_or(request.revision_strength, defaults.revision_strength),
            }
        )

    def revisions(self, request: GenerationRequest, schedule: ScaleSchedule) -> tuple[int, int]:
        """How often a picture is revised, and the number of scales that a revision keeps: at least one, and those of a
        given picture, but not all.
        """
        revisions, strength = request.revisions or 0, request.revision_strength
        assert strength is not None
        if revisions and request.guidance_layer:
            raise RequestError("revisions", revisions, "0 with a guidance_layer", "guide the logits: guidance_layer 0")
        if revisions and len(schedule) == 1:
            raise RequestError("revisions", revisions, "0 where a picture is one scale")
        scales, given = len(schedule), self.given_scales(request, schedule)
        return revisions if given < scales else 0, max(1, given % scales, scales - max(1, round(strength * scales)))

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
        revised = self.defaults.revisions if request.revisions is None else request.revisions
        if request.revision_strength not in (None, self.defaults.revision_strength) and not revised:
            words += ("revision_strength has no effect without revisions",)
        if request.guidance_layer and request.revisions is None and revised:
            words += (f"a guidance_layer leaves out the {revised} revisions that {self.name} has else",)
        return words + without_effect(request, _UNUSED, self.name)

    def costs(self, request: GenerationRequest, schedule: ScaleSchedule, tokens: int) -> tuple[Cost, ...]:
        """Cost of each scale of one picture."""
        last = last_guided(per_scale(request.guidance, len(schedule)))
        each = torch.finfo(self._dtype).bits // 8
        weights = sum(p.numel() for p in self._transformer.blocks.parameters()) * each
        costs = []
        for scale in range(len(schedule)):
            rows = 2 if scale <= last else 1
            kept = self._config.depth * 2 * schedule.starts[scale + 1] * self._config.width * each
            flops = rows * scale_flops(self._config, schedule, scale, tokens)
            costs.append(Cost(flops=flops, bytes=float(weights + rows * kept)))
        return tuple(costs)

    def revision_cost(
        self, request: GenerationRequest, schedule: ScaleSchedule, costs: Sequence[Cost], kept: int
    ) -> Cost:
        """Cost of the step that begins a revision: decoding, coding, and reading all scales up to the first painted."""
        latent, config = schedule.latent_grids(self._config.patchify)[-1], self._autoencoder.config
        last = last_guided(per_scale(request.guidance, len(schedule)))
        null_rows = 1 if kept <= last else 0  # of every scale that is read, or of none
        rows = [1 + (scale <= last) for scale in range(kept + 1)]
        reading = sum(cost.flops * (1 + null_rows) / each for cost, each in zip(costs, rows, strict=False))
        weights = sum(p.nbytes for p in self._autoencoder.parameters())
        flops = decode_flops(config, latent) + encode_flops(config, latent) + reading
        return Cost(flops=flops, bytes=costs[kept].bytes + weights)

    def _peak_bytes(self, schedule: ScaleSchedule, latent: Grid, read_anew: int) -> int:
        """`read_anew` are the tokens that a revision begins with."""
        each = torch.finfo(self._dtype).bits // 8
        text = getattr(self._text, "network", self._text)  # or it is one itself
        parts = (self._transformer, self._autoencoder, text)
        weights = sum(p.nbytes for part in parts if isinstance(part, nn.Module) for p in part.parameters())
        n = max(schedule.starts[-1] - schedule.starts[-2], read_anew)
        stepping = (
            cache_bytes(self._config, schedule, 2, each) + 2 * n * (self._config.hidden + 8 * self._config.width) * 4
        )
        return weights + max(stepping, decode_peak_bytes(self._autoencoder.config, latent, 4))


def is_guided(plan: Plan) -> bool:
    """Whether any scale is guided."""
    return last_guided(per_scale(plan.request.guidance, 1)) >= 0


def per_scale(value: float | tuple[float, ...] | None, scales: int) -> tuple[float, ...]:
    """A setting that is one number or one a scale, as the latter."""
    assert value is not None
    return value if isinstance(value, tuple) else (float(value),) * scales
