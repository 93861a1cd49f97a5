"""A model card from what was measured: scores, loss curve, samples, recipe. It states nothing that no file holds.

    python -m gesso.training.card MODEL_FOLDER --run RUN_FOLDER --score SCORE_JSON [--tokenizer RUN_FOLDER]
    python -m gesso.training.card MODEL_FOLDER --run RUN_FOLDER --score SCORE_JSON [--autoencoder RUN_FOLDER]

The run is the transformer's. The first stage's run, tokenizer or autoencoder, may be left out: a model that goes on
from another one, or that shares its first stage, has none of its own. Needs matplotlib (`pip install 'gesso[train]'`).
Not here: training, scoring (`gesso eval shapes --output`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from gesso.errors import FileError, MissingError
from gesso.files import written_aside
from gesso.weights.configuration import read_config

Log = list[dict[str, float]]
"""The lines of a run's log."""


class _Kind(NamedTuple):
    """What a family's card says: what the model is, the first stage's name, and its figures on held-out scenes."""

    words: str
    stage: str
    figures: tuple[tuple[str, str], ...]


_KINDS = {
    "infinity": _Kind(
        "A small Infinity (bitwise visual autoregression)",
        "tokenizer",
        (("bit_accuracy", "{:.4f} of bits right"), ("validation_loss", "loss {:.4f}")),
    ),
    "flux": _Kind(
        "A small FLUX (rectified flow in the latents of a small autoencoder; diffusers' network)",
        "autoencoder",
        (("validation_loss", "loss {:.4f}"),),
    ),
    "z-image": _Kind(
        "A small Z-Image (rectified flow in the latents of a small autoencoder; S3-DiT)",
        "autoencoder",
        (("validation_loss", "loss {:.4f}"),),
    ),
}


def write_card(model: Path, run: Path, score: Path, first_stage: Path | None = None) -> Path:
    """Write README.md, score.json, pictures and the first stage's recipe into a model's folder; returns the card.

    `run` is the transformer's, `first_stage` the tokenizer's or the autoencoder's, if there is one.
    Raises FileError where a log, a sheet or the score is missing, or the model is of a family that has no card.
    """
    config = read_config(model)
    kind = _KINDS.get(str(config.get("family")))
    if kind is None:
        raise FileError(model, f"holds a model of the family {config.get('family')}", f"one of {', '.join(_KINDS)}")
    measured = _read_json(score, "make it with gesso eval shapes --output")
    if not {"categories", "overall", "request"} <= measured.keys():
        raise FileError(score, "is no shapes-score", "make it with gesso eval shapes --output")
    answers = {name: value for name, value in measured.items() if name != "answers"}
    sheets = sorted(run.glob("samples-*.png"))
    if not sheets:
        raise FileError(run, "holds no sample sheet", "train at least one evaluation")
    logs = {kind.stage: _log(first_stage)} if first_stage else {}
    logs["transformer"] = _log(run)
    text = _card(model, config, kind, answers, logs, [path for path in (first_stage, run) if path])
    with written_aside(model / "loss.png") as aside:
        draw_losses(logs, aside)
    contents = {"samples.png": sheets[-1].read_bytes(), "score.json": _json_bytes(answers), "README.md": text.encode()}
    if first_stage:
        recipe = _read_json(first_stage / "export" / "training.json", "train the first stage to its end")
        contents[f"training-{kind.stage}.json"] = _json_bytes(recipe)
    for name, content in contents.items():
        with written_aside(model / name) as aside:
            aside.write_bytes(content)
    return model / "README.md"


def draw_losses(logs: Mapping[str, Log], path: Path) -> None:
    """One panel a network: training loss by step, logarithmic."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingError("matplotlib, which draws the loss curve,", "pip install 'gesso[train]'") from error
    figure = Figure(figsize=(4.5 * len(logs), 3), layout="constrained")
    for index, (name, rows) in enumerate(logs.items(), 1):
        axes = figure.add_subplot(1, len(logs), index)
        steps = [row["step"] for row in rows if "loss" in row]
        axes.plot(steps, [row["loss"] for row in rows if "loss" in row], linewidth=0.8)
        axes.set(title=f"{name}: training loss", xlabel="step", yscale="log")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=90)


def _card(
    model: Path,
    config: Mapping[str, Any],
    kind: _Kind,
    answers: Mapping[str, Any],
    logs: Mapping[str, Log],
    runs: list[Path],
) -> str:
    options = " ".join(_option(name.replace("_", "-"), value) for name, value in answers["request"].items())
    generation = config["generation"]
    return f"""# {model.name}

{kind.words} that paints the *shapes* world
at {generation["width"]} x {generation["height"]} pixels. Trained by Gesso's own trainers; {_size(model)} of bfloat16
safetensors. Licence: Apache-2.0, like Gesso.

![samples](samples.png)

Each row one prompt of the recipe's eight, each column one seed.

## Score

Strict judge (everything the prompt states, and nothing else), on combinations that never occur in training:

| category | right | share | 95 % interval |
|---|---|---|---|
{_rows(answers["categories"])}
| **overall** (mean of categories) | | **{answers["overall"]:.3f}** | |

Reproduce: `gesso eval shapes {options}`

{_held_out(kind, logs)}

## Training

![loss](loss.png)

{_commands(kind, logs, runs)}

## Limits

It knows {len(config["text"]["vocabulary"])} words, eight shapes, eight colours, up to four objects, one size of
picture. Words it does not know are ignored.
"""


def _rows(categories: Mapping[str, Any]) -> str:
    return "\n".join(
        f"| {name} | {share['right']} of {share['asked']} | {share['share']:.3f} "
        f"| {share['interval'][0]:.3f} to {share['interval'][1]:.3f} |"
        for name, share in categories.items()
    )


def _size(model: Path) -> str:
    """All of a model's weights, and what of them it shares with others."""
    listed = _read_json(model / "manifest.json", "export the model again")
    weights = [entry for name, entry in listed.items() if name.endswith(".safetensors")]
    total = sum(entry["bytes"] for entry in weights)
    shared = sum(entry["bytes"] for entry in weights if entry.get("shared"))
    others = f", {shared / 1e6:.2f} MB of them shared with other models," if shared else ""
    return f"{total / 1e6:.2f} MB{others}"


def _held_out(kind: _Kind, logs: Mapping[str, Log]) -> str:
    """What the networks reach on held-out scenes, from the last evaluation that a log holds."""
    sentences = []
    if kind.stage in logs:
        psnr = _last(logs[kind.stage], "evaluation/psnr")
        sentences.append(f"{kind.stage.capitalize()} on held-out scenes: {psnr:.2f} dB.")
    figures = [words.format(_last(logs["transformer"], f"evaluation/{name}")) for name, words in kind.figures]
    sentences.append(f"Transformer on held-out scenes: {', '.join(figures)}.")
    return "\n".join(sentences)


def _commands(kind: _Kind, logs: Mapping[str, Log], runs: list[Path]) -> str:
    """How it was trained, one fact a line."""
    recipes = [_read_json(run / "recipe.json", "name the folder of a training run") for run in runs]
    commands = ", then ".join(f"`gesso train {recipe['recipe']}`" for recipe in recipes)
    lines = [f"{commands}; about {sum(map(_seconds, logs.values())) / 3600:.1f} hours in all."]
    sittings = [f"{name} in {_sittings(log)}" for name, log in logs.items() if _sittings(log) > 1]
    if sittings:
        lines.append(f"Trained in more than one sitting: {', '.join(sittings)}.")
    settings = recipes[-1]["settings"]
    if settings.get("start_from"):
        lines.append("It went on from an earlier model (`start_from`), whose own training is not counted here.")
    if settings.get("train_text") is False:
        lines.append(f"Its word encoder is that of {Path(settings['text']).name}, as it is.")
    files = f"`training-{kind.stage}.json` and `training.json` hold" if len(runs) > 1 else "`training.json` holds"
    return "\n".join([*lines, f"{files} what was set, as it was in the end."])


def _option(name: str, value: object) -> str:
    """A field as the command line spells it."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {','.join(map(str, value)) if isinstance(value, list) else value}"


def _last(rows: Log, name: str) -> float:
    found = [row[name] for row in rows if name in row]
    if not found:
        raise FileError("log.jsonl", f"holds no {name}", "train at least one evaluation")
    return found[-1]


def _seconds(rows: Log) -> float:
    """Seconds trained, over all sittings: the clock starts anew at each resume."""
    total, last = 0.0, 0.0
    for row in rows:
        now = row.get("seconds", last)
        total += now - last if now >= last else now
        last = now
    return total


def _sittings(rows: Log) -> int:
    clocks = [row["seconds"] for row in rows if "seconds" in row]
    return 1 + sum(after < before for before, after in pairwise(clocks))


def _log(run: Path) -> Log:
    path = run / "log.jsonl"
    if not path.is_file():
        raise FileError(run, "holds no log.jsonl", "name the folder of a training run")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _json_bytes(values: object) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()


def _read_json(path: Path, way_out: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(path, "cannot be read as JSON", way_out) from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--score", type=Path, required=True)
    stage = parser.add_mutually_exclusive_group()
    stage.add_argument("--tokenizer", type=Path, dest="stage")
    stage.add_argument("--autoencoder", type=Path, dest="stage")
    given = parser.parse_args(arguments)
    write_card(given.model, given.run, given.score, given.stage)


if __name__ == "__main__":
    main()
