"""A tiny family of rectified flow with random weights: six verbs in full, for what the engine does with such families.

The network takes a time per sample, so pictures at any step, of any number of steps, guided or not, share a batch where
only their size is the same. Not here: anything trained, and pictures to start from.
Random numbers: picture i has one CPU generator seeded ``seed + i``, whose only draw is the initial noise.
Time: sigma is 1 for noise and 0 for the clean picture; the network says the velocity, noise minus clean.
Shapes: B pictures, R rows (prompts, then the negatives of those guided), C latent channels, h w cells, E features.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gesso.errors import RequestError
from gesso.pipelines.contract import Cost, Output, Plan
from gesso.pipelines.planning import without_effect
from gesso.request import GenerationRequest

CHANNELS, FEATURES, WIDTH, STRIDE = 4, 16, 24, 4
SIZES = ((32, 32), (48, 32))  # (width, height) in pixels
WORDS = 12  # of a prompt that are read
_WITHOUT_EFFECT = (
    "revisions",
    "guidance_layer",
    "true_guidance",
    "guidance_normalization",
    "guidance_truncation",
    "clip_skip",
    "refiner",
    "temperature",
    "top_k",
    "top_p",
    "frames",
    "fps",
)


class TinyVelocity(nn.Module):
    """Two convolutions, between them shifted by time and text."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1)
        self.condition = nn.Linear(FEATURES + 2, 2 * WIDTH)
        self.out = nn.Conv2d(WIDTH, CHANNELS, 3, padding=1)

    def forward(self, x_RChw: Tensor, sigma_R: Tensor, text_RE: Tensor) -> Tensor:
        time_R2 = torch.stack([sigma_R.cos(), (3 * sigma_R).sin()], dim=1)
        condition_RW11 = self.condition(torch.cat([text_RE, time_R2], dim=1))[..., None, None]
        scale_RW11, shift_RW11 = condition_RW11.chunk(2, dim=1)
        return self.out(torch.tanh(self.into(x_RChw) * (1 + scale_RW11) + shift_RW11))


@dataclass(eq=False)
class FlowState:
    """One picture on its way; ``velocity_Chw`` is that of its last step."""

    request: GenerationRequest
    seed: int
    text_E: Tensor
    negative_E: Tensor | None
    sigmas: tuple[float, ...]
    x_Chw: Tensor
    cost: Cost
    velocity_Chw: Tensor | None = None
    done: int = 0

    @property
    def total(self) -> int:
        return len(self.sigmas) - 1

    @property
    def remaining(self) -> int:
        return self.total - self.done

    @property
    def batch_key(self) -> Hashable:
        return tuple(self.x_Chw.shape)


class TinyFlowPipeline:
    """The six verbs."""

    name = "tiny-flow"
    digest = "none"
    dtype = "float32"

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.network = TinyVelocity().eval().requires_grad_(False)
        self.pixels = nn.ConvTranspose2d(CHANNELS, 3, STRIDE, STRIDE).eval().requires_grad_(False)
        self.batches: list[list[tuple[str, int]]] = []  # of each step (prompt, steps done before)

    def plan(self, request: GenerationRequest) -> Plan:
        size = (request.width or SIZES[0][0], request.height or SIZES[0][1])
        if size not in SIZES:
            field = "width" if request.height in (None, SIZES[0][1]) else "height"
            nearest = " or ".join(f"{width}x{height}" for width, height in SIZES)
            raise RequestError(field, getattr(request, field), f"part of a size of {self.name}", f"nearest: {nearest}")
        if request.scheduler not in (None, "euler"):
            raise RequestError("scheduler", request.scheduler, f"a scheduler of {self.name} (euler)")
        if request.init_image is not None:
            raise RequestError("init_image", request.init_image, f"usable with {self.name}", "leave it out")
        filled = request.model_copy(
            update={
                "seed": secrets.randbelow(2**32) if request.seed is None else request.seed,
                "width": size[0],
                "height": size[1],
                "steps": request.steps or 6,
                "guidance": 2.0 if request.guidance is None else request.guidance,
                "scheduler": "euler",
            }
        )
        if isinstance(filled.guidance, tuple):
            raise RequestError("guidance", filled.guidance, f"one number for {self.name}")
        assert filled.steps is not None
        cost = self._cost(filled)
        total = Cost(flops=cost.flops * filled.steps, bytes=cost.bytes * filled.steps)
        warnings = tuple(
            f'{self.name} reads {WORDS} words; cut: "{cut}"'
            for text in (request.prompt, request.negative)
            if (cut := " ".join(_words(text)[WORDS:]))
        )
        warnings += without_effect(request, _WITHOUT_EFFECT, self.name)
        return Plan(request=filled, steps=filled.steps, cost=total, peak_bytes=1 << 20, warnings=warnings)

    def _cost(self, request: GenerationRequest) -> Cost:
        assert request.width is not None and request.height is not None
        cells, rows = request.width * request.height // STRIDE**2, 1 if request.guidance == 1 else 2
        return Cost(flops=float(rows * cells * 2 * 2 * 9 * CHANNELS * WIDTH), bytes=float(rows * cells * WIDTH * 4))

    def encode(self, plans: Sequence[Plan]) -> list[tuple[Tensor, Tensor | None]]:
        """The prompt's features, and those that guidance pushes away from."""
        return [
            (_features(request.prompt), None if request.guidance == 1 else _features(request.negative))
            for request in (plan.request for plan in plans)
        ]

    def begin(self, plan: Plan, conditioning: tuple[Tensor, Tensor | None], image: int) -> FlowState:
        request = plan.request
        assert request.seed is not None and request.width is not None and request.height is not None
        seed = request.seed + image
        shape = (CHANNELS, request.height // STRIDE, request.width // STRIDE)
        return FlowState(
            request=request,
            seed=seed,
            text_E=conditioning[0],
            negative_E=conditioning[1],
            sigmas=tuple(np.linspace(1.0, 0.0, plan.steps + 1).tolist()),
            x_Chw=torch.randn(shape, generator=torch.Generator().manual_seed(seed)),
            cost=self._cost(request),
        )

    @torch.inference_mode()
    def step(self, states: Sequence[FlowState]) -> None:
        """Euler: x moves along the velocity by the difference of the sigmas, each picture by its own."""
        self.batches.append([(state.request.prompt, state.done) for state in states])
        guided = [state for state in states if state.negative_E is not None]
        rows = [*states, *guided]
        text_RE = torch.stack(
            [state.text_E for state in states] + [state.negative_E for state in guided if state.negative_E is not None]
        )
        sigma_R = torch.tensor([state.sigmas[state.done] for state in rows])
        velocity_RChw = self.network(torch.stack([state.x_Chw for state in rows]), sigma_R, text_RE)
        away = iter(velocity_RChw[len(states) :])
        for state, velocity_Chw in zip(states, velocity_RChw, strict=False):
            if state.negative_E is not None:
                assert isinstance(state.request.guidance, float)
                velocity_Chw = torch.lerp(next(away), velocity_Chw, state.request.guidance)
            state.x_Chw = state.x_Chw + (state.sigmas[state.done + 1] - state.sigmas[state.done]) * velocity_Chw
            state.velocity_Chw = velocity_Chw
            state.done += 1

    @torch.inference_mode()
    def preview(self, state: FlowState) -> Image.Image:
        """Where the last velocity leads, at a quarter of the size."""
        x_Chw = state.x_Chw
        if state.velocity_Chw is not None:
            x_Chw = x_Chw - state.sigmas[state.done] * state.velocity_Chw
        picture = self._picture(x_Chw)
        return picture.reduce(STRIDE)

    def decode(self, states: Sequence[FlowState]) -> Iterator[Output]:
        for state in states:
            with torch.inference_mode():
                yield Output(image=self._picture(state.x_Chw), seed=state.seed)

    def _picture(self, x_Chw: Tensor) -> Image.Image:
        pixels_HW3 = self.pixels(x_Chw[None])[0].movedim(0, -1).mul(100).add(128).clamp(0, 255)
        return Image.fromarray(pixels_HW3.round().to(torch.uint8).numpy())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _features(text: str) -> Tensor:
    """A vector of its words in their order; words are vectors drawn from a seed that their letters make."""
    features_E = torch.zeros(FEATURES)
    for place, word in enumerate(_words(text)[:WORDS]):
        generator = torch.Generator().manual_seed(int.from_bytes(word.encode()) % 2**63)
        features_E += torch.randn(FEATURES, generator=generator).roll(place)
    return features_E
