"""Step-cache goldens of decisions: which steps are full under every policy, and how many tokens a layer computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gesso.cache_settings import CacheSettings
from gesso.caching.policy_choice import Policy
from gesso.caching.policy_interval import Kind, adaptive_intervals, adaptive_steps, diffusers_full_steps, planned_steps
from gesso.caching.policy_speculation import SpeculationCourse
from gesso.caching.policy_tokens import fresh_ratio, stream_ratio
from gesso.errors import GessoError
from tests.golden.comparison import Comparison
from tests.golden.side_car import Golden, NotYetError, SideCar, view

_LAYERS = 28  # of the network whose ratios are recorded; the published code always divides by one less
_PORTS = {
    "flux": (False, 0, 0.1),
    "hunyuan_video": (True, 0, 0.1),
    "dit_sample": (False, 1, 0.01),
    "dit_ddp": (False, 1, 0.01),
}
"""SpeCa's ports: whether every forecast is checked, how far ahead the decay is, and the least threshold."""


class Interval(SideCar):
    """A schedule with an interval. `types` in letters; those of other lists are by other names."""

    steps: int
    interval: int
    first_enhance: int
    types: str
    duca: bool = False
    full_steps: tuple[int, ...] | None = None
    full_count: int | None = None


class Diffusers(SideCar):
    """As diffusers counts."""

    steps: int
    cache_interval: int
    disable_cache_before_step: int
    types: str


class Adaptive(SideCar):
    """DiT's schedule."""

    steps: int
    fresh_threshold: int
    types_in_execution_order: str
    active_interval_after_each_step: tuple[float, ...] | str = ()


class Speculation(SideCar):
    """A scripted run: the error that would be measured at every step."""

    family: str
    steps: int
    base_threshold: float
    decay_rate: float
    min_taylor_steps: int
    max_taylor_steps: int
    first_enhance: int
    errors_in_execution_order: tuple[float, ...]
    types: str
    verified: str
    thresholds: tuple[float, ...]


class Ratio(SideCar):
    """A share of fresh tokens."""

    family: str
    schedule: str
    base: float
    num_steps: int
    layer: int
    value: float
    step_index_counting_down: int | None = None
    module: str = "mlp"
    stream: str = ""


def check_decisions(golden: Golden, comparison: Comparison) -> None:
    """Every list of the side-car by its name."""
    for name, cases in golden.data.items():
        if not isinstance(cases, list) or name == "notes":
            continue
        for number, case in enumerate(cases):
            _check_decision(comparison, name, f"{name}.{number}", case)


def check_schedules(golden: Golden, comparison: Comparison) -> None:
    """DiT's adaptive schedules, and ratios of tokens."""
    for name, cases in golden.data.items():
        if not isinstance(cases, list) or name == "notes":
            continue
        for number, case in enumerate(cases):
            place = f"{name}.{number}"
            if name == "fresh_ratio":
                ratio = view(case, Ratio, f"{place}.")
                comparison.close(place, _ratio(ratio), ratio.value, 1e-9)
            elif name in ("toca_dit", "duca_dit"):
                _check_adaptive(comparison, place, view(case, Adaptive, f"{place}."), name == "duca_dit")
            else:
                raise NotYetError(f"list {name}")


def _check_decision(comparison: Comparison, name: str, place: str, case: Mapping[str, Any]) -> None:
    if name == "speca":
        _check_speculation(comparison, place, view(case, Speculation, f"{place}."))
        return
    if name.startswith("diffusers"):
        stated = view(case, Diffusers, f"{place}.")
        full = diffusers_full_steps(stated.steps, stated.cache_interval, stated.disable_cache_before_step)
        _same(comparison, place, "".join("F" if one else "T" for one in full), stated.types)
        return
    stated = view(case, Interval, f"{place}.")
    policies = {"taylorseer": "taylorseer", "taylorseer_lite": "lite", "clusca_flux": "clusca", "clusca_dit": "clusca"}
    policies |= {"toca_flux_mode": "toca", "hunyuan_toca_duca": "duca" if stated.duca else "toca"}
    if name not in policies:
        raise NotYetError(f"list {name}")
    values = {"policy": policies[name], "interval": stated.interval, "warmup": stated.first_enhance}
    try:
        settings = CacheSettings.model_validate(values).filled()
    except GessoError as error:
        raise NotYetError(str(error)) from error
    taken = "".join(planned_steps(settings, stated.steps))
    if policies[name] == "clusca":
        taken = taken.replace(Kind.TOKENS, "C")
    _same(comparison, place, taken, stated.types)
    full = tuple(step for step, kind in enumerate(taken) if kind == "F")
    if stated.full_steps is not None:
        comparison.true(f"{place}.full_steps", full == stated.full_steps, f"full steps {full}")
    if stated.full_count is not None:
        comparison.true(f"{place}.full_count", len(full) == stated.full_count, f"{len(full)} full steps")


def _check_speculation(comparison: Comparison, place: str, stated: Speculation) -> None:
    if stated.family not in _PORTS:
        raise NotYetError(f"SpeCa for {stated.family}")
    checks_all, ahead, floor = _PORTS[stated.family]
    settings = CacheSettings(
        policy="speca",
        threshold=stated.base_threshold,
        decay=stated.decay_rate,
        min_skips=stated.min_taylor_steps,
        max_skips=stated.max_taylor_steps,
        warmup=stated.first_enhance,
        floor=floor,
        original=True,
    )
    course = Policy(settings).course(stated.steps)
    assert isinstance(course, SpeculationCourse)
    course.checks_all, course.ahead = checks_all, ahead
    types, verified = "", ""
    for step, error in enumerate(stated.errors_in_execution_order):
        comparison.close(f"{place}.thresholds.{step}", course.threshold(step), stated.thresholds[step], 1e-9)
        decision = course.decide(step)
        types += "F" if decision.full else "T"
        verified += "v" if decision.check else "."
        course.settle(step, decision.full, error if decision.check else None)
    _same(comparison, place, types, stated.types)
    _same(comparison, f"{place}.verified", verified, stated.verified)


def _check_adaptive(comparison: Comparison, place: str, stated: Adaptive, alternate: bool) -> None:
    taken = "".join(adaptive_steps(stated.steps, stated.fresh_threshold, alternate=alternate))
    _same(comparison, place, taken, stated.types_in_execution_order)
    if isinstance(stated.active_interval_after_each_step, tuple):
        found = tuple(adaptive_intervals(stated.steps, stated.fresh_threshold))
        same = found == stated.active_interval_after_each_step
        comparison.true(f"{place}.intervals", same, f"intervals {found}")


def _ratio(ratio: Ratio) -> float:
    if ratio.family == "flux_hunyuan":
        return stream_ratio(ratio.base, ratio.layer, single=ratio.stream.startswith("single"))
    if ratio.step_index_counting_down is None:
        raise NotYetError(f"ratios of {ratio.family}")
    return fresh_ratio(
        ratio.schedule,  # pyright: ignore[reportArgumentType]
        ratio.base,
        remaining=ratio.step_index_counting_down / ratio.num_steps,
        depth=ratio.layer / (_LAYERS - 1),
        attention=ratio.module == "attn",
    )


def _same(comparison: Comparison, place: str, taken: str, stated: str) -> None:
    comparison.true(place, taken == stated, f"{taken} where {stated} was recorded")
