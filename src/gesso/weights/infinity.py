"""Infinity's networks from files: ours, and those its authors publish. Strict by name and shape.

Not here: which files (`catalogue`), pipelines (`engine/loading`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from gesso import stored
from gesso.devices import META
from gesso.errors import FileError, WeightsError
from gesso.models import components
from gesso.models.infinity.autoencoder import Autoencoder, AutoencoderConfig
from gesso.models.infinity.checkpoint import (
    autoencoder_state,
    infer_autoencoder_config,
    infer_transformer_config,
    transformer_state,
)
from gesso.models.infinity.scales import ScaleSchedule
from gesso.models.infinity.transformer import InfinityConfig, InfinityTransformer
from gesso.models.word_encoder import WordEncoder, WordEncoderConfig
from gesso.weights import manifest, shared
from gesso.weights.configuration import read_config
from gesso.weights.files import fill, read_tensors

Config = TypeVar("Config")
Network = TypeVar("Network", bound=nn.Module)

_UNUSABLE = (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError)
"""What sizes that fit nothing raise, from a configuration's own check to the layers it is made into."""


def load_tokenizer(folder: Path) -> Autoencoder:
    """The tokenizer of an exported folder (of a tokenizer alone, or of a whole model), in float32."""
    config = read_config(folder)
    part = "tokenizer" if "tokenizer" in config else "network"
    manifest.verify(folder, ("tokenizer.safetensors",))
    return _load_own(folder, "tokenizer", Autoencoder, parse(AutoencoderConfig, config.get(part), folder))


def load_transformer(folder: Path) -> InfinityTransformer:
    """The transformer of an exported folder, in float32."""
    return _load_own(
        folder, "transformer", InfinityTransformer, parse(InfinityConfig, read_config(folder).get("network"), folder)
    )


def load_word_encoder(folder: Path) -> WordEncoder:
    """The word encoder of an exported folder, in float32."""
    return _load_own(folder, "text", WordEncoder, parse(WordEncoderConfig, read_config(folder).get("text"), folder))


def load_schedules(folder: Path) -> dict[tuple[int, int], ScaleSchedule]:
    """The scale schedules of an exported folder, by (height, width)."""
    found = read_config(folder).get("schedules")
    if not isinstance(found, Mapping):
        raise FileError(folder, "its configuration lacks schedules", "export the model again")
    return {_size(name, folder): parse(ScaleSchedule, values, folder) for name, values in found.items()}


def _size(name: str, folder: Path) -> tuple[int, int]:
    width, _, height = name.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise FileError(folder, f"{name} is no size", "export the model again")
    return int(height), int(width)


def load_published_transformer(path: Path, *, patchify: bool = False, weights: bool = True) -> InfinityTransformer:
    """A published transformer, a file or a folder of shards; its sizes are read off the tensors.

    Without `weights` it lies on the meta device, and no more is looked at than shapes.
    """
    if not weights:
        return _published_transformer(path, patchify, weights=False)
    kind = f"a published transformer{', patchified' if patchify else ''}"
    return components.shared(path, kind, torch.float32, lambda: _published_transformer(path, patchify, weights=True))


def _published_transformer(path: Path, patchify: bool, *, weights: bool) -> InfinityTransformer:
    published = _read_published(path, ("gpt_fsdp",), weights=weights)
    try:
        state = transformer_state(published)
        config = infer_transformer_config(state, patchify=patchify)
    except _UNUSABLE as error:
        raise WeightsError(path, detail=f"not an Infinity transformer ({_reason(error)})") from error
    return filled(InfinityTransformer, config, state, path) if weights else _made(InfinityTransformer, config, path)


def load_published_tokenizer(path: Path, *, weights: bool = True) -> Autoencoder:
    """A published tokenizer (`vae` or `ema` in a `.pth`); its sizes are read off the tensors. `weights` as above."""
    if not weights:
        return _published_tokenizer(path, weights=False)
    kind = "a published tokenizer"
    return components.shared(path, kind, torch.float32, lambda: _published_tokenizer(path, weights=True))


def _published_tokenizer(path: Path, *, weights: bool) -> Autoencoder:
    published = _read_published(path, ("vae", "ema"), weights=weights)
    try:
        state = autoencoder_state(published)
        config = infer_autoencoder_config(state)
    except _UNUSABLE as error:
        raise WeightsError(path, detail=f"not an Infinity tokenizer ({_reason(error)})") from error
    return filled(Autoencoder, config, state, path) if weights else _made(Autoencoder, config, path)


def _read_published(path: Path, keys: tuple[str, ...], *, weights: bool) -> dict[str, Tensor]:
    """Its tensors or, without `weights`, what has their shapes: stand-ins, and of pickles maps that nobody reads."""
    if weights:
        return read_tensors(path, keys=keys)
    with stored.deferred():
        return read_tensors(path, keys=keys, later=True)


def parse(kind: type[Config], values: object, source: Path) -> Config:
    """A configuration from JSON values, every value of its field's type; unknown and missing fields are errors."""
    if not isinstance(values, Mapping):
        raise FileError(source, f"its configuration has no values for {kind.__name__}", "export the model again")
    known = {field.name for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    if unknown := sorted(set(values) - known):
        raise FileError(source, f"its configuration has unknown fields: {', '.join(unknown)}", "use a newer gesso")
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except (ValidationError, ArithmeticError) as error:
        raise FileError(source, f"its configuration is unusable: {_reason(error)}", "export the model again") from error


def _reason(error: Exception) -> str:
    """What is wrong, in a few words."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{place}: {first['msg']}" if place else first["msg"]
    return f"no {error.args[0]}" if isinstance(error, KeyError) else str(error)


def _load_own(folder: Path, part: str, make: Callable[[Config], Network], config: Config) -> Network:
    path = shared.part(folder, f"{part}.safetensors")
    kind = f"{make.__module__}.{make.__qualname__}"
    return components.shared(path, kind, torch.float32, lambda: filled(make, config, read_tensors(path), path), config)


def filled(make: Callable[[Config], Network], config: Config, state: Mapping[str, Tensor], source: Path) -> Network:
    """The network in float32 and evaluation mode, filled without making its memory twice."""
    network = _made(make, config, source)
    fill(network, {name: value.float() for name, value in state.items()}, source)
    return network.eval().requires_grad_(False)


def _made(make: Callable[[Config], Network], config: Config, source: Path) -> Network:
    """The network on the meta device."""
    try:
        with torch.device(META):
            return make(config).eval().requires_grad_(False)
    except _UNUSABLE as error:
        raise WeightsError(source, detail=f"its sizes make no network ({_reason(error)})") from error
