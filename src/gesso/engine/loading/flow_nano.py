"""Puts nano flow models together: parts from a folder, or fresh out of training, in a pipeline.

Not here: official FLUX and Z-Image, reading files (`weights/flow_nano`), what a pipeline does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gesso.engine.loading.build import Build
from gesso.models.word_features import FluxWordFeatures, WordFeatures
from gesso.pipelines.contract import Pipeline
from gesso.sampling.flow import FlowSchedule
from gesso.weights import flow_nano, infinite_you_nano
from gesso.weights.catalogue import Entry
from gesso.weights.configuration import read_config
from gesso.weights.flow_nano import FlowNano
from gesso.weights.infinity import parse

if TYPE_CHECKING:
    from gesso.pipelines.infinite_you import InfiniteYou


def load_own(entry: Entry, build: Build) -> Pipeline:
    """A model of our trainers' layout; without weights it can plan and nothing else."""
    model = flow_nano.load(entry.folder, weights=build.weights, dtype=build.dtype)
    build.place({"text_encoder": model.text, "transformer": model.network, "autoencoder": model.autoencoder})
    return assemble(model, entry.name, entry.folder, build, _guest(model, entry.folder, build))


def assemble(model: FlowNano, name: str, source: Path, build: Build, guest: InfiniteYou | None = None) -> Pipeline:
    """The pipeline of a model's parts, FLUX with a guest that paints people, if it has one.

    Raises FileError, which names `source`, for defaults that it cannot use.
    """
    if model.family == "flux":
        return _flux(model, name, source, build, guest)
    return _z_image(model, name, source, build)


def _guest(model: FlowNano, folder: Path, build: Build) -> InfiniteYou | None:
    if model.family != "flux" or not infinite_you_nano.paints_people(read_config(folder)):
        return None
    from gesso.engine.loading import infinite_you_nano as loading

    return loading.guest(folder, build)


def _flux(model: FlowNano, name: str, source: Path, build: Build, guest: InfiniteYou | None) -> Pipeline:
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
        guest=guest,
        device=build.device,
        dtype=build.dtype,
    )


def _z_image(model: FlowNano, name: str, source: Path, build: Build) -> Pipeline:
    from gesso.pipelines.z_image import ZImagePipeline
    from gesso.pipelines.z_image_state import ZImageDefaults

    network: Any = model.network
    return ZImagePipeline(
        transformer=network,
        autoencoder=model.autoencoder,
        text=WordFeatures(model.text),
        shift=FlowSchedule(shift=model.shift),
        defaults=parse(ZImageDefaults, {**model.defaults, "sizes": model.sizes}, source),
        name=name,
        digest=model.digest,
        device=build.device,
        dtype=build.dtype,
    )
