"""Puts a HunyuanVideo together from a folder in diffusers' layout: networks strictly filled, their fit checked.

Reads local files only, and of weights only safetensors. Not here: names and places (`weights/catalogue`), text
encoders (`models/hunyuan_video_text`), what the pipeline does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gesso.engine.loading.build import Build
from gesso.engine.loading.weights_digest import weights_digest
from gesso.errors import FileError
from gesso.models.diffusers_parts import hunyuan_video_autoencoder, hunyuan_video_transformer
from gesso.models.hunyuan_video_text import HunyuanVideoText, load_hunyuan_video_text
from gesso.models.kl_autoencoder import scaling_problem
from gesso.weights.catalogue import Entry
from gesso.weights.configuration import read_config, whole_number
from gesso.weights.diffusers_layout import load_network
from gesso.weights.files import check_shards
from gesso.weights.flow_schedule import FlowSchedule, read_schedule
from gesso.weights.infinity import parse

if TYPE_CHECKING:
    from gesso.pipelines.hunyuan_video import HunyuanVideoPipeline

_PIPELINE = "HunyuanVideoPipeline"
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_MENDED = "fetch it again"
_PATCHES = ("patch_size", "patch_size_t")
# What a transformer may be asked for: others of its kind begin from pictures, or know no guidance.
_WANTED = {"image_condition_type": None, "guidance_embeds": True}


def load_published(entry: Entry, build: Build) -> HunyuanVideoPipeline:
    """HunyuanVideo, text to video, as it is published for diffusers.

    Raises FileError for a folder that holds something else or whose parts do not fit each other, WeightsError for
    weights that are incomplete, too many, damaged or of the wrong shape, MissingError without diffusers.
    """
    folder, weights, dtype = entry.folder, build.weights, build.dtype
    called = read_config(folder, "model_index.json").get("_class_name")
    if called != _PIPELINE:
        raise FileError(folder, f"holds diffusers' {called}, not a HunyuanVideo", f"{_PIPELINE} is wanted")
    kinds = hunyuan_video_transformer(), hunyuan_video_autoencoder()  # before what imports diffusers for good
    from gesso.pipelines.hunyuan_video import HunyuanVideoPipeline
    from gesso.pipelines.hunyuan_video_state import HunyuanVideoDefaults

    schedule = _schedule(folder / "scheduler")
    transformer = load_network(folder / "transformer", kinds[0], dtype, weights=weights)
    autoencoder = load_network(folder / "vae", kinds[1], dtype, weights=weights)
    for part in _TEXT_ENCODERS if weights else ():
        check_shards(folder / part)
    text = load_hunyuan_video_text(folder, dtype=dtype, weights=weights)
    network: Any = transformer.config
    _check_fit(folder, network, autoencoder.config, text)
    build.place(
        {
            "text_encoder": text.llama,
            "text_encoder_2": text.clip,
            "transformer": transformer,
            "autoencoder": autoencoder,
        }
    )
    return HunyuanVideoPipeline(
        transformer=transformer,
        autoencoder=autoencoder,
        text=text,
        scheduler=asdict(schedule),
        defaults=parse(HunyuanVideoDefaults, entry.defaults, folder),
        device=torch.device(build.device),
        dtype=dtype,
        name=entry.name,
        digest=weights_digest(entry) if weights else "",
    )


def _schedule(folder: Path) -> FlowSchedule:
    """The schedule, which bends alike for videos of all sizes; diffusers' pipeline knows no other. Raises FileError."""
    schedule = read_schedule(folder)
    if schedule.use_dynamic_shifting:
        raise FileError(folder, "use_dynamic_shifting true is not false", "no other is supported")
    return schedule


def _check_fit(
    folder: Path, network: Mapping[str, Any], autoencoder: Mapping[str, Any], text: HunyuanVideoText
) -> None:
    """Whether each part takes what the one before it makes, and can do what is asked of it. Raises FileError."""
    for name, wanted in _WANTED.items():
        if network[name] != wanted:
            problem = f"{name} {network[name]} is not {wanted}"
            raise FileError(folder / "transformer", problem, "text to video alone is supported")
    for name in _PATCHES:
        whole_number(folder / "transformer", name, network[name])
    if problem := scaling_problem(autoencoder["scaling_factor"], None):
        raise FileError(folder / "vae" / "config.json", problem, _MENDED)
    features, pooled = text.widths
    made = autoencoder["latent_channels"]
    if network["in_channels"] != made or network["out_channels"] != made:
        read = f"{network['in_channels']} channels and makes {network['out_channels']}"
        problem = f"the transformer reads {read} where the autoencoder has {made}"
    elif network["text_embed_dim"] != features:
        problem = f"text features are {features} wide where the transformer reads {network['text_embed_dim']}"
    elif network["pooled_projection_dim"] != pooled:
        problem = f"the pooled text is {pooled} wide where the transformer reads {network['pooled_projection_dim']}"
    if problem:
        raise FileError(folder, f"its parts do not fit: {problem}", _MENDED)
