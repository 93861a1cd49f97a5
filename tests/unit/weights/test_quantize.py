"""8-bit weights: the rule at its edges, layers that stand for linear ones, and torchao where it is installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from gesso.errors import MissingError
from gesso.weights.quantize import SCHEMES, Int8Linear, linear_layers, quantize_layers, quantize_rows, quantized_bytes

TORCHAO = importlib.util.find_spec("torchao") is not None


class Small(nn.Module):
    """A linear layer of each kind, and a part that is to be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 20)
        self.more = nn.Sequential(nn.SiLU(), nn.Linear(20, 48, bias=False))
        self.left = CLIPLike()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.more(self.first(x))


class CLIPLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_the_weight_but_for_half_a_step(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 48).to(dtype)
    weight[3] = 0
    rows, scale = quantize_rows(weight)
    assert (rows.dtype, scale.dtype, scale.shape) == (torch.int8, dtype, (20, 1))
    error = (rows.float() * scale.float() - weight.float()).abs()
    assert (error <= 0.51 * scale.float() + 0.01 * weight.float().abs()).all()
    largest = rows.abs().amax(1).tolist()  # in 16 bits the scale is rounded, and the quotient
    assert all(value == 0 if row == 3 else 125 <= value <= 128 for row, value in enumerate(largest))


def test_halves_go_to_the_even() -> None:
    rows, _ = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5]]))
    assert rows.tolist() == [[127, 0, 2, -2]]


def test_a_network_keeps_its_meaning_dtype_and_other_parts() -> None:
    torch.manual_seed(0)
    network = Small().eval().requires_grad_(False)
    x, before = torch.randn(3, 48), network(torch.ones(1, 48))
    planned = sum(quantized_bytes(getattr(*place)) for place in linear_layers(network, without="CLIP"))
    plain = network(x)
    for parent, name in linear_layers(network, without="CLIP"):
        setattr(parent, name, SCHEMES["8bit"](getattr(parent, name)))
    assert isinstance(network.first, Int8Linear) and type(network.left.inside) is nn.Linear
    assert 0 < (network(x) - plain).abs().max() < 0.05 * plain.abs().max()
    assert next(network.parameters()).dtype == torch.float32
    layers: list[Any] = [network.first, network.more[1]]
    assert sum(p.nbytes for layer in layers for p in layer.parameters()) == planned
    assert torch.equal(network.first(x), nn.functional.linear(x, network.first.weight, network.first.bias))
    assert network(torch.ones(1, 48)).shape == before.shape


def test_everything_is_quantized_unless_told_otherwise() -> None:
    network = Small()
    assert quantize_layers(network, "8bit") == 3
    assert not linear_layers(network)


@pytest.mark.skipif(TORCHAO, reason="torchao is installed")
@pytest.mark.parametrize("scheme", ["torchao-int8", "torchao-fp8"])
def test_without_torchao_the_command_is_named(scheme: str) -> None:
    with pytest.raises(MissingError, match=r"gesso\[quantize\]"):
        quantize_layers(Small(), scheme)


@pytest.mark.skipif(not TORCHAO, reason="torchao is not installed")
@pytest.mark.parametrize(("scheme", "most"), [("torchao-int8", 0.05), ("torchao-fp8", 0.1)])
@pytest.mark.filterwarnings("ignore")
def test_torchao_keeps_the_meaning(scheme: str, most: float) -> None:
    torch.manual_seed(0)
    network = Small().eval().requires_grad_(False)
    x = torch.randn(3, 48)
    plain = network(x)
    assert quantize_layers(network, scheme) == 3
    assert 0 < (network(x) - plain).abs().max() < most * plain.abs().max()
