"""`gesso models`: what can be painted with. The catalogue itself is in `gesso.weights`."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gesso.weights.catalogue import Entry

models = typer.Typer(help="List the models, or show one.", invoke_without_command=True)

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


def _as_json(entry: "Entry") -> str:
    return json.dumps(dataclasses.asdict(entry), ensure_ascii=False, default=str)
