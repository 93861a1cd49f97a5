"""Taylor forecasts of a feature from what it was at earlier steps: pure functions of tensors, and nothing that is kept.

A `Ladder` is a feature at its newest full step (order 0) and its finite-difference derivatives by the number of the
step (orders 1 to 3). Source: TaylorSeer, arXiv:2503.06923, section 3.2, which is written for equal gaps. Where gaps are
unequal (warm-up, masks, adaptive policies) an order is by default the true derivative of the polynomial through the
newest points; the published code divides by the newest gap alone, which `spacing="last_gap"` repeats. With equal gaps
both are the same.
Not here: smoothing (`predictor_smoothing`), where a ladder lives (`store`), when a step is full (`policy`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

LARGEST_ORDER = 3
_SINGLE = 4  # bytes of a number in single precision


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """Filtering features before differences are taken. Source: the smoothing branch of Cache4Diffusion.

    `exponential` is S = alpha x + (1 - alpha) S_before; `moving_average` is the mean of the newest two. `hybrid`
    filters order 2 and above only. `form`: `filter` is what these words say; `documented` is what the published text
    says (a window of three cached entries, whose older two are filtered already); `as_run` is what the published code
    does, with its defects.
    """

    method: Literal["exponential", "moving_average"] = "exponential"
    alpha: float = 0.8
    hybrid: bool = False
    form: Literal["filter", "documented", "as_run"] = "filter"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How ladders grow and are read.

    Ladders keep order 0 alone before step `since`. `expansion`: `taylor` sums d_k x^k / k!; `newton` reads the same
    orders as the polynomial through the newest points.
    """

    order: int = 1
    since: int = 0
    spacing: Literal["exact", "last_gap"] = "exact"
    expansion: Literal["taylor", "newton"] = "taylor"
    smoothing: Smoothing | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.order <= LARGEST_ORDER:
            raise ValueError(f"order {self.order} is not 0 to {LARGEST_ORDER}")


@dataclass(frozen=True)
class Ladder:
    """Orders 0 and up, of the feature's shape; `steps` are the full steps they were made of, newest first.

    `older` are raw features of the steps before, which some ways of smoothing need.
    """

    steps: tuple[int, ...]
    factors: tuple[Tensor, ...]
    older: tuple[Tensor, ...] = field(default=())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.factors, *self.older)


def extend(ladder: Ladder | None, feature: Tensor, step: int, rule: Rule) -> Ladder:
    """The ladder after a full step with this feature. Begins anew where `step` is not after the ladder's newest."""
    if ladder is not None and step <= ladder.steps[0]:
        ladder = None
    if rule.smoothing is not None:
        from gesso.caching.predictor_smoothing import extend_smoothed

        return extend_smoothed(ladder, feature, step, rule, rule.smoothing)
    return Ladder(*differences(ladder, feature, step, rule))


def differences(
    ladder: Ladder | None, feature: Tensor, step: int, rule: Rule, order: int | None = None
) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    """Steps and orders of the ladder that `feature` extends, up to `order` (the rule's own if not given)."""
    factors = [feature]
    if ladder is None or step < rule.since:
        return (step,), (feature,)
    for lower, old in enumerate(ladder.factors[: rule.order if order is None else order]):
        factors.append((factors[lower] - old.to(feature)).div_(gap(ladder, step, lower, rule)))
    return (step, *ladder.steps)[: len(factors)], tuple(factors)


def gap(ladder: Ladder, step: int, lower: int, rule: Rule) -> float:
    """What the difference of two derivatives of order `lower` is divided by.

    The k-th derivative of the polynomial through k + 1 points is k! times their divided difference; the points of order
    `lower + 1` span from `step` back to the ladder's entry number `lower`.
    """
    if rule.spacing == "last_gap":
        return step - ladder.steps[0]
    return (step - ladder.steps[lower]) / (lower + 1)


def predict(ladder: Ladder, step: int, rule: Rule, order: int | None = None) -> Tensor:
    """The feature at `step`, a new tensor, from orders up to `order` (all if not given)."""
    factors = ladder.factors[: None if order is None else order + 1]
    if len(factors) == 1:
        return factors[0].clone()
    result = factors[0]
    for power, factor in enumerate(factors[1:], start=1):
        reach, share = _reach(ladder, step, power, rule), 1 / math.factorial(power)
        if factor.dtype.itemsize >= _SINGLE:
            add = result.add if power == 1 else result.add_  # order 0 is the ladder's
            result = add(factor, alpha=reach * share)
        else:  # rounded after each product, which makes the published code's bits
            result = result + (factor if power == 1 else factor * share) * reach
    return result


def _reach(ladder: Ladder, step: int, power: int, rule: Rule) -> int:
    """What derivative number `power` is multiplied by, times the factorial."""
    if rule.expansion == "taylor":
        return (step - ladder.steps[0]) ** power
    return math.prod(step - node for node in ladder.steps[:power])
