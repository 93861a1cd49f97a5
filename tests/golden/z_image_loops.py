"""Z-Image goldens of complete runs, through the pipeline: the six verbs as the engine calls them.

The pictures of a golden step in one company. Text features and noise are the recorded ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gesso.models.s3dit.transformer import S3DiT
from gesso.pipelines.z_image import ZImagePipeline
from gesso.pipelines.z_image_state import ZImageDefaults, ZImageState
from gesso.request import GenerationRequest
from gesso.sampling.flow import FlowSchedule, share_of_way
from tests.golden.comparison import Comparison
from tests.golden.side_car import BrokenGoldenError, Golden, SideCar
from tests.golden.z_image_network import autoencoder_of, build_autoencoder, transformer_of

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL


class Loop(SideCar):
    """One run; prompts are names of recorded features."""

    name: str
    height: int
    width: int
    steps: int
    guidance_scale: float
    prompt: str | list[str]
    negative_prompt: str | list[str] | None = None
    num_images_per_prompt: int = 1
    noise_seed: int
    cfg_normalization: bool | float = False
    cfg_truncation: float | None = 1.0
    shift: float | None = None
    use_dynamic_shifting: bool | None = None
    t_given_to_model: list[float] | None = None

    @property
    def prompts(self) -> list[str]:
        """One a picture."""
        names = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return [name for name in names for _ in range(self.num_images_per_prompt)]

    @property
    def negatives(self) -> list[str]:
        """One a picture."""
        each = self.negative_prompt
        count = 1 if isinstance(self.prompt, str) else len(self.prompt)
        names = each if isinstance(each, list) else [each or ""] * count
        return [name for name in names for _ in range(self.num_images_per_prompt)]


class LoopsSideCar(SideCar):
    shift: float = 3.0
    loops: list[Loop]


@dataclass(frozen=True)
class RecordedText:
    """A text encoder that knows the golden's prompts by name."""

    golden: Golden

    @property
    def max_tokens(self) -> int:
        return 512

    def count(self, prompt: str) -> int:
        return len(self.features([prompt])[0])

    def unknown(self, prompt: str) -> list[str]:
        return []

    def cut(self, prompt: str) -> str:
        return ""

    def features(self, prompts: Sequence[str]) -> list[Tensor]:
        return [self.golden.tensor(f"feat.{prompt or 'empty'}") for prompt in prompts]


def check_loops(golden: Golden, comparison: Comparison) -> None:
    """Velocities and latents of each step where recorded, the last latents, and the picture."""
    side_car = golden.view(LoopsSideCar)
    transformer = transformer_of(golden)
    for loop in side_car.loops:
        _check_loop(golden, comparison, transformer, loop, side_car.shift)


def _check_loop(golden: Golden, comparison: Comparison, transformer: S3DiT, loop: Loop, shift: float) -> None:
    pipeline = _pipeline(golden, transformer, loop, shift)
    states = _begin(golden, comparison, pipeline, loop)
    atol = golden.tolerances.get("floats", default=1e-3)
    for step in range(loop.steps):
        if loop.t_given_to_model is not None:
            name = f"{loop.name}: time {step}"
            comparison.close(name, states[0].time, loop.t_given_to_model[step], 1e-6)
        pipeline.step(states)
        name = f"{loop.name}.step{step}"
        if f"{name}.velocity" in golden.tensors:
            velocity = torch.cat(
                [state.velocity_C1hw[None, :, 0] for state in states if state.velocity_C1hw is not None]
            )
            comparison.close(f"{name}.velocity", velocity, golden.tensor(f"{name}.velocity"), atol)
        if f"{name}.latents" in golden.tensors:
            comparison.close(f"{name}.latents", _latents(states), golden.tensor(f"{name}.latents"), atol)
    comparison.close(f"{loop.name}.final", _latents(states), golden.tensor(f"{loop.name}.final"), atol)
    if f"{loop.name}.image_uint8_nhwc" in golden.tensors:
        pictures = np.stack([np.asarray(output.image) for output in pipeline.decode(states)])
        pixels = golden.tolerances.get("uint8", default=1)
        recorded = golden.tensor(f"{loop.name}.image_uint8_nhwc")
        comparison.close(f"{loop.name}.image_uint8_nhwc", torch.from_numpy(pictures), recorded, pixels)


def _pipeline(golden: Golden, transformer: S3DiT, loop: Loop, shift: float) -> ZImagePipeline:
    """The product's, with the shift that the side-car states, else with that by which the recorded times come out."""
    pictured = f"{loop.name}.image_uint8_nhwc" in golden.tensors
    autoencoder = autoencoder_of(golden) if pictured else _stand_in(golden, loop)
    static, dynamic = (
        ZImagePipeline(
            transformer=transformer,
            autoencoder=autoencoder,
            text=RecordedText(golden),
            shift=FlowSchedule(shift=loop.shift or shift, use_dynamic_shifting=by_tokens),
            defaults=ZImageDefaults(),
            name="golden",
            digest="",
        )
        for by_tokens in (False, True)
    )
    if loop.use_dynamic_shifting is not None:
        return dynamic if loop.use_dynamic_shifting else static
    return min(static, dynamic, key=lambda pipeline: _time_error(pipeline, loop))


def _time_error(pipeline: ZImagePipeline, loop: Loop) -> float:
    """By how much the pipeline's times differ from the recorded ones; 0 where none are."""
    request = GenerationRequest(prompt="any", width=loop.width, height=loop.height, steps=loop.steps)
    times = share_of_way(pipeline.planner.sigmas(request)[:-1]).tolist()
    return max(
        (abs(time - given) for time, given in zip(times, loop.t_given_to_model or (), strict=False)), default=0.0
    )


def _stand_in(golden: Golden, loop: Loop) -> AutoencoderKL:
    """An autoencoder without weights that shrinks as the recorded noise says: nothing of this loop is decoded."""
    noise = golden.tensor(f"{loop.name}.noise")
    stride = loop.height // noise.shape[-2]
    if stride & (stride - 1) or stride * noise.shape[-2] != loop.height:
        raise BrokenGoldenError(f"{loop.name}: noise of {noise.shape[-2]} rows for a height of {loop.height}")
    levels = stride.bit_length()
    return build_autoencoder(
        {"block_out_channels": [8] * levels, "norm_num_groups": 8, "latent_channels": noise.shape[-3]}
    )


def _begin(golden: Golden, comparison: Comparison, pipeline: ZImagePipeline, loop: Loop) -> list[ZImageState]:
    """A state a picture, each a request of its own, on its recorded noise. The first picture's is the seed's own."""
    if len(loop.prompts) != len(loop.negatives):
        raise BrokenGoldenError(f"{loop.name}: {len(loop.negatives)} negative prompts for {len(loop.prompts)} prompts")
    requests = [
        GenerationRequest(
            prompt=prompt,
            negative=negative,
            width=loop.width,
            height=loop.height,
            steps=loop.steps,
            seed=loop.noise_seed,
            guidance=loop.guidance_scale,
            guidance_normalization=float(loop.cfg_normalization),
            guidance_truncation=1.0 if loop.cfg_truncation is None else min(loop.cfg_truncation, 1.0),
        )
        for prompt, negative in zip(loop.prompts, loop.negatives, strict=True)
    ]
    plans = [pipeline.plan(request) for request in requests]
    conditionings = pipeline.encode(plans)
    states = [pipeline.begin(plan, made, 0) for plan, made in zip(plans, conditionings, strict=True)]
    noise = golden.tensor(f"{loop.name}.noise")
    comparison.close(f"{loop.name}: noise", states[0].latent_C1hw[:, 0], noise[0], 1e-5)
    for state, noise_Chw in zip(states, noise, strict=True):
        state.latent_C1hw = noise_Chw[:, None].clone()
    return states


def _latents(states: Sequence[ZImageState]) -> Tensor:
    return torch.stack([state.latent_C1hw[:, 0] for state in states])
