"""What a request means to Z-Image: blanks filled, values checked, warnings, schedules, and the cost of it all.

Reads configurations and sizes of networks, never weights, so it works on the meta device. Not here: the other five
verbs (`z_image`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gesso.errors import RequestError
from gesso.models import flux_cost
from gesso.models.s3dit import cost
from gesso.models.s3dit.packing import ContextShape, Size
from gesso.models.s3dit.transformer import S3DiT
from gesso.pipelines.contract import Cost, Plan, StepShape
from gesso.pipelines.planning import (
    CuttingVocabulary,
    check_cached,
    check_edge,
    check_list,
    cut_text,
    picture_size,
    scheduler_of,
    seed_or_drawn,
    swapped_scheduler,
    text_networks,
    unknown_words,
    untrained_size,
    value_or,
    without_effect,
)
from gesso.pipelines.z_image_state import (
    EditingTextEncoder,
    PictureEncoder,
    TextEncoder,
    ZImageDefaults,
    guidance_of_steps,
)
from gesso.request import GenerationRequest
from gesso.sampling.flow import (
    STOCHASTIC,
    FlowSchedule,
    complete,
    dynamic_shift,
    first_step,
    linear_sigmas,
    shift_of_tokens,
    static_shift,
)

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

SCHEDULERS = ("euler", STOCHASTIC)
_LARGEST_CONDITION = 1024 * 1024  # pixels of a picture that is edited
_UNUSED = ("revisions",)
_UNUSED += ("guidance_layer", "true_guidance", "temperature", "top_k", "top_p", "frames", "fps", "mask")
_UNUSED += ("clip_skip", "refiner")
_TEMPLATE_PIECE = 32  # tokens at most of a piece of an editing prompt that is only marks


class _AboutPicture:
    """A text encoder as a prompt meets it that is about a picture: between other marks, which take tokens as well."""

    def __init__(self, text: EditingTextEncoder) -> None:
        self._text, self.max_tokens = text, text.max_tokens

    def count(self, prompt: str) -> int:
        return self._text.count(prompt, 1)

    def unknown(self, prompt: str) -> list[str]:
        return self._text.unknown(prompt)

    def cut(self, prompt: str) -> str:
        return self._text.cut(prompt, 1)


class ZImagePlanner:
    """`plan` for one model, and what its other verbs ask of a plan."""

    def __init__(
        self,
        transformer: S3DiT,
        autoencoder: AutoencoderKL,
        text: TextEncoder,
        pictures: PictureEncoder | None,
        shift: FlowSchedule,
        defaults: ZImageDefaults,
        name: str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.defaults, self.name = defaults, name
        self._transformer, self._autoencoder, self._text, self._pictures = transformer, autoencoder, text, pictures
        self._shift, self._config, self._bytes_each = shift, transformer.config, dtype.itemsize
        self._vae: Any = autoencoder.config
        self.stride: int = 2 ** (len(self._vae["block_out_channels"]) - 1)

    @property
    def edge(self) -> int:
        """Pixels along the edge of a token; sizes are multiples of it."""
        return self.stride * self._config.patch[1]

    def plan(self, request: GenerationRequest) -> Plan:
        """Fill blanks, check sizes, scheduler, lists and the picture, and count the work. Raises RequestError."""
        picture = None if request.init_image is None else picture_size("init_image", request.init_image)
        filled = self._filled(request, picture)
        if filled.scheduler not in SCHEDULERS:
            hint = f"there is: {', '.join(SCHEDULERS)}"
            raise RequestError("scheduler", filled.scheduler, f"a scheduler of {self.name}", hint)
        check_cached(filled)
        sigmas_N = self.sigmas(filled)
        if len(sigmas_N) < 2:
            strength = filled.init_strength
            raise RequestError("init_strength", strength, f"above 0 for {self.name}", "nothing would be painted anew")
        check_list(filled, "guidance", len(sigmas_N) - 1, "step")
        guidance = guidance_of_steps(filled, sigmas_N)
        guided = any(guidance)
        prompt = self._shape(filled.prompt, picture)
        negative = self._shape(filled.negative, picture) if guided else None
        held = self._activations(filled, prompt, negative)
        return Plan(
            request=filled,
            steps=len(sigmas_N) - 1,
            cost=self._cost(filled, guidance, prompt, negative),
            peak_bytes=self._weight_bytes() + max(held.values()),
            activations=held,
            warnings=(
                *self._warnings(request, filled, guided, picture),
                *cut_text(self._asking(picture), request, self.name),
                *unknown_words(self._text, request, self.name),
            ),
            shape=self._step_shape(filled, prompt, negative),
        )

    def size(self, request: GenerationRequest) -> Size:
        """Of a filled request's latent, in cells."""
        assert request.width is not None and request.height is not None
        return 1, request.height // self.stride, request.width // self.stride

    def sigmas(self, request: GenerationRequest) -> Tensor:
        """Where each step of a filled request begins, then 0, float32. A picture to start from skips the first ones."""
        assert request.steps is not None
        sigmas_N, rule = linear_sigmas(request.steps), self._shift
        if rule.use_dynamic_shifting:
            mu = shift_of_tokens(
                math.prod(self.size(request)) // self._config.patch[1] ** 2,
                base_tokens=rule.base_image_seq_len,
                most_tokens=rule.max_image_seq_len,
                base_shift=rule.base_shift,
                most_shift=rule.max_shift,
            )
            sigmas_N = dynamic_shift(sigmas_N, mu)
        else:
            sigmas_N = static_shift(sigmas_N, rule.shift)
        strength = 1.0 if self.defaults.editing or request.init_strength is None else request.init_strength
        return complete(sigmas_N)[first_step(request.steps, strength) :]

    def step_costs(
        self, size: Size, guidance: Sequence[float], prompt: ContextShape, negative: ContextShape | None
    ) -> tuple[Cost, ...]:
        """Cost of each step: one evaluation, or two where it is guided."""
        config, each = self._config, self._bytes_each
        weights = flux_cost.weight_bytes([self._transformer])
        costs: dict[bool, Cost] = {}
        for doubled in {value > 1 for value in guidance}:
            contexts = [prompt, negative] if doubled and negative is not None else [prompt]
            tokens = sum(cost.whole_tokens(config, size, context) for context in contexts)
            moved = weights + (config.n_layers + config.n_refiner_layers) * cost.working_bytes(config, tokens, each)
            costs[doubled] = Cost(flops=cost.evaluation_flops(config, size, contexts), bytes=float(moved))
        return tuple(costs[value > 1] for value in guidance)

    def condition_sizes(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Width and height to which a picture of this size is reduced to be edited, and then cut, in whole tokens."""
        if width * height > _LARGEST_CONDITION:
            factor = math.sqrt(_LARGEST_CONDITION / (width * height))
            width, height = max(int(width * factor), 1), max(int(height * factor), 1)
        cut = max(width // self.edge, 1) * self.edge, max(height // self.edge, 1) * self.edge
        return (width, height), cut

    # ---- blanks and checks ------------------------------------------------------------------------------------------

    def _filled(self, request: GenerationRequest, picture: tuple[int, int] | None) -> GenerationRequest:
        """Without blanks; a picture that is edited lends its size. `picture` is the given one's width and height."""
        defaults = self.defaults
        width, height, strength = request.width, request.height, request.init_strength
        if picture is not None and defaults.editing:
            across, down = self._checked_condition(request, picture)
            width, height = value_or(width, across), value_or(height, down)
        elif picture is not None:
            strength = value_or(strength, defaults.init_strength)
        width, height = value_or(width, defaults.width), value_or(height, defaults.height)
        positions = self._config.axes_lens
        for field, pixels, most in (("width", width, positions[2]), ("height", height, positions[1])):
            check_edge(field, pixels, multiple=self.edge, largest=most * self.edge, name=self.name)
        return request.model_copy(
            update={
                "seed": seed_or_drawn(request),
                "width": width,
                "height": height,
                "steps": value_or(request.steps, defaults.steps),
                "scheduler": scheduler_of(request, defaults.scheduler),
                "guidance": value_or(request.guidance, defaults.guidance),
                "guidance_normalization": value_or(request.guidance_normalization, defaults.guidance_normalization),
                "guidance_truncation": value_or(request.guidance_truncation, defaults.guidance_truncation),
                "init_strength": strength,
            }
        )

    def _checked_condition(self, request: GenerationRequest, picture: tuple[int, int]) -> tuple[int, int]:
        """Width and height of the picture as it is edited. Raises RequestError where it has more places than there are.

        Features of pictures are placed by latent cells, the pictures themselves by tokens.
        """
        _, (across, down) = self.condition_sizes(*picture)
        pixels_each = self.edge if self._pictures is None else self.stride
        for pixels, places in ((across, self._config.axes_lens[2]), (down, self._config.axes_lens[1])):
            if pixels > places * pixels_each:
                allowed = f"at most {places * pixels_each} pixels along an edge for {self.name}"
                raise RequestError("init_image", request.init_image, allowed, f"it has {pixels}; crop it")
        return across, down

    def _step_shape(self, filled: GenerationRequest, prompt: ContextShape, negative: ContextShape | None) -> StepShape:
        contexts, size = [prompt] if negative is None else [prompt, negative], self.size(filled)
        tokens = max(cost.whole_tokens(self._config, size, context) for context in contexts)
        picture = max(cost.picture_tokens(self._config, size, context) for context in contexts)
        return StepShape(
            image_tokens=picture,
            text_tokens=tokens - picture,
            grid=(size[1] // self._config.patch[1], size[2] // self._config.patch[1]),
            output=(self._config.in_channels, *size),
            branches=len(contexts),
        )

    # ---- warnings ---------------------------------------------------------------------------------------------------

    def _warnings(
        self, request: GenerationRequest, filled: GenerationRequest, guided: bool, picture: tuple[int, int] | None
    ) -> tuple[str, ...]:
        defaults = self.defaults
        assert filled.width is not None and filled.height is not None
        found = list(untrained_size(filled, defaults.sizes, self.name))
        if defaults.distilled and guided:
            found.append(f"{self.name} is distilled: guidance doubles its work and harms the picture")
        elif isinstance(request.guidance, float) and 0 < request.guidance < 1:
            found.append("guidance has no effect unless it is above 1")
        if picture is not None and not defaults.editing and picture[0] * filled.height != picture[1] * filled.width:
            given, painted = f"{picture[0]}x{picture[1]}", f"{filled.width}x{filled.height}"
            found.append(f"init_image is {given} and is cut to the proportions of {painted}")
        if request.negative and not guided:
            found.append("negative has no effect unless guidance is above 1")
        unused = (*_UNUSED, "init_strength") if defaults.editing else _UNUSED
        swapped = swapped_scheduler(request, filled, defaults.scheduler)
        return (*found, *swapped, *without_effect(request, unused, self.name))

    # ---- cost -------------------------------------------------------------------------------------------------------

    def _asking(self, picture: tuple[int, int] | None) -> CuttingVocabulary:
        """What is asked how much of a prompt is read."""
        if self.defaults.editing and picture is not None and isinstance(self._text, EditingTextEncoder):
            return _AboutPicture(self._text)
        return self._text

    def _shape(self, prompt: str, picture: tuple[int, int] | None) -> ContextShape:
        """Of the context that a prompt will make; of an edited picture's features, the most there may be."""
        tokens = min(self._asking(picture).count(prompt), self._text.max_tokens)
        if not self.defaults.editing:
            return ContextShape(captions=(tokens,))
        if picture is None:
            return ContextShape(captions=(tokens,), editing=True)
        _, (width, height) = self.condition_sizes(*picture)
        return ContextShape(
            captions=(_TEMPLATE_PIECE, tokens, _TEMPLATE_PIECE),
            conditions=((1, height // self.stride, width // self.stride),),
            features=((1, self._pictures.max_tokens),) if self._pictures is not None else (),
            editing=True,
        )

    def _cost(
        self,
        filled: GenerationRequest,
        guidance: Sequence[float],
        prompt: ContextShape,
        negative: ContextShape | None,
    ) -> Cost:
        """The whole of one picture: texts, given picture, steps, decoding."""
        assert filled.width is not None and filled.height is not None
        contexts = [prompt] if negative is None else [prompt, negative]
        networks = text_networks(self._text)
        flops = flux_cost.decode_flops(self._vae, filled.width, filled.height)
        for context in contexts:
            flops += flux_cost.text_flops(networks, sum(context.captions))
            flops += cost.read_flops(self._config, context)
        for _, height, width in prompt.conditions:
            flops += flux_cost.encode_flops(self._vae, width * self.stride, height * self.stride)
        if filled.init_image is not None and not prompt.conditions:
            flops += flux_cost.encode_flops(self._vae, filled.width, filled.height)
        moved = flux_cost.weight_bytes([*networks, self._autoencoder])
        steps = self.step_costs(self.size(filled), guidance, prompt, negative)
        return sum(steps, Cost(flops=flops, bytes=float(moved)))

    def _weight_bytes(self) -> int:
        return flux_cost.weight_bytes(
            [*text_networks(self._text), *text_networks(self._pictures), self._transformer, self._autoencoder]
        )

    def _activations(
        self, filled: GenerationRequest, prompt: ContextShape, negative: ContextShape | None
    ) -> dict[str, int]:
        """Bytes that each stage holds beside weights."""
        assert filled.width is not None and filled.height is not None
        contexts = [prompt] if negative is None else [prompt, negative]
        tokens = sum(cost.whole_tokens(self._config, self.size(filled), context) for context in contexts)
        longest = max(sum(context.captions) for context in contexts)
        each, of_pixels = self._bytes_each, self._autoencoder.dtype.itemsize
        held = {
            "text": flux_cost.text_peak_bytes(text_networks(self._text), longest, each),
            "step": cost.working_bytes(self._config, tokens, each),
            "decode": flux_cost.decode_peak_bytes(self._vae, filled.width, filled.height, of_pixels),
        }
        if filled.init_image is not None:
            sizes = [(width, height) for _, height, width in prompt.conditions]
            size = (sizes[0][0] * self.stride, sizes[0][1] * self.stride) if sizes else (filled.width, filled.height)
            held["picture"] = flux_cost.encode_peak_bytes(self._vae, *size, of_pixels)
        return held
