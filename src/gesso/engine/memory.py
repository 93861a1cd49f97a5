"""Memory before work: what a request needs in each memory mode, what is free, and which mode is taken.

Predictions are those of `weights/footprint` for what the plan says that its stages hold; they are taken to be right
within a tenth. Automatic choice never changes a picture: it takes the fastest mode that fits and paints the same bits.
Not here: how a mode is put into force (`weights/placing`), what happens when memory runs out all the same (`fleet`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from gesso.devices import CPU, CUDA, kind_of
from gesso.engine.device import free_bytes
from gesso.errors import OutOfMemoryError
from gesso.memory_modes import AUTO, EXACT, FULL, SHOWN, MemoryMode, parse_mode
from gesso.pipelines.contract import Pipeline, Plan

if TYPE_CHECKING:
    from gesso.request import GenerationRequest
    from gesso.weights.footprint import Footprint

UNCERTAINTY = 0.1
SMALLER = "a smaller width and height"
_SMALL = 1 << 28  # bytes of files: models up to this size are not worth planning for

_ASKING: ContextVar[GenerationRequest | None] = ContextVar("gesso_asking", default=None)


@contextmanager
def loading_for(request: GenerationRequest) -> Iterator[None]:
    """Within it, a model is loaded for this request, whose needs decide the memory mode."""
    token = _ASKING.set(request)
    try:
        yield
    finally:
        _ASKING.reset(token)


def asking() -> GenerationRequest | None:
    """The request that a model is loaded for now."""
    return _ASKING.get()


def is_small(size: int) -> bool:
    """Whether a model whose files have so many bytes is loaded as it is, without looking at what is free."""
    return size <= _SMALL


def peaks(pipeline: Pipeline, plan: Plan, wanted: str = AUTO) -> dict[MemoryMode, int]:
    """The most memory on the device for one picture of the plan, by mode, the wanted one among them if it is any.

    {} for a pipeline that was not loaded.
    """
    if _footprint(pipeline) is None:
        return {}
    modes = SHOWN if wanted == AUTO else (*SHOWN, parse_mode(wanted))
    return {mode: _peak(pipeline, plan, mode) for mode in modes}


def activations(footprint: Footprint, plan: Plan) -> Mapping[str, int]:
    """What stages hold beside weights, by the plan, or what it leaves for all of them."""
    return plan.activations or {"all": max(0, plan.peak_bytes - footprint.weights(FULL))}


def most_held(pipeline: Pipeline, mode: MemoryMode) -> int | None:
    """The most bytes of weights on the device at once in a mode, without guests; None where parts are not known."""
    footprint = _footprint(pipeline)
    if footprint is None:
        return None
    return footprint.weights(mode) if mode.placement == "full" else footprint.peak(mode, {}, (0, 0))


def mode_of(pipeline: Pipeline) -> MemoryMode | None:
    """The mode in force; None for a pipeline that was not loaded."""
    return getattr(getattr(pipeline, "build", None), "memory", None)


def needed(pipeline: Pipeline, plan: Plan) -> int:
    """Bytes that one picture takes in the mode in force, weights included."""
    mode = mode_of(pipeline)
    return plan.peak_bytes if mode is None else _peak(pipeline, plan, mode)


def choose(wanted: str, planner: Pipeline, plan: Plan, device: str) -> MemoryMode:
    """The mode that is asked for or, for "auto", the first that surely fits, else the least that may.

    Raises OutOfMemoryError where what is asked for, or any mode that paints the same bits, surely does not fit; it
    names those that do.
    """
    free = free_bytes(device)
    modes = [mode for mode in EXACT if _rests(planner, plan, mode, device)] if wanted == AUTO else [parse_mode(wanted)]
    if free is None or _footprint(planner) is None:
        return modes[0]
    foreseen = {mode: _peak(planner, plan, mode) for mode in modes}
    for mode, peak in foreseen.items():
        if peak * (1 + UNCERTAINTY) <= free:
            return mode
    least = min(modes, key=lambda mode: foreseen[mode])
    if foreseen[least] * (1 - UNCERTAINTY) > free:
        raise OutOfMemoryError(foreseen[least], free, options(planner, plan, device))
    return least


def options(pipeline: Pipeline, plan: Plan, device: str) -> tuple[str, ...]:
    """What would need less, for an error: the fastest mode that fits with the weights as they are, the fastest of those
    in 8 bits, and a smaller size.
    """
    free, most = free_bytes(device), needed(pipeline, plan)
    if free is not None:
        free += _held(pipeline)
    fitting: list[MemoryMode] = []
    for mode, peak in peaks(pipeline, plan).items():
        fits = free is not None and peak <= free and _rests(pipeline, plan, mode, device)
        if fits and peak < most and not any(mode.scheme == other.scheme for other in fitting):
            fitting.append(mode)
    return (*(f"--memory {mode}" for mode in fitting), SMALLER)


def _held(pipeline: Pipeline) -> int:
    """About what a loaded model's weights take on the device now, which another mode would have back."""
    build = getattr(pipeline, "build", None)
    return most_held(pipeline, build.memory) or 0 if build is not None and build.weights else 0


def _peak(pipeline: Pipeline, plan: Plan, mode: MemoryMode) -> int:
    footprint = _footprint(pipeline)
    if footprint is None:
        return plan.peak_bytes
    size = (plan.request.width or 0, plan.request.height or 0)
    return footprint.peak(mode, activations(footprint, plan), size, plan.guests)


def _rests(pipeline: Pipeline, plan: Plan, mode: MemoryMode, device: str) -> bool:
    """Whether what rests in host memory has room there."""
    footprint, free = _footprint(pipeline), free_bytes(CPU)
    if kind_of(device) != CUDA or footprint is None or free is None:
        return True
    return footprint.host(mode, plan.guests) <= free


def _footprint(pipeline: Pipeline) -> Footprint | None:
    found = getattr(getattr(pipeline, "build", None), "footprint", None)
    return found if found is not None and found.plain else None
