"""Puts a FLUX.1 together from a folder in diffusers' layout: networks strictly filled, their fit checked, a pipeline.

Reads local files only, and of weights only safetensors. Not here: names and places (`weights/catalogue`), text
encoders (`models/flux_text`), what the pipeline does, nano models (`flow_nano`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gesso.engine.loading import infinite_you
from gesso.engine.loading.build import Build
from gesso.engine.loading.weights_digest import weights_digest
from gesso.errors import FileError
from gesso.models.diffusers_parts import flux_transformer
from gesso.models.flux_text import FluxText, load_flux_text
from gesso.weights.catalogue import Entry
from gesso.weights.configuration import read_config
from gesso.weights.diffusers_layout import load_autoencoder, load_network
from gesso.weights.files import check_shards
from gesso.weights.flow_schedule import read_schedule

if TYPE_CHECKING:
    from gesso.pipelines.flux import FluxPipeline
    from gesso.pipelines.flux_state import FluxDefaults

_PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_EDGE = 1024
# Text tokens: dev's, which knows guidance, and schnell's, which does not.
_LENGTH_DEV, _LENGTH_SCHNELL = 512, 256


def load_published(entry: Entry, build: Build) -> FluxPipeline:
    """FLUX.1 as its authors publish it for diffusers; what its files say decides whether it is dev or schnell.

    Raises FileError for a folder that holds something else or whose parts do not fit each other, WeightsError for
    weights that are incomplete, too many, damaged or of the wrong shape, MissingError without diffusers.
    """
    return _put_together(entry, build)


def _put_together(entry: Entry, build: Build) -> FluxPipeline:
    folder, weights, dtype = entry.folder, build.weights, build.dtype
    called = read_config(folder, "model_index.json").get("_class_name")
    if called not in _PIPELINES:
        raise FileError(folder, f"holds diffusers' {called}, not a FLUX.1", f"one of {', '.join(_PIPELINES)} is wanted")
    kind = flux_transformer()  # before what imports diffusers for good
    from gesso.pipelines.flux import FluxPipeline

    schedule = read_schedule(folder / "scheduler")
    transformer = load_network(folder / "transformer", kind, dtype, weights=weights)
    autoencoder = load_autoencoder(folder, dtype, weights=weights)
    values: Any = transformer.config
    length = _LENGTH_DEV if values["guidance_embeds"] else _LENGTH_SCHNELL
    for part in _TEXT_ENCODERS if weights else ():
        check_shards(folder / part)
    text = load_flux_text(folder, dtype=dtype, length=length, weights=weights)
    _check_fit(folder, values, autoencoder.config, text)
    encoders = {"text_encoder": text.clip, "text_encoder_2": text.t5}
    build.place({**encoders, "transformer": transformer, "autoencoder": autoencoder})
    return FluxPipeline(
        transformer=transformer,
        autoencoder=autoencoder,
        text=text,
        scheduler=asdict(schedule),
        defaults=_defaults(entry, distilled=not values["guidance_embeds"]),
        name=entry.name,
        digest=weights_digest(entry) if weights else "",
        guest=infinite_you.guest(build, values),
        device=build.device,
        dtype=dtype,
    )


def _check_fit(folder: Path, network: Mapping[str, Any], autoencoder: Mapping[str, Any], text: FluxText) -> None:
    """Whether each part takes what the one before it makes. Raises FileError."""
    features, pooled = text.widths
    made = 4 * autoencoder["latent_channels"]
    problem = ""
    if network["in_channels"] != made:
        problem = f"the transformer reads {network['in_channels']} channels where the autoencoder makes {made}"
    elif network["joint_attention_dim"] != features:
        problem = f"text features are {features} wide where the transformer reads {network['joint_attention_dim']}"
    elif network["pooled_projection_dim"] != pooled:
        problem = f"the pooled text is {pooled} wide where the transformer reads {network['pooled_projection_dim']}"
    if problem:
        raise FileError(folder, f"its parts do not fit: {problem}", "fetch it again")


def _defaults(entry: Entry, *, distilled: bool) -> FluxDefaults:
    from gesso.pipelines.flux_state import FluxDefaults

    size: dict[str, Any] = {"width": _EDGE, "height": _EDGE} | entry.defaults
    if distilled:
        return FluxDefaults(**{"steps": 4, "guidance": 0.0, "distilled": True, **size})
    return FluxDefaults(**{"steps": 28, "guidance": 3.5, **size})
