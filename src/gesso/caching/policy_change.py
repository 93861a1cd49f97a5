"""Policies that look at the first block: a step is full where its residual has changed enough.

`first_block` compares with the last full step (ParaAttention's first-block cache, diffusers' `FirstBlockCacheConfig`);
`accumulated` adds up the changes from step to step (TeaCache, arXiv:2411.19108). What is forecast is the residual of
the blocks after.
Not here: where the residual is taken (`sites`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gesso.cache_settings import CacheSettings
from gesso.caching.policy import Action, Decision
from gesso.caching.policy_interval import Kind


def relative_change(new: Tensor, old: Tensor) -> float:
    """Mean absolute difference over the mean absolute value of the old."""
    return float((new.float() - old.float()).abs().mean() / old.float().abs().mean().clamp_min(1e-12))


@dataclass
class ChangeCourse:
    """Full where it must be, and where the change since then passes `threshold`; else the tail is forecast."""

    must: list[bool]
    threshold: float
    max_skips: int
    accumulates: bool
    skips: int = 0
    total: float = 0.0

    @classmethod
    def of(cls, settings: CacheSettings, kinds: list[Kind]) -> ChangeCourse:
        assert settings.threshold is not None and settings.max_skips is not None
        must = [kind is Kind.FULL for kind in kinds]
        return cls(must, settings.threshold, settings.max_skips, settings.policy == "accumulated")

    def decide(self, step: int) -> Decision:
        full = self.must[step] or self.skips >= self.max_skips
        return Decision(Action.COMPUTE if full else Action.PROBE)

    def refuses(self, step: int, measured: float) -> bool:
        return (self.total + measured if self.accumulates else measured) >= self.threshold

    def settle(self, step: int, computed: bool, measured: float | None) -> None:
        self.skips = 0 if computed else self.skips + 1
        self.total = 0.0 if computed else self.total + (measured or 0.0)
