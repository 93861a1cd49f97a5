"""`gesso generate`: prompts to pictures in a folder.

Here: the command, its own options, and saving. The request's options come from `options`, prompts from `prompts`,
file names from `names`, what is already there from `resume`.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gesso.cli.entries import default_size, find_entry
from gesso.cli.names import DEFAULT_TEMPLATE, check_template, picture_name
from gesso.cli.options import check_fields, drawn_seed, request_fields, request_options
from gesso.cli.painting import paint, tell_warnings, uninterrupted
from gesso.cli.prompts import read_prompts
from gesso.cli.resume import find_done, given_options
from gesso.cli.view import View
from gesso.errors import CancelledError, RequestError
from gesso.events import Result
from gesso.files import free_name, ready_folder
from gesso.metadata import save_picture
from gesso.request import GenerationRequest, parse_request
from gesso.settings import load_settings

_ENDINGS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}


class Format(StrEnum):
    """Picture formats that can be asked for."""

    PNG = "png"
    WEBP = "webp"
    JPEG = "jpeg"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One picture to be made: its request, its place among all of them (from 1) and among its prompt's (from 0)."""

    request: GenerationRequest
    index: int
    image: int


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where pictures go and how they are written."""

    folder: Path
    template: str
    ending: str
    quality: int | None
    with_metadata: bool
    command: dict[str, object]

    def save(self, task: Task, result: Result) -> Path:
        """Writes one picture under a free name."""
        request = task.request
        name = picture_name(
            self.template,
            index=task.index,
            image=task.image,
            seed=result.seed,
            prompt=request.prompt,
            model=request.model,
        )
        record = {**result.metadata, "command": self.command} if self.with_metadata else None
        return save_picture(result.image, free_name(self.folder / f"{name}{self.ending}"), record, quality=self.quality)


@request_options()
def generate(
    options: dict[str, object],
    prompt: Annotated[
        list[str], typer.Argument(help="One prompt each; - reads one a line from standard input, @FILE from a file.")
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder; made if missing.")] = None,
    name: Annotated[
        str, typer.Option(metavar="TEMPLATE", help="File name: {index}, {image}, {seed}, {slug}, {model}.")
    ] = DEFAULT_TEMPLATE,
    format: Annotated[Format, typer.Option(help="File format.")] = Format.PNG,
    file_quality: Annotated[
        int | None, typer.Option(help="1 to 100, for webp and jpeg; else lossless webp and jpeg at 95.")
    ] = None,
    metadata: Annotated[bool, typer.Option(help="Put the request into each file, for show and rerun.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Make only what an earlier run of this left out.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; else the best there is.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a picture, and for an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no warnings.")] = False,
    open_: Annotated[bool, typer.Option("--open", help="Open the picture, or the folder of several.")] = False,
) -> None:
    """Paint pictures of prompts.

    Every prompt uses the same seeds. A file is never overwritten: a number is added.
    Paths of the pictures go to standard output, everything else to standard error.
    """
    started = time.perf_counter()
    if as_json and quiet:
        raise RequestError("--json", "--quiet", "usable with --quiet", "--json shows no progress anyway")
    settings = load_settings({"output": output, "device": device})
    check_template(name)
    if file_quality is not None and (format is Format.PNG or not 1 <= file_quality <= 100):
        raise RequestError("file_quality", file_quality, "a whole number from 1 to 100 for webp or jpeg")
    fields = _checked_fields(options)
    prompts = read_prompts(prompt)
    requests = [parse_request({**fields, "prompt": text}) for text in prompts]
    given = given_options(requests[0])
    folder = ready_folder(settings.output)
    with View(silent=as_json or quiet) as view:
        done, seed = find_done(folder, [request.prompt for request in requests], given) if resume else (set(), None)
        first_seed = next(value for value in (requests[0].seed, seed, drawn_seed()) if value is not None)
        tasks = [task for task in _tasks(requests, first_seed) if (task.request.prompt, task.request.seed) not in done]
        if resume:
            view.line(f"{len(requests) * requests[0].num_images - len(tasks)} pictures are there, {len(tasks)} to make")
        destination = Destination(
            folder=folder,
            template=name,
            ending=_ENDINGS[format.value],
            quality=file_quality,
            with_metadata=metadata,
            command={"given": given, "first_seed": first_seed},
        )
        files = _paint_all(tasks, destination, settings.device, view, as_json=as_json)
        view.line(f"{len(files)} picture{'s' if len(files) != 1 else ''} in {time.perf_counter() - started:.1f} s")
    if open_ and files:
        typer.launch(str(files[0] if len(files) == 1 else folder))


def _checked_fields(options: dict[str, object]) -> dict[str, object]:
    """The fields that were given, their values and the model's name checked before anything else is looked at."""
    entry = find_entry(options)
    fields = request_fields(options, default_size(entry))
    check_fields(fields)
    entry.require_files()
    return fields


def _tasks(requests: Sequence[GenerationRequest], first_seed: int) -> Iterator[Task]:
    """Every picture as a request of its own: each can be made alone, and is saved as soon as it is done."""
    for number, request in enumerate(requests):
        for image in range(request.num_images):
            alone = request.model_copy(update={"seed": first_seed + image, "num_images": 1})
            yield Task(request=alone, index=number * request.num_images + image + 1, image=image)


def _paint_all(
    tasks: Sequence[Task], destination: Destination, device: str | None, view: View, *, as_json: bool
) -> list[Path]:
    if not tasks:
        return []
    view.line(f"loading {tasks[0].request.model}")
    from gesso.engine import Engine
    from gesso.engine.loading import load_planner

    if planner := load_planner(tasks[0].request.model):
        for task in tasks:
            if task.image == 0:  # the last prompt's mistake is found before the first prompt's pictures are made
                planner.plan(task.request)

    files: list[Path] = []
    told: set[str] = set()
    try:
        with Engine(device=device) as engine:
            view.begin_bar("painting", len(tasks))
            for task, result in zip(tasks, paint(engine, (task.request for task in tasks), view), strict=True):
                with uninterrupted():
                    files.append(destination.save(task, result))
                    view.result(_result_line(task, result, files[-1], as_json=as_json))
                tell_warnings(result, view, told)
    except (CancelledError, KeyboardInterrupt):
        kept = f"kept {len(files)} of {len(tasks)} pictures"
        raise CancelledError(f"interrupted; {kept}; the same command with --resume makes the rest") from None
    finally:
        view.end_bar()
    return files


def _result_line(task: Task, result: Result, path: Path, *, as_json: bool) -> str:
    if not as_json:
        return str(path)
    line = {
        "file": str(path),
        "prompt": task.request.prompt,
        "seed": result.seed,
        "index": task.index,
        "image": task.image,
        "width": result.image.width,
        "height": result.image.height,
        "metadata": result.metadata,
    }
    return json.dumps(line, ensure_ascii=False)
