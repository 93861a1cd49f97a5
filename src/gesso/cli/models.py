"""`gesso models`: what can be painted with. The catalogue itself is in `gesso.weights`."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gesso.weights.catalogue import Entry
    from gesso.weights.checksums import Findings

models = typer.Typer(help="List, show and verify models.", invoke_without_command=True)

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a model.")]


@models.callback()
def default(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the models, or show one."""
    if context.invoked_subcommand is None:
        list_models(as_json)


@models.command("list")
def list_models(as_json: JsonOption = False) -> None:
    """List the models, one a line."""
    from gesso.weights import catalogue

    entries = [catalogue.find(name) for name in catalogue.names()]
    if as_json:
        for entry in entries:
            typer.echo(_as_json(entry))
        return
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        here = "not here" if entry.missing_files() else "ready"
        typer.echo(f"{entry.name:<{width}}  {here:<10}{entry.family:<10}{entry.description}")


@models.command("show")
def show_model(
    name: Annotated[str, typer.Argument(help="A catalogue name, or the path of a checkpoint.")],
    as_json: JsonOption = False,
) -> None:
    """Show all that is known of one model."""
    from gesso.weights import catalogue

    entry = catalogue.find(name)
    if as_json:
        typer.echo(_as_json(entry))
        return
    for field in dataclasses.fields(entry):
        typer.echo(f"{field.name:<14}{getattr(entry, field.name)}")
    if missing := entry.missing_files():
        typer.echo(f"{'not here':<14}{', '.join(missing)}")


@models.command("verify")
def verify_model(
    name: Annotated[str, typer.Argument(help="A catalogue name, or the path of a checkpoint.")],
    list_file: Annotated[
        Path | None, typer.Option("--list", help="Checksums to hold it against; else those it has, or that ship.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Whether files are there, not what is in them.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Hold a model's files against its checksums, and name each that is missing or altered.

    Exit status 1 if there is one.
    """
    from gesso.weights import catalogue

    checked, found = _verified(catalogue.find(name), list_file, contents=not quick)
    if as_json:
        typer.echo(json.dumps({"files": checked, "missing": found.missing, "altered": found.altered}))
    else:
        for problem, paths in (("missing", found.missing), ("altered", found.altered)):
            for path in paths:
                typer.echo(f"{problem}: {path}")
        if found.fine:
            typer.echo(f"{name}: {checked} files, all {'there' if quick else 'whole'}")
    if not found.fine:
        raise typer.Exit(1)


@models.command("manifest")
def make_manifest(
    folder: Annotated[Path, typer.Argument(help="A folder in diffusers' layout, whole and unaltered.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File; manifest.txt in the folder.")] = None,
) -> None:
    """Write the checksums of a model's files, for gesso models verify. An existing list is not replaced."""
    from gesso.errors import FileError
    from gesso.files import ready_folder, written_aside
    from gesso.weights import checksums

    if not folder.is_dir():
        raise FileError(folder, "no such folder", "name a folder with a model in it")
    path = output or folder / checksums.NAME
    if path.exists():
        raise FileError(path, "is there already", "remove it first, or name another with --output")
    digests = checksums.make(folder)
    if not digests:
        raise FileError(folder, "holds no model in diffusers' layout", "name a folder with a model_index.json")
    ready_folder(path.parent)
    with written_aside(path) as aside:
        aside.write_text(checksums.write(digests), encoding="utf-8")
    typer.echo(f"{path}: {len(digests)} files")


def _verified(entry: "Entry", list_file: Path | None, *, contents: bool) -> "tuple[int, Findings]":
    """How many files were looked at, and what is wrong with them."""
    from gesso.errors import FileError
    from gesso.weights import checksums, manifest

    if entry.layout == "gesso" and list_file is None:
        listed = manifest.names(entry.folder)
        return len(listed), manifest.findings(entry.folder, listed, contents=contents)
    places = [list_file] if list_file else [entry.folder / checksums.NAME, checksums.SHIPPED / f"{entry.name}.txt"]
    path = next((place for place in places if place.is_file()), places[0])
    if not path.is_file():
        raise FileError(
            path, "there is no such list", "make one while the model is whole: gesso models manifest FOLDER"
        )
    if not entry.folder.is_dir():
        raise FileError(entry.folder, "no such folder", entry.fetch and f"fetch it first: {entry.fetch}")
    listed = checksums.read(path)
    if listed.skipped:
        raise FileError(path, f"has lines that are no file and checksum, such as: {listed.skipped[0]}")
    return len(listed.digests), checksums.check(entry.folder, listed, contents=contents)


def _as_json(entry: "Entry") -> str:
    return json.dumps(dataclasses.asdict(entry), ensure_ascii=False, default=str)
