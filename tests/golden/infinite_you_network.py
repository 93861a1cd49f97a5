"""InfiniteYou goldens of networks: weights, the resampler, published names, and what InfuseNet adds to FLUX.

Networks are made from the configuration of whichever side-car holds their weights; weights that are not stored are made
by the recipe that it states.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from gesso.errors import WeightsError
from gesso.models import infusenet
from gesso.models.arcface import ArcFace
from gesso.models.diffusers_parts import flux_transformer
from gesso.models.resampler import Resampler, ResamplerConfig, infer_config
from gesso.weights.files import fill
from tests.golden.comparison import Comparison
from tests.golden.side_car import BrokenGoldenError, Golden, NotYetError, SideCar, read_golden
from tests.golden.z_image_network import build_autoencoder, by_recipe, compare_names

Network = TypeVar("Network", bound=nn.Module)

GUIDANCE = 3.5  # what FLUX is told in goldens that do not say


class ExactTimes(nn.Module):
    """Sines of times as exactly as float32 holds them, `[B]` to `[B,256]`.

    diffusers multiplies a guidance of 3500 with what torch makes of exp(), whose last bit differs between versions of
    torch and kinds of processors: 5e-5 of the output, which is all of the goldens' tolerance.
    """

    def forward(self, times_B: Tensor) -> Tensor:
        exponents_F = -math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128
        angles_BF = times_B[:, None].float() * exponents_F.double().exp().float()
        return torch.cat((angles_BF.cos(), angles_BF.sin()), dim=-1)


class WeightsSideCar(SideCar):
    """What tells a network."""

    config: dict[str, Any] | None = None
    seed: int | None = None
    class_: str | None = None
    weights_not_stored: bool = False  # or only some of them


class NamesSideCar(SideCar):
    tensors: dict[str, tuple[int, ...]]
    parameters: int | None = None


class InjectionSideCar(SideCar):
    """Scales are in the names of tensors: `flux_injected_scale0.8`."""

    residual_index_per_double_block: list[int] | None = None
    residual_index_per_single_block: list[int] | None = None
    scale0_equals_plain: float | None = None
    guidance_scale: float = GUIDANCE


# ---- networks of a golden ------------------------------------------------------------------------------------------


def network_of(golden: Golden, role: str) -> Any:
    """The network of a role ("flux", "infusenet", "vae", "resampler"), in evaluation mode."""
    source, prefix = _source(golden, role)
    side_car = source.view(WeightsSideCar)
    config = side_car.config or golden.data.get(f"{role}_config")
    if not isinstance(config, dict):
        raise BrokenGoldenError(f"{role}: neither side-car has its configuration")
    network = _build(role, config)
    state = {name[len(prefix) :]: value for name, value in source.tensors.items() if name.startswith(prefix)}
    if side_car.weights_not_stored or not set(state) & set(network.state_dict()):
        if side_car.seed is None:
            raise BrokenGoldenError(f"{role}: neither weights nor the seed of their recipe")
        state = by_recipe(network, side_car.seed)
    filled(network, state, source.path.name)
    if role in ("flux", "infusenet"):
        times: Any = network.time_text_embed
        given = torch.tensor([1000.0, 350.0, 3500.0])
        torch.testing.assert_close(ExactTimes()(given), times.time_proj(given), atol=1e-3, rtol=0)
        times.time_proj = ExactTimes()
    return network


def filled(network: Network, state: Mapping[str, Tensor], name: str) -> Network:
    """The network with these weights, strictly."""
    try:
        fill(network, state, name)
    except WeightsError as error:
        raise BrokenGoldenError(str(error)) from error
    return network.eval().requires_grad_(False)


def _source(golden: Golden, role: str) -> tuple[Golden, str]:
    """The golden that holds a role's weights, and what their names begin with there."""
    stated = golden.data.get("weights")
    named = stated.get(role) if isinstance(stated, dict) else None
    found = re.match(r"([\w.-]+)(?:.*prefix\W+([\w.]+)\")?", str(named)) if named else None
    if found is None:
        return golden, ""
    prefix = found[2] or ""
    if found[1] == golden.path.stem or found[1].startswith("this"):
        return golden, prefix
    source = read_golden(golden.path.with_name(f"{found[1]}.json"))
    if source is None:
        raise BrokenGoldenError(f"weights.{role}: {found[1]}.json is no side-car")
    return source, prefix


def _build(role: str, config: Mapping[str, Any]) -> nn.Module:
    """A role's network on the meta device."""
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    if role == "vae":
        return build_autoencoder(known)
    with torch.device("meta"):
        if role == "resampler":
            return Resampler(_resampler_config(known))
        if role == "infusenet":
            return infusenet.build(known)
        return flux_transformer()(**known)


def _resampler_config(stated: Mapping[str, Any]) -> ResamplerConfig:
    try:
        return TypeAdapter(ResamplerConfig).validate_python(dict(stated))
    except ValidationError as error:
        raise BrokenGoldenError(f"side-car field 'config': {error.errors()[0]['msg']}") from error


# ---- weights and names ---------------------------------------------------------------------------------------------


def check_weights(golden: Golden, comparison: Comparison) -> None:
    """Stored weights: strictly the product's names and shapes, and what the recipe gives."""
    side_car = golden.view(WeightsSideCar)
    role = {"FluxControlNetModel": "infusenet", "FluxTransformer2DModel": "flux"}.get(str(side_car.class_), "vae")
    network = _build(role, side_car.config or {})
    if not side_car.weights_not_stored:
        compare_names(comparison, network, {name: tuple(value.shape) for name, value in golden.tensors.items()})
    if side_car.seed is not None:
        recipe = by_recipe(network, side_car.seed)
        for name in recipe.keys() & golden.tensors.keys():
            comparison.close(name, recipe[name], golden.tensors[name], 1e-5)


def check_infusenet_names(golden: Golden, comparison: Comparison) -> None:
    """The published network on the meta device; its sizes are those of its tensors."""
    tensors = golden.view(NamesSideCar).tensors
    _compare_names(golden, comparison, _build("infusenet", _control_config(tensors)))


def check_resampler_names(golden: Golden, comparison: Comparison) -> None:
    """The published network on the meta device, as it is made of the file's own tensors."""
    tensors = golden.view(NamesSideCar).tensors
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in tensors.items()}
        _compare_names(golden, comparison, Resampler(infer_config(state)))
        if tensors["latents"][-1] == ResamplerConfig().dim:
            comparison.true("defaults", infer_config(state) == ResamplerConfig(), "are not the published sizes")


def check_recogniser_names(golden: Golden, comparison: Comparison) -> None:
    """The recogniser on the meta device."""
    with torch.device("meta"):
        _compare_names(golden, comparison, ArcFace())


def _compare_names(golden: Golden, comparison: Comparison, network: nn.Module) -> None:
    listing = golden.view(NamesSideCar)
    compare_names(comparison, network, listing.tensors)
    if listing.parameters is not None:
        count = sum(parameter.numel() for parameter in network.parameters())
        comparison.true("parameters", count == listing.parameters, f"{count}, not {listing.parameters}")


def _control_config(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    def count(blocks: str) -> int:
        return len({name.split(".")[1] for name in tensors if name.startswith(f"{blocks}.")})

    inner, channels = tensors["x_embedder.weight"]
    head = next(shape[0] for name, shape in tensors.items() if name.endswith("attn.norm_q.weight"))
    return {
        "in_channels": channels,
        "num_layers": count("transformer_blocks"),
        "num_single_layers": count("single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": inner // head,
        "joint_attention_dim": tensors["context_embedder.weight"][1],
        "pooled_projection_dim": tensors["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": any(name.startswith("time_text_embed.guidance_embedder") for name in tensors),
    }


# ---- resampler ------------------------------------------------------------------------------------------------------


def check_resampler(golden: Golden, comparison: Comparison) -> None:
    """Every recorded input's output, and what the branches of the layers add on the first."""
    network = network_of(golden, "resampler")
    atol = golden.tolerances.get("floats", default=5e-5)
    taps: dict[str, Tensor] = {}
    named = {"proj_in": network.proj_in}
    for index, (attention, feed_forward) in enumerate(network.layers):
        named |= {f"layers.{index}.attn": attention, f"layers.{index}.ff": feed_forward}
    for name, module in named.items():
        module.register_forward_hook(lambda _m, _i, made, name=name: taps.__setitem__(name, made))
    for name in (name for name in golden.tensors if name == "in" or name.startswith("in_")):
        taps.clear()
        comparison.close(f"out{name[2:]}", network(golden.tensor(name)), golden.tensor(f"out{name[2:]}"), atol)
        for tap in taps if name == "in" else ():
            if f"tap.{tap}" in golden.tensors:
                comparison.close(f"tap.{tap}", taps[tap], golden.tensor(f"tap.{tap}"), atol)


# ---- injection ------------------------------------------------------------------------------------------------------


def check_injection(golden: Golden, comparison: Comparison) -> None:
    """InfuseNet's residuals; FLUX's output without them and with them at every recorded scale; who gets which."""
    side_car = golden.view(InjectionSideCar)
    flux, side = network_of(golden, "flux"), network_of(golden, "infusenet")
    atol = golden.tolerances.get("floats", default=5e-5)
    with torch.inference_mode():
        made = _residuals(golden, side, 1.0)
        for kind, found in (("double", made.double), ("single", made.single)):
            recorded = [name for name in golden.tensors if re.fullmatch(rf"{kind}_residual\d+", name)]
            comparison.true(kind, len(found or ()) == len(recorded), f"{len(found or ())} {kind} residuals")
            for name in recorded[: len(found or ())]:
                comparison.close(name, (found or ())[int(name[len(f"{kind}_residual") :])], golden.tensor(name), atol)
        plain = _flux(golden, flux, side_car.guidance_scale, {})
        comparison.close("flux_plain", plain, golden.tensor("flux_plain"), atol)
        for name in golden.tensors:
            if found := re.fullmatch(r"flux_injected_scale([\d.]+)", name):
                given = _residuals(golden, side, float(found[1])).arguments()
                out = _flux(golden, flux, side_car.guidance_scale, given)
                comparison.close(name, out, golden.tensor(name), atol)
                if float(found[1]) == 0 and side_car.scale0_equals_plain == 0:
                    comparison.equal("scale 0 is none at all", out, plain)
        _check_places(golden, comparison, flux, side_car)


def _residuals(golden: Golden, side: Any, scale: float) -> infusenet.Residuals:
    return infusenet.residuals(
        side,
        tokens_BLD=golden.tensor("hidden_states"),
        control_BLD=golden.tensor("controlnet_cond"),
        identity_BNE=golden.tensor("id_tokens"),
        pooled_BP=golden.tensor("pooled"),
        time_B=golden.tensor("timestep"),
        positions_L3=golden.tensor("img_ids"),
        scale=scale,
    )


def _flux(golden: Golden, flux: Any, guidance: float, given: Mapping[str, Any]) -> Tensor:
    tokens_BLD, text_BTE = golden.tensor("hidden_states"), golden.tensor("text_tokens")
    guidance_B = torch.full((len(tokens_BLD),), guidance) if flux.config["guidance_embeds"] else None
    return flux(
        hidden_states=tokens_BLD,
        timestep=golden.tensor("timestep"),
        guidance=guidance_B,
        pooled_projections=golden.tensor("pooled"),
        encoder_hidden_states=text_BTE,
        txt_ids=text_BTE.new_zeros(text_BTE.shape[1], 3),
        img_ids=golden.tensor("img_ids"),
        return_dict=False,
        **given,
    )[0]


def _check_places(golden: Golden, comparison: Comparison, flux: Any, side_car: InjectionSideCar) -> None:
    """Residual k is k+1 everywhere and no block does anything: what each block is left with says what it was given."""
    tables = {
        "double": side_car.residual_index_per_double_block,
        "single": side_car.residual_index_per_single_block,
    }
    counts = {kind: sum(1 for name in golden.tensors if re.fullmatch(rf"{kind}_residual\d+", name)) for kind in tables}
    if any(table is not None and not counts[kind] for kind, table in tables.items() if table):
        raise NotYetError("places of residuals that were not recorded")
    seen: list[Tensor] = []
    for block in (*flux.transformer_blocks, *flux.single_transformer_blocks):
        block.forward = lambda hidden_states, encoder_hidden_states, seen=seen, **_: (
            seen.append(hidden_states),
            (encoder_hidden_states, hidden_states),
        )[1]
    flux.norm_out.forward = lambda hidden_states, _time: (seen.append(hidden_states), hidden_states)[1]
    like = golden.tensor("double_residual0" if counts["double"] else "single_residual0")
    given = infusenet.Residuals(*([torch.full_like(like, k + 1.0) for k in range(n)] or None for n in counts.values()))
    _flux(golden, flux, side_car.guidance_scale, given.arguments())
    received = [round(float((after - before).mean())) - 1 for before, after in _pairs(seen)]
    doubles = len(flux.transformer_blocks)
    for kind, places in (("double", received[:doubles]), ("single", received[doubles:])):
        if tables[kind] is not None and counts[kind]:
            comparison.true(f"{kind} places", places == tables[kind], f"{places}, not {tables[kind]}")


def _pairs(values: list[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
    return pairwise(values)
