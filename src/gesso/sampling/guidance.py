"""Classifier-free guidance (arXiv:2207.12598) as arithmetic, and the name of the branch that is being evaluated.

A pipeline names the branch around each call of its network; whoever is attached to the network (step caches) reads it.
Not here: which rows are guided, and when (pipelines).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

PROMPT = "prompt"
NEGATIVE = "negative"

_RUNNING: ContextVar[str | tuple[tuple[int, str], ...]] = ContextVar("guidance_branch", default=PROMPT)


@contextmanager
def branch(name: str) -> Iterator[None]:
    """While it lasts, calls of the network evaluate this branch of all states that step together, in their order."""
    token = _RUNNING.set(name)
    try:
        yield
    finally:
        _RUNNING.reset(token)


@contextmanager
def branches(samples: Sequence[tuple[int, str]]) -> Iterator[None]:
    """While it lasts, each sample of a call is of this state (by its place among those that step) and this branch."""
    token = _RUNNING.set(tuple(samples))
    try:
        yield
    finally:
        _RUNNING.reset(token)


def running_samples(states: int) -> tuple[tuple[int, str], ...]:
    """State and branch of each sample of the call that is being made for so many states."""
    running = _RUNNING.get()
    return tuple((index, running) for index in range(states)) if isinstance(running, str) else running


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """scale*conditional + (1-scale)*unconditional: 1 is no guidance, more pulls away from the unconditional."""
    return scale * conditional + (1 - scale) * unconditional


def guide_keeping_length(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """negative + scale*(positive - negative), every vector of the last axis as long as the positive's own.

    Source: what diffusers' `QwenImagePipeline` makes of two evaluations, in the same order of operations.
    """
    guided = negative + scale * (positive - negative)
    wanted = torch.linalg.vector_norm(positive, dim=-1, keepdim=True)
    return guided * (wanted / torch.linalg.vector_norm(guided, dim=-1, keepdim=True))
