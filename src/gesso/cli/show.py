"""`gesso show` and `gesso rerun`: a picture's own request, and the same picture made again and compared.

Here: printing a record, comparing pixels, and the three verdicts. What is said of a picture holds for a video. Not
here: reading files (`gesso.metadata`, `gesso.pictures`, `gesso.videos`).
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from gesso.cache_settings import spelled
from gesso.cli.machine import Device, check_machine, machine_settings, new_engine
from gesso.cli.view import View
from gesso.errors import CancelledError, MissingError, RequestError
from gesso.files import ready_folder
from gesso.memory_modes import FULL, parse_mode
from gesso.metadata import Record, digests_of_person, file_digest, pixels_digest, read_record, versions
from gesso.pictures import picture_format, read_pixels
from gesso.settings import Settings
from gesso.videos import check_video_name, is_video, read_frames

if TYPE_CHECKING:
    from PIL import Image

    from gesso.events import Result

EQUAL, WITHIN, DIFFERENT = "equal", "equal within", "different"
# Above this the pictures differ in more than the order of floating-point sums.
_LARGEST_NOISE = 8
# What records say that were written before there was a choice.
_PLAIN = {"attention": "sdpa", "compiled": False}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two pictures compared: the verdict, the largest difference of a channel (of 255; None if the sizes differ).

    Videos are compared frame by frame; None is also for other numbers of frames.
    """

    verdict: str
    largest: int | None

    def __str__(self) -> str:
        return f"{WITHIN} {self.largest}/255" if self.verdict == WITHIN else self.verdict


def show(
    file: Annotated[Path, typer.Argument(help="A picture or video that Gesso saved.")],
    as_json: Annotated[bool, typer.Option("--json", help="The whole record as one JSON object.")] = False,
) -> None:
    """Show the request that a picture carries.

    Also the versions, device, seconds and digests of its making.
    """
    record = read_record(file)
    changed = not _pixels_are_those_made(file, record)
    if as_json:
        typer.echo(json.dumps({**record.data, "pixels_changed": changed}, ensure_ascii=False))
        return
    with View() as view:
        for name, value in _rows(record):
            typer.echo(f"{name:<16}{value}")
        if changed:
            view.warn(f"{file}: its pixels were changed after it was made")


def rerun(
    file: Annotated[Path, typer.Argument(help="A picture or video that Gesso saved.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Also save the new picture here.")] = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="The verdict as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no warnings.")] = False,
) -> None:
    """Make a picture again and say whether it is equal.

    It is painted in the dtype and by the attention of the record; where the machine lacks that, it says so.
    The verdict is "equal", "equal within k/255" (floating-point noise of another machine or version) or "different".
    The last ends with status 1.
    """
    record = read_record(file)
    next(_frames_of(file))  # a file that cannot be read is found before any work
    settings = _settings_of(record, device)
    if output is not None:
        check_video_name(output) if is_video(file) else picture_format(output)
        ready_folder(output.parent)
    with View(silent=as_json or quiet) as view:
        view.line(f"loading {record.request.model}")
        result = _made_again(record, settings)
        notes = [*_changes(record, result), *_file_changes(file, record)]
        for note in notes:
            view.warn(note)
    compared = _compare(file, record, result)
    if output is not None:
        result.save(output)
    if as_json:
        verdict = {
            "file": str(file),
            "verdict": compared.verdict,
            "largest_difference": compared.largest,
            "notes": notes,
        }
        typer.echo(json.dumps(verdict, ensure_ascii=False))
    else:
        typer.echo(str(compared))
    if compared.verdict == DIFFERENT:
        raise typer.Exit(1)


def _settings_of(record: Record, device: str | None) -> Settings:
    """The settings in force, but with the arithmetic of the record where this machine can do it."""
    flags: dict[str, object] = {"device": device, "dtype": record.data.get("dtype") or None}
    how = {"attention": record.data.get("attention"), "compile": record.data.get("compiled")}
    flags["memory"] = _arithmetic_of(record.data.get("memory"))
    settings = machine_settings(flags | how)
    try:
        check_machine(settings)
    except (MissingError, RequestError):  # what is used instead is told, as every other change
        settings = machine_settings(flags | {"attention": _PLAIN["attention"], "compile": _PLAIN["compiled"]})
        check_machine(settings)
    return settings


def _arithmetic_of(memory: object) -> str | None:
    """The memory mode of a record where that changes pictures; where parts rest is for this machine to say."""
    mode = parse_mode(str(memory or FULL))
    return str(replace(mode, placement=FULL.placement)) if mode.scheme or mode.tiling else None


def _made_again(record: Record, settings: Settings) -> "Result":
    try:
        with new_engine(settings) as engine:
            return engine.run(record.request_for_this_picture())[0]
    except KeyboardInterrupt:
        raise CancelledError("interrupted; nothing was compared") from None


def _compare(file: Path, record: Record, result: "Result") -> Comparison:
    """The new picture against the file; a lossy file's record still knows the digest of the picture before coding."""
    if not _is_png(file) and result.metadata["pixels"] == record.pixels:
        return Comparison(verdict=EQUAL, largest=0)
    return compare_frames(result.frames or [result.image], _frames_of(file))


def _frames_of(file: Path) -> "Iterator[Image.Image]":
    """The frames of a video, or a picture as the only one."""
    if is_video(file):
        yield from read_frames(file)
    else:
        yield read_pixels(file)


def compare_frames(new: "Iterable[Image.Image]", old: "Iterable[Image.Image]") -> Comparison:
    """Two pictures or videos, RGB: equal, equal within k/255 for small k, or different."""
    largest = 0
    for one, other in zip_longest(new, old):
        difference = None if one is None or other is None else _largest_difference(one.convert("RGB"), other)
        if difference is None:
            return Comparison(verdict=DIFFERENT, largest=None)
        largest = max(largest, difference)
    if largest > _LARGEST_NOISE:
        return Comparison(verdict=DIFFERENT, largest=largest)
    return Comparison(verdict=WITHIN if largest else EQUAL, largest=largest)


def _largest_difference(new: "Image.Image", old: "Image.Image") -> int | None:
    from PIL import ImageChops

    if new.size != old.size:
        return None
    extremes = cast("tuple[tuple[int, int], ...]", ImageChops.difference(new, old).getextrema())
    return max(high for _, high in extremes)


def _is_png(file: Path) -> bool:
    return file.suffix.lower() == ".png"


def _pixels_are_those_made(file: Path, record: Record) -> bool:
    """Whether the file still holds what was made; a lossy file never does, so of that nothing is said."""
    return not _is_png(file) or pixels_digest(read_pixels(file)) == record.pixels


def _changes(record: Record, result: "Result") -> Iterator[str]:
    """What is not as it was when the picture was made, and may therefore change pixels."""
    now = cast("dict[str, object]", result.metadata["model"])["digest"]
    if now != record.model_digest:
        yield f"the weights of {record.request.model} changed: {record.model_digest[:23]}… then, {str(now)[:23]}… now"
    for name, version in versions().items():
        then = record.versions.get(name, "unknown")
        if then != version:
            yield f"{name} was {then}, is {version}"
    yield from _adapter_changes(record, result)
    then, now = (data.get("refiner") for data in (record.data, result.metadata))
    if then != now:
        yield f"the refiner changed: {str(then)[:23]}… then, {str(now)[:23]}… now"
    for name in ("device", "dtype", "attention", "compiled"):
        then, now = (data.get(name, _PLAIN.get(name)) for data in (record.data, result.metadata))
        if then != now:
            yield f"{name} was {then}, is {now}"
    yield from _safety_change(record, result)


def _safety_change(record: Record, result: "Result") -> Iterator[str]:
    """That the picture was looked at otherwise when it was made, so that it may be blurred now, or then."""
    then, now = (data.get("safety") for data in (record.data, result.metadata))
    then, now = (verdict if isinstance(verdict, dict) else {"decision": "off"} for verdict in (then, now))
    if then.get("model") != now.get("model"):
        yield f"the safety checker was {str(then.get('model'))[:23]}, is {str(now.get('model'))[:23]}"
    if then["decision"] != now["decision"]:
        yield f"the safety checker's decision was {then['decision']}, is {now['decision']}"


def _adapter_changes(record: Record, result: "Result") -> Iterator[str]:
    """Which adapters' files are others than they were; both lists are in the order of the request."""
    then, now = (cast("list[dict[str, object]]", data.get("lora") or []) for data in (record.data, result.metadata))
    for old, new in zip(then, now, strict=False):
        if old.get("digest") != new.get("digest"):
            digests = (str(each.get("digest"))[:23] for each in (old, new))
            yield f"the adapter {new.get('source')} changed: {'… then, '.join(digests)}… now"
        elif old.get("config") != new.get("config"):
            yield f"the adapter {new.get('source')} has another adapter_config.json beside it now than then"


def _file_changes(file: Path, record: Record) -> Iterator[str]:
    """What was changed outside of Gesso: the picture's own pixels, or the picture it started from."""
    if not _pixels_are_those_made(file, record):
        yield f"{file}: its pixels were changed after it was made"
    given = (("init_image", record.request.init_image, "starting picture"), ("mask", record.request.mask, "mask"))
    for field, path, what in given:
        if path is not None and file_digest(Path(path)) != record.data.get(field):
            yield f"{path}: the {what} was changed since"
    if record.request.identity is not None:
        now = digests_of_person(record.request.identity)
        if now != record.data.get("identity"):
            yield f"{record.request.identity.image}: the person's pictures were changed since"


def _rows(record: Record) -> Iterator[tuple[str, object]]:
    """What `gesso show` prints: the request without what was left out of it, then how it was made."""
    for name, value in record.request.model_dump(mode="json").items():
        if name == "cache" and record.request.cache is not None:
            yield name, spelled(record.request.cache)
        elif name == "lora":
            yield from (
                (name, f"{each['source']}::{1 if each['scale'] is None else each['scale']:g}") for each in value
            )
        elif value not in (None, ""):
            yield name, value
    yield "this picture", f"number {record.index}, seed {record.seed}"
    yield "weights", record.model_digest or "unknown"
    yield "made with", ", ".join(f"{name} {version}" for name, version in record.versions.items())
    how = {name: record.data.get(name, plain) for name, plain in _PLAIN.items()}
    yield "on", f"{record.data.get('device')}, {record.data.get('dtype')}, company {record.data.get('company')}"
    yield "by", f"attention {how['attention']}, {'compiled' if how['compiled'] else 'not compiled'}"
    cached = record.data.get("cache")
    if isinstance(cached, dict):
        counts = f"{cached.get('computed')} computed, {cached.get('forecast')} forecast"
        yield "steps taken", f"{counts}: {cached.get('steps')}"
    if "likeness" in record.data:
        likeness = record.data["likeness"]
        yield "likeness", "unknown, no face is seen, or too small a one" if likeness is None else likeness
    yield from _safety_row(record)
    seconds = record.data.get("seconds")
    if isinstance(seconds, dict):
        yield "seconds", ", ".join(f"{stage} {value}" for stage, value in cast("dict[str, float]", seconds).items())
    yield "pixels", record.pixels


def _safety_row(record: Record) -> Iterator[tuple[str, object]]:
    """What a safety checker made of the picture, where it was looked at."""
    verdict = record.data.get("safety")
    if isinstance(verdict, dict) and verdict.get("decision") != "off":
        why = f" ({verdict['reason']})" if verdict.get("reason") else ""
        yield "checked", f"{verdict.get('decision')}{why}, score {verdict.get('score')}, by {verdict.get('model')}"
