"""Step-cache goldens of pure arithmetic: Taylor ladders, plain and smoothed. Schedules: `step_cache_schedules`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from gesso.caching.predictor import Rule, Smoothing, extend, predict
from tests.golden.comparison import Comparison
from tests.golden.side_car import BrokenGoldenError, Golden, NotYetError, SideCar

_DEFAULT = 1e-6


class Schedule(SideCar):
    """Which steps are full."""

    full: tuple[int, ...]
    first_enhance: int
    steps: int


class SmoothingCase(SideCar):
    """A way of smoothing."""

    use_hybrid_smoothing: bool = False
    smoothing_method: str = "exponential"
    smoothing_alpha: float = 0.8
    window: int = 2


class MathSideCar(SideCar):
    """Ladders of every order over every schedule."""

    variant: str
    schedules: Mapping[str, Schedule]
    orders: tuple[int, ...]
    cases: Mapping[str, SmoothingCase] | None = None


def check_taylor_math(golden: Golden, comparison: Comparison) -> None:
    """Orders after every full step and forecasts at every other, as far as they are recorded."""
    side_car = golden.view(MathSideCar)
    if side_car.cases is None:
        for name, schedule in side_car.schedules.items():
            for order in side_car.orders:
                rule = _rule(side_car.variant, schedule, order, None)
                _check(golden, comparison, f"{name}/O{order}", schedule, rule)
        return
    for case_name, case in side_car.cases.items():
        for name, schedule in side_car.schedules.items():
            for order in side_car.orders:
                rule = _rule(side_car.variant, schedule, order, case)
                _check(golden, comparison, f"{case_name}/{name}/O{order}", schedule, rule)


def smoothing_of(method: str, alpha: float, hybrid: bool, form: str) -> Smoothing:
    """The product's smoothing by the side-car's words."""
    if method not in ("exponential", "moving_average"):
        raise NotYetError(f"smoothing_method {method}")
    if form not in ("as_run", "documented"):
        raise NotYetError(f"smoothing as {form}")
    return Smoothing(method=method, alpha=alpha, hybrid=hybrid, form=form)  # pyright: ignore[reportArgumentType]


def _rule(variant: str, schedule: Schedule, order: int, case: SmoothingCase | None) -> Rule:
    """The reference divides by the last gap; its smoothing branch has no guard."""
    words = re.split(r"[^a-z_]+", variant.lower())
    smoothing = None
    if case is not None:
        if case.window != 2 and case.smoothing_method == "moving_average":
            raise NotYetError(f"a moving average over {case.window}")
        form = "as_run" if "as_run" in words else "documented"
        smoothing = smoothing_of(case.smoothing_method, case.smoothing_alpha, case.use_hybrid_smoothing, form)
    elif words[0] not in ("guarded", "unguarded"):
        raise NotYetError(f"variant {variant}")
    return Rule(
        order=order,
        since=schedule.first_enhance - 1 if words[0] == "guarded" else 0,
        spacing="last_gap",
        smoothing=smoothing,
    )


def _check(golden: Golden, comparison: Comparison, prefix: str, schedule: Schedule, rule: Rule) -> None:
    features = golden.tensor("features")
    recorded = {name: value for name, value in golden.tensors.items() if name.startswith(f"{prefix}/")}
    if not recorded:  # not every order is recorded of every case
        return
    if schedule.steps > len(features):
        raise BrokenGoldenError(f"{schedule.steps} steps, but {len(features)} features")
    atol = golden.tolerances.get("atol", default=_DEFAULT)
    ladder = None
    for step in range(schedule.steps):
        if step in schedule.full:
            ladder = extend(ladder, features[step], step, rule)
            _check_factors(comparison, f"{prefix}/factors/{step:02}/", recorded, ladder.factors, atol)
        elif ladder is not None and f"{prefix}/pred/{step:02}" in recorded:
            name = f"{prefix}/pred/{step:02}"
            comparison.close(name, predict(ladder, step, rule), recorded[name], atol)


def _check_factors(
    comparison: Comparison, prefix: str, recorded: Mapping[str, Tensor], factors: tuple[Tensor, ...], atol: float
) -> None:
    """Exactly the recorded orders, and their values. Where nothing of a step is recorded, nothing is compared."""
    orders = sorted(int(name.removeprefix(prefix)) for name in recorded if name.startswith(prefix))
    if not orders:
        return
    held = list(range(len(factors)))
    comparison.true(f"{prefix}orders", orders == held, f"orders {held} where {orders} were recorded")
    for order in set(orders) & set(held):
        comparison.close(f"{prefix}{order}", factors[order], recorded[f"{prefix}{order}"], atol)
