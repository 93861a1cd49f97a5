"""A model card from what was measured: scores, loss curve, samples, recipe. It states nothing that no file holds.

    python -m gesso.training.card MODEL_FOLDER --run RUN_FOLDER --tokenizer RUN_FOLDER --score SCORE_JSON

Needs matplotlib (`pip install 'gesso[train]'`). Not here: training, scoring (`gesso eval shapes --output`).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from gesso.errors import FileError, MissingError


def write_card(model: Path, run: Path, tokenizer: Path, score: Path) -> Path:
    """Write README.md, score.json, pictures and the tokenizer's recipe into a model's folder; returns the card's path.

    Raises FileError where a log, a sheet or the score is missing.
    """
    answers = {name: value for name, value in _read_json(score).items() if name != "answers"}
    sheets = sorted(run.glob("samples-*.png"))
    if not sheets:
        raise FileError(run, "holds no sample sheet", "train at least one evaluation")
    shutil.copyfile(sheets[-1], model / "samples.png")
    logs = {"tokenizer": _log(tokenizer), "transformer": _log(run)}
    draw_losses(logs, model / "loss.png")
    (model / "score.json").write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(tokenizer / "export" / "training.json", model / "training-tokenizer.json")
    card = model / "README.md"
    card.write_text(_card(model, answers, logs, _read_json(run / "recipe.json")), encoding="utf-8")
    return card


def draw_losses(logs: Mapping[str, list[dict[str, float]]], path: Path) -> None:
    """One panel a network: training loss by step, logarithmic."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingError("matplotlib, which draws the loss curve,", "pip install 'gesso[train]'") from error
    figure = Figure(figsize=(9, 3), layout="constrained")
    for index, (name, rows) in enumerate(logs.items(), 1):
        axes = figure.add_subplot(1, len(logs), index)
        steps = [row["step"] for row in rows if "loss" in row]
        axes.plot(steps, [row["loss"] for row in rows if "loss" in row], linewidth=0.8)
        axes.set(title=f"{name}: training loss", xlabel="step", yscale="log")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=90)


def _card(
    model: Path, answers: Mapping[str, object], logs: Mapping[str, list[dict[str, float]]], recipe: Mapping[str, object]
) -> str:
    categories = answers["categories"]
    request = answers["request"]
    assert isinstance(categories, Mapping) and isinstance(request, Mapping)
    rows = "\n".join(
        f"| {name} | {share['right']} of {share['asked']} | {share['share']:.3f} "
        f"| {share['interval'][0]:.3f} to {share['interval'][1]:.3f} |"
        for name, share in categories.items()
    )
    tokenizer = [row for row in logs["tokenizer"] if "evaluation/psnr" in row][-1]
    transformer = [row for row in logs["transformer"] if "evaluation/bit_accuracy" in row][-1]
    hours = sum(_seconds(log) for log in logs.values()) / 3600
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    options = " ".join(_option(name.replace("_", "-"), value) for name, value in request.items())
    return f"""# {model.name}

A small Infinity (bitwise visual autoregression) that paints the *shapes* world at 64 x 64 pixels. Trained from nothing
by Gesso's own trainers; {size / 1e6:.2f} MB of bfloat16 safetensors. Licence: Apache-2.0, like Gesso.

![samples](samples.png)

Each row one prompt of the recipe's eight, each column one seed.

## Score

Strict judge (everything the prompt states, and nothing else), on combinations that never occur in training:

| category | right | share | 95 % interval |
|---|---|---|---|
{rows}
| **overall** (mean of categories) | | **{answers["overall"]:.3f}** | |

Reproduce: `gesso eval shapes {options}`

Tokenizer on held-out scenes: {tokenizer["evaluation/psnr"]:.2f} dB. Transformer on held-out scenes:
{transformer["evaluation/bit_accuracy"]:.4f} of bits right, loss {transformer["evaluation/validation_loss"]:.4f}.

## Training

![loss](loss.png)

`gesso train shapes-tokenizer`, then `gesso train infinity-nano`; about {hours:.1f} hours of two CPU cores in all, other
work going on beside it. `training-tokenizer.json` and `training.json` hold the recipes as they ended; both runs were
resumed on the way with another number of steps, which changes the rate's curve.

## Limits

It knows 75 words, eight shapes, eight colours, up to four objects, one size of picture. Words it does not know are
ignored.
"""


def _option(name: str, value: object) -> str:
    """A field as the command line spells it."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {','.join(map(str, value)) if isinstance(value, list) else value}"


def _seconds(rows: list[dict[str, float]]) -> float:
    """Seconds trained, over all sittings: the clock starts anew at each resume."""
    total, last = 0.0, 0.0
    for row in rows:
        now = row.get("seconds", last)
        total += now - last if now >= last else now
        last = now
    return total


def _log(run: Path) -> list[dict[str, float]]:
    path = run / "log.jsonl"
    if not path.is_file():
        raise FileError(run, "holds no log.jsonl", "name the folder of a training run")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _read_json(path: Path) -> dict[str, object]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(path, "cannot be read as JSON", "make it with gesso eval shapes --output") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    for name in ("run", "tokenizer", "score"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    write_card(given.model, given.run, given.tokenizer, given.score)


if __name__ == "__main__":
    main()
