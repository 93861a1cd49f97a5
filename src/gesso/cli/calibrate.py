"""`gesso calibrate`, and the step cache that `--quality` means: the fastest that was measured to be that close.

Measuring is `gesso.evaluation.caches`', what is kept of it `gesso.fronts`'; here they are called and printed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gesso.cache_settings import granularities, parse_cache
from gesso.cli.entries import find_entry
from gesso.cli.machine import Attention, Compile, Device, Dtype, Memory, check_machine, machine_settings
from gesso.cli.paths import absolute_model
from gesso.cli.view import View
from gesso.devices import CUDA, kind_of
from gesso.engine.attention import DEFAULT
from gesso.errors import CancelledError, MissingError, RequestError
from gesso.files import ready_folder, written_aside
from gesso.fronts import (
    EXACT,
    Point,
    alike,
    caches_at,
    keep_point,
    losing,
    pareto_front,
    parse_quality,
    path_of,
    pick,
    read_points,
    unlike,
    with_point,
)
from gesso.memory_modes import AUTO, FULL
from gesso.request import parse_request
from gesso.settings import Settings

if TYPE_CHECKING:
    from gesso.pipelines.contract import Pipeline
    from gesso.weights.catalogue import Entry

_MOST_PICTURES = 600


def calibrate(
    model: Annotated[str, typer.Argument(help="Catalogue name, or path of a checkpoint.")],
    steps: Annotated[int | None, typer.Option(help="Steps of a picture; else the model's own.")] = None,
    pictures: Annotated[int, typer.Option(help="Pictures that each cache is measured on.")] = 24,
    cache: Annotated[
        list[str] | None, typer.Option("--cache", metavar="CACHE", help="Try these and no others; may be repeated.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw what was measured, as PNG or SVG.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    memory: Memory = None,
    attention: Attention = None,
    compile: Compile = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the front, at the end.")] = False,
) -> None:
    """Measure what step caches of a model save and cost.

    Each cache paints the same pictures, which are compared with those without one; models of the shapes world are
    scored too. What was measured is kept at once, so that the same command goes on where it was interrupted.
    gesso generate --quality picks from it.
    """
    model = str(absolute_model(model))
    entry = find_entry({"model": model})
    entry.require_files()
    if not 1 <= pictures <= _MOST_PICTURES:
        raise RequestError("pictures", pictures, f"a whole number from 1 to {_MOST_PICTURES}")
    if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
        raise RequestError("plot", plot.name, "a .png or .svg file")
    fields: dict[str, object] = {} if steps is None else {"steps": steps}
    for wanted in cache or [None]:
        parse_request({**fields, "prompt": "any", "model": model, "cache": wanted})
    settings = machine_settings(
        {"device": device, "dtype": dtype, "memory": memory, "attention": attention, "compile": compile}
    )
    check_machine(settings)
    with View(silent=quiet) as view:
        points, taken = _measure(entry, fields, pictures, cache, settings, view)
        _print_front(points, taken)
        view.line(f"kept in {path_of(settings.home, model)}")
    if plot is not None:
        draw_front(points, f"{model}, {taken} steps", plot)


def _measure(
    entry: "Entry",
    fields: dict[str, object],
    pictures: int,
    wanted: Sequence[str] | None,
    settings: Settings,
    view: View,
) -> tuple[list[Point], int]:
    """All points that are held against the same pictures without a cache; and the steps of these."""
    from gesso.engine.acceleration import Acceleration
    from gesso.engine.device import check_device, default_device
    from gesso.engine.loading import load_pipeline
    from gesso.engine.planning import planned
    from gesso.evaluation.caches import GRID, bench_of, calibrate, fitting, usable
    from gesso.evaluation.lpips import load_lpips

    place = check_device(settings.device or default_device())
    view.line(f"loading {entry.name}")
    chosen = Acceleration(attention=settings.attention, compile=settings.compile)
    pipeline = load_pipeline(entry.name, place, settings.dtype, acceleration=chosen, memory=settings.memory)
    bench = bench_of(pipeline, entry.name, fields, pictures=pictures, device=place, attention=settings.attention)
    bench.told, bench.lpips = view.line, load_lpips(settings.home)
    first = bench.requests[0].model_copy(update={"cache": parse_request({"prompt": "any", "cache": "lite"}).cache})
    steps = planned(pipeline, first).steps  # refuses models that have no steps to forecast
    known = _known(pipeline, place, settings, str(getattr(pipeline, "digest", "")))
    points = read_points(settings.home, entry.name)
    caches = usable(bench, wanted) if wanted else fitting(bench, GRID)
    try:
        for point in calibrate(bench, caches, points, known):
            keep_point(settings.home, entry.name, point)
            points = with_point(points, point)
            view.line(_line(point, alike(points, known)))
    except KeyboardInterrupt:
        raise CancelledError("interrupted; what was measured is kept, the same command goes on") from None
    beside = [one for one in alike(points, known) if (one.reference, one.painted) == (steps, bench.painted)]
    return beside, steps


def _known(pipeline: "Pipeline", place: str, settings: Settings, digest: str) -> dict[str, str]:
    """The weights, and the machine that seconds are of, with what it was told that is not its own."""
    import platform

    import torch

    name = torch.cuda.get_device_name(place) if kind_of(place) == CUDA else platform.machine()
    said = (settings.memory, settings.attention, "compiled" if settings.compile else "")
    besides = [f", {value}" for value in said if value not in (AUTO, str(FULL), DEFAULT, "")]
    return {
        "digest": digest,
        "device": place,
        "dtype": str(getattr(pipeline, "dtype", "")).removeprefix("torch."),
        "hardware": f"{name}, {torch.get_num_threads()} threads{''.join(besides)}",
    }


def _line(point: Point, points: Sequence[Point]) -> str:
    name = point.cache or f"{point.steps} steps, no cache"
    score = "" if point.score is None else f", shapes {point.score:.3f} of {point.score_without:.3f}"
    lost = ", loses to fewer steps" if losing(point, points) else ""
    seen = "" if point.lpips is None else f"lpips {point.lpips:.4f}  "
    return f"{point.speed:5.2f}x  ssim {point.ssim:.4f}  psnr {point.psnr:5.1f}  {seen}{name}{score}{lost}"


def _print_front(points: Sequence[Point], steps: int) -> None:
    """The caches that no other beats in both, the slowest first, below what their pictures were painted with."""
    front = pareto_front(caches_at(points, steps))
    if front:
        typer.echo(f"{steps} steps, {', '.join(front[0].painted)}, held against the same without a cache:")
    for point in front:
        typer.echo(_line(point, points))


def cache_of_quality(
    quality: str | None, fields: Mapping[str, object], entry: "Entry", settings: Settings
) -> tuple[dict[str, object], str, str]:
    """The field `cache` that a quality means, empty for none; what to say of it; and a warning where the request is not
    what was measured.

    Raises:
        RequestError: beside `--cache`, for no number, and for a model that was not calibrated at these steps.
    """
    if quality is None:
        return {}, "", ""
    if "cache" in fields:
        raise RequestError("quality", quality, "usable with --cache", "give one of them")
    if parse_quality(quality) is None:
        return {}, "", ""
    from gesso.engine.device import check_device, default_device
    from gesso.engine.loading import load_planner
    from gesso.engine.loading.weights_digest import weights_digest

    planner = load_planner(entry.name, settings.device, settings.dtype)
    plan = planner.plan(parse_request({**fields, "prompt": "any"}))
    if plan.shape is None:
        hint = f"it has no steps to forecast; take {EXACT}"
        raise RequestError("quality", quality, f"usable with {entry.name}", hint)
    place = check_device(settings.device or default_device())
    every = read_points(settings.home, str(fields.get("model", entry.name)))
    points = alike(every, _known(planner, place, settings, weights_digest(entry)))
    if every and not points:
        hint = f"what is known is of other weights or another machine; first: {_command(entry.name, settings)}"
        raise RequestError("quality", quality, f"known for {entry.name}, as it is here", hint)
    point = pick(points, quality, model=entry.name, steps=plan.steps, asked=plan.request.steps)
    if point is None:
        best = max(point.ssim for point in caches_at(points, plan.steps))
        said = f"no cache: none is faster and that close at {plan.steps} steps; the closest is {best:.4f} (SSIM)"
        return {}, said, ""
    cached = planner.plan(parse_request({**fields, "prompt": "any", "cache": point.cache}))
    differs = unlike(point, cached.request)
    warning = f"the cache was {differs}: expect another speed and likeness" if differs else ""
    return {"cache": point.cache}, _line(point, points).strip(), warning


def _command(model: str, settings: Settings) -> str:
    """What calibrates a model as the settings in force have it painted."""
    said = [("--device", settings.device, None), ("--dtype", settings.dtype, None)]
    said += [("--memory", settings.memory, AUTO), ("--attention", settings.attention, DEFAULT)]
    options = [f" {option} {value}" for option, value, usual in said if value != usual]
    return f"gesso calibrate {model}{''.join(options)}{' --compile' if settings.compile else ''}"


def draw_front(points: Sequence[Point], title: str, path: Path) -> None:
    """Speed and similarity of every point, caches and fewer steps apart, the front as a line. Raises MissingError."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingError("matplotlib, which draws the plot,", "pip install 'gesso[train]'") from error
    figure: Any = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    plain = sorted((one for one in points if not one.cache), key=_speed)
    cached = [one for one in points if one.cache and one.computed < one.steps]
    for kind in dict.fromkeys(map(_kind, cached)):
        group = [one for one in cached if _kind(one) == kind]
        axes.scatter([one.speed for one in group], [one.ssim for one in group], s=18, label=kind)
    front = pareto_front(cached)
    axes.plot([one.speed for one in front], [one.ssim for one in front], color="black", linewidth=0.8, label="front")
    axes.plot([one.speed for one in plain], [one.ssim for one in plain], "x--", color="grey", label="fewer steps")
    axes.set_xlabel("times as fast")
    axes.set_ylabel("similarity to the picture without a cache (SSIM)")
    axes.set_title(title)
    axes.legend(fontsize="small")
    ready_folder(path.parent)
    with written_aside(path) as aside:
        figure.savefig(aside, format=path.suffix[1:].lower(), dpi=120)


def _kind(point: Point) -> str:
    """The policy, and what it forecasts where it has a choice."""
    settings = parse_cache(point.cache)
    choice = len(granularities(settings.policy)) > 1 and settings.granularity
    return f"{settings.policy} by {choice}" if choice else settings.policy


def _speed(point: Point) -> float:
    return point.speed
