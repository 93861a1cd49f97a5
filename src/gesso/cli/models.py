"""`gesso models`: what can be painted with. The catalogue itself, and fetching, are in `gesso.weights`."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gesso.cli.view import View

if TYPE_CHECKING:
    from gesso.errors import GessoError
    from gesso.weights.catalogue import Entry
    from gesso.weights.checksums import Findings

models = typer.Typer(help="List, show, pull, verify and remove models.", invoke_without_command=True)

NameArgument = Annotated[str, typer.Argument(help="A catalogue name.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a model.")]


@models.callback()
def default(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the models, or show one."""
    if context.invoked_subcommand is None:
        list_models(as_json)


@models.command("list")
def list_models(as_json: JsonOption = False) -> None:
    """List the models, one a line: what their weights take in memory (bfloat16) and to download, and their licence.

    Your own are added in models.toml of the folder GESSO_HOME (docs/models.md).
    """
    entries, problems = _listed()
    if as_json:
        for entry in entries:
            typer.echo(_as_json(entry))
        for problem in problems:
            typer.echo(json.dumps(problem.as_dict(), ensure_ascii=False))
        return
    rows = [("name", "", "family", "memory", "download", "licence", "")]
    rows += [_row(entry) for entry in entries]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for *row, last in rows:
        typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + f"  {last}")
    for problem in problems:
        typer.echo(f"not usable: {problem}")


def _listed() -> "tuple[list[Entry], list[GessoError]]":
    """Every model, and what is wrong with those that the user has added."""
    from gesso.errors import GessoError
    from gesso.weights import catalogue

    entries: list[Entry] = []
    problems: list[GessoError] = [*catalogue.problems()]
    for name in catalogue.names():
        try:
            entries.append(catalogue.find(name))
        except GessoError as error:  # a path of the user's with nothing usable there
            problems.append(error)
    return entries, problems


def _row(entry: "Entry") -> tuple[str, ...]:
    from gesso.weights import hub

    here = "not here" if entry.missing_files() else "ready"
    memory, download = sum(entry.memory().values()), entry.download
    licence = f"{entry.licence} (to be accepted)" if entry.gated else entry.licence
    sizes = (hub.amount(memory) if memory else "-", f"about {hub.amount(download)}" if download else "-")
    revisions = [source.revision for source in entry.sources if source.revision]
    name = f"{entry.name}@{revisions[0][:12]}" if revisions else entry.name
    return (name, here, entry.family, *sizes, licence, entry.description)


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
    for label, value in _described(entry):
        typer.echo(f"{label:<14}{value}")
    if missing := entry.missing_files():
        typer.echo(f"{'not here':<14}{', '.join(missing)}")


@models.command("pull")
def pull_model(
    name: NameArgument,
    origin: Annotated[Literal["huggingface", "modelscope"], typer.Option("--from", help="Hub.")] = "huggingface",
    revision: Annotated[
        list[str] | None,
        typer.Option(
            "--revision",
            help="Branch, tag or commit; REPOSITORY=REVISION for a model of several repositories.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a published model, or the rest of it, or what of it is damaged.

    The disk's room is looked at first; every size and checksum that the hub states is checked. Run again after an
    interruption, it goes on where it stopped. Tokens are the settings hf_token and modelscope_token.
    """
    from gesso.weights import catalogue, hub

    entry = catalogue.find(name)
    with View(silent=as_json) as view:
        try:
            pulled = hub.pull(entry, origin=origin, revisions=revision or (), watcher=_Watcher(view, name))
        except KeyboardInterrupt:
            view.end_bar()
            view.line(f"{name}: what has come is kept; the same command goes on from there")
            raise
    if as_json:
        typer.echo(json.dumps({"name": name, "from": origin, **dataclasses.asdict(pulled)}, default=str))
    else:
        typer.echo(f"{name}: {pulled.files} files, {hub.amount(pulled.size)}, all whole, in {pulled.folder}")


class _Watcher:
    """A pull's progress as a bar of megabytes."""

    def __init__(self, view: View, name: str) -> None:
        self._view = view
        self._name = name

    def begin(self, total: int, here: int) -> None:
        if here:
            self._view.line(f"{self._name}: {here / 1e6:.0f} MB are here already and are checked first")
        self._view.begin_bar(self._name, max(round(total / 1e6), 1), "MB")

    def move(self, here: int) -> None:
        self._view.move_bar(here / 1e6)

    def wait(self) -> None:
        self._view.line(f"{self._name}: another pull of it runs; waiting for that")


@models.command("remove")
def remove_model(
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove a pulled model's files. What ships and what you trained stays."""
    from gesso.errors import RequestError
    from gesso.weights import catalogue, hub

    entry = catalogue.find(name)
    folder, size = hub.removable(entry)
    if not yes:
        what = f"remove {folder} and free {hub.amount(size)}"
        if as_json or not sys.stdin.isatty():
            raise RequestError("remove", name, "confirmed", f"--yes would {what}")
        typer.confirm(f"{what[0].upper()}{what[1:]}?", abort=True, err=True)
    freed = hub.remove(entry)
    if as_json:
        typer.echo(json.dumps({"name": name, "folder": str(folder), "freed": freed}))
    else:
        typer.echo(f"{folder}: removed, {hub.amount(freed)} freed")


@models.command("verify")
def verify_model(
    name: Annotated[str, typer.Argument(help="A catalogue name, or the path of a checkpoint.")],
    list_file: Annotated[
        Path | None, typer.Option("--list", help="Checksums to hold it against; else those it has, or that ship.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Whether files are there, not what is in them.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Hold a model's files against its checksums, and name each that is missing, short or altered.

    Exit status 1 if there is one.
    """
    from gesso.weights import catalogue

    checked, found = _verified(catalogue.find(name), list_file, contents=not quick)
    if as_json:
        typer.echo(json.dumps({"files": checked, **dataclasses.asdict(found)}))
    else:
        for problem, paths in dataclasses.asdict(found).items():
            for path in paths:
                typer.echo(f"{problem}: {path}")
        if found.fine:
            typer.echo(f"{name}: {checked} files, all {'there' if quick else 'whole'}")
    if not found.fine:
        raise typer.Exit(1)


@models.command("manifest")
def make_manifest(
    name: Annotated[str, typer.Argument(help="A model's name, or its folder or file: whole and unaltered.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File; else manifest.txt in the folder, FILE.txt of a file.")
    ] = None,
    kind: Annotated[
        Literal["md5", "sha256"], typer.Option("--digest", help="md5, as Z-Image's own lists have, or sha256.")
    ] = "md5",
) -> None:
    """Write the checksums of all files that gesso reads of a model, for gesso models verify.

    An existing list is not replaced.
    """
    from gesso.errors import FileError
    from gesso.files import ready_folder, written_aside
    from gesso.weights import catalogue, checksums
    from gesso.weights.files import files_of

    entry = catalogue.find(name)
    entry.require_files()
    if entry.layout == "gesso":
        raise FileError(name, "has its list, manifest.json, already", f"gesso models verify {name}")
    files = files_of(entry.folder, entry.files)
    if elsewhere := [file for file in files if not file.is_relative_to(entry.folder)]:
        raise FileError(elsewhere[0], f"does not lie in {entry.folder}, whose list it would be in", "list it there")
    path = output or _list_beside(entry)
    if path.exists():
        raise FileError(path, "is there already", "remove it first, or name another with --output")
    digests = checksums.make(entry.folder, files, kind)
    ready_folder(path.parent)
    with written_aside(path) as aside:
        aside.write_text(checksums.write(digests), encoding="utf-8")
    typer.echo(f"{path}: {len(digests)} files")


def _list_beside(entry: "Entry") -> Path:
    """Where the list of a model lies that is the user's own; several single files may lie in one folder."""
    from gesso.weights import checksums

    if entry.layout == "file" and not entry.sources:
        return entry.folder / f"{entry.files[0]}.txt"
    return entry.folder / checksums.NAME


def _verified(entry: "Entry", list_file: Path | None, *, contents: bool) -> "tuple[int, Findings]":
    """How many files were looked at, and what is wrong with them."""
    from gesso.errors import FileError
    from gesso.weights import checksums, manifest

    if not entry.folder.is_dir():
        entry.require_files()
    own_list = entry.layout == "gesso" or (entry.folder / manifest.NAME).is_file()  # exported, or pulled
    if own_list and list_file is None:
        listed = manifest.names(entry.folder)
        return len(listed), manifest.findings(entry.folder, listed, contents=contents)
    shipped = checksums.SHIPPED / f"{entry.name}.txt"
    places = [list_file] if list_file else [_list_beside(entry), entry.folder / checksums.NAME, shipped]
    path = next((place for place in places if place.is_file()), places[0])
    if not path.is_file():
        raise FileError(
            path, "there is no such list", f"make one while the model is whole: gesso models manifest {entry.name}"
        )
    listed = checksums.read(path)
    if listed.skipped:
        raise FileError(path, f"has lines that are no file and checksum, such as: {listed.skipped[0]}")
    return len(listed.digests), checksums.check(entry.folder, listed, contents=contents)


def _described(entry: "Entry") -> "Iterator[tuple[str, object]]":
    """What there is to say of a model, line by line."""
    from gesso.weights import hub

    left_out = ("sources", "parameters", "download", "gated", "needs")
    for field in dataclasses.fields(entry):
        if field.name not in left_out:
            yield field.name, getattr(entry, field.name)
    if entry.gated:
        yield "gated", entry.gated
    if memory := entry.memory():
        parts = ", ".join(f"{part} {hub.amount(count)}" for part, count in memory.items())
        yield "memory", f"{hub.amount(sum(memory.values()))} of weights in bfloat16: {parts}"
    if entry.download:
        yield "download", f"about {hub.amount(entry.download)}"
    for need in entry.needs:
        yield "needs", need
    here = hub.pulled_from(entry)
    for source in entry.sources:
        what = f"{', '.join(source.patterns)} of {source.repository}, {source.revision or 'main branch'}"
        from_hub = next((name for name in (source.repository, source.modelscope) if name in here), None)
        of = f" of {from_hub}" if from_hub != source.repository else ""
        yield "pulled", what + (f"; here: {here[from_hub]}{of}" if from_hub else "")


def _as_json(entry: "Entry") -> str:
    shown = dataclasses.asdict(entry) | {"memory": entry.memory(), "missing": entry.missing_files()}
    return json.dumps(shown, ensure_ascii=False, default=str)
