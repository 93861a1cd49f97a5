"""Data to train LoRAs on, made in a moment: a few coloured pictures with captions, and the recipe of a tiny run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from gesso.training import recipes
from gesso.training.recipes.recipe import Recipe

CAPTIONS = ("a red star", "two blue rings", "a red ring")
_COLOURS = ("red", "navy", "olive")
_LOOP = {"steps": 6, "batch": 2, "log_every": 1, "evaluate_every": 3, "checkpoint_every": 2, "warmup": 2}
_SETTINGS = {
    "dtype": "float32",
    "width": 64,
    "height": 64,
    "rank": 2,
    "sample_seeds": 1,
    "sample_prompts": '["a star"]',
}


def write_pictures(folder: Path, captions: tuple[str, ...] = CAPTIONS, side: int = 80) -> Path:
    """Wider than high, half of it in another colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, caption in enumerate(captions):
        picture = Image.new("RGB", (side + 16, side), _COLOURS[index % len(_COLOURS)])
        picture.paste("white", (0, 0, side // 2, side))
        picture.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption + "\n", encoding="utf-8")
    return folder


def lora_recipe(model: Path | str, data: Path, fields: Mapping[str, object] | None = None) -> Recipe:
    """Six steps of two pictures, at rank 2."""
    values = _LOOP | _SETTINGS | {"generation": '[["steps", 2], ["guidance", 1]]'} | dict(fields or {})
    chosen = recipes.load("lora", model=str(model), data=str(data))
    if "infinity" in str(model):
        del values["generation"]
    return recipes.override(chosen, {name: str(value) for name, value in values.items()})
