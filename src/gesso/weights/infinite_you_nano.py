"""InfiniteYou's networks at a small size, from the folder of a nano FLUX that our trainer exports with them.

Beside FLUX's own files the folder holds `infusenet`, `resampler` and `recogniser.safetensors`, and its `config.json`
says their sizes under "identity" and "recogniser". Not here: FLUX's files (`flow_nano`), published networks
(`infinite_you`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from gesso.devices import META
from gesso.errors import FileError
from gesso.models import infusenet
from gesso.models.flux_network import FluxConfig
from gesso.models.resampler import Resampler, ResamplerConfig
from gesso.weights.configuration import read_config
from gesso.weights.files import read_tensors
from gesso.weights.infinity import filled, parse

if TYPE_CHECKING:
    from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel

FILES = ("infusenet.safetensors", "resampler.safetensors", "recogniser.safetensors")


def paints_people(config: Mapping[str, object]) -> bool:
    """Whether a model's configuration says that it has these networks."""
    return config.get("identity") is not None


def build_infusenet(config: FluxConfig) -> FluxControlNetModel:
    """The network of a configuration, with fresh weights."""
    return infusenet.build(asdict(config))


def load_infusenet(folder: Path, dtype: torch.dtype, *, weights: bool = True) -> FluxControlNetModel:
    """On the CPU; without `weights` it has its shapes and lies on the meta device. Raises FileError, WeightsError."""
    config = parse(FluxConfig, _sizes(folder).get("infusenet"), folder)
    if not weights:
        with torch.device(META):
            return build_infusenet(config).eval().requires_grad_(False)
    path = folder / FILES[0]
    network = filled(build_infusenet, config, read_tensors(path), path)  # pyright: ignore[reportArgumentType]
    nn.Module.to(network, dtype=dtype)  # their own warns of parts kept in float32: there are none
    return network


def load_resampler(folder: Path) -> Resampler:
    """On the CPU, in float32. Raises FileError, WeightsError."""
    path = folder / FILES[1]
    return filled(Resampler, parse(ResamplerConfig, _sizes(folder).get("resampler"), folder), read_tensors(path), path)


def _sizes(folder: Path) -> Mapping[str, object]:
    sizes = read_config(folder).get("identity")
    if not isinstance(sizes, Mapping):
        raise FileError(folder, "its configuration has no identity", "export the model again")
    return sizes
