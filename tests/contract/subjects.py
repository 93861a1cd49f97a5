"""The pipelines that the contract is put to, each tiny and made in a moment. A new family adds a line to `SUBJECTS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from gesso.engine import Engine
from gesso.pipelines.contract import Pipeline
from gesso.request import GenerationRequest
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

    def engine(self, max_batch: int = 16) -> Engine:
        """An engine that knows this pipeline only, whatever model is asked for."""
        return Engine(device="cpu", load=lambda name, device, dtype: self.pipeline, max_batch=max_batch)

    def close(self, one: Image.Image, other: Image.Image) -> bool:
        """Whether two pictures are equal up to what company may do to sums."""
        difference = np.asarray(one).astype(int) - np.asarray(other).astype(int)
        return int(np.abs(difference).max()) <= self.tolerance


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "infinity": lambda: Subject(pipeline=tiny_pipeline()),
    "infinity, patchified": lambda: Subject(pipeline=tiny_pipeline(patchify=True)),
    "infinity, guided inside": lambda: Subject(pipeline=tiny_pipeline(), fields={"guidance_layer": -1}),
}
