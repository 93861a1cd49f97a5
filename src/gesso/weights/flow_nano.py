"""Nano flow models from the folders that our trainer exports: FLUX and Z-Image at small sizes. Strict throughout.

A folder holds `config.json` (family, network, text, autoencoder, scheduler, sizes, generation), `transformer`, `text`
and `autoencoder.safetensors`, and a manifest; text and autoencoder may lie in the zoo's shared room (`shared`).
Not here: which models there are (`catalogue`), pipelines (`engine`), training (`training/flow`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from gesso.devices import META
from gesso.errors import FileError, RequestError
from gesso.models import components, flux_network, kl_autoencoder
from gesso.models.flux_network import FluxConfig
from gesso.models.kl_autoencoder import KLAutoencoderConfig
from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.transformer import S3DiT
from gesso.models.word_encoder import WordEncoder, WordEncoderConfig
from gesso.request import parse_request
from gesso.weights import infinite_you_nano, manifest, shared
from gesso.weights.configuration import read_config
from gesso.weights.files import read_tensors
from gesso.weights.infinity import filled, parse

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

FILES = ("config.json", "transformer.safetensors", "text.safetensors", "autoencoder.safetensors")


class Family(NamedTuple):
    """How a family's network is made: its configuration's class, and the network of one."""

    config: type[Any]
    build: Callable[[Any], nn.Module]


FAMILIES = {
    "flux": Family(FluxConfig, flux_network.build),
    "z-image": Family(S3DiTConfig, S3DiT),
}


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """`shift` bends the schedule towards noise: sigma becomes shift * sigma / (1 + (shift - 1) * sigma)."""

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.shift <= 100:
            raise ValueError("shift must be above 0 and at most 100")


@dataclass(frozen=True, kw_only=True)
class FlowNano:
    """A model's parts, in evaluation mode. `sizes` are (width, height) in pixels.

    `defaults` are fields of a request; `stride` the pixels along the edge of a latent cell; `digest` that of all files,
    "" where only the configuration was read.
    """

    family: str
    network: nn.Module
    text: WordEncoder
    autoencoder: AutoencoderKL
    stride: int
    shift: float
    sizes: tuple[tuple[int, int], ...]
    defaults: dict[str, object]
    digest: str


def load(folder: Path, *, weights: bool = True, dtype: torch.dtype = torch.float32) -> FlowNano:
    """All parts of a folder. Without `weights` the networks have their shapes and lie on the meta device.

    `dtype` is that of the network and the autoencoder; words are read in float32.

    Raises FileError for a configuration that is unusable, or whose parts do not fit each other; WeightsError for files
    that are damaged or fit no network; MissingError without diffusers.
    """
    config = read_config(folder)
    family = family_of(folder, config)
    files = FILES + (infinite_you_nano.FILES if infinite_you_nano.paints_people(config) else ())
    digest = manifest.verify(folder, files) if weights else ""
    network = parse(family.config, config.get("network"), folder)
    text = parse(WordEncoderConfig, config.get("text"), folder)
    autoencoder = parse(KLAutoencoderConfig, config.get("autoencoder"), folder)
    scheduler = parse(SchedulerConfig, config.get("scheduler"), folder)
    sizes = _sizes(folder, config.get("sizes"), 2 * autoencoder.stride)
    defaults = _defaults(folder, config.get("generation"), sizes)
    if problem := misfit(network, text, autoencoder):
        raise FileError(folder, f"its parts do not fit: {problem}", "export it again")
    return FlowNano(
        family=str(config["family"]),
        network=_part(folder, "transformer", family.build, network, weights, dtype),
        text=_part(folder, "text", WordEncoder, text, weights),
        autoencoder=_part(folder, "autoencoder", kl_autoencoder.build, autoencoder, weights, dtype),
        stride=autoencoder.stride,
        shift=scheduler.shift,
        sizes=sizes,
        defaults=defaults,
        digest=digest,
    )


def load_autoencoder(folder: Path) -> tuple[AutoencoderKL, KLAutoencoderConfig]:
    """The autoencoder of an exported folder (of an autoencoder alone, or of a whole model), in float32."""
    config = read_config(folder)
    name = "autoencoder" if "autoencoder" in config else "network"
    parsed = parse(KLAutoencoderConfig, config.get(name), folder)
    manifest.verify(folder, ("autoencoder.safetensors",))
    return _part(folder, "autoencoder", kl_autoencoder.build, parsed, True), parsed


def family_of(folder: Path, config: Mapping[str, object]) -> Family:
    """The family that a configuration names. Raises FileError for one that is no flow model."""
    name = config.get("family")
    if not isinstance(name, str) or name not in FAMILIES:
        known = " or ".join(FAMILIES)
        raise FileError(folder, f"holds a model of the family {name}", f"one of {known} is wanted here")
    return FAMILIES[name]


def misfit(network: Any, text: WordEncoderConfig, autoencoder: KLAutoencoderConfig) -> str:
    """What keeps a network's configuration from going with a text encoder and an autoencoder, "" if nothing does."""
    if network.latent_channels != autoencoder.latent_channels:
        has, wanted = autoencoder.latent_channels, network.latent_channels
        return f"the autoencoder has {has} channels where the network has {wanted}"
    if network.text_width != text.width:
        return f"text features are {text.width} wide where the network reads {network.text_width}"
    return ""


def _part(
    folder: Path, name: str, build: Callable[[Any], Any], config: Any, weights: bool, dtype: torch.dtype = torch.float32
) -> Any:
    if not weights:
        with torch.device(META):
            return build(config).eval().requires_grad_(False)
    path = shared.part(folder, f"{name}.safetensors")
    kind = f"{build.__module__}.{build.__qualname__}"
    return components.shared(path, kind, dtype, lambda: _made(build, config, path, dtype), config)


def _made(build: Callable[[Any], Any], config: Any, path: Path, dtype: torch.dtype) -> nn.Module:
    network = filled(build, config, read_tensors(path), path)
    return nn.Module.to(network, dtype=dtype)  # their own warns of parts kept in float32: there are none


def _sizes(folder: Path, found: object, multiple: int) -> tuple[tuple[int, int], ...]:
    sizes = [tuple(size) for size in found if isinstance(size, list)] if isinstance(found, list) else []
    for size in sizes:
        whole = len(size) == 2 and all(isinstance(edge, int) and edge > 0 for edge in size)
        if not whole or any(edge % multiple for edge in size):
            raise FileError(folder, f"{list(size)} is no size in multiples of {multiple} pixels", "export it again")
    if not sizes or not isinstance(found, list) or len(sizes) != len(found):
        raise FileError(folder, "its configuration lacks sizes", "export the model again")
    return tuple((width, height) for width, height in sizes)


def _defaults(folder: Path, found: object, sizes: tuple[tuple[int, int], ...]) -> dict[str, object]:
    """Defaults of a request; a request must allow them."""
    if not isinstance(found, Mapping):
        raise FileError(folder, "its configuration lacks generation", "export the model again")
    defaults = dict(found)
    try:
        parse_request({"prompt": "-"} | {key: value for key, value in defaults.items() if key != "init_strength"})
    except RequestError as error:
        raise FileError(folder, f"its generation defaults are unusable: {error}", "export it again") from error
    if (defaults.get("width"), defaults.get("height")) not in sizes:
        raise FileError(folder, "its default size is none of its sizes", "export it again")
    return defaults
