"""The recipe of a LoRA, for any model that is here: settings by its family, and a loop by its size."""

from __future__ import annotations

from gesso.errors import RequestError
from gesso.training.loop import LoopSettings
from gesso.training.lora.layers import FAMILIES
from gesso.training.lora.settings import BitsLoraSettings, FlowLoraSettings, LoraSettings, NoiseLoraSettings
from gesso.training.lora.task import LoraTask
from gesso.training.recipes.recipe import Recipe
from gesso.weights import catalogue

_SETTINGS: dict[str, type[LoraSettings]] = {"sdxl": NoiseLoraSettings, "infinity": BitsLoraSettings}


def lora(model: str, data: str) -> Recipe:
    """A LoRA of a model by name or path, on a folder or a file of JSON lines.

    Nano models learn in minutes on a CPU, many pictures a step at a high rate; large ones one picture a step.
    Raises RequestError or FileError for a model that is not known, or of a family that nothing is trained for.
    """
    entry = catalogue.find_painter(model)
    if entry.family not in FAMILIES:
        raise RequestError("model", model, "of a family that LoRAs are trained for", f"one of: {', '.join(FAMILIES)}")
    kind, nano = _SETTINGS.get(entry.family, FlowLoraSettings), entry.layout == "gesso"
    loop = LoopSettings(
        steps=600 if nano else 1500,
        batch=16 if nano else 1,
        learning_rate=2e-3 if nano else 1e-4,
        warmup=20,
        final_rate=0.1,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        clip=1.0,
        average_decay=0.98,
        precision="fp32",  # the base has the dtype that it is loaded in
        attention=("MATH",) if nano else ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"),
        evaluate_every=200 if nano else 250,
        checkpoint_every=100 if nano else 250,
    )
    return Recipe(name="lora", make=LoraTask, settings=kind(model=model, data=data, rank=8 if nano else 16), loop=loop)
