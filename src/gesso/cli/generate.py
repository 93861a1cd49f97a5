"""`gesso generate`: prompts to pictures, or videos, in a folder.

Here: the command, its own options, and saving. The request's options come from `options`, prompts from `prompts`,
file names from `names`, what is already there from `resume`.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gesso.cli.calibrate import cache_of_quality
from gesso.cli.entries import default_size, find_entry, makes_videos
from gesso.cli.likeness import check_likeness, paint_alike
from gesso.cli.lora import fetch_missing
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
from gesso.cli.names import DEFAULT_TEMPLATE, check_template, picture_name
from gesso.cli.options import check_fields, drawn_seed, request_fields, request_options
from gesso.cli.painting import paint_placed, tell_warnings, uninterrupted
from gesso.cli.paths import absolute_paths
from gesso.cli.prompts import read_prompts
from gesso.cli.resume import find_done, given_options
from gesso.cli.view import View
from gesso.errors import CancelledError, GessoError, RejectedError, RequestError
from gesso.events import Result
from gesso.files import ready_folder, written_under_free_name
from gesso.request import GenerationRequest, parse_request
from gesso.settings import Settings
from gesso.videos import require_library

if TYPE_CHECKING:
    from gesso.weights.catalogue import Entry

_ENDINGS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg", "mp4": ".mp4"}


class Format(StrEnum):
    """File formats that can be asked for: the last is for videos, the others are for pictures."""

    PNG = "png"
    WEBP = "webp"
    JPEG = "jpeg"
    MP4 = "mp4"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One picture to be made: its request, its place among all of them (from 1) and among its prompt's (from 0)."""

    request: GenerationRequest
    index: int
    image: int


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where pictures go and how they are written; the `model` is as it was named, for their names."""

    folder: Path
    template: str
    format: Format
    quality: int | None
    model: str
    with_metadata: bool
    command: dict[str, object]

    def save(self, task: Task, result: Result) -> Path:
        """Writes one picture under a name that is free, whoever else writes to the folder."""
        request = task.request
        name = picture_name(
            self.template,
            index=task.index,
            image=task.image,
            seed=result.seed,
            prompt=request.prompt,
            model=self.model,
        )
        command = self.command if result.seed == request.seed else {**self.command, "seed": request.seed}
        recorded = replace(result, metadata={**result.metadata, "command": command})
        path = self.folder / f"{name}{_ENDINGS[self.format.value]}"
        return written_under_free_name(
            path, lambda aside: recorded.save(aside, with_metadata=self.with_metadata, quality=self.quality)
        )

    def counted(self, number: int) -> str:
        """So many of what is made, in words."""
        noun = "video" if self.format is Format.MP4 else "picture"
        return f"{number} {noun}{'s' if number != 1 else ''}"


Prompts = Annotated[
    list[str], typer.Argument(help="One prompt each; - reads one a line from standard input, @FILE from a file.")
]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Folder; made if missing.")]
Name = Annotated[str, typer.Option(metavar="TEMPLATE", help="File name: {index}, {image}, {seed}, {slug}, {model}.")]
WrittenAs = Annotated[Format | None, typer.Option(help="File format; else png, and mp4 for models that make videos.")]
FileQuality = Annotated[
    int | None, typer.Option(help="1 to 100, for webp, jpeg, mp4; else lossless webp, jpeg at 95, mp4 at 70.")
]
Metadata = Annotated[bool, typer.Option(help="Put the request into each file, for show and rerun.")]
Quality = Annotated[
    str | None,
    typer.Option(metavar="NUMBER", help="Fastest step cache this alike, such as 0.98 (gesso calibrate), or exact."),
]
MinLikeness = Annotated[
    float | None, typer.Option(metavar="NUMBER", help="Of a person: paint again what is less alike; try 0.5.")
]
Tries = Annotated[int | None, typer.Option(metavar="INTEGER", help="How often at most, the best is kept; else 4.")]
Resume = Annotated[bool, typer.Option("--resume", help="Make only what an earlier run of this left out.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a picture, and for an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no warnings.")]
Open = Annotated[bool, typer.Option("--open", help="Open the picture, or the folder of several.")]


@request_options()
def generate(
    options: dict[str, object],
    prompt: Prompts,
    output: Output = None,
    name: Name = DEFAULT_TEMPLATE,
    format: WrittenAs = None,
    file_quality: FileQuality = None,
    metadata: Metadata = True,
    quality: Quality = None,
    min_likeness: MinLikeness = None,
    tries: Tries = None,
    resume: Resume = False,
    device: Device = None,
    dtype: Dtype = None,
    memory: Memory = None,
    attention: Attention = None,
    compile: Compile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    open_: Open = False,
) -> None:
    """Paint pictures of prompts.

    Models that make videos make those. Every prompt uses the same seeds. A file is never overwritten: it gets
    a number. Paths of the pictures go to standard output, everything else to standard error.
    """
    started = time.perf_counter()
    if as_json and quiet:
        raise RequestError("--json", "--quiet", "usable with --quiet", "--json shows no progress anyway")
    machine = {"device": device, "dtype": dtype, "memory": memory, "attention": attention, "compile": compile}
    settings = machine_settings({"output": output, **machine})
    check_template(name)
    fields, entry = _checked_fields(options)
    cache, chosen_cache, unlike = cache_of_quality(quality, fields, entry, settings)
    chosen = _chosen_format(format, entry, file_quality)
    requests = [parse_request({**fields, **cache, "prompt": text}) for text in read_prompts(prompt)]
    check_likeness(min_likeness, tries, requests[0].identity)
    folder = ready_folder(settings.output)
    with View(silent=as_json or quiet) as view:
        if chosen_cache:
            view.line(chosen_cache)
        if unlike:
            view.warn(unlike)
        tasks, command = _left_to_do(requests, folder, view, videos=chosen is Format.MP4, resume=resume)
        destination = Destination(
            folder=folder,
            template=name,
            format=chosen,
            quality=file_quality,
            model=entry.name,
            with_metadata=metadata,
            command=command,
        )
        alike = (min_likeness, tries)
        files, rejected = _paint_all(tasks, destination, settings, view, as_json=as_json, alike=alike)
        view.line(f"{destination.counted(len(files))} in {time.perf_counter() - started:.1f} s")
    if open_ and files:
        typer.launch(str(files[0] if len(files) == 1 else folder))
    if rejected:
        raise RejectedError(rejected, len(tasks))


def _checked_fields(options: dict[str, object]) -> "tuple[dict[str, object], Entry]":
    """The fields that were given, and the model: both checked before anything else is looked at."""
    entry = find_entry(options)
    fields = request_fields(options, default_size(entry))
    check_fields(fields)
    entry.require_files()
    return absolute_paths(fields), entry


def _chosen_format(asked: Format | None, entry: "Entry", quality: int | None) -> Format:
    """The format to write in, which has to be one of what the model makes; and the library that writes it is there.

    A `quality` has to be one that it has.
    """
    of_videos, fitting = makes_videos(entry), [Format.PNG, Format.WEBP, Format.JPEG]
    if of_videos:
        require_library()
        fitting = [Format.MP4]
    if asked is not None and asked not in fitting:
        what = f"a format of {'videos' if of_videos else 'pictures'}, which {entry.name} makes"
        raise RequestError("format", asked.value, what, f"use {', '.join(fitting)}")
    chosen = asked or fitting[0]
    if quality is not None and (chosen is Format.PNG or not 1 <= quality <= 100):
        raise RequestError("file_quality", quality, "a whole number from 1 to 100 for webp, jpeg or mp4")
    return chosen


def _left_to_do(
    requests: Sequence[GenerationRequest], folder: Path, view: View, *, videos: bool, resume: bool
) -> tuple[list[Task], dict[str, object]]:
    """The pictures to be made, with `resume` those that an earlier run left out; and the command for their records."""
    given, texts = given_options(requests[0]), [request.prompt for request in requests]
    done, seed = find_done(folder, texts, given, videos=videos) if resume else (set(), None)
    first_seed = next(value for value in (requests[0].seed, seed, drawn_seed()) if value is not None)
    tasks = [task for task in _tasks(requests, first_seed) if (task.request.prompt, task.request.seed) not in done]
    if resume:
        there = len(requests) * requests[0].num_images - len(tasks)
        view.line(f"already there: {there}, to make: {len(tasks)}")
    return tasks, {"given": given, "first_seed": first_seed}


def _tasks(requests: Sequence[GenerationRequest], first_seed: int) -> Iterator[Task]:
    """Every picture as a request of its own: each can be made alone, and is saved as soon as it is done."""
    for number, request in enumerate(requests):
        for image in range(request.num_images):
            alone = request.model_copy(update={"seed": first_seed + image, "num_images": 1})
            yield Task(request=alone, index=number * request.num_images + image + 1, image=image)


def _paint_all(
    tasks: Sequence[Task],
    destination: Destination,
    settings: Settings,
    view: View,
    *,
    as_json: bool,
    alike: tuple[float | None, int | None],
) -> tuple[list[Path], list[int]]:
    """The files that were written, and the seeds of pictures that the safety checker rejected."""
    if not tasks:
        return [], []
    view.line(f"loading {tasks[0].request.model}")
    from gesso.engine.adapters import ModelAdapters
    from gesso.engine.loading import load_planner
    from gesso.engine.planning import planned

    check_machine(settings)
    firsts = [task.request for task in tasks if task.image == 0] or [tasks[0].request]
    planner = load_planner(tasks[0].request.model, settings.device, settings.dtype)
    fetch_missing(firsts[0], ModelAdapters(planner).family, view)
    for request in firsts:  # the last prompt's mistake is found before the first prompt's pictures are made
        planned(planner, request, attention=settings.attention)
    settings = with_memory_mode(settings, firsts, view)

    files: list[Path] = []
    rejected: list[int] = []
    told: set[str] = set()
    try:
        with new_engine(settings) as engine:
            unit = destination.counted(0).removeprefix("0 ")
            view.begin_bar("painting", len(tasks), unit)
            wanted = [task.request for task in tasks]
            if alike[0] is None:
                painted = paint_placed(engine, wanted, view)
            else:
                painted = enumerate(paint_alike(engine, wanted, view, *alike))
            for place, result in painted:
                task = tasks[place]
                if isinstance(result, RejectedError):
                    rejected += result.seeds[:1]
                    _tell_rejected(task, result, view, as_json=as_json)
                    continue
                with uninterrupted():
                    files.append(destination.save(task, result))
                    view.result(_result_line(task, result, files[-1], as_json=as_json))
                tell_warnings(result, view, told)
                if _safety(result) == "blurred":
                    view.warn(f"{files[-1]}: blurred, because the safety checker flagged it")
    except (CancelledError, KeyboardInterrupt):
        raise CancelledError(f"interrupted; {_kept(files, tasks, destination)}") from None
    except GessoError:
        if files:
            view.line(_kept(files, tasks, destination))
        raise
    finally:
        view.end_bar()
    return files, rejected


def _kept(files: Sequence[Path], tasks: Sequence[Task], destination: Destination) -> str:
    """What there is of pictures that were not all made, and how to get the others."""
    kept = f"kept {len(files)} of {destination.counted(len(tasks))}"
    return f"{kept}; the same command with --resume makes the rest" if destination.with_metadata else kept


def _safety(result: Result) -> str:
    """What the safety checker's look came to: off, passed or blurred."""
    verdict = result.metadata.get("safety")
    return str(verdict.get("decision")) if isinstance(verdict, dict) else "off"


def _tell_rejected(task: Task, error: RejectedError, view: View, *, as_json: bool) -> None:
    """That a picture was painted and is not to be seen."""
    view.warn(f"seed {error.seeds[0]}: not written, because the safety checker rejected it")
    if as_json:
        line = {"file": None, "prompt": task.request.prompt, "seed": error.seeds[0], "index": task.index}
        view.result(json.dumps({**line, "image": task.image, "safety": "rejected"}, ensure_ascii=False))


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
        **({"frames": len(result.frames), "fps": result.fps} if result.frames else {}),
        "safety": _safety(result),
        "metadata": result.metadata,
    }
    return json.dumps(line, ensure_ascii=False)
