"""`gesso eval`: scores of models. Painting and judging are in `gesso.evaluation`; here they are called and printed."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gesso.cli.entries import default_size, find_entry
from gesso.cli.options import check_fields, request_fields, request_options
from gesso.cli.view import View
from gesso.errors import CancelledError
from gesso.files import ready_folder, written_aside
from gesso.settings import load_settings

if TYPE_CHECKING:
    from gesso.evaluation.shapes import Answer, ShapesScore

evaluate = typer.Typer(help="Score a model.", no_args_is_help=True)


@evaluate.callback()
def scores() -> None:
    """Score a model."""


@evaluate.command("shapes")
@request_options()
def shapes(
    options: dict[str, object],
    prompts: Annotated[int, typer.Option(help="How many held-out prompts, the six categories in turn.")] = 600,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Also write score and answers as JSON.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; else the best there is.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The score as one JSON object, without the answers.")] = False,
) -> None:
    """Score a model by GenEval's six categories, asked of the shapes world.

    No combination that is asked for occurs in training.
    A picture counts only if everything the prompt states is right and nothing else is in it.
    """
    entry = find_entry(options)
    fields = request_fields(options, default_size(entry))
    check_fields(fields)
    seed = fields.pop("seed", 0)
    settings = load_settings({"device": device})

    from gesso.evaluation.shapes import check_prompts

    check_prompts(prompts)
    entry.require_files()
    if output is not None:
        ready_folder(output.parent)
    with View(silent=as_json) as view:
        score = _score(fields, prompts, seed if isinstance(seed, int) else 0, settings.device, view)
    whole = score.as_dict()
    if output is not None:
        with written_aside(output) as aside:
            aside.write_text(json.dumps(whole, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps({name: value for name, value in whole.items() if name != "answers"}, ensure_ascii=False))
        return
    _print_table(score)


def _score(fields: dict[str, object], prompts: int, seed: int, device: str | None, view: View) -> "ShapesScore":
    from gesso.engine import Engine
    from gesso.evaluation.shapes import evaluate as evaluate_shapes

    judged = 0

    def report(answer: "Answer") -> None:
        nonlocal judged
        judged += 1
        view.move_bar(judged)

    try:
        with Engine(device=device) as engine:
            view.begin_bar("painting and judging", prompts)
            return evaluate_shapes(engine, fields, prompts=prompts, seed=seed, report=report)
    except KeyboardInterrupt:
        raise CancelledError(f"interrupted after {judged} pictures; nothing was scored") from None
    finally:
        view.end_bar()


def _print_table(score: "ShapesScore") -> None:
    typer.echo(f"{'category':<18}{'right':>6}{'asked':>7}{'share':>8}   95 % interval")
    for name, share in score.categories.items():
        low, high = share.interval
        typer.echo(f"{name:<18}{share.right:>6}{share.asked:>7}{share.value:>8.3f}   {low:.3f} to {high:.3f}")
    typer.echo(f"{'overall':<31}{score.overall:>8.3f}   mean of the categories; {score.seconds:.1f} s")
