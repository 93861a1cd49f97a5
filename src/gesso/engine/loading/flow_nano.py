"""Puts nano flow models together: parts from a folder, or fresh out of training, in a pipeline.

Not here: official FLUX and Z-Image, reading files (`weights/flow_nano`), what a pipeline does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from gesso.engine.loading.build import Build
from gesso.models.word_features import FluxWordFeatures, WordFeatures
from gesso.pipelines.contract import Pipeline
from gesso.weights import flow_nano
from gesso.weights.catalogue import Entry
from gesso.weights.flow_nano import FlowNano
from gesso.weights.infinity import parse


def load_own(entry: Entry, build: Build) -> Pipeline:
    """A model of our trainers' layout; without weights it can plan and nothing else."""
    model = flow_nano.load(entry.folder, weights=build.weights)
    if build.weights:
        for part in (model.network, model.autoencoder):  # their own `to` warns of parts kept in float32: there are none
            nn.Module.to(part, dtype=build.dtype)
        build.place({"text_encoder": model.text, "transformer": model.network, "autoencoder": model.autoencoder})
    return assemble(model, entry.name, entry.folder)


def assemble(model: FlowNano, name: str, source: Path) -> Pipeline:
    """The pipeline of a model's parts. Raises FileError, which names `source`, for defaults that it cannot use."""
    return _PIPELINES[model.family](model, name, source)


def _flux(model: FlowNano, name: str, source: Path) -> Pipeline:
    from gesso.pipelines.flux import FluxPipeline
    from gesso.pipelines.flux_state import FluxDefaults

    network: Any = model.network
    return FluxPipeline(
        transformer=network,
        autoencoder=model.autoencoder,
        text=FluxWordFeatures(model.text),
        scheduler={"shift": model.shift, "use_dynamic_shifting": False},
        defaults=parse(FluxDefaults, {**model.defaults, "sizes": model.sizes}, source),
        name=name,
        digest=model.digest,
    )


def _z_image(model: FlowNano, name: str, source: Path) -> Pipeline:
    from gesso.pipelines.z_image import ZImagePipeline
    from gesso.pipelines.z_image_state import ShiftRule, ZImageDefaults

    network: Any = model.network
    return ZImagePipeline(
        transformer=network,
        autoencoder=model.autoencoder,
        text=WordFeatures(model.text),
        shift=ShiftRule(shift=model.shift),
        defaults=parse(ZImageDefaults, {**model.defaults, "sizes": model.sizes}, source),
        name=name,
        digest=model.digest,
    )


_PIPELINES: dict[str, Callable[[FlowNano, str, Path], Pipeline]] = {"flux": _flux, "z-image": _z_image}
