"""Building the product's Z-Image networks from side-cars: S3-DiT and the autoencoder. Not here: the checks.

Weights lie in a golden of their own, which another names, or are made by the recipe that a side-car states.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from gesso.errors import WeightsError
from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.transformer import S3DiT
from gesso.weights.files import fill
from tests.golden.comparison import Comparison
from tests.golden.side_car import BrokenGoldenError, Golden, NotYetError, SideCar, read_golden, view

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

Network = TypeVar("Network", bound=nn.Module)

_TOKENS = ("latents", "x_pad_token", "cap_pad_token")  # what the recipe draws at half strength


class WeightsSideCar(SideCar):
    """What tells a network: its configuration, and the seed of its weights where they are made by the recipe."""

    config: dict[str, object]
    seed: int | None = None
    weights_not_stored: bool = False


class Weights(SideCar):
    """Names of the goldens that hold weights."""

    transformer: str | None = None
    vae: str | None = None


def transformer_of(golden: Golden) -> S3DiT:
    """The network of a golden, in evaluation mode: of the golden that it names, or by its own recipe."""
    source = _source(golden, "transformer")
    network = _on_meta(S3DiT, network_config(source.view(WeightsSideCar).config))
    return _filled(network, source)


def autoencoder_of(golden: Golden) -> AutoencoderKL:
    """diffusers' autoencoder, as `transformer_of`."""
    source = _source(golden, "vae")
    config = source.view(WeightsSideCar).config
    return _filled(build_autoencoder(config), source)


def network_config(stated: Mapping[str, object]) -> S3DiTConfig:
    """A published configuration. Raises NotYetError for what the product has not, BrokenGoldenError for nonsense."""
    if stated.get("n_kv_heads", stated.get("n_heads")) != stated.get("n_heads"):
        raise NotYetError("fewer heads of keys and values than of queries")
    known = {name: value for name, value in stated.items() if not name.startswith("_")}
    try:
        return TypeAdapter(S3DiTConfig).validate_python(known)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BrokenGoldenError(f"side-car field 'config.{field}': {first['msg']}") from error


def build_autoencoder(config: Mapping[str, object]) -> AutoencoderKL:
    """The autoencoder of a configuration, on the meta device."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    channels = config.get("block_out_channels")
    levels = len(channels) if isinstance(channels, list) else 1
    kinds: dict[str, object] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    with torch.device("meta"):
        return AutoencoderKL(**(kinds | dict(config)))  # pyright: ignore[reportArgumentType]


def by_recipe(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """The weights that the recipe gives a network's names and shapes."""
    state: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        leaf = name.rpartition(".")[-1]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float32)
        if not value.is_floating_point():
            state[name] = value
        elif leaf.startswith("running_"):
            state[name] = 1 + 0.2 * drawn.abs() if leaf == "running_var" else 0.1 * drawn
        elif leaf in _TOKENS:
            state[name] = 0.5 * drawn
        elif value.ndim >= 2:
            state[name] = drawn / drawn[0].numel() ** 0.5
        else:
            state[name] = 1 + 0.1 * drawn if leaf == "weight" else 0.1 * drawn
    return state


def check_weights(golden: Golden, comparison: Comparison) -> None:
    """Stored weights: strictly the product's names and shapes, and what the recipe gives."""
    side_car = golden.view(WeightsSideCar)
    if "dim" in side_car.config:
        network: nn.Module = _on_meta(S3DiT, network_config(side_car.config))
    else:
        network = build_autoencoder(side_car.config)
    compare_names(comparison, network, {name: tuple(value.shape) for name, value in golden.tensors.items()})
    if side_car.seed is None:
        return
    recipe = by_recipe(network, side_car.seed)
    for name, recorded in golden.tensors.items():
        if name in recipe:
            comparison.close(name, recipe[name], recorded, 1e-5)


def compare_names(comparison: Comparison, network: nn.Module, recorded: Mapping[str, tuple[int, ...]]) -> None:
    """Names and shapes of a state dict, in any order."""
    ours = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    missing, unexpected = sorted(set(recorded) - set(ours)), sorted(set(ours) - set(recorded))
    comparison.true("names", not missing and not unexpected, f"missing {missing[:3]}, unexpected {unexpected[:3]}")
    wrong = sorted(name for name in set(recorded) & set(ours) if ours[name] != recorded[name])
    comparison.true("shapes", not wrong, f"{len(wrong)} differ: {wrong[:3]}")


def _source(golden: Golden, part: str) -> Golden:
    """The golden that holds a part's configuration and weights."""
    named = view(golden.data.get("weights") or {}, Weights, "weights.")
    name = named.transformer if part == "transformer" else named.vae
    if name is None:
        return golden
    source = read_golden(golden.path.with_name(f"{name}.json"))
    if source is None:
        raise BrokenGoldenError(f"weights.{part}: {name}.json is no side-car")
    return source


def _on_meta(make: type[S3DiT], config: S3DiTConfig) -> S3DiT:
    with torch.device("meta"):
        return make(config)


def _filled(network: Network, source: Golden) -> Network:
    side_car = source.view(WeightsSideCar)
    if side_car.weights_not_stored or next(iter(network.state_dict())) not in source.tensors:
        if side_car.seed is None:
            raise BrokenGoldenError("side-car has neither weights nor the seed of their recipe")
        state = by_recipe(network, side_car.seed)
    else:
        state = dict(source.tensors)
    try:
        fill(network, state, source.path.name)
    except WeightsError as error:
        raise BrokenGoldenError(str(error)) from error
    return network.eval().requires_grad_(False)
