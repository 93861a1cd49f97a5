"""SDXL's refiner as the guest of a Stable Diffusion XL, read when a request wants it, from a folder or a single file.

Nothing of it is looked for before a request has one. Not here: what it does (`pipelines/sdxl_refiner`), names of its
tensors (`weights/sdxl_file`), the model whose guest it is (`sdxl`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gesso.engine.loading import check_pulled
from gesso.engine.loading.build import Build
from gesso.engine.loading.weights_digest import weights_digest
from gesso.errors import FileError, RequestError
from gesso.models.diffusers_parts import unet_2d_condition
from gesso.models.sdxl_text import SdxlText
from gesso.pipelines.sdxl_refiner import REFINER, RefinerNetwork, SdxlRefiner, sizes
from gesso.weights import catalogue, digests
from gesso.weights.catalogue import Entry
from gesso.weights.configuration import read_config, whole_number
from gesso.weights.diffusers_layout import load_network
from gesso.weights.files import files_of
from gesso.weights.noise_schedule import NAME, read_noise_schedule
from gesso.weights.sdxl_file import part_folder, read_refiner

FAMILY = "sdxl-refiner"  # and the name of the published one


def guest(build: Build, channels: int, text: SdxlText) -> SdxlRefiner:
    """The guest of a Stable Diffusion XL whose autoencoder has so many channels, and which reads with `text`."""

    def shapes(name: str) -> RefinerNetwork:
        made = _read(_entry(name), build.dtype, weights=False)
        _check_fit(name, made.unet, channels, text)
        build.footprint.expect(REFINER, made.unet)
        return made

    def load(name: str) -> RefinerNetwork:
        entry = _entry(name)
        digests.begin(files_of(entry.folder, entry.files))
        with build.reading_guest(REFINER):
            made = _read(entry, build.dtype, weights=True)
            _check_fit(name, made.unet, channels, text)
            build.place({REFINER: made.unet})
            check_pulled(entry)  # last, since files are hashed beside the loading
        return made

    return SdxlRefiner(load=load, shapes=shapes)


def _entry(name: str) -> Entry:
    """Where a refiner lies. Raises RequestError for what is none, MissingError with the way to it, FileError."""
    try:
        entry = catalogue.find(name)
    except RequestError as error:
        raise RequestError("refiner.model", name, "a known refiner", error.hint) from None
    if entry.family != FAMILY:
        raise RequestError("refiner.model", name, "a refiner", f"such as {FAMILY}")
    entry.require_files()
    return entry


def _read(entry: Entry, dtype: torch.dtype, *, weights: bool) -> RefinerNetwork:
    """A refiner on the CPU, or without `weights` on the meta device. Raises FileError, WeightsError, MissingError."""
    unet: Any
    if entry.layout == "file":
        path = entry.folder / entry.files[0]
        unet, zero_empty = read_refiner(path, dtype, weights=weights), False
        schedule = read_noise_schedule(part_folder(path.parent, "scheduler", NAME))
    else:
        unet = load_network(entry.folder / "unet", unet_2d_condition(), dtype, weights=weights)
        zero_empty = bool(read_config(entry.folder, "model_index.json").get("force_zeros_for_empty_prompt", True))
        schedule = read_noise_schedule(entry.folder / "scheduler")
    made_of = weights_digest(entry) if weights else ""
    return RefinerNetwork(unet=unet, scheduler=schedule.values(), zero_empty=zero_empty, digest=made_of)


def _check_fit(name: str, unet: nn.Module, channels: int, text: SdxlText) -> None:
    """Whether a refiner reads what the model makes. Raises FileError."""
    config: Any = unet.config
    large: Any = text.large.config
    problem, numbers = "", 0
    if config["addition_embed_type"] == "text_time":
        width = whole_number(name, "addition_time_embed_dim", config["addition_time_embed_dim"])
        numbers = len(sizes(0, 0)[0]) * width
    if config["addition_embed_type"] != "text_time" or config["time_cond_proj_dim"] is not None:
        problem = "it reads something else than a text and a picture's sizes"
    elif (config["in_channels"], config["out_channels"]) != (channels, channels):
        made = f"{config['in_channels']} channels and makes {config['out_channels']}"
        problem = f"it reads {made} where the model's autoencoder has {channels}"
    elif config["cross_attention_dim"] != large.hidden_size:
        problem = f"it reads features {config['cross_attention_dim']} wide where the model's are {large.hidden_size}"
    elif config["projection_class_embeddings_input_dim"] - numbers != large.projection_dim:
        problem = f"it does not read a pooled text {large.projection_dim} wide and five numbers"
    if problem:
        raise FileError(name, f"does not fit this model: {problem}", "take SDXL's refiner, or leave it out")
