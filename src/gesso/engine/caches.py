"""Step caches as the engine uses them: planned with the request, put onto a model's network, freed with each picture.

Here: whether a cache fits a model and what it will hold (`with_cache`, `check_room`), the caches that are on a model's
network (`Caches`), and one picture's part in one (`Cached`). Not here: what a cache does (`caching`), who steps with
whom (`groups`). PyTorch is not imported before a request has a cache.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from gesso.cache_settings import CacheSettings, spelled
from gesso.devices import CPU
from gesso.engine.accounts import Pace
from gesso.engine.device import free_bytes, release_memory
from gesso.errors import FileError, OutOfMemoryError, RequestError
from gesso.fronts import Point, expected, measured, read_points
from gesso.pipelines.contract import Pipeline, Plan
from gesso.settings import load_settings

if TYPE_CHECKING:
    from torch import nn

    from gesso.caching.attach import Attached
    from gesso.caching.policy_choice import Policy
    from gesso.request import GenerationRequest

SMALLER = ("--cache with granularity=trunk", "with offload=true", "without it")
_READABLE = ("", "sdpa", "math", "cudnn")
"""Attention kernels that go through PyTorch's own function, where scores can be read; "" is nobody's choice."""


# ---- before the first step ------------------------------------------------------------------------------------------


def with_cache(pipeline: Pipeline, plan: Plan, *, attention: str = "") -> Plan:
    """The plan with all that its request's step cache means: blanks filled, bytes, warnings.

    The pipeline may be on the meta device. `attention` is the kernel in force. Raises RequestError for a cache that
    does not fit the model, its steps, or the kernel.
    """
    request = plan.request
    if request.cache is None:
        return plan
    network = _network_of(pipeline)
    if plan.shape is None or network is None:
        hint = "only diffusion transformers have steps to forecast; leave it out"
        raise RequestError("cache", request.cache.policy, f"usable with {request.model}", hint)

    from gesso.caching.sites_layout import check

    policy = check(network, request.cache, plan.steps)
    if policy.settings.score == "attention" and attention not in _READABLE:
        hint = f"{attention} does not show its scores; take score=random or score=norm, or --attention sdpa"
        raise RequestError("cache.score", "attention", "usable with this attention", hint)
    settings = policy.settled(plan.steps)
    kept = _kept_bytes(pipeline, network, settings, plan)
    on_device = 0 if settings.offload else kept
    held = dict(plan.activations)
    weights = plan.peak_bytes - max(held.values(), default=0)
    if held:
        held["step"] = held.get("step", 0) + on_device
    return replace(
        plan,
        request=plan.request.model_copy(update={"cache": settings}),
        peak_bytes=weights + (max(held.values()) if held else on_device),
        activations=held,
        cache_bytes=kept,
        warnings=(*plan.warnings, *_warnings(pipeline, policy, plan, settings)),
    )


def computed_steps(plan: Plan) -> int:
    """Of a plan's steps those that are computed whatever happens; all of them where it has no cache."""
    if plan.request.cache is None:
        return plan.steps

    from gesso.caching.policy_choice import Policy

    return Policy(plan.request.cache).full_steps(plan.steps)


def check_room(plan: Plan, device: str, caches: Caches) -> None:
    """Raise OutOfMemoryError where what a plan's cache keeps does not fit, even when other pictures' is given up."""
    cache = plan.request.cache
    if cache is None:
        return
    place = CPU if cache.offload else device
    free = free_bytes(place)
    if free is not None and plan.cache_bytes > free + caches.held_bytes:
        release_memory()  # what earlier pictures left may not be given back yet
        free = free_bytes(place)
    if free is not None and plan.cache_bytes > free + caches.held_bytes:
        raise OutOfMemoryError(plan.cache_bytes, free, SMALLER)


def _kept_bytes(pipeline: Pipeline, network: nn.Module, settings: CacheSettings, plan: Plan) -> int:
    import torch

    from gesso.caching.memory import expected_bytes

    shape = plan.shape
    assert shape is not None
    return expected_bytes(
        network,
        settings,
        image_tokens=shape.image_tokens,
        text_tokens=shape.text_tokens,
        output=shape.output,
        branches=shape.branches,
        dtype=getattr(pipeline, "dtype", torch.float32),
    )


def _warnings(pipeline: Pipeline, policy: Policy, plan: Plan, settings: CacheSettings) -> Iterator[str]:
    """Of a cache that does nothing, of one that harms more than it saves, and of one of which nobody knows either."""
    full, name = policy.full_steps(plan.steps), plan.request.model
    if full == plan.steps:
        yield f"cache has no effect: all {plan.steps} steps are computed; take more steps, or a smaller warmup"
    elif getattr(getattr(pipeline, "defaults", None), "distilled", False):
        forecast = plan.steps - full
        yield (
            f"{name} is distilled to few steps, too far apart to be forecast from one another: the cache leaves out at "
            f"most {forecast} of {plan.steps}, and the picture loses what these would have drawn; better without it"
        )
    elif policy.adapts and not measured(_points(pipeline, name), settings, plan.steps):
        asked = spelled(plan.request.cache or settings)
        yield (
            f"what {asked} saves and costs on {name} at {plan.steps} steps was not measured; first: "
            f"gesso calibrate {name} --steps {plan.steps} --cache {asked}"
        )


def _network_of(pipeline: Pipeline) -> nn.Module | None:
    """The network that a pipeline calls at every step, by the name under which the engine knows it."""
    return getattr(pipeline, "transformer", None)


# ---- while pictures are painted -------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Shared:
    """A cache on a network, the pictures that are painted with it, and what was measured of it and others.

    `full` and `forecast` are how long steps of either kind took lately, in the company that they had.
    """

    attached: Attached
    points: list[Point]
    pictures: set[Cached] = field(default_factory=set)
    full: Pace = field(default_factory=Pace)
    forecast: Pace = field(default_factory=Pace)

    @property
    def share(self) -> float:
        """What a forecast step takes of a full one; 1 before both were seen."""
        full, forecast = self.full.of(1, 1), self.forecast.of(1, 1)
        return min(forecast / full, 1.0) if full and forecast is not None else 1.0

    def outlook(self, step: int, of: int) -> float:
        """What a picture's steps from this one on will take, as a share of as many full ones; at most, where open."""
        policy, left = self.attached.policy, of - step
        if not left or policy.adapts:
            return 1.0
        forecast = left - policy.full_steps(of, since=step)
        return 1 - (1 - self.share) * forecast / left


class Caches:
    """The step caches on one model's network, one for each way in which requests want it.

    One that nobody uses stays until another is wanted, so that requests that are alike find it there.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._shared: dict[CacheSettings, _Shared] = {}

    def begin(self, plan: Plan) -> Cached | None:
        """A picture's part in the cache that its plan wants; None where it wants none."""
        settings = plan.request.cache
        if settings is None:
            return None
        if settings not in self._shared:
            from gesso.caching.attach import attach

            self._detach_idle()
            network = _network_of(self._pipeline)
            assert network is not None and plan.shape is not None
            points = _points(self._pipeline, plan.request.model)
            self._shared[settings] = _Shared(attach(network, settings), points)
        assert plan.shape is not None
        return Cached(self._shared[settings], plan.request, plan.shape.grid)

    def outlook(self, plan: Plan) -> float:
        """What a picture of this plan, not yet begun, will take of one without a cache; 1 before its cache was seen."""
        settings = plan.request.cache
        shared = None if settings is None else self._shared.get(settings)
        return 1.0 if shared is None else shared.outlook(0, plan.steps)

    def detach(self) -> None:
        """Take everything off: the network is as it was."""
        for shared in self._shared.values():
            shared.attached.detach()
        self._shared.clear()

    @property
    def held_bytes(self) -> int:
        """What is kept for all pictures under way."""
        return sum(shared.attached.store.bytes() for shared in self._shared.values())

    def _detach_idle(self) -> None:
        for settings, shared in list(self._shared.items()):
            if not shared.pictures:
                shared.attached.detach()
                del self._shared[settings]


def _points(pipeline: Pipeline, model: str) -> list[Point]:
    """What was measured of this model's caches; nothing where the list is broken, which a picture can do without."""
    try:
        return read_points(load_settings().home, model, str(getattr(pipeline, "digest", "")))
    except FileError:
        return []


class Cached:
    """One picture's part in a step cache; it is what the picture's features are known by.

    Attributes:
        record: what its steps came to, for the picture's metadata; there once it has ended.
    """

    def __init__(self, shared: _Shared, request: GenerationRequest, grid: tuple[int, int]) -> None:
        self._shared, self._request, self._grid = shared, request, grid
        self.record: dict[str, object] = {}
        shared.pictures.add(self)

    def decision(self, step: int, of: int) -> Hashable:
        """What the step will do. Pictures may share it whose decisions are equal."""
        attached = self.attached
        decision = attached.begin_step(self, step, of, grid=self._grid)
        # What shares a call is computed together: a branch that begins late must not do that to another's forecast.
        begun = () if decision.full else attached.store.branches(self)
        return id(attached), decision, begun

    def charged(self, flops: int, seconds: float) -> int:
        """Of a step's FLOPs those that it is charged, once it is done: for a forecast the share that it took."""
        full = self.attached.taken(self).endswith("F")
        (self._shared.full if full else self._shared.forecast).saw(seconds, flops)
        return flops if full else round(flops * self._shared.share)

    def outlook(self, step: int, of: int) -> float:
        """What the steps from this one on will take, as a share of as many full ones; at most, where that is open."""
        return self._shared.outlook(step, of)

    def end(self) -> None:
        """Free all that is kept for it. Nothing happens the second time."""
        if self not in self._shared.pictures:
            return
        attached = self.attached
        if self in attached.runs:
            taken, errors = attached.taken(self), attached.measured(self)
            drift = expected(self._shared.points, self._request, len(taken))
            self.record = {
                "steps": taken,
                "computed": taken.count("F"),
                "forecast": taken.count("T"),
                "bytes": attached.store.bytes(self),
                **({"measured": {str(step): round(value, 6) for step, value in errors.items()}} if errors else {}),
                **({"expected": drift} if drift is not None else {}),
            }
        attached.free(self)
        self._shared.pictures.discard(self)

    @property
    def attached(self) -> Attached:
        """The cache on the network."""
        return self._shared.attached


@contextmanager
def calling(company: Sequence[Cached | None]) -> Iterator[None]:
    """While it lasts, the network is evaluated for these pictures, all of one cache and decision, or all without."""
    cached = [one for one in company if one is not None]
    if not cached:
        yield
        return
    with cached[0].attached.call(cached):
        yield
