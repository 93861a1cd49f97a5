"""`gesso compare`: the same request painted by several models, on one labelled sheet with the seconds each took.

Here: which models, painting them one after the other, and the sheet's words. The sheet itself is drawn by
`gesso.sheets`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gesso.cli.entries import default_size, find_entry
from gesso.cli.machine import (
    Attention,
    Compile,
    Device,
    Dtype,
    Memory,
    check_machine,
    machine_settings,
    new_engine,
    with_memory_mode,
)
from gesso.cli.names import slug
from gesso.cli.options import check_fields, drawn_seed, request_fields, request_options
from gesso.cli.painting import paint, tell_warnings
from gesso.cli.view import View
from gesso.errors import CancelledError, RequestError
from gesso.events import Result
from gesso.files import ready_folder, written_under_free_name
from gesso.metadata import save_picture
from gesso.request import GenerationRequest, parse_request
from gesso.settings import Settings

if TYPE_CHECKING:
    from gesso.engine import Engine

_MOST_MODELS, _MOST_PICTURES = 12, 16  # what fits on a sheet that can still be looked at
_LEAST_SIDE, _MOST_SIDE = 168, 512  # pixels of a picture's longer edge on the sheet


@dataclass(frozen=True, kw_only=True)
class Painted:
    """What one model made of the request: its pictures, and the seconds of each without loading."""

    model: str
    results: list[Result]
    seconds: list[float]

    @property
    def mean(self) -> float:
        return sum(self.seconds) / len(self.seconds)


@request_options(without=("model",))
def compare(
    options: dict[str, object],
    prompt: Annotated[str, typer.Argument(help="The prompt that every model paints.")],
    model: Annotated[list[str], typer.Option("--model", help="Catalogue name or path; give two or more.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder; made if missing.")] = None,
    warm_up: Annotated[
        bool, typer.Option(help="Paint a picture that is not timed first, as the first one of a model is slower.")
    ] = True,
    device: Device = None,
    dtype: Dtype = None,
    memory: Memory = None,
    attention: Attention = None,
    compile: Compile = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end, and for an error.")] = False,
) -> None:
    """Paint one prompt with several models, side by side.

    Every model uses the same seeds. The seconds are those of a picture, prompt to pixels, alone and without loading.
    """
    if not 2 <= len(model) <= _MOST_MODELS:
        raise RequestError("model", ", ".join(model), f"given 2 to {_MOST_MODELS} times")
    machine = {"device": device, "dtype": dtype, "memory": memory, "attention": attention, "compile": compile}
    settings = machine_settings({"output": output, **machine})
    requests = _requests(options, prompt, model, settings)
    folder = ready_folder(settings.output)
    painted: list[Painted] = []
    with View(silent=as_json) as view:
        try:
            for request in requests:
                painted.append(_paint(request, settings, view, warm_up=warm_up))
        except (CancelledError, KeyboardInterrupt):
            raise CancelledError(f"interrupted after {len(painted)} of {len(requests)} models; no sheet") from None
        view.line("drawing the sheet")
    sheet = _save_sheet(folder, prompt, painted)
    if as_json:
        typer.echo(json.dumps(_as_object(sheet, painted), ensure_ascii=False))
        return
    for one in painted:
        typer.echo(f"{one.model:<20}{one.mean:>9.3f} s a picture")
    typer.echo(f"sheet: {sheet}")


def _requests(
    options: dict[str, object], prompt: str, models: list[str], settings: Settings
) -> list[GenerationRequest]:
    """One request a model, all with the same seed, each held against its model before any of them paints."""
    entries = [find_entry({"model": name}) for name in models]
    seed: object = None
    requests: list[GenerationRequest] = []
    for name, entry in zip(models, entries, strict=True):
        fields = request_fields(options, default_size(entry)) | {"model": name}
        check_fields(fields)
        entry.require_files()
        request = parse_request({**fields, "prompt": prompt})
        if request.num_images > _MOST_PICTURES:
            raise RequestError("num_images", request.num_images, f"at most {_MOST_PICTURES} on a sheet")
        seed = next(value for value in (request.seed, seed, drawn_seed()) if value is not None)
        requests.append(request.model_copy(update={"seed": seed}))

    from gesso.engine.loading import load_planner
    from gesso.engine.planning import planned

    check_machine(settings)
    for request in requests:
        planned(load_planner(request.model, settings.device, settings.dtype), request, attention=settings.attention)
    return requests


def _paint(request: GenerationRequest, settings: Settings, view: View, *, warm_up: bool) -> Painted:
    """The pictures of one model, one by one, in an engine of its own: its memory is free for the next model."""
    view.line(f"loading {request.model}")
    seed = request.seed or 0
    # One after the other they are alone in any case; deterministic ones would share the reading of their prompt, which
    # belongs to the seconds of each.
    alone = [
        request.model_copy(update={"seed": seed + image, "num_images": 1, "deterministic": False})
        for image in range(request.num_images)
    ]
    with new_engine(with_memory_mode(settings, [request], view)) as engine:
        if warm_up:
            _paint_all(engine, alone[:1], view, "warming up")
        results = _paint_all(engine, alone, view, f"painting with {request.model}")
    return Painted(model=request.model, results=results, seconds=[_seconds(result) for result in results])


def _paint_all(engine: "Engine", requests: list[GenerationRequest], view: View, words: str) -> list[Result]:
    view.begin_bar(words, len(requests))
    try:
        results: list[Result] = []
        told: set[str] = set()
        for request in requests:  # the next only when the last is done: its seconds are its own
            results += paint(engine, [request], view)
            tell_warnings(results[-1], view, told)
        return results
    finally:
        view.end_bar()


def _seconds(result: Result) -> float:
    """Seconds of a picture without those of loading, from its own record."""
    stages = result.metadata["seconds"]
    assert isinstance(stages, dict)
    return float(sum(seconds for stage, seconds in stages.items() if stage != "load"))


def _save_sheet(folder: Path, prompt: str, painted: list[Painted]) -> Path:
    from gesso.sheets import Group, contact_sheet

    groups = [
        Group(
            caption=f"{one.model}, {one.results[0].image.width}x{one.results[0].image.height}, {one.mean:.3g} s",
            pictures=[result.image for result in one.results],
        )
        for one in painted
    ]
    pictures = [result.image for one in painted for result in one.results]
    side = min(_MOST_SIDE, max(_LEAST_SIDE, *(max(picture.size) for picture in pictures)))
    seeds = [result.seed for result in painted[0].results]
    note = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    sheet = contact_sheet(groups, title=prompt, note=note, columns=max(1, 4 // len(seeds)), side=side)
    path = folder / f"compare-{slug(prompt)}.png"
    return written_under_free_name(path, lambda aside: save_picture(sheet, aside, None))


def _as_object(sheet: Path, painted: list[Painted]) -> dict[str, object]:
    return {
        "sheet": str(sheet),
        "models": [
            {
                "model": one.model,
                "seconds": [round(seconds, 4) for seconds in one.seconds],
                "seeds": [result.seed for result in one.results],
                "warnings": one.results[0].metadata.get("warnings", []),
                "width": one.results[0].image.width,
                "height": one.results[0].image.height,
            }
            for one in painted
        ],
    }
