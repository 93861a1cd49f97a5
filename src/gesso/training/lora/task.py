"""The task of training a LoRA: a frozen base model as generation loads it, layers beside its own, data of the user's.

Text encoders are let go once every caption has been read, and the autoencoder leaves the device between sheets. The
base is this task's alone: no other pipeline of the process shares a part of it. Not here: see the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gesso.adapters.formats.places import family_of
from gesso.devices import CPU, kind_of
from gesso.engine.device import default_device
from gesso.engine.loading import load_pipeline, load_planner
from gesso.memory_modes import FULL
from gesso.pipelines.contract import Pipeline, Plan
from gesso.request import parse_request
from gesso.training.flow import draw_shares
from gesso.training.latents import Rounds
from gesso.training.lora import file
from gesso.training.lora.data import Example, check_sizes, find_examples, with_trigger
from gesso.training.lora.layers import LoraNetwork, target_layers
from gesso.training.lora.material import Material, RememberedText, Row
from gesso.training.lora.objectives import objective
from gesso.training.lora.recomputing import recompute_blocks
from gesso.training.lora.settings import LoraSettings
from gesso.training.painting import paint
from gesso.training.pictures import sheet, to_tensor

_MEASURED = 16  # pictures that are measured where none are held out
_CHUNK = 4  # of them at once
_PROMPTS = 4  # captions that a sheet shows
_SMALL = 128  # pixels up to which a sheet is doubled
_LONGEST_PROMPT = 2000  # characters of a request's


class LoraTask:
    """Learn from pictures and captions what a model is to add to what it does.

    Raises RequestError for settings that the model cannot have, FileError for data that cannot be used, and whatever
    loading the model raises.
    """

    def __init__(self, settings: LoraSettings, batch: int, seed: int) -> None:
        self.settings, self.batch, self.seed = settings, batch, seed
        examples = find_examples(settings)
        device = settings.device or default_device()
        # What does not fit is told before weights are read.
        _check(load_planner(settings.model, device, settings.dtype), settings, examples)
        self.pipeline: Any = load_pipeline(settings.model, device, settings.dtype, memory=str(FULL), shared=False)
        self.plans = _plans(self.pipeline, settings, examples)
        self.size = _size(self.plans[0])
        taken = len(examples) - settings.held_out
        self.examples, held_out = examples[:taken], examples[taken:]
        self.measured = held_out or examples[:_MEASURED]
        self.rounds = Rounds(taken, batch, seed)
        self.role, base, shapes = _shapes(self.pipeline, settings)
        self.base, self.family = base.eval().requires_grad_(False), family_of(base)
        alpha = settings.rank if settings.alpha is None else settings.alpha
        self.network = LoraNetwork(shapes, settings.rank, alpha, seed).to(self.pipeline.device)
        self.network.attach(self.base)
        if settings.recompute:
            recompute_blocks(self.base)
        self.text = self.pipeline.text = RememberedText(self.pipeline.text, self.pipeline.device)
        self.objective = objective(self.family, self.pipeline, self.text, settings)
        identity = f"{self.family} {self.pipeline.digest} {self.pipeline.dtype}"
        self.material = Material(_latents_of(self.pipeline), self.text, self.size, identity)
        self._plain: tuple[float, list[list[Tensor]]] | None = None

    def heavy_modules(self) -> list[nn.Module]:
        """None: the hooks on the base's layers are not compiled."""
        return []

    def prepare(self, folder: Path, report: Callable[[int], None]) -> None:
        """Make latents and text features that the run's folder lacks, and let text encoders go."""
        self.material.open(folder)
        for made, example in enumerate(dict.fromkeys([*self.examples, *self.measured]), 1):
            self.material.latent(example)
            self.material.text(example.caption)
            report(made)
        self.pipeline.encode(self.plans)  # which reads what sheets are painted of
        self.text.let_go()
        self._lay_autoencoder(CPU)

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """That of this step's batch, some of whose captions are left out."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = [self.examples[place] for place in self.rounds.of(step)]
        dropped = (torch.rand(len(chosen), generator=generator) < self.settings.caption_drop).tolist()
        latent_BChw, texts = self._batch(chosen)
        texts = [self.objective.unprompted(row) if out else row for row, out in zip(texts, dropped, strict=True)]
        shares_B = draw_shares(len(chosen), generator)
        return self.objective.loss(latent_BChw, texts, shares_B, generator), {}

    def evaluate(self) -> dict[str, float]:
        """Loss with the LoRA and without, of pictures that are held out or else of the first, at fixed times."""
        return {"loss": self._measure(), "loss_without": self._without()[0]}

    def samples(self) -> Image.Image:
        """Rows: prompts. The left half is without the LoRA, the right half with it and the same seeds."""
        without, adapted = self._without()[1], self._paint()
        scale = 2 if max(self.size) <= _SMALL else 1
        return sheet([[*before, *after] for before, after in zip(without, adapted, strict=True)], scale)

    def export(self, folder: Path, facts: Mapping[str, object]) -> None:
        recipe = facts.get("recipe")
        loop = recipe.get("loop") if isinstance(recipe, Mapping) else None
        said = file.metadata(
            family=self.family,
            model=Path(self.settings.model).name,  # of a path no more: the file may go to others
            digest=self.pipeline.digest,
            trigger=self.settings.trigger,
            rank=self.network.rank,
            alpha=self.network.alpha,
            size=self.size,
            pictures=len(self.examples),
            loop=loop if isinstance(loop, Mapping) else {},
        )
        file.write(folder, self.network.tensors(self.role, self.pipeline.dtype), said, facts)

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _batch(self, examples: list[Example]) -> tuple[Tensor, list[Row]]:
        latents = [self.material.latent(example) for example in examples]
        return torch.stack(latents), [self.material.text(example.caption) for example in examples]

    def _measure(self) -> float:
        count, total = len(self.measured), 0.0
        shares_N = (torch.arange(count) + 0.5) / count
        for first in range(0, count, _CHUNK):
            chosen = slice(first, first + _CHUNK)
            latent_BChw, texts = self._batch(self.measured[chosen])
            generator = torch.Generator().manual_seed(first)
            loss = self.objective.loss(latent_BChw, texts, shares_N[chosen], generator)
            total += float(loss) * len(texts)
        return total / count

    def _without(self) -> tuple[float, list[list[Tensor]]]:
        """What the base does by itself, which is found once."""
        if self._plain is None:
            with self.network.put_aside():
                self._plain = self._measure(), self._paint()
        return self._plain

    def _paint(self) -> list[list[Tensor]]:
        """A row of pictures a prompt."""
        self._lay_autoencoder(str(self.pipeline.device))
        rows = [paint(self.pipeline, [plan.request]) for plan in self.plans]
        self._lay_autoencoder(CPU)
        return [[to_tensor(np.array(image)[None])[0] for image in row] for row in rows]

    def _lay_autoencoder(self, device: str) -> None:
        """It is wanted for sheets alone, and a card's memory for learning."""
        if kind_of(self.pipeline.device) != CPU:
            self.pipeline.autoencoder.to(device)


def _check(pipeline: Pipeline, settings: LoraSettings, examples: list[Example]) -> None:
    """Whether model, settings and pictures go together; weights are not looked at."""
    _shapes(pipeline, settings)
    size = _size(_plans(pipeline, settings, examples)[0])
    check_sizes(examples, *size, settings.most_enlarged)


def _size(plan: Plan) -> tuple[int, int]:
    """Width and height of what a plan paints."""
    width, height = plan.request.width, plan.request.height
    assert width is not None and height is not None
    return width, height


def _shapes(pipeline: Pipeline, settings: LoraSettings) -> tuple[str, nn.Module, dict[str, Any]]:
    """The role of a pipeline's network, the network, and the layers of it that get a LoRA. Raises RequestError."""
    role = "unet" if hasattr(pipeline, "unet") else "transformer"
    network: nn.Module = getattr(pipeline, role)
    return role, network, target_layers(network, family_of(network), settings.targets, settings.rank)


def _plans(pipeline: Pipeline, settings: LoraSettings, examples: list[Example]) -> list[Plan]:
    """Of the sheet's rows. Raises RequestError for a size or a field that the model cannot have."""
    prompts = [with_trigger(prompt, settings.trigger) for prompt in settings.sample_prompts]
    prompts = prompts or list(dict.fromkeys(example.caption for example in examples))[:_PROMPTS]
    fields: dict[str, Any] = {"width": settings.width, "height": settings.height, "seed": 0}
    if _films(pipeline):
        fields["frames"] = 1
    fields |= {"num_images": settings.sample_seeds, "model": settings.model, **dict(settings.generation)}
    asked = {name: value for name, value in fields.items() if value is not None}
    return [pipeline.plan(parse_request({"prompt": prompt[:_LONGEST_PROMPT], **asked})) for prompt in prompts]


def _films(pipeline: Any) -> bool:
    return hasattr(getattr(pipeline, "planner", None), "frame_stride")


def _latents_of(pipeline: Any) -> Callable[[Tensor], Tensor]:
    """Pictures to what the network paints: scaled latents, or Infinity's features before they are bits."""
    if hasattr(pipeline, "latents_of"):
        return pipeline.latents_of
    return lambda image_B3HW: pipeline.autoencoder.encode(image_B3HW.to(pipeline.device))
