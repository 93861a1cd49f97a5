"""`gesso eval`: scores of models. Painting and judging are in `gesso.evaluation`; here they are called and printed."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gesso.cli.entries import default_size, find_entry
from gesso.cli.machine import Attention, Compile, Device, Dtype, check_machine, machine_settings, new_engine
from gesso.cli.options import check_fields, request_fields, request_options
from gesso.cli.view import View
from gesso.errors import CancelledError, FileError
from gesso.files import ready_folder, written_aside
from gesso.settings import Settings

if TYPE_CHECKING:
    from gesso.engine import Engine
    from gesso.evaluation.faces import FacesScore
    from gesso.evaluation.shapes import ShapesScore
    from gesso.models.face_recogniser import FaceRecogniser

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
    device: Device = None,
    dtype: Dtype = None,
    attention: Attention = None,
    compile: Compile = None,
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
    settings = machine_settings({"device": device, "dtype": dtype, "attention": attention, "compile": compile})

    from gesso.evaluation.shapes import check_prompts

    check_prompts(prompts)
    entry.require_files()
    check_machine(settings)
    _check_file(output)
    with View(silent=as_json) as view:
        score = _score(fields, prompts, seed if isinstance(seed, int) else 0, settings, view)
    _hand_over(score.as_dict(), lambda: _print_table(score), output, as_json)


@evaluate.command("faces")
@request_options(without=("identity", "identity_pose", "identity_variant", "num_images"))
def faces(
    options: dict[str, object],
    trials: Annotated[int, typer.Option(help="How many people, each painted once.")] = 200,
    recogniser: Annotated[
        Path | None, typer.Option(help="Folder of the recogniser that judges; else the model's own, which flatters it.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Also write score and answers as JSON.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    attention: Attention = None,
    compile: Compile = None,
    as_json: Annotated[bool, typer.Option("--json", help="The score as one JSON object, without the answers.")] = False,
) -> None:
    """Score how well a model keeps a person, on cartoon people that training never saw.

    Each is painted from one portrait, in the pose, mood and surroundings of another.
    A picture counts if, of twenty people, it is most like its own; chance is 1 in 20.
    """
    entry = find_entry(options)
    acts = {name: options.pop(f"identity_{name}") for name in ("strength", "start", "end")}
    identity = {name: value for name, value in acts.items() if value is not None}
    fields = request_fields(options, default_size(entry))
    check_fields(fields)
    seed = fields.pop("seed", 0)
    settings = machine_settings({"device": device, "dtype": dtype, "attention": attention, "compile": compile})

    from gesso.evaluation import faces as likeness

    likeness.check_trials(trials)
    entry.require_files()
    check_machine(settings)
    _check_file(output)
    judge = likeness.recogniser_of(recogniser or entry.folder)
    with View(silent=as_json) as view:
        score = _likeness(judge, fields, identity, trials, seed if isinstance(seed, int) else 0, settings, view)
    _hand_over(score.as_dict(), lambda: _print_likeness(score), output, as_json)


def _likeness(
    judge: "FaceRecogniser",
    fields: dict[str, object],
    identity: dict[str, object],
    trials: int,
    seed: int,
    settings: Settings,
    view: View,
) -> "FacesScore":
    from gesso.evaluation.faces import evaluate as evaluate_faces

    with _judging(settings, trials, view) as (engine, judged):
        return evaluate_faces(engine, judge, fields, trials=trials, seed=seed, identity=identity, report=judged)


def _print_likeness(score: "FacesScore") -> None:
    typer.echo(f"{'people known again':<24}{'right':>6}{'of':>6}{'share':>8}   95 % interval")
    for name, share in (("in painted pictures", score.painted), ("in the world's own", score.drawn)):
        low, high = share.interval
        typer.echo(f"{name:<24}{share.right:>6}{share.asked:>6}{share.value:>8.3f}   {low:.3f} to {high:.3f}")
    typer.echo(f"{'by chance':<36}{score.chance:>8.3f}")
    typer.echo(f"likeness to the right person {score.own:.3f}, to others {score.others:.3f}; {score.seconds:.1f} s")


def _score(fields: dict[str, object], prompts: int, seed: int, settings: Settings, view: View) -> "ShapesScore":
    from gesso.evaluation.shapes import evaluate as evaluate_shapes

    with _judging(settings, prompts, view) as (engine, judged):
        numbers = count(1)
        return evaluate_shapes(engine, fields, prompts=prompts, seed=seed, report=lambda answer: judged(next(numbers)))


@contextmanager
def _judging(settings: Settings, pictures: int, view: View) -> "Iterator[tuple[Engine, Callable[[int], None]]]":
    """An engine, and what is to hear how many pictures were judged; an interruption says how far it came."""
    judged = 0

    def report(number: int) -> None:
        nonlocal judged
        judged = number
        view.move_bar(number)

    try:
        with new_engine(settings) as engine:
            view.begin_bar("painting and judging", pictures)
            yield engine, report
    except KeyboardInterrupt:
        raise CancelledError(f"interrupted after {judged} pictures; nothing was scored") from None
    finally:
        view.end_bar()


def _check_file(output: Path | None) -> None:
    """Refuse, before any work, a place where no file can be written. Raises FileError."""
    if output is None:
        return
    if output.is_dir():
        raise FileError(output, "is a folder, not a file", f"name one in it, such as {output / 'score.json'}")
    ready_folder(output.parent)


def _hand_over(whole: dict[str, object], print_table: Callable[[], None], output: Path | None, as_json: bool) -> None:
    """Print a score, as JSON or as its table, and only then write the file: a full disk takes nothing away."""
    if as_json:
        typer.echo(json.dumps({name: value for name, value in whole.items() if name != "answers"}, ensure_ascii=False))
    else:
        print_table()
    if output is not None:
        with written_aside(output) as aside:
            aside.write_text(json.dumps(whole, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _print_table(score: "ShapesScore") -> None:
    typer.echo(f"{'category':<18}{'right':>6}{'asked':>7}{'share':>8}   95 % interval")
    for name, share in score.categories.items():
        low, high = share.interval
        typer.echo(f"{name:<18}{share.right:>6}{share.asked:>7}{share.value:>8.3f}   {low:.3f} to {high:.3f}")
    typer.echo(f"{'overall':<31}{score.overall:>8.3f}   mean of the categories; {score.seconds:.1f} s")
