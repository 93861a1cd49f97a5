"""SpeCa (arXiv:2509.11628): forecast, check one module against the truth, and compute where the error is too large.

A forecast is checked once enough have been taken in a row; one that is refused is computed in full, the same step. The
published code keeps the refused forecast and computes the next step instead, takes one forecast unconditionally after
every full step (so that a warm-up of three is full at steps 0 and 2 only), and measures relative errors element by
element, which explodes near zero; `original` repeats that.
Not here: which module is checked (`placement`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gesso.cache_settings import CacheSettings, MetricName
from gesso.caching.policy import Action, Decision
from gesso.caching.policy_interval import Kind


def error_of(forecast: Tensor, truth: Tensor, metric: MetricName, eps: float = 1e-10) -> float:
    """How far a forecast `[B,...]` is from the truth.

    `l1` and `l2` (root mean square) as they are; `relative_…` over the same of the truth; `elementwise_…` with every
    difference over its own true value plus `eps`, as published; `cosine` is one less the mean cosine of the samples.
    """
    forecast, truth = forecast.float(), truth.float()
    difference = (forecast - truth).abs()
    match metric:
        case "l1":
            error = difference.mean()
        case "l2":
            error = difference.square().mean().sqrt()
        case "relative_l1":
            error = difference.mean() / truth.abs().mean().clamp_min(eps)
        case "relative_l2":
            error = difference.square().mean().sqrt() / truth.square().mean().sqrt().clamp_min(eps)
        case "elementwise_l1":
            error = (difference / (truth.abs() + eps)).mean()
        case "elementwise_l2":
            error = (difference / (truth.abs() + eps)).square().mean().sqrt()
        case "cosine":
            error = 1 - torch.cosine_similarity(forecast.flatten(1), truth.flatten(1)).mean()
    return float(error)


@dataclass(kw_only=True)
class SpeculationCourse:
    """The threshold decays from `base` to `base * decay` over the run, and never below `floor`.

    Two habits of the published ports: HunyuanVideo's checks every forecast (`checks_all`) though early errors are of no
    use, and DiT's, which counts steps down, is one step further in its decay (`ahead`).
    """

    must: list[bool]
    base: float
    decay: float
    floor: float
    min_skips: int
    max_skips: int
    original: bool = False
    checks_all: bool = False
    ahead: int = 0
    skips: int = 0
    error: float | None = None

    @classmethod
    def of(cls, settings: CacheSettings, kinds: list[Kind]) -> SpeculationCourse:
        assert settings.threshold is not None and settings.decay is not None and settings.floor is not None
        assert settings.min_skips is not None and settings.max_skips is not None
        return cls(
            must=[kind is Kind.FULL for kind in kinds],
            base=settings.threshold,
            decay=settings.decay,
            floor=settings.floor,
            min_skips=settings.min_skips,
            max_skips=settings.max_skips,
            original=settings.original,
        )

    def threshold(self, step: int) -> float:
        return max(self.base * self.decay ** ((step + self.ahead) / len(self.must)), self.floor)

    def decide(self, step: int) -> Decision:
        if self._full(step):
            return Decision(Action.COMPUTE)
        return Decision(Action.FORECAST, check=self.checks_all or self.skips >= self.min_skips)

    def _full(self, step: int) -> bool:
        if not self.original:
            return self.must[step] or self.skips >= self.max_skips
        if self.skips == 0:  # the step after a full one is never full, whatever the warm-up says
            return step == 0
        late = self.skips >= self.max_skips
        failed = self.skips >= self.min_skips and self.error is not None and self.error > self.threshold(step)
        return self.must[step] or late or failed

    def refuses(self, step: int, measured: float) -> bool:
        return not self.original and measured > self.threshold(step)

    def settle(self, step: int, computed: bool, measured: float | None) -> None:
        self.skips = 0 if computed else self.skips + 1
        if computed or self.skips == 1:
            self.error = None
        if measured is not None and not computed:
            self.error = measured
