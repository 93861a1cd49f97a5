"""Puts a Qwen-Image together from a folder in diffusers' layout: networks strictly filled, their fit checked.

Reads local files only, and of weights only safetensors. Not here: names and places (`weights/catalogue`), strictness
(`weights/qwen_image`, `models/qwen_image_text`), what the pipeline does.
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
from gesso.models.qwen_image_text import QwenImageText, load_qwen_image_text
from gesso.weights.catalogue import Entry
from gesso.weights.configuration import read_config
from gesso.weights.files import check_shards
from gesso.weights.flow_schedule import StretchedSchedule, read_schedule
from gesso.weights.infinity import parse
from gesso.weights.qwen_image import load_autoencoder, load_transformer

if TYPE_CHECKING:
    from gesso.pipelines.qwen_image import QwenImagePipeline

_PIPELINES = ("QwenImagePipeline", "QwenImageImg2ImgPipeline")


def load_published(entry: Entry, build: Build) -> QwenImagePipeline:
    """Qwen-Image as its authors publish it for diffusers.

    Raises FileError for a folder that holds something else or whose parts do not fit each other, WeightsError for
    weights that are incomplete, too many, damaged or of the wrong shape, MissingError without diffusers.
    """
    folder, weights, dtype = entry.folder, build.weights, build.dtype
    called = read_config(folder, "model_index.json").get("_class_name")
    if called not in _PIPELINES:
        wanted = f"one of {', '.join(_PIPELINES)} is wanted"
        raise FileError(folder, f"holds diffusers' {called}, not a Qwen-Image", wanted)
    schedule = read_schedule(folder / "scheduler", StretchedSchedule)
    transformer = load_transformer(folder, dtype, weights=weights)
    autoencoder = load_autoencoder(folder, dtype, weights=weights)
    if weights:
        check_shards(folder / "text_encoder")
    text = load_qwen_image_text(folder, dtype=dtype, weights=weights)
    values: Any = transformer.config
    _check_fit(folder, values, autoencoder.config, text)
    build.place({"text_encoder": text.network, "transformer": transformer, "autoencoder": autoencoder})
    from gesso.pipelines.qwen_image import QwenImagePipeline  # needs diffusers, which was looked for by now
    from gesso.pipelines.qwen_image_state import QwenImageDefaults

    return QwenImagePipeline(
        transformer=transformer,
        autoencoder=autoencoder,
        text=text,
        scheduler=asdict(schedule),
        defaults=parse(QwenImageDefaults, entry.defaults, folder),
        name=entry.name,
        digest=weights_digest(entry) if weights else "",
        device=torch.device(build.device),
        dtype=dtype,
    )


def _check_fit(folder: Path, network: Mapping[str, Any], autoencoder: Mapping[str, Any], text: QwenImageText) -> None:
    """Whether each part takes what the one before it makes. Raises FileError."""
    made, latent = 4 * autoencoder["z_dim"], autoencoder["z_dim"]
    problem = ""
    if network["in_channels"] != made:
        problem = f"the transformer reads {network['in_channels']} channels where the autoencoder makes {made}"
    elif (network["out_channels"] or made) != latent:
        problem = f"the transformer makes {network['out_channels'] or made} channels where the autoencoder has {latent}"
    elif network["joint_attention_dim"] != text.width:
        problem = f"text features are {text.width} wide where the transformer reads {network['joint_attention_dim']}"
    if problem:
        raise FileError(folder, f"its parts do not fit: {problem}", "fetch it again")
