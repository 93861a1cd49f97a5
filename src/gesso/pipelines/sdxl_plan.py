"""What a request means to Stable Diffusion XL: blanks filled, values checked, warnings, schedules, and its cost.

Reads configurations and sizes of networks, never weights, so it works on the meta device. Not here: the other five
verbs (`sdxl`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gesso.errors import FileError, RequestError
from gesso.models import flux_cost, sdxl_cost
from gesso.pictures import read_pixels
from gesso.pipelines.contract import Cost, Plan
from gesso.pipelines.planning import (
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
from gesso.pipelines.sdxl_refiner import REFINER, RefinerNetwork, Schedule, SdxlRefiner
from gesso.pipelines.sdxl_state import SdxlDefaults, TextEncoder
from gesso.request import GenerationRequest
from gesso.request_parts import Refiner
from gesso.sampling import noise_schedulers

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

_UNUSED = ("revisions",)
_UNUSED += ("true_guidance", "guidance_layer", "guidance_normalization", "guidance_truncation")
_UNUSED += ("temperature", "top_k", "top_p", "frames", "fps")
_SIZES = 6  # numbers about a picture's size that the network reads
_WHITE = 128  # of 255; what is at least so bright in a mask is painted anew
_FEWEST_PIXELS, _MOST_PIXELS = 0.5, 2.0  # of the size that a model was trained at, where it still paints well


class SdxlPlanner:
    """`plan` for one model, and what its other verbs ask of a plan."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        autoencoder: AutoencoderKL,
        text: TextEncoder,
        scheduler: Mapping[str, Any],
        defaults: SdxlDefaults,
        dtype: torch.dtype,
        name: str,
        refiner: SdxlRefiner | None = None,
    ) -> None:
        self.defaults, self.name, self._refiner = defaults, name, refiner
        self._unet, self._autoencoder, self._text, self._scheduler = unet, autoencoder, text, scheduler
        self._network: Any = unet.config
        self._vae: Any = autoencoder.config
        self._bytes_each = torch.finfo(dtype).bits // 8
        self._pixel_bytes = 4 if self._vae["force_upcast"] else self._bytes_each
        self.stride: int = 2 ** (len(self._vae["block_out_channels"]) - 1)
        self.latent_channels: int = self._vae["latent_channels"]

    @property
    def sees_mask(self) -> bool:
        """Whether the network reads a mask and what stays of a picture beside the latent."""
        return self._network["in_channels"] == 2 * self.latent_channels + 1

    @property
    def text_widths(self) -> tuple[int, int]:
        """Of features a token, and of the pooled vector."""
        sizes = _SIZES * self._network["addition_time_embed_dim"]
        return self._network["cross_attention_dim"], self._network["projection_class_embeddings_input_dim"] - sizes

    def plan(self, request: GenerationRequest) -> Plan:
        """Fill blanks, check all values and pictures, and count the work. Raises RequestError, FileError."""
        if self.sees_mask and request.mask is None:
            hint = "give init_image and mask: it was made to paint over parts of a picture"
            raise RequestError("mask", "", f"given, which {self.name} needs", hint)
        filled = self._filled(request)
        counts = [len(schedule.timesteps_N) for schedule in self.schedules(filled)]
        evaluations = sum(counts)
        check_list(filled, "guidance", evaluations, "evaluation")
        plan = Plan(request=filled, steps=evaluations, cost=Cost(flops=0.0, bytes=0.0), peak_bytes=0)
        guidance = guidance_values(plan)
        warnings = (*self._size_warnings(filled), *self._picture_warnings(filled))
        if request.negative and max(guidance) <= 1:
            warnings += ("negative has no effect unless guidance is above 1",)
        held = self._activations(filled, guidance)
        refined = [self._refined(filled).unet] if filled.refiner is not None else []
        weights = flux_cost.weight_bytes([*text_networks(self._text), self._unet, self._autoencoder, *refined])
        return Plan(
            request=filled,
            steps=evaluations,
            cost=self._cost(filled, guidance, counts),
            peak_bytes=weights + max(held.values()),
            activations=held,
            guests=(REFINER,) if refined else (),
            warnings=(
                *warnings,
                *cut_text(self._text, request, self.name),
                *unknown_words(self._text, request, self.name),
                *without_effect(request, _UNUSED, self.name),
            ),
        )

    def schedules(self, request: GenerationRequest) -> tuple[Schedule, ...]:
        """Fresh schedulers for one picture of a filled request: the model's and, if there is one, its refiner's."""
        assert request.scheduler is not None and request.steps is not None
        scheduler, timesteps_N = noise_schedulers.make_noise_scheduler(
            request.scheduler, self._scheduler, steps=request.steps, strength=value_or(request.init_strength, 1.0)
        )
        own = Schedule(scheduler, timesteps_N, len(scheduler.timesteps) - len(timesteps_N))
        if request.refiner is None or self._refiner is None:
            return (own,)
        return self._refiner.schedules(request, own, self._scheduler)

    def step_costs(
        self, request: GenerationRequest, guidance: tuple[float, ...], counts: Sequence[int]
    ) -> tuple[Cost, ...]:
        """Cost of each step of one picture: an evaluation of one sample, or of two, by one network and the next."""
        networks = [self._unet] if request.refiner is None else [self._unet, self._refined(request).unet]
        once = [self._evaluated(network, request) for network in networks]
        by_step = [each for each, count in zip(once, counts, strict=True) for _ in range(count)]
        return tuple(
            Cost(flops=samples * each.flops, bytes=weights + samples * each.bytes)
            for (weights, each), samples in zip(by_step, (2 if value > 1 else 1 for value in guidance), strict=True)
        )

    def _evaluated(self, network: UNet2DConditionModel, request: GenerationRequest) -> tuple[int, Cost]:
        """A network's weights in bytes, and what one sample costs beside them."""
        config: Any = network.config
        cells, text = self._cells(request), self._text.max_tokens
        flops = sdxl_cost.unet_flops(config, *cells, text)
        moved = sdxl_cost.unet_bytes(config, *cells, text, 0, self._bytes_each)
        return flux_cost.weight_bytes([network]), Cost(flops=flops, bytes=moved)

    def _refined(self, request: GenerationRequest) -> RefinerNetwork:
        """The refiner without weights, for a request that has one."""
        assert request.refiner is not None and self._refiner is not None
        return self._refiner.shapes(request.refiner)

    # ---- blanks and checks ------------------------------------------------------------------------------------------

    def _filled(self, request: GenerationRequest) -> GenerationRequest:
        defaults = self.defaults
        if (skipped := value_or(request.clip_skip, 0)) > self._text.most_skipped:
            raise RequestError("clip_skip", skipped, f"from 0 to {self._text.most_skipped} for {self.name}")
        width, height = value_or(request.width, defaults.width), value_or(request.height, defaults.height)
        for field, pixels in (("width", width), ("height", height)):
            check_edge(field, pixels, multiple=self.stride, largest=defaults.largest_edge, name=self.name)
        strength = None
        if request.init_image is not None:
            strength = value_or(request.init_strength, defaults.init_strength if request.mask is None else 1.0)
        return request.model_copy(
            update={
                "seed": seed_or_drawn(request),
                "width": width,
                "height": height,
                "steps": value_or(request.steps, defaults.steps),
                "scheduler": value_or(request.scheduler, defaults.scheduler),
                "clip_skip": skipped,
                "guidance": value_or(request.guidance, defaults.guidance),
                "init_strength": strength,
                "refiner": self._filled_refiner(request),
            }
        )

    def _filled_refiner(self, request: GenerationRequest) -> Refiner | None:
        if request.refiner is None:
            return None
        if self._refiner is None or self.sees_mask:
            hint = "leave it out" if self._refiner is None else "it knows nothing of the mask; leave it out"
            raise RequestError("refiner", request.refiner.model, f"usable with {self.name}", hint)
        return self._refiner.filled(request.refiner)

    def _cells(self, request: GenerationRequest) -> tuple[int, int]:
        """Height and width of the latent."""
        assert request.width is not None and request.height is not None
        return request.height // self.stride, request.width // self.stride

    # ---- warnings ---------------------------------------------------------------------------------------------------

    def _size_warnings(self, filled: GenerationRequest) -> tuple[str, ...]:
        """Of a size far from those that the model was trained at."""
        assert filled.width is not None and filled.height is not None
        trained = self.defaults.width * self.defaults.height
        if _FEWEST_PIXELS * trained <= filled.width * filled.height <= _MOST_PIXELS * trained:
            return ()
        size = f"{self.defaults.width}x{self.defaults.height}"
        return (f"{self.name} was trained on pictures of about as many pixels as {size}; others come out worse",)

    def _picture_warnings(self, filled: GenerationRequest) -> tuple[str, ...]:
        """Of given pictures of other proportions, and of a mask with nothing to paint or to keep. Raises FileError."""
        assert filled.width is not None and filled.height is not None
        found, painted = [], f"{filled.width}x{filled.height}"
        for field in ("init_image", "mask"):
            path = getattr(filled, field)
            if path is None:
                continue
            width, height = picture_size(field, path)
            if width * filled.height != height * filled.width:
                hint = "crop it to keep its proportions" if field == "init_image" else "it should be as the picture is"
                found.append(f"{field} is {width}x{height} and is stretched to {painted}; {hint}")
        if filled.mask is not None:
            darkest, brightest = _extremes(filled.mask)
            if brightest < _WHITE:
                found.append("mask has no white in it: nothing is painted anew")
            elif darkest >= _WHITE:
                found.append("mask is white everywhere: all of init_image is painted anew")
        return tuple(found)

    # ---- cost -------------------------------------------------------------------------------------------------------

    def _cost(self, filled: GenerationRequest, guidance: tuple[float, ...], counts: Sequence[int]) -> Cost:
        """The whole of one picture: texts, given picture, steps, decoding."""
        assert filled.width is not None and filled.height is not None
        texts = 2 if max(guidance) > 1 else 1
        flops = texts * flux_cost.text_flops(text_networks(self._text), self._text.max_tokens)
        flops += flux_cost.decode_flops(self._vae, filled.width, filled.height)
        if filled.init_image is not None:
            read = 2 if self.sees_mask else 1
            flops += read * flux_cost.encode_flops(self._vae, filled.width, filled.height)
        moved = flux_cost.weight_bytes([*text_networks(self._text), self._autoencoder])
        return sum(self.step_costs(filled, guidance, counts), Cost(flops=flops, bytes=float(moved)))

    def _activations(self, filled: GenerationRequest, guidance: tuple[float, ...]) -> dict[str, int]:
        """Bytes that each stage holds beside weights."""
        assert filled.width is not None and filled.height is not None
        samples, size, features = 2 if max(guidance) > 1 else 1, (filled.width, filled.height), self.text_widths[0]
        networks = [self._network] if filled.refiner is None else [self._network, self._refined(filled).unet.config]
        held = {
            "text": sdxl_cost.text_peak_bytes(samples, self._text.max_tokens, features, self._bytes_each),
            "step": max(
                sdxl_cost.unet_peak_bytes(network, *self._cells(filled), samples, self._bytes_each)
                for network in networks
            ),
            "decode": flux_cost.decode_peak_bytes(self._vae, *size, self._pixel_bytes),
        }
        if filled.init_image is not None:
            held["picture"] = sdxl_cost.encode_peak_bytes(self._vae, *size, self._pixel_bytes)
        return held


def guidance_values(plan: Plan) -> tuple[float, ...]:
    """The scale of classifier-free guidance at each evaluation."""
    guidance = plan.request.guidance
    assert guidance is not None
    return guidance if isinstance(guidance, tuple) else (float(guidance),) * plan.steps


def _extremes(path: str) -> tuple[int, int]:
    """How dark and how bright a mask is at most, from 0 to 255. Raises FileError."""
    try:
        with read_pixels(Path(path), background="black") as mask:
            darkest, brightest = mask.convert("L").getextrema()
    except FileError as error:
        raise FileError(f"mask {error.path}", error.problem, error.hint) from error
    return darkest, brightest  # pyright: ignore[reportReturnType]
