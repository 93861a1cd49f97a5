"""`gesso demo`: what `make demo` runs. Prompts to pictures and one labelled sheet, with the model that comes along."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from gesso.cli.machine import Device, Dtype, Memory, check_machine, machine_settings, new_engine
from gesso.cli.names import DEFAULT_TEMPLATE, picture_name
from gesso.cli.painting import paint, uninterrupted
from gesso.cli.view import View
from gesso.errors import CancelledError
from gesso.events import Result
from gesso.files import ready_folder
from gesso.metadata import save_picture
from gesso.request import GenerationRequest
from gesso.settings import Settings

MODEL = "infinity-nano"
SEEDS = (7, 8)
PROMPTS = (
    "a large red circle on a white background",
    "a small blue star on a yellow background",
    "a purple heart on a white background",
    "a large green diamond on a black background",
    "a red square left of a blue circle on a white background",
    "a yellow star above a purple ring on a black background",
    "a green triangle right of an orange heart on a purple background",
    "a white cross below a blue square on a red background",
    "two white crosses on a red background",
    "two yellow rings on a blue background",
    "three green hearts on a black background",
    "three red stars on a white background",
    "four orange diamonds on a blue background",
    "four purple triangles on a yellow background",
    "a blue heart and a yellow circle on a green background",
    "an orange ring and a black star on a white background",
)
SHEET = "contact-sheet.png"


def demo(
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder; made if missing.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    memory: Memory = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end, and for an error.")] = False,
) -> None:
    """Paint a contact sheet with the model that comes along.

    Needs no GPU and no download.
    Every picture carries its request: gesso rerun makes it again and says whether it is equal.
    """
    started = time.perf_counter()
    settings = machine_settings({"output": output, "device": device, "dtype": dtype, "memory": memory})
    check_machine(settings)
    folder = ready_folder(settings.output / "demo" if output is None else output)
    with View(silent=as_json) as view:
        view.line(f"loading {MODEL}")
        files, results, seconds = _paint(folder, settings, view)
        view.line("drawing the contact sheet")
        sheet = _draw_sheet(folder, results, seconds)
    total = time.perf_counter() - started
    if as_json:
        line = {"sheet": str(sheet), "files": [str(path) for path in files], "seconds": round(total, 3)}
        typer.echo(json.dumps(line, ensure_ascii=False))
        return
    typer.echo(f"{len(files)} pictures in {total:.1f} s, of which {seconds:.1f} s painting ({folder})")
    typer.echo(f"contact sheet: {sheet}")
    typer.echo("\nTry next:")
    typer.echo('  gesso generate "two red stars above a blue ring" --num-images 4 --seed 7')
    typer.echo(f"  gesso rerun {files[0]}")
    typer.echo("  gesso doctor")


def _paint(folder: Path, settings: Settings, view: View) -> tuple[list[Path], list[Result], float]:
    """Paints and saves every picture; the demo's own files are replaced, so that it can be run again and again."""
    requests = [
        GenerationRequest(prompt=prompt, model=MODEL, seed=seed, deterministic=True)
        for prompt in PROMPTS
        for seed in SEEDS
    ]
    files: list[Path] = []
    results: list[Result] = []
    try:
        with new_engine(settings) as engine:
            view.begin_bar("painting", len(requests))
            began = time.perf_counter()
            for request, result in zip(requests, paint(engine, requests, view), strict=True):
                number = len(files) + 1
                name = picture_name(
                    DEFAULT_TEMPLATE, index=number, image=0, seed=result.seed, prompt=request.prompt, model=MODEL
                )
                with uninterrupted():
                    files.append(save_picture(result.image, folder / f"{name}.png", result.metadata))
                results.append(result)
            seconds = time.perf_counter() - began
    except (CancelledError, KeyboardInterrupt):
        raise CancelledError(f"interrupted; kept {len(files)} of {len(requests)} pictures in {folder}") from None
    finally:
        view.end_bar()
    return files, results, seconds


def _draw_sheet(folder: Path, results: list[Result], seconds: float) -> Path:
    from gesso.sheets import Group, contact_sheet

    groups = [
        Group(caption=prompt, pictures=[result.image for result in results[number * len(SEEDS) :][: len(SEEDS)]])
        for number, prompt in enumerate(PROMPTS)
    ]
    seeds = " and ".join(str(seed) for seed in SEEDS)
    note = f"{MODEL}, {results[0].image.width} px, seeds {seeds}, {len(results)} pictures in {seconds:.1f} s"
    sheet = contact_sheet(groups, title="Gesso", note=note)
    return save_picture(sheet, folder / SHEET, None)
