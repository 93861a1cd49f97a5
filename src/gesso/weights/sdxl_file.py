"""A Stable Diffusion XL, or its refiner, in a single safetensors file of the original naming: parts, read strictly.

Sizes come from configurations, since such a file holds none: those that lie beside it in folders of diffusers' layout
(`unet/config.json` and so on), else SDXL's own, which come with gesso. Nothing is fetched. Not here: names
(`models/sdxl_checkpoint`), tokenizers, what becomes of the parts (`engine/loading/sdxl`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gesso import stored
from gesso.devices import META
from gesso.errors import WeightsError
from gesso.models import components, sdxl_checkpoint, sdxl_text
from gesso.models.diffusers_parts import unet_2d_condition
from gesso.models.sdxl_checkpoint import PREFIXES, Place
from gesso.models.transformers_parts import read_network
from gesso.stored import Stored
from gesso.weights import headers
from gesso.weights.diffusers_layout import load_autoencoder, load_network
from gesso.weights.files import fill
from gesso.weights.headers import TensorHeader
from gesso.weights.noise_schedule import NAME, NoiseSchedule, read_noise_schedule

CONFIGURATIONS = Path(__file__).parent / "configurations" / "sdxl"
REFINER = Path(__file__).parent / "configurations" / "sdxl-refiner"
_INPUT = f"{PREFIXES['unet']}input_blocks.0.0.weight"


@dataclass(frozen=True, kw_only=True)
class SdxlParts:
    """The networks of a file, and the noise that it was trained with."""

    unet: nn.Module
    autoencoder: nn.Module
    small: nn.Module
    large: nn.Module
    schedule: NoiseSchedule


def read_parts(path: Path, dtype: torch.dtype, pixel_dtype: torch.dtype, *, weights: bool = True) -> SdxlParts:
    """The networks of a file, on the CPU, the autoencoder in `pixel_dtype`; without `weights` on the meta device.

    Raises FileError for a file of something else and for configurations beside it that make no network, WeightsError
    that names what is missing, unexpected or of the wrong shape, MissingError without diffusers.
    """
    header = headers.read_header(path)
    networks = _empty(path.parent, dtype, pixel_dtype, _channels(header))
    wanted = {part: sdxl_checkpoint.places(part, network) for part, network in networks.items()}
    _check(path, header, networks, wanted)
    if weights:
        kinds = {part: (dtype if part != "vae" else pixel_dtype) for part in networks}
        networks = {
            part: components.shared(
                path,
                f"{part} of a single file",
                kinds[part],
                lambda part=part: _filled(path, networks[part], wanted[part], kinds[part]),
                config=networks[part].config,
            )
            for part in networks
        }
    return SdxlParts(
        unet=networks["unet"],
        autoencoder=networks["vae"],
        small=networks["text_encoder"],
        large=networks["text_encoder_2"],
        schedule=_schedule(path.parent, header),
    )


def read_refiner(path: Path, dtype: torch.dtype, *, weights: bool = True) -> nn.Module:
    """The UNet of a refiner's file, on the CPU; without `weights` on the meta device. Its text encoder, which is the
    larger of the base model's, and its autoencoder are left there. Raises as `read_parts`.
    """
    header = headers.read_header(path)
    folder = part_folder(path.parent, "unet", own=REFINER)
    network = load_network(folder, unet_2d_condition(), dtype, weights=False)
    places = sdxl_checkpoint.places("unet", network)
    own = {name: tensor for name, tensor in header.items() if name.startswith(PREFIXES["unet"])}
    _check(path, own, {"unet": network}, {"unet": places})
    if not weights:
        return network
    what = "a refiner's unet of a single file"
    return components.shared(path, what, dtype, lambda: _filled(path, network, places, dtype), config=network.config)


def part_folder(beside: Path, part: str, name: str = "config.json", own: Path = CONFIGURATIONS) -> Path:
    """The folder of a part's configuration: beside the file, or among SDXL's own."""
    return beside / part if (beside / part / name).is_file() else own / part


def _empty(beside: Path, dtype: torch.dtype, pixel_dtype: torch.dtype, channels: int | None) -> dict[str, nn.Module]:
    """Every part by its name, with shapes and no numbers; `channels` is what the UNet in the file reads."""
    unet: Any = load_network(part_folder(beside, "unet"), unet_2d_condition(), dtype, weights=False)
    if channels is not None and channels != unet.config["in_channels"]:  # one that was made for inpainting
        old = unet.conv_in
        with torch.device(META):
            unet.conv_in = nn.Conv2d(channels, old.out_channels, old.kernel_size, padding=old.padding, dtype=dtype)
        unet.register_to_config(in_channels=channels)
    texts = zip(sdxl_text.ENCODERS, sdxl_text.kinds()[:2], strict=True)
    return {
        "unet": unet.eval().requires_grad_(False),
        "vae": load_autoencoder(part_folder(beside, "vae").parent, pixel_dtype, weights=False),
        **{part: read_network(kind, part_folder(beside, part), dtype, weights=False) for part, kind in texts},
    }


def _check(
    path: Path,
    header: Mapping[str, TensorHeader],
    networks: Mapping[str, nn.Module],
    wanted: Mapping[str, Mapping[str, Place]],
) -> None:
    """Every name, every shape, nothing left over; by the names of the file. Raises WeightsError."""
    needed: dict[str, tuple[int, ...]] = {}
    for part, network in networks.items():
        for name, value in network.state_dict().items():
            place, shape = wanted[part][name], tuple(value.shape)
            if place.third is not None:
                shape = (3 * shape[0], *shape[1:])
            needed[place.name] = shape[::-1] if place.turned else shape
    unexpected = sorted(set(header) - set(needed) - _ignored(header))
    missing = tuple(name for name in needed if name not in header)
    mismatched = tuple(
        f"{name}: {header[name].shape} where {shape} is wanted"
        for name, shape in needed.items()
        if name in header and not _fits(header[name].shape, shape)
    )
    if missing or unexpected or mismatched:
        raise WeightsError(path, missing=missing, unexpected=unexpected, mismatched=mismatched)


def _ignored(header: Mapping[str, TensorHeader]) -> set[str]:
    """What such files hold besides, among it averages of all weights that training kept (`model_ema.`)."""
    marks = (*sdxl_checkpoint.IGNORED, sdxl_checkpoint.VELOCITY, sdxl_checkpoint.ZERO_TERMINAL)
    return {name for name in header if name in marks or name.startswith("model_ema.")}


def _fits(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a tensor has that shape, or is a convolution of one by one that does the same as a matrix."""
    return found in (shape, (*shape, 1, 1))


def _filled(path: Path, network: nn.Module, places: Mapping[str, Place], dtype: torch.dtype) -> nn.Module:
    """The network with its numbers, or with stand-ins where reading is deferred (`gesso.stored`)."""
    lying = stored.read_header(path)
    state: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        tensor = _cut(lying[places[name].name], places[name], tuple(value.shape)).cast_to(dtype)
        if places[name].turned:  # read at once, since a stand-in would keep the order of the file: sums go by it
            state[name] = stored.read_apart(tensor).T.contiguous()
        else:
            state[name] = stored.stand_in(tensor) if stored.is_deferred() else stored.read_apart(tensor)
    fill(network, state, path)
    sdxl_text.restore_positions(network)
    return network


def _cut(tensor: Stored, place: Place, shape: tuple[int, ...]) -> Stored:
    """The part of a tensor in the file that is wanted, in the shape in which it is wanted."""
    if place.third is not None:
        rows = prod(shape) * tensor.dtype.itemsize
        return replace(tensor, offset=tensor.offset + place.third * rows, shape=shape)
    return tensor if place.turned else replace(tensor, shape=shape)


def _channels(header: Mapping[str, TensorHeader]) -> int | None:
    """How many channels the UNet in the file reads; None where its first layer is missing, or is none."""
    shape = header[_INPUT].shape if _INPUT in header else ()
    return shape[1] if len(shape) == 4 else None


def _schedule(beside: Path, header: Mapping[str, TensorHeader]) -> NoiseSchedule:
    """As configured, or as marks in the file say what it predicts."""
    schedule = read_noise_schedule(part_folder(beside, "scheduler", NAME))
    if sdxl_checkpoint.VELOCITY in header:
        schedule = replace(schedule, prediction_type="v_prediction")
    if sdxl_checkpoint.ZERO_TERMINAL in header:  # only this spacing begins there
        schedule = replace(schedule, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return schedule
