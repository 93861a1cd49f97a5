"""A model card from what was measured: scores, loss curve, samples, recipe. It states nothing that no file holds.

    python -m gesso.training.card MODEL_FOLDER --run RUN_FOLDER --score SCORE_JSON [--tokenizer RUN_FOLDER]
    python -m gesso.training.card MODEL_FOLDER --run RUN_FOLDER --score SCORE_JSON [--autoencoder RUN_FOLDER]
    python -m gesso.training.card MODEL_FOLDER --run RUN_FOLDER --score SCORE_JSON [OTHER_JUDGES_SCORE_JSON]
        [--autoencoder RUN_FOLDER] [--recogniser RUN_FOLDER] [--flux RUN_FOLDER]        (a model that paints people)

The run is that of the network which gives the model its name. Runs of what it builds on may be left out: a model that
goes on from another one, or that shares a part, has none of its own; what the folder then holds of them from an earlier
card (`training-….json`) stays and counts. Needs matplotlib (`pip install 'gesso[train]'`).
Not here: training, scoring (`gesso eval shapes --output`, `gesso eval faces --output`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from gesso.errors import FileError, GessoError, MissingError, RequestError
from gesso.files import written_aside
from gesso.weights import infinite_you_nano
from gesso.weights.configuration import read_config

_SCORES = ("score.json", "score-other-judge.json")

Log = list[dict[str, float]]
"""The lines of a run's log."""


class _Kind(NamedTuple):
    """What a card says: what the model is, what it builds on, its own network's name and figures, and its score."""

    words: str
    stages: tuple[str, ...]
    figures: tuple[tuple[str, str], ...]
    network: str = "transformer"
    world: str = "shapes"
    unseen: str = "scenes"


_KINDS = {
    "infinity": _Kind(
        "A small Infinity (bitwise visual autoregression)",
        ("tokenizer",),
        (("bit_accuracy", "{:.4f} of bits right"), ("validation_loss", "loss {:.4f}")),
    ),
    "flux": _Kind(
        "A small FLUX (rectified flow in the latents of a small autoencoder; diffusers' network)",
        ("autoencoder",),
        (("validation_loss", "loss {:.4f}"),),
    ),
    "z-image": _Kind(
        "A small Z-Image (rectified flow in the latents of a small autoencoder; S3-DiT)",
        ("autoencoder",),
        (("validation_loss", "loss {:.4f}"),),
    ),
}


_PEOPLE = _Kind(
    "A small InfiniteYou (InfuseNet and a resampler beside a small FLUX, which stays as it was)",
    ("autoencoder", "recogniser", "flux"),
    (("validation_loss", "loss {:.4f}"), ("validation_loss_stranger", "{:.4f} with strangers' vectors")),
    network="InfuseNet",
    world="faces",
    unseen="people",
)
_STAGES = {
    "tokenizer": ("psnr", "{:.2f} dB"),
    "autoencoder": ("psnr", "{:.2f} dB"),
    "recogniser": ("accuracy", "{:.3f} of people told from 19 others"),
    "flux": ("validation_loss", "loss {:.4f}"),
}
"""What a model builds on, by its option: the figure of its last evaluation, and how it is written."""
_NAMES = {"shapes": "shapes-score", "faces": "likeness-score"}
_WANTED = {"shapes": {"categories", "overall", "request"}, "faces": {"painted", "drawn", "own", "others", "request"}}


def write_card(model: Path, run: Path, scores: Sequence[Path], stages: Mapping[str, Path] | None = None) -> Path:
    """Write README.md, score.json, pictures and the stages' recipes into a model's folder; returns the card.

    `run` is that of the model's own network, `stages` are earlier runs by what they trained (`_STAGES`), as far as
    there are any. The first of `scores` is the model's, a second one that of another judge.
    Raises FileError where a log, a sheet or a score is missing or of something else, RequestError for a stage that the
    model does not build on.
    """
    config = read_config(model)
    kind = _PEOPLE if infinite_you_nano.paints_people(config) else _KINDS.get(str(config.get("family")))
    if kind is None:
        raise FileError(model, f"holds a model of the family {config.get('family')}", f"one of {', '.join(_KINDS)}")
    if unknown := [name for name in stages or {} if name not in kind.stages]:
        raise RequestError("--" + unknown[0], str((stages or {})[unknown[0]]), f"one of {', '.join(kind.stages)}")
    earlier = {name: stages[name] for name in kind.stages if name in stages} if stages else {}
    measured = [_score(path, kind.world) for path in scores]
    sheets = sorted(run.glob("samples-*.png"))
    if not sheets:
        raise FileError(run, "holds no sample sheet", "train at least one evaluation")
    kept = {name: log for name in kind.stages if name not in earlier and (log := _kept_log(model, name))}
    logs = {name: _log(folder) for name, folder in earlier.items()} | {kind.network: _log(run)}
    write = _people_card if kind is _PEOPLE else _shapes_card
    text = write(model, config, kind, measured, kept | logs, [*earlier.values(), run])
    with written_aside(model / "loss.png") as aside:
        draw_losses(logs, aside)
    contents = {"samples.png": sheets[-1].read_bytes(), "README.md": text.encode()}
    contents |= {name: _json_bytes(score) for name, score in zip(_SCORES, measured, strict=False)}
    for name, folder in earlier.items():
        recipe = _read_json(folder / "export" / "training.json", f"train the {name} to its end")
        contents[f"training-{name}.json"] = _json_bytes(recipe)
    for name, content in contents.items():
        with written_aside(model / name) as aside:
            aside.write_bytes(content)
    return model / "README.md"


def draw_losses(logs: Mapping[str, Log], path: Path) -> None:
    """One panel a network, two in a row: training loss by step, logarithmic."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingError("matplotlib, which draws the loss curve,", "pip install 'gesso[train]'") from error
    columns = min(len(logs), 2)
    rows = -(-len(logs) // columns)
    figure = Figure(figsize=(4.5 * columns, 3 * rows), layout="constrained")
    for index, (name, log) in enumerate(logs.items(), 1):
        axes = figure.add_subplot(rows, columns, index)
        steps = [line["step"] for line in log if "loss" in line]
        axes.plot(steps, [line["loss"] for line in log if "loss" in line], linewidth=0.8)
        axes.set(title=f"{name}: training loss", xlabel="step", yscale="log")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=90)


def _shapes_card(
    model: Path,
    config: Mapping[str, Any],
    kind: _Kind,
    scores: Sequence[Mapping[str, Any]],
    logs: Mapping[str, Log],
    runs: Sequence[Path],
) -> str:
    answers, generation = scores[0], config["generation"]
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

Reproduce: `gesso eval shapes {_options(answers["request"])}`

{_held_out(kind, logs)}

## Training

![loss](loss.png)

{_commands(kind, logs, runs)}

## Limits

It knows {len(config["text"]["vocabulary"])} words, eight shapes, eight colours, up to four objects, one size of
picture. Words it does not know are ignored.
"""


def _people_card(
    model: Path,
    config: Mapping[str, Any],
    kind: _Kind,
    scores: Sequence[Mapping[str, Any]],
    logs: Mapping[str, Log],
    runs: Sequence[Path],
) -> str:
    score, generation = scores[0], config["generation"]
    lines = {"painted, by the model's own recogniser, which flatters": score["painted"]}
    if len(scores) > 1:
        lines["painted, by a recogniser that the model never met"] = scores[1]["painted"]
    lines |= {"drawn by the world itself, by the model's own": score["drawn"]}
    return f"""# {model.name}

{kind.words}
that paints people of the *faces* world at {generation["width"]} x {generation["height"]} pixels, each from one
portrait. Trained by Gesso's own trainers; {_size(model)} of bfloat16 safetensors.
Licence: Apache-2.0, like Gesso. No photograph of anybody was used.

![samples](samples.png)

Each row one person that training never saw: the portrait to paint from, what is asked for as the world itself draws
it, and five pictures by five seeds.

## Likeness

{score["painted"]["asked"]} people that never occur in training. A picture is right if, of twenty people's other
portraits, its own person's is the most like it:

| pictures | right | share | 95 % interval |
|---|---|---|---|
{_rows(lines)}
| by chance | | {score["chance"]:.3f} | |

Mean cosine to the right person {score["own"]:.3f}, to the others {score["others"]:.3f}.

Reproduce: `gesso eval faces {_options(score["request"])}`

{_held_out(kind, logs)}

## Training

![loss](loss.png)

{_commands(kind, logs, runs)}

## Limits

It knows {len(config["text"]["vocabulary"])} words, cartoon faces and one size of picture. Photographs mean nothing
to it. Words it does not know are ignored.
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
    """What the networks reach on what training never saw, from the last evaluation that a log holds."""
    figures = {name: (_STAGES[name],) for name in kind.stages if name in logs} | {kind.network: kind.figures}
    sentences = []
    for name, wanted in figures.items():
        reached = ", ".join(words.format(_last(logs[name], f"evaluation/{figure}")) for figure, words in wanted)
        sentences.append(f"{name[:1].upper()}{name[1:]} on held-out {kind.unseen}: {reached}.")
    return "\n".join(sentences)


def _commands(kind: _Kind, logs: Mapping[str, Log], runs: Sequence[Path]) -> str:
    """How it was trained, one fact a line."""
    recipes = [_read_json(run / "recipe.json", "name the folder of a training run") for run in runs]
    commands = ", then ".join(f"`gesso train {recipe['recipe']}`" for recipe in recipes)
    lines = [f"{commands}; about {sum(map(_seconds, logs.values())) / 3600:.1f} hours in all."]
    sittings = [f"{name} in {_sittings(log)}" for name, log in logs.items() if _sittings(log) > 1]
    if sittings:
        lines.append(f"Trained in more than one sitting: {', '.join(sittings)}.")
    before = [name for name, log in logs.items() if not any("loss" in row for row in log)]
    lines += [f"Its {name} is that of an earlier training, which is not counted." for name in before]
    settings = recipes[-1]["settings"]
    if went_on := [f"`{recipe['recipe']}`" for recipe in recipes if recipe["settings"].get("start_from")]:
        lines.append(
            f"{', '.join(went_on)} went on from an earlier model (`start_from`), whose training is not counted."
        )
    if settings.get("train_text") is False:
        text = settings["text"]  # a model's name or folder, or sizes
        owner = Path(text).name if isinstance(text, str) else "the earlier one"
        lines.append(f"Its word encoder is that of {owner} as it was then, unchanged.")
    files = [f"`training-{name}.json`" for name in kind.stages if name in logs]
    said = f"{', '.join(files)}\nand `training.json` hold" if files else "`training.json` holds"
    return "\n".join([*lines, f"{said} what was set, as it was in the end."])


def _options(request: Mapping[str, object]) -> str:
    """The fields of a request as the command line spells them."""
    fields = {name: value for name, value in request.items() if name != "identity"}
    identity = request.get("identity")
    if isinstance(identity, Mapping):
        fields |= {f"identity-{name}": value for name, value in identity.items()}
    return " ".join(_option(name.replace("_", "-"), value) for name, value in fields.items())


def _option(name: str, value: object) -> str:
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


def _kept_log(model: Path, stage: str) -> Log:
    """The last evaluation of what an earlier card was told of, as a log without losses; empty where there is none."""
    path = model / f"training-{stage}.json"
    facts = _read_json(path, "train the stage again") if path.is_file() else {}
    figures = facts.get("evaluation") or {}
    return [{f"evaluation/{name}": value for name, value in figures.items()}] if figures else []


def _log(run: Path) -> Log:
    path = run / "log.jsonl"
    if not path.is_file():
        raise FileError(run, "holds no log.jsonl", "name the folder of a training run")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _score(path: Path, world: str) -> dict[str, Any]:
    """A score of a world, without its answers. Raises FileError."""
    made = f"make it with gesso eval {world} --output"
    found = _read_json(path, made)
    if found.get("score") != world or not _WANTED[world] <= found.keys():
        raise FileError(path, f"is no {_NAMES[world]}", made)
    return {name: value for name, value in found.items() if name != "answers"}


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
    parser.add_argument("--score", type=Path, required=True, nargs="+")
    for name in _STAGES:
        parser.add_argument(f"--{name}", type=Path)
    given = parser.parse_args(arguments)
    stages = {name: getattr(given, name) for name in _STAGES if getattr(given, name) is not None}
    try:
        write_card(given.model, given.run, given.score, stages)
    except GessoError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
