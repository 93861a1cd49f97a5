"""A pipeline around another: the same verbs, each announced to a test, which may count, wait or raise.

Here too: which states are still alive, without keeping them so.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from gesso.pipelines.contract import Output, Pipeline, Plan
from gesso.request import GenerationRequest

Announce = Callable[[str, list[str]], None]


class Watched:
    """Calls ``announce(verb, prompts of those who take part)`` before each verb but ``plan``."""

    def __init__(self, pipeline: Pipeline, announce: Announce) -> None:
        self._pipeline = pipeline
        self._announce = announce
        self._begun: list[tuple[weakref.ref[Any], str]] = []

    def plan(self, request: GenerationRequest) -> Plan:
        return self._pipeline.plan(request)

    def encode(self, plans: Sequence[Plan]) -> Sequence[Any]:
        self._announce("encode", [plan.request.prompt for plan in plans])
        return self._pipeline.encode(plans)

    def begin(self, plan: Plan, conditioning: Any, image: int) -> Any:
        self._announce("begin", [plan.request.prompt])
        state = self._pipeline.begin(plan, conditioning, image)
        self._begun.append((weakref.ref(state), plan.request.prompt))
        return state

    def step(self, states: Sequence[Any]) -> None:
        self._announce("step", self._prompts(states))
        self._pipeline.step(states)

    def preview(self, state: Any) -> Image.Image | Sequence[Image.Image]:
        self._announce("preview", self._prompts([state]))
        return self._pipeline.preview(state)

    def decode(self, states: Sequence[Any]) -> Iterator[Output | None]:
        self._announce("decode", self._prompts(states))
        yield from self._pipeline.decode(states)

    def _prompts(self, states: Sequence[Any]) -> list[str]:
        return [prompt for state in states for reference, prompt in self._begun if reference() is state]

    def alive(self) -> list[str]:
        """Prompts of the states that somebody still holds."""
        if any(reference() is not None for reference, _ in self._begun):
            gc.collect()
        return [prompt for reference, prompt in self._begun if reference() is not None]
