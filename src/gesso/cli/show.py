"""`gesso show` and `gesso rerun`: a picture's own request, and the same picture made again and compared.

Here: printing a record, comparing pixels, and the three verdicts. Not here: reading files (`gesso.metadata`,
`gesso.pictures`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from gesso.cli.view import View
from gesso.errors import CancelledError
from gesso.files import ready_folder
from gesso.metadata import Record, file_digest, pixels_digest, read_record, save_picture, versions
from gesso.pictures import picture_format, read_pixels
from gesso.settings import load_settings

if TYPE_CHECKING:
    from PIL import Image

    from gesso.events import Result

EQUAL, WITHIN, DIFFERENT = "equal", "equal within", "different"
# Above this the pictures differ in more than the order of floating-point sums.
_LARGEST_NOISE = 8


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two pictures compared: the verdict, the largest difference of a channel (of 255; None if the sizes differ)."""

    verdict: str
    largest: int | None

    def __str__(self) -> str:
        return f"{WITHIN} {self.largest}/255" if self.verdict == WITHIN else self.verdict


def show(
    file: Annotated[Path, typer.Argument(help="A picture that Gesso saved.")],
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
    file: Annotated[Path, typer.Argument(help="A picture that Gesso saved.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Also save the new picture here.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; else the best there is.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The verdict as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no warnings.")] = False,
) -> None:
    """Make a picture again and say whether it is equal.

    The verdict is "equal", "equal within k/255" (floating-point noise of another machine or version) or "different".
    The last ends with status 1.
    """
    record = read_record(file)
    old = read_pixels(file)
    settings = load_settings({"device": device})
    if output is not None:
        picture_format(output)
        ready_folder(output.parent)
    with View(silent=as_json or quiet) as view:
        view.line(f"loading {record.request.model}")
        result = _made_again(record, settings.device)
        notes = [*_changes(record, result), *_file_changes(file, record)]
        for note in notes:
            view.warn(note)
    compared = _compare(file, old, record, result)
    if output is not None:
        save_picture(result.image, output, result.metadata)
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


def _made_again(record: Record, device: str | None) -> "Result":
    from gesso.engine import Engine

    try:
        with Engine(device=device) as engine:
            return engine.run(record.request_for_this_picture())[0]
    except KeyboardInterrupt:
        raise CancelledError("interrupted; nothing was compared") from None


def _compare(file: Path, old: "Image.Image", record: Record, result: "Result") -> Comparison:
    """The new picture against the file; a lossy file's record still knows the digest of the picture before coding."""
    new = result.image.convert("RGB")
    if not _is_png(file) and pixels_digest(new) == record.pixels:
        return Comparison(verdict=EQUAL, largest=0)
    return compare_pictures(new, old)


def compare_pictures(new: "Image.Image", old: "Image.Image") -> Comparison:
    """Two RGB pictures: equal, equal within k/255 for small k, or different."""
    largest = _largest_difference(new, old)
    if largest is None or largest > _LARGEST_NOISE:
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
    for name in ("device", "dtype"):
        if record.data.get(name) != result.metadata.get(name):
            yield f"{name} was {record.data.get(name)}, is {result.metadata.get(name)}"


def _file_changes(file: Path, record: Record) -> Iterator[str]:
    """What was changed outside of Gesso: the picture's own pixels, or the picture it started from."""
    if not _pixels_are_those_made(file, record):
        yield f"{file}: its pixels were changed after it was made"
    start = record.request.init_image
    if start is not None and file_digest(Path(start)) != record.data.get("init_image"):
        yield f"{start}: the starting picture was changed since"


def _rows(record: Record) -> Iterator[tuple[str, object]]:
    """What `gesso show` prints: the request without what was left out of it, then how it was made."""
    for name, value in record.request.model_dump(mode="json").items():
        if value not in (None, ""):
            yield name, value
    yield "this picture", f"number {record.index}, seed {record.seed}"
    yield "weights", record.model_digest or "unknown"
    yield "made with", ", ".join(f"{name} {version}" for name, version in record.versions.items())
    yield "on", f"{record.data.get('device')}, {record.data.get('dtype')}, company {record.data.get('company')}"
    seconds = record.data.get("seconds")
    if isinstance(seconds, dict):
        yield "seconds", ", ".join(f"{stage} {value}" for stage, value in cast("dict[str, float]", seconds).items())
    yield "pixels", record.pixels
