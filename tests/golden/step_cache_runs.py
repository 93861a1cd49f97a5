"""Step-cache goldens of whole runs: an attached cache makes the reference's outputs, decisions and ladders."""

from __future__ import annotations

from typing import Any

import torch

from gesso.cache_settings import CacheSettings
from gesso.caching.attach import Attached, attach
from gesso.caching.policy_speculation import SpeculationCourse
from gesso.errors import RequestError
from tests.golden.comparison import Comparison
from tests.golden.side_car import BrokenGoldenError, Golden, NotYetError, SideCar
from tests.golden.step_cache_networks import subject_of

_DEFAULT = 2e-5
_ERROR = 0.02  # of a measured error: it divides by values near zero, so that rounding shows in its third digit
_MODULES = {
    "img_attn": ("attn:0",),
    "txt_attn": ("attn:1",),
    "img_mlp": ("ff", "img_mlp"),
    "txt_mlp": ("ff_context", "txt_mlp"),
    "attn": ("attention",),
    "mlp": ("feed_forward",),
}
_LISTS = {"double_stream": ("transformer_blocks", "layers"), "single_stream": ("single_transformer_blocks",)}
_METRICS = {"relative_l1": "elementwise_l1", "relative_l2": "elementwise_l2", "all": "elementwise_l1"} | {
    "l1": "l1",
    "l2": "l2",
    "cosine_similarity": "cosine",
}


class RunSideCar(SideCar):
    """A whole run. `params` are in the reference's words."""

    method: str
    steps: int
    params: dict[str, Any]
    types: tuple[str, ...]
    activated_steps: tuple[int, ...] | None = None
    verified: tuple[bool, ...] | None = None
    errors: tuple[float | None, ...] | None = None
    thresholds: tuple[float, ...] | None = None


def check_run(golden: Golden, comparison: Comparison) -> None:
    """Outputs at every step, with the cache and without, and what is kept after the last."""
    side_car = golden.view(RunSideCar)
    settings = settings_of(side_car.method, side_car.params)
    subject = subject_of(golden)
    plain = subject(0)
    attached = attach(subject.network, settings)
    runs = [str(number) for number in range(subject.runs)]
    atol = golden.tolerances.get("atol", default=_DEFAULT)
    checked: list[bool] = []
    for step in range(side_car.steps):
        decisions = [attached.begin_step(run, step, side_car.steps) for run in runs]
        checked.append(decisions[0].check)
        with attached.call(runs):
            output = subject(step)
        comparison.close(f"out/{step:02}", output, golden.tensor(f"out/{step:02}"), atol)
        if f"full/{step:02}" in golden.tensors:
            comparison.close(f"full/{step:02}", subject(step), golden.tensor(f"full/{step:02}"), atol)
    _check_decisions(side_car, comparison, attached, runs, checked)
    _check_factors(golden, comparison, attached, runs[0], atol)
    attached.detach()
    left = [name for name, module in subject.network.named_modules() if hasattr(module, "_diffusers_hook")]
    comparison.true("detached", not left and torch.equal(subject(0), plain), f"hooks left at {left[:3]}")


def settings_of(method: str, params: dict[str, Any]) -> CacheSettings:
    """The product's settings by the reference's words, as the reference runs."""
    values: dict[str, Any] = {"original": True, "order": params.get("max_order"), "warmup": params.get("first_enhance")}
    match method:
        case "TaylorSeer" | "TaylorSeer+smoothing":
            values |= {"policy": "taylorseer", "interval": params.get("interval"), "granularity": "module"}
            if params.get("use_smoothing"):
                values |= {"smoothing": params.get("smoothing_method"), "alpha": params.get("smoothing_alpha", 0.8)}
                values |= {"hybrid": bool(params.get("use_hybrid_smoothing"))}
        case "TaylorSeer-Lite":
            values |= {"policy": "lite", "interval": params.get("interval")}
        case "SpeCa":
            metric = str(params.get("error_metric", "relative_l1"))
            if metric not in _METRICS:
                raise NotYetError(f"error_metric {metric}")
            values |= {"policy": "speca", "metric": _METRICS[metric], "floor": params.get("threshold_floor", 0.1)}
            values |= {"threshold": params.get("base_threshold"), "decay": params.get("decay_rate")}
            values |= {"min_skips": params.get("min_taylor_steps"), "max_skips": params.get("max_taylor_steps")}
        case _:
            raise NotYetError(f"method {method}")
    try:
        return CacheSettings.model_validate(values)
    except RequestError as error:
        raise NotYetError(str(error)) from error


def _check_decisions(
    side_car: RunSideCar, comparison: Comparison, attached: Attached, runs: list[str], checked: list[bool]
) -> None:
    stated = "".join("F" if kind == "full" else "T" for kind in side_car.types)
    for run in runs:
        taken = attached.taken(run)
        comparison.true("types", taken == stated, f"{taken} where {stated} was recorded")
    if side_car.activated_steps is not None:
        full = tuple(step for step, kind in enumerate(attached.taken(runs[0])) if kind == "F")
        comparison.true("activated_steps", full == side_car.activated_steps, f"full steps {full}")
    if side_car.verified is not None:
        comparison.true("verified", tuple(checked) == side_car.verified, f"checked at {checked}")
    measured = attached.measured(runs[0])
    for step, error in enumerate(side_car.errors or ()):
        if error is not None:
            comparison.close(f"errors.{step}", measured.get(step, float("nan")), error, _ERROR * max(abs(error), 1))
    if side_car.thresholds is not None:
        course = attached.policy.course(side_car.steps)
        assert isinstance(course, SpeculationCourse)
        for step, threshold in enumerate(side_car.thresholds):
            comparison.close(f"thresholds.{step}", course.threshold(step), threshold, 1e-9)


def _check_factors(golden: Golden, comparison: Comparison, attached: Attached, run: str, atol: float) -> None:
    """Ladders after the last step, by the reference's names; of several packed samples, which are joined again."""
    for name, recorded in golden.tensors.items():
        if not name.startswith("factors_end/"):
            continue
        *place, order = name.removeprefix("factors_end/").split("/")
        held = [attached.store.ladder(run, "prompt", site).factors for site in _sites(attached, run, place)]
        if not held or any(int(order) >= len(factors) for factors in held):
            raise BrokenGoldenError(f"nothing is kept for tensor '{name}'")
        tensors = [factors[int(order)] for factors in held]
        comparison.close(name, tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1), recorded, atol)


def _sites(attached: Attached, run: str, place: list[str]) -> list[str]:
    """Our sites for `<stream>/<layer>/<module>`, or the trunk where there is no place; several are outputs of one."""
    if not place:
        return ["trunk"]
    stream, layer, module = place
    known = attached.store.sites(run, "prompt")
    blocks = [f"{name}.{layer}" for name in _LISTS.get(stream, (stream,))]
    if module == "total":
        found = [f"{block}.proj_out" for block in blocks] + [f"{block}:{n}" for block in blocks for n in range(2)]
    else:
        found = [f"{block}.{leaf}" for block in blocks for leaf in _MODULES.get(module, (module,))]
    return [site for site in found if site in known]
