"""InfiniteYou's golden of 8-bit weights: one linear layer in detail, then InfuseNet and FLUX with both quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gesso.weights.quantize import Int8Linear, linear_layers, quantize_layers, quantize_rows
from tests.golden.comparison import Comparison
from tests.golden.infinite_you_network import InjectionSideCar, _flux, _residuals, network_of
from tests.golden.side_car import BrokenGoldenError, Golden, SideCar, read_golden


class Facts(SideCar):
    all_linears_quantized: bool | None = None
    n_quantized: int | None = None
    rule_absmax_over_127_per_output_row_round_half_even: bool | None = None


class QuantizationSideCar(SideCar):
    facts: Facts = Facts()
    inputs: str | None = None


def check_quantization(golden: Golden, comparison: Comparison) -> None:
    """Rows, scales and products are exact; both networks then agree within the tolerance."""
    side_car = golden.view(QuantizationSideCar)
    weight_OI, bias_O = golden.tensor("w"), golden.tensor("b")
    rows_OI, scale_O1 = quantize_rows(weight_OI)
    layer = Int8Linear(rows_OI, scale_O1, bias_O)
    comparison.equal("int8", rows_OI, golden.tensor("int8"))
    comparison.equal("scale", scale_O1, golden.tensor("scale"))
    comparison.equal("w_dequantized", layer.weight, golden.tensor("w_dequantized"))
    atol = golden.tolerances.get("floats", default=5e-5)
    comparison.close(
        "y_float", nn.functional.linear(golden.tensor("x"), weight_OI, bias_O), golden.tensor("y_float"), atol
    )
    comparison.close("y_int8", layer(golden.tensor("x")), golden.tensor("y_int8"), 1e-6)
    if side_car.inputs is not None:
        _check_networks(golden, comparison, side_car)


def _check_networks(golden: Golden, comparison: Comparison, side_car: QuantizationSideCar) -> None:
    inputs = read_golden(golden.path.with_name(f"{side_car.inputs}.json"))
    if inputs is None:
        raise BrokenGoldenError(f"inputs: {side_car.inputs}.json is no side-car")
    flux, side = network_of(inputs, "flux"), network_of(inputs, "infusenet")
    counts = [quantize_layers(network, "8bit") for network in (flux, side)]
    wanted = side_car.facts.n_quantized
    comparison.true("layers", wanted in (None, *counts, sum(counts)), f"{counts} were quantized, not {wanted}")
    left = [place for network in (flux, side) for place in linear_layers(network)]
    comparison.true("all layers", not left, f"{len(left)} linear layers are left")
    atol = golden.tolerances.get("floats", default=5e-5)
    with torch.inference_mode():
        made: Any = _residuals(inputs, side, 1.0)
        wanted_first = golden.tensor("injection.double_residual0_int8")
        comparison.close("double_residual0", made.double[0], wanted_first, atol)
        guidance = inputs.view(InjectionSideCar).guidance_scale
        out = _flux(inputs, flux, guidance, made.arguments())
        comparison.close("flux_injected", out, golden.tensor("injection.flux_injected_int8"), atol)
