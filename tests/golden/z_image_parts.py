"""Z-Image goldens of isolated parts: embeddings, attention within samples, schedules, published names."""

from __future__ import annotations

import re

import torch
from pydantic import Field
from torch import Tensor

from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.layers import attend, time_features
from gesso.models.s3dit.rotary import rotate, turns
from gesso.models.s3dit.transformer import S3DiT
from gesso.sampling.flow import complete, dynamic_shift, linear_sigmas, shift_of_tokens, static_shift
from tests.golden.comparison import Comparison
from tests.golden.side_car import BrokenGoldenError, Golden, NotYetError, SideCar
from tests.golden.z_image_network import build_autoencoder, compare_names

_MASKLESS = ("_native_flash", "flash", "_flash_3")  # backends that drop the mask: a flaw, and not to be matched


def check_embeddings(golden: Golden, comparison: Comparison) -> None:
    """Features of times; cosines and sines of positions; rotation of queries."""
    atol = golden.tolerances.get("floats", default=5e-5)
    for name, recorded in golden.tensors.items():
        if found := re.fullmatch(r"timestep\.out(\d+)", name):
            if int(found[1]) != recorded.shape[-1] or int(found[1]) != 256:
                raise NotYetError(f"{found[1]} features of a time")
            comparison.close(name, time_features(golden.tensor("timestep.in")), recorded, atol)
        elif found := re.fullmatch(r"rope\.(.+)\.cos_sin", name):
            ids = golden.tensor(f"rope.{found[1]}.ids")
            comparison.close(name, turns(_axes(golden, 2 * recorded.shape[1]), ids), recorded, atol)
        elif name == "rope.apply.out":
            before, table = golden.tensor("rope.apply.in").clone(), golden.tensor("rope.apply.freqs")
            comparison.close(name, rotate(before, table[None, :, None]), recorded, atol)


def _axes(golden: Golden, head_width: int) -> S3DiTConfig:
    """A configuration with heads of this width; the axes share it as in published networks, unless stated."""
    stated = golden.data.get("axes_dims")
    quarter = head_width // 8
    axes = tuple(stated) if isinstance(stated, list) else (2 * quarter, 3 * quarter, 3 * quarter)
    return S3DiTConfig(dim=head_width, n_heads=1, n_kv_heads=1, axes_dims=axes, axes_lens=(4096, 4096, 4096))


def check_attention(golden: Golden, comparison: Comparison) -> None:
    """Attention in a mask is attention within samples: the rows that are real, packed without padding."""
    atol = golden.tolerances.get("floats", default=5e-5)
    q, k, v, mask = (golden.tensor(name) for name in ("q", "k", "v", "mask"))
    real = [row.nonzero().flatten() for row in mask.bool()]
    order = sorted(range(len(real)), key=lambda sample: len(real[sample]))

    def packed(x_BSHd: Tensor) -> Tensor:
        return torch.cat([x_BSHd[sample, real[sample]] for sample in order])[None]

    groups = tuple((1, len(real[sample])) for sample in order)
    within = attend(packed(q), packed(k), packed(v), groups)
    whole = attend(q, k, v, ((len(q), q.shape[1]),))
    for name, recorded in golden.tensors.items():
        found = re.fullmatch(r"out\.(.+)\.(masked|nomask)", name)
        if found and found[2] == "nomask":
            comparison.close(name, whole, recorded, atol)
        elif found and found[1] not in _MASKLESS:
            comparison.close(name, within, packed(recorded), atol)


class SizeShift(SideCar):
    tokens: int
    mu: float


class SchedulerSideCar(SideCar):
    calculate_shift: dict[str, SizeShift] = Field(default_factory=dict)
    ctor_sigma_min_max: tuple[float, float] = (0.0, 1.0)
    shift: float = 3.0


def check_scheduler(golden: Golden, comparison: Comparison) -> None:
    """Sigmas and timesteps of every shift and number of steps; mu of every number of tokens."""
    side_car = golden.view(SchedulerSideCar)
    atol = golden.tolerances.get("floats", default=5e-5)
    for size, stated in side_car.calculate_shift.items():
        comparison.close(f"mu of {size}", shift_of_tokens(stated.tokens), stated.mu, 1e-9)
    for name, recorded in golden.tensors.items():
        sigmas = _sigmas(name, len(recorded), side_car)
        leaf = name.rpartition(".")[-1]
        measured = sigmas[: len(recorded)] * (1000 if leaf == "timesteps" else 1)
        comparison.close(name, measured, recorded, atol)


def _sigmas(name: str, length: int, side_car: SchedulerSideCar) -> Tensor:
    if name == "ctor.sigmas":
        return complete(static_shift(linear_sigmas(length), side_car.shift))
    if found := re.fullmatch(r"unmodified_sigma_min\.n(\d+)\.\w+", name):
        end = side_car.ctor_sigma_min_max[0]
        return complete(static_shift(linear_sigmas(int(found[1]), end), side_car.shift))
    if found := re.fullmatch(r"static([\d.]+)\.n(\d+)\.\w+", name):
        return complete(static_shift(linear_sigmas(int(found[2])), float(found[1])))
    if found := re.fullmatch(r"dynamic\.(\w+)\.n(\d+)\.\w+", name):
        if found[1] not in side_car.calculate_shift:
            raise BrokenGoldenError(f"calculate_shift has no {found[1]}")
        mu = shift_of_tokens(side_car.calculate_shift[found[1]].tokens)
        return complete(dynamic_shift(linear_sigmas(int(found[2])), mu))
    raise NotYetError(f"the schedule '{name}'")


class NamesSideCar(SideCar):
    """A listing of published names: shapes by name, how many there are, and their numbers together."""

    count: int
    parameters: int
    tensors: dict[str, tuple[int, ...]]


def check_transformer_names(golden: Golden, comparison: Comparison) -> None:
    """The full-size network on the meta device."""
    with torch.device("meta"):
        _compare_listing(golden, comparison, S3DiT(S3DiTConfig()))


def check_autoencoder_names(golden: Golden, comparison: Comparison) -> None:
    """The full-size autoencoder on the meta device, by the configuration of Z-Image and FLUX.1."""
    config: dict[str, object] = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    config |= {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
    _compare_listing(golden, comparison, build_autoencoder(config))


def _compare_listing(golden: Golden, comparison: Comparison, network: torch.nn.Module) -> None:
    listing = golden.view(NamesSideCar)
    compare_names(comparison, network, listing.tensors)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    comparison.true("parameters", parameters == listing.parameters, f"{parameters}, not {listing.parameters}")
    comparison.true("count", len(network.state_dict()) == listing.count, f"{len(network.state_dict())} tensors")
