"""`gesso plan`: what a request would cost. The model's `plan` states the work; here it is shown, and timed roughly."""

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from gesso.cache_settings import spelled
from gesso.cli.entries import default_size, find_entry, makes_videos
from gesso.cli.machine import Device, Dtype, Memory, machine_settings
from gesso.cli.options import request_fields, request_options
from gesso.errors import OutOfMemoryError
from gesso.request import parse_request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gesso.pipelines.contract import Pipeline, Plan

_TRIAL_SIDE = 1024
_TRIAL_SECONDS = 0.2


@request_options()
def plan(
    options: dict[str, object],
    prompt: Annotated[str, typer.Argument(help="The prompt; longer ones cost a little more.")],
    device: Device = None,
    dtype: Dtype = None,
    memory: Memory = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what a request would cost, without painting.

    Prints steps, floating-point operations, bytes moved, the most memory at once and a lower bound of the seconds.
    """
    entry = find_entry(options)
    request = parse_request({**request_fields(options, default_size(entry)), "prompt": prompt})
    entry.require_files()
    settings = machine_settings({"device": device, "dtype": dtype, "memory": memory})

    from gesso.engine.adapters import adapter_bytes
    from gesso.engine.device import check_device, default_device
    from gesso.engine.loading import load_planner
    from gesso.engine.planning import planned
    from gesso.engine.safety import Guard

    place, kind = check_device(settings.device or default_device()), settings.dtype
    planner = load_planner(request.model, place, kind)
    made = planned(planner, request, attention=settings.attention)
    foreseen, chosen = _memory(planner, made, settings.memory, place)
    adapters, (safety, checker) = adapter_bytes(planner, made), Guard(settings).foreseen(request, place)
    speed = measured_speed(place)
    if as_json:
        more = {"memory": foreseen, "memory_mode": chosen, "adapters": dict(adapters)}
        more["safety"] = {"mode": safety, "bytes": checker}
        typer.echo(json.dumps({**_as_object(made, speed, place), **more}, ensure_ascii=False))
        return
    pictures, noun, length = made.request.num_images, "picture", ""
    if makes_videos(entry):
        noun, length = "video", f", {made.request.frames} frames at {made.request.fps:g} a second"
    for name, value in (
        ("model", made.request.model),
        ("size", f"{made.request.width}x{made.request.height}{length}"),
        (f"{noun}s", pictures),
        ("steps", f"{made.steps} a {noun}"),
        ("work", f"{made.cost.flops / 1e9:,.1f} GFLOP, {made.cost.bytes / 2**20:,.0f} MiB moved, a {noun}"),
        *_cache_lines(made, noun),
        *_adapter_lines(made, adapters),
        *_safety_lines(safety, checker),
        *_memory_lines(made, foreseen, chosen),
        (
            "seconds",
            f"{made.cost.flops * pictures / speed:.3f} at least ({place} multiplies at {speed / 1e9:,.0f} GFLOP/s)",
        ),
        ("download", ", ".join(name for name, size in adapters if size is None) or "nothing, its files are here"),
    ):
        typer.echo(f"{name:<10}{value}")
    for warning in made.warnings:
        typer.echo(f"warning: {warning}", err=True)


def _memory(planner: "Pipeline", made: "Plan", wanted: str, device: str) -> tuple[dict[str, int], str | None]:
    """Bytes at most by memory mode, and the mode that would be taken, None where nothing fits."""
    from gesso.engine.memory import choose, peaks

    foreseen = {str(mode): size for mode, size in peaks(planner, made, wanted).items()}
    try:
        return foreseen, str(choose(wanted, planner, made, device))
    except OutOfMemoryError:
        return foreseen, None


def _cache_lines(made: "Plan", noun: str) -> "Iterator[tuple[str, str]]":
    """What a step cache leaves out, and what it keeps for that. The work above is that without it."""
    from gesso.engine.caches import computed_steps

    cache = made.request.cache
    if cache is None:
        return
    computed, place = computed_steps(made), "main memory" if cache.offload else "the device's memory"
    forecast = made.steps - computed
    adapts = cache.threshold is not None and forecast > 0
    counted = f"at most {forecast} of {made.steps}" if adapts else f"{forecast} of {made.steps}"
    yield "cache", spelled(cache)
    yield "", f"{counted} steps are forecast, the work above is without that"
    yield "", f"{made.cache_bytes / 2**20:,.2f} MiB of features in {place}, a {noun}"


def _adapter_lines(made: "Plan", adapters: "list[tuple[str, int | None]]") -> "Iterator[tuple[str, str]]":
    """Each adapter, its scale, and what it adds to the memory below."""
    for lora, (name, size) in zip(made.request.lora, adapters, strict=True):
        held = "not here yet, so that its memory is not counted" if size is None else f"{size / 2**20:,.1f} MiB"
        yield "lora", f"{name} at {lora.scale:g}, {held}"


def _safety_lines(mode: str, checker: int | None) -> "Iterator[tuple[str, str]]":
    """What looking at finished pictures takes beside the memory below."""
    if mode != "off":
        size = "it is not here yet" if checker is None else f"{checker / 2**20:,.1f} MiB on top of the memory below"
        yield "safety", f"{mode}, by a checker: {size}"


def _memory_lines(made: "Plan", foreseen: dict[str, int], chosen: str | None) -> "Iterator[tuple[str, str]]":
    """The most memory at once in each mode, weights included; a star at the one that would be taken now."""
    for number, (name, size) in enumerate((foreseen or {"full": made.peak_bytes}).items()):
        star = " *" if name == chosen else ""
        yield "memory" if not number else "", f"{size / 2**20:>9,.0f} MiB at most, {name}{star}"
    if chosen is None:
        yield "", "more than is free: no mode fits that leaves pictures as they are"


def measured_speed(device: str) -> float:
    """Floating-point operations a second of a large float32 matrix product on this device, measured in about 0.3 s."""
    import torch

    square = torch.ones(_TRIAL_SIDE, _TRIAL_SIDE, device=device)
    done, began = 0, 0.0
    while True:
        float((square @ square)[0, 0])  # reading a value waits for the device
        began = began or time.perf_counter()  # the first product only warms up
        seconds = time.perf_counter() - began
        if seconds > _TRIAL_SECONDS:
            return done * 2.0 * _TRIAL_SIDE**3 / seconds
        done += 1


def _as_object(made: "Plan", speed: float, device: str) -> dict[str, object]:
    return {
        "request": made.request.model_dump(mode="json"),
        "steps": made.steps,
        "flops": made.cost.flops,
        "bytes": made.cost.bytes,
        "peak_bytes": made.peak_bytes,
        "cache_bytes": made.cache_bytes,
        "seconds_at_least": made.cost.flops * made.request.num_images / speed,
        "flops_per_second": speed,
        "device": device,
        "warnings": list(made.warnings),
    }
