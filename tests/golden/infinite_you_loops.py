"""InfiniteYou goldens of complete runs, through the pipeline with its guest; and of schedules and windows.

The pictures of a golden step in one company. Text, identity tokens and key points are the recorded ones. What the seed
draws is checked on the first picture; the others, which the reference drew from one generator, are given theirs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from gesso.errors import FileError
from gesso.identity.reader import Pose
from gesso.models import flux_network
from gesso.pipelines.flux import FluxPipeline
from gesso.pipelines.flux_state import FluxDefaults, FluxState
from gesso.pipelines.infinite_you import InfiniteYou, Networks
from gesso.request import GenerationRequest
from gesso.request_parts import Identity
from gesso.sampling.schedulers import bend_of_tokens, make_scheduler
from gesso.sampling.windows import in_window
from tests.golden.comparison import Comparison
from tests.golden.infinite_you_network import network_of
from tests.golden.side_car import BrokenGoldenError, Golden, NotYetError, SideCar

_SCHEDULER: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True}


class Loop(SideCar):
    """One run. `control` is "black" or the name of a picture of key points beside the golden."""

    name: str
    steps: int
    width: int
    height: int
    seed: int
    batch: int = 1
    control: str = "black"
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    conditioning_scale: float = 1.0
    guidance_scale: float = 3.5
    true_guidance_scale: float | None = None
    conditioning_scale_per_step: list[float] | None = None
    flux_calls: int | None = None
    infusenet_calls: int | None = None
    timesteps_given_to_models: list[float] | None = None

    @property
    def doubled(self) -> bool:
        return self.true_guidance_scale is not None and self.true_guidance_scale != 1


class LoopsSideCar(SideCar):
    loops: list[Loop]
    scheduler: dict[str, Any] = Field(default_factory=lambda: dict(_SCHEDULER))


class Window(SideCar):
    steps: int
    start: float
    end: float
    first_last_count: tuple[int, int, int] | None


class Bend(SideCar):
    tokens: int
    mu: float


class SchedulesSideCar(SideCar):
    scheduler: dict[str, Any] = Field(default_factory=lambda: dict(_SCHEDULER))
    mu: dict[str, Bend] = Field(default_factory=dict)
    keep_windows: list[Window] = Field(default_factory=list)


# ---- what was recorded, in place of what made it --------------------------------------------------------------------


@dataclass(frozen=True)
class RecordedText:
    """A text encoder whose prompts are row numbers, those of the negative texts after a minus."""

    golden: Golden

    @property
    def max_tokens(self) -> int:
        return self.golden.tensor("text_tokens").shape[1]

    def count(self, prompt: str) -> int:
        return self.max_tokens

    def unknown(self, prompt: str) -> list[str]:
        return []

    def cut(self, prompt: str) -> str:
        return ""

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        negative = "neg_" if prompts[0].startswith("-") else ""
        rows = [int(prompt.lstrip("-")) for prompt in prompts]
        return self.golden.tensor(f"{negative}text_tokens")[rows], self.golden.tensor(f"{negative}pooled")[rows]


@dataclass(frozen=True)
class RecordedFace:
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordedFaces:
    """A reader of faces whose photographs are row numbers; a vector is the row, which the resampler is told."""

    def face(self, path: Path) -> RecordedFace:
        return RecordedFace()

    def vector(self, path: Path) -> Tensor:
        return torch.tensor([float(path.name)])

    def vector_of(self, image: Image.Image, source: str) -> Tensor:
        raise FileError(source, "is not looked at")

    def pose(self, path: Path, width: int, height: int) -> Pose:
        if not path.is_file():
            raise BrokenGoldenError(f"{path.name} is missing")
        return Pose(Image.open(path).convert("RGB"))


class RecordedTokens(nn.Module):
    def __init__(self, golden: Golden) -> None:
        super().__init__()
        self.golden = golden

    def forward(self, row_111: Tensor) -> Tensor:
        return self.golden.tensor("id_tokens")[[int(row_111)]]


# ---- loops ----------------------------------------------------------------------------------------------------------


def check_loops(golden: Golden, comparison: Comparison) -> None:
    """Latents of each step, FLUX's outputs, draws, times, scales and calls, as far as recorded; and the picture."""
    side_car = golden.view(LoopsSideCar)
    flux, side, autoencoder = (network_of(golden, role) for role in ("flux", "infusenet", "vae"))
    guest = InfiniteYou(
        faces=RecordedFaces(),  # pyright: ignore[reportArgumentType]
        load=lambda variant: Networks(variant, side, RecordedTokens(golden)),
        shapes=lambda variant: side,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    pipeline = FluxPipeline(
        transformer=flux,
        autoencoder=autoencoder,
        text=RecordedText(golden),
        scheduler=side_car.scheduler,
        defaults=FluxDefaults(width=64, height=64, distilled=not flux.config["guidance_embeds"]),
        name="golden",
        digest="",
        guest=guest,
    )
    for loop in side_car.loops:
        _check_loop(golden, comparison, pipeline, loop, side)


def _check_loop(golden: Golden, comparison: Comparison, pipeline: FluxPipeline, loop: Loop, side: nn.Module) -> None:
    outputs: list[Tensor] = []
    calls: list[float] = []
    hooks = [
        pipeline.transformer.register_forward_hook(lambda _m, _i, made: outputs.append(made[0])),
        side.register_forward_hook(
            lambda _m, _i, given, _o: calls.append(given["conditioning_scale"]), with_kwargs=True
        ),
    ]
    try:
        states = _begin(golden, comparison, pipeline, loop)
        _run(golden, comparison, pipeline, loop, states)
    finally:
        for hook in hooks:
            hook.remove()
    for index, velocity in enumerate(outputs):
        name = f"{loop.name}.flux_call{index}"
        if name in golden.tensors and (loop.doubled or loop.true_guidance_scale is None):
            comparison.close(name, velocity, golden.tensor(name), golden.tolerances.get("atol", default=1e-3))
    if loop.flux_calls is not None and (loop.doubled or loop.true_guidance_scale is None):
        detail = f"{len(outputs)}, not {loop.flux_calls}"
        comparison.true(f"{loop.name}: evaluations of FLUX", len(outputs) == loop.flux_calls, detail)
    if loop.conditioning_scale_per_step is not None:
        active = [scale for scale in loop.conditioning_scale_per_step if scale]
        # The reference evaluates InfuseNet in inactive steps too, and multiplies by 0.
        comparison.true(f"{loop.name}: InfuseNet's scales", calls == active, f"{calls}, not {active}")


def _begin(golden: Golden, comparison: Comparison, pipeline: FluxPipeline, loop: Loop) -> list[FluxState]:
    """A state a picture, each a request of its own, on its recorded noise."""
    if loop.doubled and (loop.true_guidance_scale or 0) < 1:
        raise NotYetError("true guidance below 1")
    edge = pipeline.planner.edge
    requests = [
        GenerationRequest(
            prompt=str(row),
            negative=f"-{row}" if loop.true_guidance_scale is not None else "",
            width=loop.width - loop.width % edge,
            height=loop.height - loop.height % edge,
            steps=loop.steps,
            seed=loop.seed,
            guidance=loop.guidance_scale,
            true_guidance=loop.true_guidance_scale,
            identity=Identity(
                image=str(row),
                strength=loop.conditioning_scale,
                start=loop.guidance_start,
                end=loop.guidance_end,
                pose=None if loop.control == "black" else str(golden.path.with_name(loop.control)),
            ),
        )
        for row in range(loop.batch)
    ]
    plans = [pipeline.plan(request) for request in requests]
    states = [pipeline.begin(plan, made, 0) for plan, made in zip(plans, pipeline.encode(plans), strict=True)]
    _give_draws(golden, comparison, loop, states)
    return states


def _give_draws(golden: Golden, comparison: Comparison, loop: Loop, states: list[FluxState]) -> None:
    atol = golden.tolerances.get("atol", default=1e-3)
    control, noise = (golden.tensors.get(f"{loop.name}.{name}_latents_packed") for name in ("control", "initial"))
    if loop.batch == 1 and control is not None and states[0].presence is not None:
        comparison.close(f"{loop.name}: control latents", states[0].presence.control_1LD, control, atol)
    if loop.batch == 1 and noise is not None:
        comparison.close(f"{loop.name}: noise", states[0].tokens_1LD, noise, 1e-6)
    if loop.batch > 1 and (control is None or noise is None):
        raise BrokenGoldenError(f"{loop.name}: the draws of several pictures from one generator are not recorded")
    for row, state in enumerate(states):
        if noise is not None:
            state.tokens_1LD = noise[row : row + 1].clone()
        if control is not None and state.presence is not None:
            state.presence = replace(state.presence, control_1LD=control[row : row + 1])


def _run(golden: Golden, comparison: Comparison, pipeline: FluxPipeline, loop: Loop, states: list[FluxState]) -> None:
    atol = golden.tolerances.get("atol", default=1e-3)
    sigmas: Any = states[0].scheduler
    if f"{loop.name}.sigmas" in golden.tensors:
        comparison.close(f"{loop.name}.sigmas", sigmas.sigmas, golden.tensor(f"{loop.name}.sigmas"), 5e-5)
    if loop.timesteps_given_to_models is not None:
        given = states[0].timesteps_N / 1000
        comparison.close(f"{loop.name}: times", given, torch.tensor(loop.timesteps_given_to_models), 5e-5)
    for step in range(loop.steps):
        pipeline.step(states)
        name = f"{loop.name}.step{step}.latents"
        if name in golden.tensors:
            comparison.close(name, _latents(states), golden.tensor(name), atol)
    comparison.close(f"{loop.name}.final", _latents(states), golden.tensor(f"{loop.name}.final"), atol)
    if f"{loop.name}.unpacked_scaled" in golden.tensors:
        values: Any = pipeline.autoencoder.config
        latents = flux_network.unpack(_latents(states), *states[0].size)
        unscaled = latents / values["scaling_factor"] + values["shift_factor"]
        # Scaling enlarges whatever error there is.
        wider = atol / min(1.0, values["scaling_factor"])
        comparison.close(f"{loop.name}.unpacked", unscaled, golden.tensor(f"{loop.name}.unpacked_scaled"), wider)
    if f"{loop.name}.image_uint8_nhwc" in golden.tensors:
        pictures = np.stack([np.asarray(output.image) for output in pipeline.decode(states)])
        recorded = golden.tensor(f"{loop.name}.image_uint8_nhwc")
        pixels = golden.tolerances.get("uint8", default=1)
        comparison.close(f"{loop.name}.image", torch.from_numpy(pictures), recorded, pixels)


def _latents(states: Sequence[FluxState]) -> Tensor:
    return torch.cat([state.tokens_1LD for state in states])


# ---- schedules ------------------------------------------------------------------------------------------------------


def check_schedules(golden: Golden, comparison: Comparison) -> None:
    """Sigmas and timesteps of every size and number of steps; mu of every number of tokens; every window's steps."""
    side_car = golden.view(SchedulesSideCar)
    atol = golden.tolerances.get("atol", default=5e-5)
    for size, stated in side_car.mu.items():
        mu = bend_of_tokens(stated.tokens, side_car.scheduler)
        comparison.close(f"mu of {size}", mu, stated.mu, 1e-9)
    for name, recorded in golden.tensors.items():
        found = re.fullmatch(r"(\d+)x(\d+)\.n(\d+)\.(sigmas|timesteps)", name)
        if found is None:
            raise NotYetError(f"the schedule '{name}'")
        size = f"{found[1]}x{found[2]}"
        tokens = side_car.mu[size].tokens if size in side_car.mu else int(found[1]) // 16 * (int(found[2]) // 16)
        scheduler: Any
        scheduler, timesteps = make_scheduler("euler", side_car.scheduler, steps=int(found[3]), tokens=tokens)
        measured = timesteps if found[4] == "timesteps" else scheduler.sigmas
        comparison.close(name, measured, recorded, atol * (1000 if found[4] == "timesteps" else 1))
    for window in side_car.keep_windows:
        active = [step for step in range(window.steps) if in_window(step, window.steps, window.start, window.end)]
        ours = (active[0], active[-1], len(active)) if active else None
        name = f"window {window.start} to {window.end} of {window.steps}"
        comparison.true(name, ours == window.first_last_count, f"{ours}, not {window.first_last_count}")
