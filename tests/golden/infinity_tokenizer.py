"""Infinity goldens of kinds a (multi-scale quantizer) and b (tokenizer network)."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso.models.infinity.autoencoder import Autoencoder, AutoencoderConfig, to_uint8
from gesso.models.infinity.checkpoint import autoencoder_state
from gesso.models.infinity.quantizer import Quantized, entropy, quantize, shrink, sum_of_codes, to_tokens
from gesso.models.infinity.scales import Grid
from tests.golden.comparison import Comparison
from tests.golden.side_car import BrokenGoldenError, Golden, NotYetError, SideCar, bits_first, grids, read_cases

_NEAR_ZERO = 0.05  # of a code's entry


class QuantizerSideCar(SideCar):
    d: int
    apply_spatial_patchify: int = 0
    scale_schedule_thw: list[tuple[int, int, int]]


class AutoencoderSettings(SideCar):
    """A published tokenizer's configuration."""

    codebook_dim: int
    base_ch: int
    num_res_blocks: int
    encoder_ch_mult: tuple[int, ...]
    decoder_ch_mult: tuple[int, ...]
    patch_size: int
    groups: int = 32
    gn_eps: float = 1e-6
    attention: bool = False


class AutoencoderSideCar(SideCar):
    config: AutoencoderSettings
    apply_spatial_patchify: int = 0


class AutoencoderCase(SideCar):
    scale_schedule_thw: list[tuple[int, int, int]]
    clamped_fraction: float | None = None


def check_quantizer(golden: Golden, comparison: Comparison) -> None:
    """Kind a: bits of every scale, residuals, sums, the straight-through gradient, the entropy helper."""
    side_car = golden.view(QuantizerSideCar)
    scales = grids(side_car.scale_schedule_thw)
    atol = golden.tolerances.get("floats", default=1e-5)
    latent = golden.tensor("latent").requires_grad_()
    quantized = quantize(latent, scales)
    bits = [bits_first(golden.tensor(f"s{scale:02d}.bits")) for scale in range(len(scales))]
    for scale in range(len(scales)):
        _check_scale(golden, comparison, quantized, scales, scale, bool(side_car.apply_spatial_patchify), atol)
    comparison.close("quantized_out", quantized.sum_BKHW, golden.tensor("quantized_out"), atol)
    if "summed_codes_from_bits" in golden.tensors:
        rebuilt = sum_of_codes(bits, scales[-1])
        comparison.close("summed_codes_from_bits", rebuilt, golden.tensor("summed_codes_from_bits"), atol)
    if "grad_latent" in golden.tensors:
        (quantized.sum_BKHW * golden.tensor("grad_weight")).sum().backward()
        assert latent.grad is not None
        comparison.close("grad_latent", latent.grad, golden.tensor("grad_latent"), atol)
    if "near_zero_fraction_per_scale" in golden.tensors:
        near = [(r.abs() < _NEAR_ZERO * side_car.d**-0.5).float().mean() for r in quantized.residuals]
        recorded = golden.tensor("near_zero_fraction_per_scale")
        comparison.close("near_zero_fraction_per_scale", torch.stack(near), recorded, 1e-3)
    if "soft_entropy.per_sample" in golden.tensors:
        _check_entropy(golden, comparison, quantized, atol)


def _check_scale(
    golden: Golden,
    comparison: Comparison,
    quantized: Quantized,
    scales: tuple[Grid, ...],
    scale: int,
    patchify: bool,
    atol: float,
) -> None:
    name = f"s{scale:02d}"
    bits = bits_first(golden.tensor(f"{name}.bits"))
    comparison.equal(f"{name}.bits", quantized.bits[scale], bits)
    if f"{name}.residual" in golden.tensors:
        recorded = golden.tensor(f"{name}.residual").squeeze(2)
        comparison.close(f"{name}.residual", quantized.residuals[scale], recorded, atol)
    if f"{name}.bits_patchified" in golden.tensors:
        tokens = to_tokens(quantized.bits[scale].to(torch.uint8), patchify)
        comparison.equal(f"{name}.bits_patchified", tokens, golden.tensor(f"{name}.bits_patchified"))
    if f"{name}.next_input_area" in golden.tensors:
        summed = sum_of_codes(quantized.bits[: scale + 1], scales[-1])
        recorded = golden.tensor(f"{name}.next_input_area").squeeze(2)
        comparison.close(f"{name}.next_input_area", shrink(summed, scales[scale + 1]), recorded, atol)


def _check_entropy(golden: Golden, comparison: Comparison, quantized: Quantized, atol: float) -> None:
    """The helper was evaluated on one scale's residual, which the side-car names in words."""
    words = " ".join(str(value) for value in _meanings(golden).values() if "entropy" in str(value))
    named = re.search(r"residual of scale (\d+)", words)
    if named is None:
        raise BrokenGoldenError("side-car does not say of which scale the soft entropy is")
    unit = F.normalize(quantized.residuals[int(named[1])].detach(), dim=1)
    per_cell, codebook, odds = entropy(unit)
    recorded = golden.tensor("soft_entropy.per_sample")
    # a sum of `bits` rounded terms each up to 0.69
    comparison.close("soft_entropy.per_sample", per_cell, recorded, max(atol, 1e-5))
    comparison.close("soft_entropy.codebook", codebook, golden.tensor("soft_entropy.codebook"), max(atol, 1e-5))
    comparison.close("soft_entropy.avg_prob", odds, golden.tensor("soft_entropy.avg_prob"), atol)


def _meanings(golden: Golden) -> dict[str, object]:
    stated = golden.data.get("tensors")
    return {str(name): words for name, words in stated.items()} if isinstance(stated, dict) else {}


def build_autoencoder(settings: AutoencoderSettings, published: dict[str, Tensor]) -> Autoencoder:
    """The product's tokenizer, a published state loaded strictly. Raises NotYetError for what it cannot express."""
    if settings.attention or any("attn" in name for name in published):
        raise NotYetError("a tokenizer with attention")
    if settings.gn_eps != 1e-6:
        raise NotYetError(f"group norm epsilon {settings.gn_eps}")
    config = AutoencoderConfig(
        bits=settings.codebook_dim,
        width=settings.base_ch,
        encoder_multipliers=settings.encoder_ch_mult,
        decoder_multipliers=settings.decoder_ch_mult,
        residual_blocks=settings.num_res_blocks,
        stride=settings.patch_size,
        groups=settings.groups,
    )
    network = Autoencoder(config).eval()
    network.load_state_dict(autoencoder_state(published), strict=True)
    return network


def check_autoencoder(golden: Golden, comparison: Comparison) -> None:
    """Kind b: features, bits, sums, decoded picture before clamping, bytes."""
    side_car = golden.view(AutoencoderSideCar)
    network = build_autoencoder(side_car.config, golden.state("state_in"))
    for prefix, case in read_cases(golden, AutoencoderCase, "image"):
        with torch.no_grad():
            _check_case(golden, comparison, network, prefix, case)


def _check_case(
    golden: Golden, comparison: Comparison, network: Autoencoder, prefix: str, case: AutoencoderCase
) -> None:
    def recorded(leaf: str) -> Tensor | None:
        return golden.tensors.get(f"{prefix}.{leaf}")

    atol = golden.tolerances.get("floats", default=2e-4)
    scales = grids(case.scale_schedule_thw)
    features = network.encode(golden.tensor(f"{prefix}.image"))
    quantized = quantize(features, scales)
    for scale in range(len(scales)):
        name = f"{prefix}.s{scale:02d}.bits"
        comparison.equal(name, quantized.bits[scale], bits_first(golden.tensor(name)))
    unclamped = network.decoder(quantized.sum_BKHW)
    decoded = network.decode(sum_of_codes(quantized.bits, scales[-1]))
    floats = {
        "raw_features": features,
        "quantized": quantized.sum_BKHW,
        "decoded_unclamped": unclamped,
        "summed_codes": sum_of_codes(quantized.bits, scales[-1])[:, :, None],
    }
    for leaf, measured in floats.items():
        if (expected := recorded(leaf)) is not None:
            comparison.close(f"{prefix}.{leaf}", measured, expected, atol)
    if (expected := recorded("decoded_u8_bgr")) is not None:
        pixels = golden.tolerances.get("uint8", default=1)
        comparison.close(f"{prefix}.decoded_u8_bgr", to_uint8(decoded).flip(-1), expected, pixels)
    if case.clamped_fraction is not None:
        clamped = (unclamped.abs() > 1).float().mean()
        comparison.close(f"{prefix}.clamped_fraction", clamped, case.clamped_fraction, 2e-3)
