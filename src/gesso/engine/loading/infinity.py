"""Puts an Infinity together: networks from its files, their fit checked, on the device, in a pipeline.

Not here: names and places (`weights/catalogue`), strictness (`weights/files`), what the pipeline does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from gesso.devices import META
from gesso.engine.loading.build import Build
from gesso.errors import FileError, RequestError
from gesso.models import components
from gesso.models.flan_t5 import FlanT5
from gesso.models.infinity.autoencoder import Autoencoder, AutoencoderConfig
from gesso.models.infinity.scales import ScaleSchedule, pixel_sizes
from gesso.models.infinity.transformer import InfinityConfig, InfinityTransformer
from gesso.models.word_encoder import WordEncoder, WordEncoderConfig
from gesso.pipelines.contract import Pipeline
from gesso.pipelines.infinity import InfinityPipeline
from gesso.pipelines.infinity_state import GenerationDefaults
from gesso.request import parse_request
from gesso.weights import manifest
from gesso.weights.catalogue import Entry
from gesso.weights.configuration import read_config
from gesso.weights.files import digest
from gesso.weights.infinity import (
    load_published_tokenizer,
    load_published_transformer,
    load_schedules,
    load_tokenizer,
    load_transformer,
    load_word_encoder,
    parse,
)


def _planner(entry: Entry, build: Build) -> Pipeline:
    """A pipeline of our trainers' layout that can plan and nothing else: no weights are read."""
    config = read_config(entry.folder)
    with torch.device(META):
        transformer = InfinityTransformer(parse(InfinityConfig, config.get("network"), entry.folder))
        autoencoder = Autoencoder(parse(AutoencoderConfig, config.get("tokenizer"), entry.folder))
        text = WordEncoder(parse(WordEncoderConfig, config.get("text"), entry.folder))
        _place(build, transformer, autoencoder, text)
        return InfinityPipeline(
            transformer=transformer,
            autoencoder=autoencoder,
            text=text,
            schedules=load_schedules(entry.folder),
            defaults=_defaults(entry),
            name=entry.name,
            digest="",
            device=build.device,
            dtype=build.dtype,
        )


def load_own(entry: Entry, build: Build) -> Pipeline:
    """A model of our trainers' layout; without weights it can plan and nothing else."""
    if not build.weights:
        return _planner(entry, build)
    folder = entry.folder
    digests = manifest.verify(folder, tuple(name for name in entry.files if name != manifest.NAME))
    transformer, autoencoder, text = load_transformer(folder), load_tokenizer(folder), load_word_encoder(folder)
    schedules, defaults = load_schedules(folder), _defaults(entry)
    _check_fit(entry, transformer.config, autoencoder.config, text.config.width, schedules)
    _place(build, transformer, autoencoder, text)
    return InfinityPipeline(
        transformer=transformer,
        autoencoder=autoencoder,
        text=text,
        schedules=schedules,
        defaults=defaults,
        name=entry.name,
        digest=digests,
        device=build.device,
        dtype=build.dtype,
    )


def load_published(entry: Entry, build: Build) -> Pipeline:
    """Infinity as its authors publish it; without weights it can plan and nothing else."""
    transformer_path, tokenizer_path, text_path = (entry.folder / name for name in entry.files)
    weights = build.weights
    autoencoder = load_published_tokenizer(tokenizer_path, weights=weights)
    patchify = autoencoder.config.stride == 8
    transformer = load_published_transformer(transformer_path, patchify=patchify, weights=weights)
    files = [path for part in (transformer_path, tokenizer_path) for path in _files_of(part)]
    text, schedules = FlanT5(text_path, dtype=build.dtype, weights=weights), pixel_sizes()
    _check_fit(entry, transformer.config, autoencoder.config, text.width, schedules)
    _place(build, transformer, autoencoder, text.network)
    return InfinityPipeline(
        transformer=transformer,
        autoencoder=autoencoder,
        text=text,
        schedules=schedules,
        defaults=_defaults(entry),
        name=entry.name,
        digest=digest(files) if weights else "",
        device=build.device,
        dtype=build.dtype,
    )


def _place(build: Build, transformer: InfinityTransformer, autoencoder: Autoencoder, text: nn.Module) -> None:
    if not components.is_placed(transformer):
        transformer.cast_blocks(build.dtype)
    if not components.is_placed(autoencoder):
        autoencoder.cast(build.dtype)
    build.place({"text_encoder": text, "transformer": transformer, "autoencoder": autoencoder})


def _check_fit(
    entry: Entry,
    network: InfinityConfig,
    tokenizer: AutoencoderConfig,
    text_width: int,
    schedules: Mapping[tuple[int, int], ScaleSchedule],
) -> None:
    """Whether each part takes what the one before it makes. Raises FileError."""
    cells, edge = (4, 2 * tokenizer.stride) if network.patchify else (1, tokenizer.stride)
    problem = ""
    if text_width != network.text_width:
        problem = f"text features are {text_width} wide where the transformer reads {network.text_width}"
    elif network.bits != tokenizer.bits * cells:
        problem = f"the transformer makes {network.bits} bits where the tokenizer has {tokenizer.bits * cells}"
    elif any(len(schedule) > network.scale_embeddings for schedule in schedules.values()):
        problem = f"a schedule has more scales than the transformer's {network.scale_embeddings}"
    elif any(size != tuple(edge * side for side in schedule.final_grid) for size, schedule in schedules.items()):
        problem = f"a schedule's last grid, {edge} pixels a token, is not its size"
    elif (entry.defaults["height"], entry.defaults["width"]) not in schedules:
        problem = "the default size has no schedule"
    if problem:
        raise FileError(entry.folder, f"its parts do not fit: {problem}", "fetch or export it again")


def _defaults(entry: Entry) -> GenerationDefaults:
    defaults = parse(GenerationDefaults, entry.defaults, entry.folder)
    blanks = {key: value for key, value in entry.defaults.items() if key not in ("init_strength", "distilled")}
    try:  # they fill a request's blanks, so a request must allow them
        parse_request({"prompt": "-"} | blanks)
    except RequestError as error:
        raise FileError(entry.folder, f"its generation defaults are unusable: {error}", "export it again") from error
    return defaults


def _files_of(path: Path) -> list[Path]:
    return sorted(found for found in path.iterdir() if found.is_file()) if path.is_dir() else [path]
