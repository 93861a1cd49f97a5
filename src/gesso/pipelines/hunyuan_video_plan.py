"""What a request means to HunyuanVideo: blanks filled, values checked, warnings, schedules, and the cost of it all.

Reads configurations and sizes of networks, never weights, so it works on the meta device. Not here: the other five
verbs (`hunyuan_video`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gesso.devices import CPU
from gesso.errors import RequestError
from gesso.models import flux_cost, hunyuan_video_cost
from gesso.models.hunyuan_video_tiles import Tiling
from gesso.pipelines.contract import Cost, Plan, StepShape
from gesso.pipelines.hunyuan_video_state import HunyuanVideoDefaults, TextEncoder
from gesso.pipelines.planning import (
    check_cached,
    check_edge,
    check_list,
    cut_text,
    quoted,
    seed_or_drawn,
    text_networks,
    value_or,
    without_effect,
)
from gesso.request import GenerationRequest
from gesso.sampling import schedulers
from gesso.sampling.schedulers import Scheduler

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

_UNUSED = ("revisions",)
_UNUSED += ("guidance_layer", "guidance_normalization", "guidance_truncation", "temperature", "top_k", "top_p")
_UNUSED += ("identity", "clip_skip", "refiner")


class HunyuanVideoPlanner:
    """`plan` for one model, and what its other verbs ask of a plan."""

    def __init__(
        self,
        transformer: HunyuanVideoTransformer3DModel,
        autoencoder: AutoencoderKLHunyuanVideo,
        text: TextEncoder,
        scheduler: Mapping[str, Any],
        defaults: HunyuanVideoDefaults,
        name: str,
        dtype: torch.dtype,
    ) -> None:
        self.defaults, self.name = defaults, name
        self._transformer, self._autoencoder, self._text, self._scheduler = transformer, autoencoder, text, scheduler
        self._network: Any = transformer.config
        self._vae: Any = autoencoder.config
        self._bytes_each = dtype.itemsize
        self.stride: int = self._vae["spatial_compression_ratio"]
        self.frame_stride: int = self._vae["temporal_compression_ratio"]

    @property
    def edge(self) -> int:
        """Pixels along the edge of a token; sizes are multiples of it."""
        return self._network["patch_size"] * self.stride

    def plan(self, request: GenerationRequest) -> Plan:
        """Fill blanks, check sizes, frames, scheduler and lists, and count the work. Raises RequestError."""
        if request.init_image is not None:
            raise RequestError("init_image", request.init_image, f"usable with {self.name}", "leave it out")
        filled = self._filled(request)
        assert filled.scheduler is not None
        schedulers.check_name(filled.scheduler, from_picture=False)
        check_cached(filled)
        evaluations = len(self.schedule(filled, CPU)[1])
        check_list(filled, "guidance", evaluations, "evaluation")
        held = self._activations(filled)
        weights = flux_cost.weight_bytes([*text_networks(self._text), self._transformer, self._autoencoder])
        return Plan(
            request=filled,
            steps=evaluations,
            cost=self._cost(filled, evaluations),
            peak_bytes=weights + max(held.values()),
            warnings=(*self._warnings(filled), *without_effect(request, _UNUSED, self.name)),
            activations=held,
            shape=self._shape(filled),
        )

    def schedule(
        self, request: GenerationRequest, device: torch.device | str, generator: torch.Generator | None = None
    ) -> tuple[Scheduler, Tensor]:
        """A fresh scheduler for one video of a filled request, and the timestep of each evaluation, `[N]`.

        `generator` is the video's own, from which some schedulers draw; to plan, none is needed.
        """
        assert request.scheduler is not None and request.steps is not None
        return schedulers.make_scheduler(
            request.scheduler,
            self._scheduler,
            steps=request.steps,
            tokens=self._tokens(request),
            device=device,
            generator=generator,
        )

    def latent_size(self, request: GenerationRequest) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a filled request."""
        assert request.width is not None and request.height is not None and request.frames is not None
        frames = (request.frames - 1) // self.frame_stride + 1
        return frames, request.height // self.stride, request.width // self.stride

    def step_cost(self, request: GenerationRequest) -> Cost:
        """Cost of a step of one video: one evaluation, or two."""
        tokens, text = self._tokens(request), self._text.max_tokens
        weights = flux_cost.weight_bytes([self._transformer])
        once = Cost(
            flops=hunyuan_video_cost.transformer_flops(self._network, tokens, text),
            bytes=hunyuan_video_cost.transformer_bytes(self._network, tokens, text, weights, self._bytes_each),
        )
        return once + once if guides_truly(request) else once

    # ---- blanks and checks ------------------------------------------------------------------------------------------

    def _filled(self, request: GenerationRequest) -> GenerationRequest:
        defaults = self.defaults
        width, height = value_or(request.width, defaults.width), value_or(request.height, defaults.height)
        for field, pixels in (("width", width), ("height", height)):
            check_edge(field, pixels, multiple=self.edge, largest=defaults.largest_edge, name=self.name)
        frames = value_or(request.frames, defaults.frames)
        self._check_frames(frames)
        return request.model_copy(
            update={
                "seed": seed_or_drawn(request),
                "width": width,
                "height": height,
                "frames": frames,
                "fps": value_or(request.fps, defaults.fps),
                "steps": value_or(request.steps, defaults.steps),
                "scheduler": value_or(request.scheduler, defaults.scheduler),
                "guidance": value_or(request.guidance, defaults.guidance),
                "true_guidance": value_or(request.true_guidance, 1.0),
            }
        )

    def _check_frames(self, frames: int) -> None:
        """One and a multiple of the frames that a latent frame stands for, up to the most. Raises RequestError."""
        stride, most = self.frame_stride, self.defaults.largest_frames
        if frames > most:
            raise RequestError("frames", frames, f"at most {most} for {self.name}", f"nearest: {most}")
        if (frames - 1) % stride:
            below = frames - (frames - 1) % stride
            near = " or ".join(str(count) for count in (below, below + stride) if count <= most)
            raise RequestError(
                "frames", frames, f"one more than a multiple of {stride} for {self.name}", f"nearest: {near}"
            )

    def _tokens(self, request: GenerationRequest) -> int:
        frames, height, width = self.latent_size(request)
        across = self._network["patch_size"]
        return frames // self._network["patch_size_t"] * (height // across) * (width // across)

    def _shape(self, filled: GenerationRequest) -> StepShape:
        frames, height, width = self.latent_size(filled)
        across = self._network["patch_size"]
        return StepShape(
            image_tokens=self._tokens(filled),
            text_tokens=self._text.max_tokens,
            grid=(height // across, width // across),
            output=(self._network["out_channels"], frames, height, width),
            branches=2 if guides_truly(filled) else 1,
        )

    # ---- warnings ---------------------------------------------------------------------------------------------------

    def _warnings(self, filled: GenerationRequest) -> tuple[str, ...]:
        found, trained = list(cut_text(self._text, filled, self.name)), self.defaults.trained_frames
        length = f"the {self._text.pooled_tokens} tokens that CLIP reads for the video's overall style"
        for field, words in (("prompt", filled.prompt), ("negative", filled.negative)):
            if tail := self._text.cut_from_pooled(words):
                found.append(f"{field} is longer than {length}; cut off there: {quoted(tail)}")
        assert filled.frames is not None
        if filled.frames > trained:
            found.append(f"{self.name} was trained with up to {trained} frames; longer videos come out worse")
        if filled.negative and not guides_truly(filled):
            found.append("negative has no effect unless true_guidance is above 1")
        return tuple(found)

    # ---- cost -------------------------------------------------------------------------------------------------------

    def _cost(self, filled: GenerationRequest, evaluations: int) -> Cost:
        """The whole of one video: texts, steps, decoding."""
        text, tiling = self._text, Tiling.of(self._autoencoder)
        reading = flux_cost.text_flops([text.llama], text.read_tokens)
        reading += flux_cost.text_flops([text.clip], text.pooled_tokens)
        flops = reading * (2 if guides_truly(filled) else 1)
        flops += hunyuan_video_cost.decode_flops(self._vae, tiling, *self.latent_size(filled))
        moved = flux_cost.weight_bytes([*text_networks(text), self._autoencoder])
        step = self.step_cost(filled)
        return Cost(flops=flops + evaluations * step.flops, bytes=moved + evaluations * step.bytes)

    def _activations(self, filled: GenerationRequest) -> dict[str, int]:
        """Bytes that each stage holds beside weights."""
        each, tiling, text = self._bytes_each, Tiling.of(self._autoencoder), self._text
        llama: Any = text.llama.config
        tokens, size = self._tokens(filled), self.latent_size(filled)
        return {
            "text": hunyuan_video_cost.text_peak_bytes(llama.to_dict(), text.read_tokens, each),
            "step": hunyuan_video_cost.transformer_peak_bytes(self._network, tokens, text.max_tokens, each),
            "decode": hunyuan_video_cost.decode_peak_bytes(self._vae, tiling, *size, each),
        }


def guides_truly(request: GenerationRequest) -> bool:
    """Whether a filled request has a second evaluation, with the negative prompt, at every step."""
    return request.true_guidance is not None and request.true_guidance > 1


def guidance_values(plan: Plan) -> tuple[float, ...]:
    """The guidance that goes into the network, for each evaluation."""
    given = plan.request.guidance
    assert given is not None
    return given if isinstance(given, tuple) else (float(given),) * plan.steps
