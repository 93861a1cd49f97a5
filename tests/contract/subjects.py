"""The pipelines that the contract is put to: every test of this folder runs once for each, `TRAINED` ones when slow.

A new family adds one entry to `SUBJECTS`, and is held to all of it: a name, and a function that makes the pipeline,
tiny and with random weights, so that it takes a moment (in a module of its own beside `tests/tiny_flow.py`, imported
inside the function where it brings heavy libraries).

`docs/add-a-model.md` shows a whole family; its example is a subject too, straight from the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module

import numpy as np
from PIL import Image

from gesso.engine import Engine
from gesso.engine.loading import load_pipeline
from gesso.pipelines.contract import Pipeline
from gesso.request import GenerationRequest
from gesso.sampling.flow import STOCHASTIC
from tests.contract.worked_example import example_pipeline
from tests.tiny_flow import TinyFlowPipeline
from tests.tiny_infinity import tiny_pipeline


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A pipeline and what the contract has to know of it.

    Attributes:
        pipeline: the same object for the whole module; it keeps no state of a request.
        fields: fields that every request to it carries.
        tolerance: the most by which a picture in company may differ from the one made alone, in 255ths.
    """

    pipeline: Pipeline
    fields: Mapping[str, object] = field(default_factory=dict)
    tolerance: int = 1

    def ask(self, prompt: str = "a red star", **fields: object) -> GenerationRequest:
        """A request to it, with seed 7 unless told otherwise."""
        return GenerationRequest.model_validate({"prompt": prompt, "seed": 7, **self.fields, **fields})

    def engine(self, max_batch: int = 16, pipeline: Pipeline | None = None) -> Engine:
        """An engine that knows only this pipeline, or one around it, whatever model is asked for."""
        chosen = pipeline or self.pipeline
        return Engine(device="cpu", load=lambda name, device, dtype: chosen, max_batch=max_batch)

    def close(self, one: Image.Image, other: Image.Image) -> bool:
        """Whether two pictures are equal up to what company may do to sums."""
        difference = np.asarray(one).astype(int) - np.asarray(other).astype(int)
        return int(np.abs(difference).max()) <= self.tolerance


@cache
def _shipped(name: str) -> Pipeline:
    return load_pipeline(name, "cpu")


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "infinity": lambda: Subject(pipeline=tiny_pipeline()),
    "infinity, patchified": lambda: Subject(pipeline=tiny_pipeline(patchify=True)),
    "infinity, revised": lambda: Subject(pipeline=tiny_pipeline(), fields={"revisions": 2}),
    "infinity, guided inside": lambda: Subject(pipeline=tiny_pipeline(), fields={"guidance_layer": -1}),
    "flow": lambda: Subject(pipeline=TinyFlowPipeline()),
    "flow, unguided": lambda: Subject(pipeline=TinyFlowPipeline(), fields={"guidance": 1.0, "width": 48}),
    "flux": lambda: Subject(pipeline=import_module("tests.tiny_flux").tiny_pipeline()),
    "flux, doubled": lambda: Subject(
        pipeline=import_module("tests.tiny_flux").tiny_pipeline(guidance_embeds=False), fields={"guidance": 2.0}
    ),
    "flux, with noise at every step": lambda: Subject(
        pipeline=import_module("tests.tiny_flux").tiny_pipeline(), fields={"scheduler": STOCHASTIC}
    ),
    "flux, with a person": lambda: Subject(
        pipeline=import_module("tests.tiny_infinite_you").tiny_pipeline_with_guest(),
        fields={"identity": {"image": str(import_module("tests.tiny_infinite_you").PERSON), "end": 0.8}},
    ),
    "z-image": lambda: Subject(pipeline=import_module("tests.tiny_z_image").tiny_pipeline()),
    "z-image, unguided": lambda: Subject(
        pipeline=import_module("tests.tiny_z_image").tiny_pipeline(), fields={"guidance": 0.0}
    ),
    "z-image, with noise at every step": lambda: Subject(
        pipeline=import_module("tests.tiny_z_image").tiny_pipeline(), fields={"scheduler": STOCHASTIC}
    ),
    "hunyuan-video": lambda: Subject(
        pipeline=import_module("tests.tiny_hunyuan_video").tiny_pipeline(tile=32, stride=24), fields={"height": 48}
    ),
    "hunyuan-video, doubled": lambda: Subject(
        pipeline=import_module("tests.tiny_hunyuan_video").tiny_pipeline(), fields={"true_guidance": 2.0, "frames": 1}
    ),
    "hunyuan-video, with noise at every step": lambda: Subject(
        pipeline=import_module("tests.tiny_hunyuan_video").tiny_pipeline(), fields={"scheduler": STOCHASTIC}
    ),
    "qwen-image": lambda: Subject(pipeline=import_module("tests.tiny_qwen_image").tiny_pipeline()),
    "qwen-image, unguided": lambda: Subject(
        pipeline=import_module("tests.tiny_qwen_image").tiny_pipeline(), fields={"guidance": 1.0}
    ),
    "qwen-image, with noise at every step": lambda: Subject(
        pipeline=import_module("tests.tiny_qwen_image").tiny_pipeline(), fields={"scheduler": STOCHASTIC}
    ),
    "sdxl": lambda: Subject(pipeline=import_module("tests.tiny_sdxl").tiny_pipeline()),
    "sdxl, with noise at every step": lambda: Subject(
        pipeline=import_module("tests.tiny_sdxl").tiny_pipeline(), fields={"scheduler": "dpm++2m-sde", "negative": "a"}
    ),
    "docs/add-a-model.md": lambda: Subject(pipeline=example_pipeline()),
}

# Models that ship with Gesso.
TRAINED: dict[str, Callable[[], Subject]] = {
    "infinity-nano": lambda: Subject(pipeline=_shipped("infinity-nano")),
    "flux-nano": lambda: Subject(pipeline=_shipped("flux-nano")),
    "z-image-nano": lambda: Subject(pipeline=_shipped("z-image-nano")),
}
