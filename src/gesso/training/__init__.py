"""Trainers, and `run`, which trains a recipe. Networks are in `models`, worlds in `worlds`.

A recipe (`recipes/`) is a function that returns a whole configuration: a task (what is learned from what) and the
loop's settings. `loop` drives any task; `autoencoder`, `infinity`, `kl_autoencoder`, `flow` and `lora` are tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gesso.training.loop import Report


def run(
    recipe: str,
    output: str | Path,
    overrides: Mapping[str, str] | None = None,
    *,
    model: str | None = None,
    data: str | Path | None = None,
    resume: bool = False,
    report: Report | None = None,
) -> dict[str, float]:
    """Train a recipe by name into a folder and return its last evaluation.

    `model` and `data` are those of the recipe "lora", which wants both. `overrides` are `field=value` settings of the
    recipe ("steps", "batch", …), checked against its own fields.
    Raises RequestError for an unknown recipe or field, FileError where the folder is in use without `resume`.
    """
    from gesso.training import recipes
    from gesso.training.loop import Trainer

    chosen = recipes.override(
        recipes.load(recipe, model=model, data=None if data is None else str(data)), overrides or {}
    )
    return Trainer(chosen.task(), chosen.loop, Path(output), recipe=chosen.as_dict(), report=report).run(resume=resume)
