"""`gesso plan`: what a request would cost. The model's `plan` states the work; here it is shown, and timed roughly."""

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from gesso.cli.entries import default_size, find_entry
from gesso.cli.options import request_fields, request_options
from gesso.request import parse_request
from gesso.settings import load_settings

if TYPE_CHECKING:
    from gesso.pipelines.contract import Plan

_TRIAL_SIDE = 1024
_TRIAL_SECONDS = 0.2


@request_options()
def plan(
    options: dict[str, object],
    prompt: Annotated[str, typer.Argument(help="The prompt; longer ones cost a little more.")],
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; else the best there is.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what a request would cost, without painting.

    Prints steps, floating-point operations, bytes moved, the most memory at once and a lower bound of the seconds.
    """
    entry = find_entry(options)
    request = parse_request({**request_fields(options, default_size(entry)), "prompt": prompt})
    entry.require_files()
    settings = load_settings({"device": device})

    from gesso.engine.device import default_device
    from gesso.engine.loading import load_pipeline, load_planner

    place = settings.device or default_device()
    made = (load_planner(request.model, place) or load_pipeline(request.model, place)).plan(request)
    speed = measured_speed(place)
    if as_json:
        typer.echo(json.dumps(_as_object(made, speed, place), ensure_ascii=False))
        return
    pictures = made.request.num_images
    for name, value in (
        ("model", made.request.model),
        ("size", f"{made.request.width}x{made.request.height}"),
        ("pictures", pictures),
        ("steps", f"{made.steps} a picture"),
        ("work", f"{made.cost.flops / 1e9:,.1f} GFLOP, {made.cost.bytes / 2**20:,.0f} MiB moved, a picture"),
        ("memory", f"{made.peak_bytes / 2**20:,.0f} MiB at most, weights included"),
        (
            "seconds",
            f"{made.cost.flops * pictures / speed:.3f} at least ({place} multiplies at {speed / 1e9:,.0f} GFLOP/s)",
        ),
        ("download", "nothing, its files are here"),
    ):
        typer.echo(f"{name:<10}{value}")
    for warning in made.warnings:
        typer.echo(f"warning: {warning}", err=True)


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
        "seconds_at_least": made.cost.flops * made.request.num_images / speed,
        "flops_per_second": speed,
        "device": device,
        "warnings": list(made.warnings),
    }
