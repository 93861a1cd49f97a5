"""A small real pipeline for the engine's tests: six verbs with numbers for a network, and a record of every call.

A picture is a vector that each step moves by noise from its own generator, as Infinity does by sampling bits: its
batch key holds its size and its step, so only pictures that are level step together. ``company_noise`` adds what a
batch's shape adds to floating-point sums, so that a picture's pixels tell whether it was alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from gesso.engine import Engine
from gesso.errors import RequestError
from gesso.events import Event, Progress
from gesso.pipelines.contract import Cost, Output, Pipeline, Plan
from gesso.request import GenerationRequest

SIDE = 8


@dataclass(eq=False, kw_only=True)
class Vector:
    """The state of one picture."""

    plan: Plan
    image: int
    vector: np.ndarray
    generator: np.random.Generator
    remaining: int
    total: int
    cost: Cost
    merges: bool = True

    @property
    def batch_key(self) -> Hashable:
        return (self.plan.request.width, self.remaining if self.merges else 0)

    @property
    def name(self) -> tuple[str, int, int]:
        """Prompt, image, and how many steps are done."""
        return (self.plan.request.prompt, self.image, self.total - self.remaining)


@dataclass(eq=False, kw_only=True)
class NumericPipeline:
    """See the top of the file.

    Every step of a picture costs ``flops``. ``gate`` holds every step until the test releases it; ``on_step`` is called
    first in every step and may raise.
    """

    steps: int = 4
    flops: float = 1.0
    company_noise: float = 0.0
    level: bool = True
    gate: threading.Semaphore | None = None
    on_step: Callable[[Sequence[Vector]], None] | None = None
    digest: str = "sha256:numeric"
    dtype: str = "float64"
    encoded: list[list[str]] = field(default_factory=list)
    batches: list[list[tuple[str, int, int]]] = field(default_factory=list)
    decoded: list[list[tuple[str, int]]] = field(default_factory=list)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def plan(self, request: GenerationRequest) -> Plan:
        if request.width is not None and request.width % SIDE:
            raise RequestError("width", request.width, f"a multiple of {SIDE}")
        filled = request.model_copy(update={"width": request.width or SIDE, "height": SIDE, "guidance": 1.0})
        return Plan(
            request=filled,
            steps=self.steps,
            cost=Cost(flops=self.steps * self.flops, bytes=float(self.steps)),
            peak_bytes=4096,
            warnings=("numbers only",),
        )

    def encode(self, plans: Sequence[Plan]) -> list[np.ndarray]:
        self.encoded.append([plan.request.prompt for plan in plans])
        return [self._embed(plan.request.prompt) for plan in plans]

    def _embed(self, prompt: str) -> np.ndarray:
        return np.random.default_rng(list(prompt.encode())).standard_normal(3)

    def begin(self, plan: Plan, conditioning: np.ndarray, image: int) -> Vector:
        seed = plan.request.seed
        assert seed is not None
        return Vector(
            plan=plan,
            image=image,
            vector=conditioning.copy(),
            generator=np.random.default_rng(seed + image),
            remaining=self.steps,
            total=self.steps,
            cost=Cost(flops=self.flops, bytes=1.0),
            merges=self.level,
        )

    def step(self, states: Sequence[Vector]) -> None:
        assert len({state.batch_key for state in states}) == 1
        self.batches.append([state.name for state in states])
        self.entered.release()
        if self.gate is not None:
            assert self.gate.acquire(timeout=10)
        if self.on_step is not None:
            self.on_step(states)
        for state in states:
            noise = state.generator.standard_normal(state.vector.shape)
            state.vector = np.tanh(state.vector + 0.5 * noise) + self.company_noise * (len(states) - 1)
            state.remaining -= 1

    def preview(self, state: Vector) -> Image.Image:
        return self._paint(state)

    def decode(self, states: Sequence[Vector]) -> Iterator[Output]:
        assert all(state.remaining == 0 for state in states)
        self.decoded.append([(state.plan.request.prompt, state.image) for state in states])
        for state in states:
            seed = state.plan.request.seed
            assert seed is not None
            yield Output(image=self._paint(state), seed=seed + state.image)

    def _paint(self, state: Vector) -> Image.Image:
        colour = np.clip((state.vector + 1) * 127.5, 0, 255).astype(np.uint8)
        pixels = np.broadcast_to(colour, (SIDE, state.plan.request.width or SIDE, 3))
        return Image.fromarray(np.ascontiguousarray(pixels))

    def wait_for_steps(self, count: int = 1) -> None:
        """Wait until so many more steps have been entered."""
        for _ in range(count):
            assert self.entered.acquire(timeout=10)


def engine_of(*pipelines: Pipeline, policy: str = "fair", max_batch: int = 16, preview_every: int = 0) -> Engine:
    """An engine that knows these pipelines as models ``0``, ``1``, …"""

    def load(name: str, device: str, dtype: str | None) -> Pipeline:
        if not name.isdecimal() or int(name) >= len(pipelines):
            raise RequestError("model", name, "a model of this test")
        return pipelines[int(name)]

    return Engine(device="cpu", policy=policy, max_batch=max_batch, preview_every=preview_every, load=load)


def ask(prompt: str, *, seed: int = 7, num_images: int = 1, model: str = "0", **fields: object) -> GenerationRequest:
    """A request to one of these models."""
    return GenerationRequest.model_validate(
        {"prompt": prompt, "seed": seed, "num_images": num_images, "model": model, **fields}
    )


def steps_of(events: Sequence[Event]) -> list[tuple[int, int]]:
    """(image, step) of every step that these events tell of."""
    return [(event.image, event.step) for event in events if isinstance(event, Progress) and event.stage == "step"]
