"""`gesso train`: names a recipe, changes some of its values, and hands it to the trainer. No training happens here."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from gesso.cli.view import View
from gesso.errors import CancelledError, RequestError

_DEFAULT_FOLDER = Path("runs")
_SCORE = "evaluation/"


def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's name; without one, the recipes are listed.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder of the run; else runs/RECIPE.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Of the recipe lora: what it is for, by name or path.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="PATH", help="Of lora: pictures with captions, or JSON lines.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's newest checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="An error as one JSON object; the list as JSON.")] = False,
) -> None:
    """Train a model by a recipe, or list the recipes.

    The folder holds checkpoints, the loss log (JSON lines) and sample sheets.
    A recipe is a Python function that returns the whole configuration; --set changes single values of it.
    lora trains a LoRA of a model that is here: gesso train lora --model flux-nano --data FOLDER -o OUT.
    """
    from gesso import training
    from gesso.training import recipes

    if recipe is None:
        names = recipes.names()
        typer.echo(json.dumps(names) if as_json else "\n".join(names))
        return
    overrides = dict(_change(text) for text in changes or ())
    theirs = None if data is None else str(data)
    recipes.override(recipes.load(recipe, model=model, data=theirs), overrides)  # refuses what is wrong before the bar
    folder = output or _DEFAULT_FOLDER / recipe  # made once the task can be
    with View(silent=as_json) as view:
        try:
            report = _reporter(recipe, view)
            last = training.run(recipe, folder, overrides, model=model, data=data, resume=resume, report=report)
        except KeyboardInterrupt:
            raise CancelledError(f"interrupted; the same command with --resume goes on in {folder}") from None
    typer.echo(json.dumps({"folder": str(folder), **last}))


def _reporter(recipe: str, view: View) -> Callable[[int, int, Mapping[str, float]], None]:
    """Moves the bar with every line of the log, and prints the evaluations."""
    begun = False

    def report(step: int, steps: int, figures: Mapping[str, float]) -> None:
        nonlocal begun
        if not begun:
            view.begin_bar(f"training {recipe}", steps, "steps")
            begun = True
        view.move_bar(step)
        scores = {name.removeprefix(_SCORE): value for name, value in figures.items() if name.startswith(_SCORE)}
        if scores:
            view.line(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))

    return report


def _change(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise RequestError("set", text, "KEY=VALUE, such as steps=1000")
    return key.strip(), value.strip()
