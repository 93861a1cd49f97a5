"""Weights in 8 bits: the rule of InfiniteYou's authors, and torchao's int8 and fp8; activations stay as they are.

The rule (optimum-quanto's qint8, weights only): each row of a linear layer's weight is divided by a 127th of its
largest magnitude and rounded half to even; the layer multiplies by the weight that this gives back. torchao does
likewise with kernels of its own, and is an extra. Not here: which parts of a model are quantized (`placing`).
Shapes: O outputs, I inputs of a linear layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.errors import MissingError

INSTALL = "pip install 'gesso[quantize]'"
_LARGEST = 127


def quantize_rows(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as int8 `[O,I]` and the scale of each, `[O,1]` in the weight's dtype. A row of zeros has the scale 1.

    Example:
        >>> rows, scale = quantize_rows(torch.tensor([[2.0, -4.0, 1.0]]))
        >>> rows.tolist(), round(float(scale * 127), 3)
        ([[64, -127, 32]], 4.0)
    """
    scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True).div_(_LARGEST)
    scale_O1 = scale_O1.masked_fill_(scale_O1 == 0, 1.0)
    # In 16 bits the scale itself is rounded, and a quotient may pass 127.
    rows_OI = torch.div(weight_OI, scale_O1).round_().clamp_(-_LARGEST - 1, _LARGEST)
    return rows_OI.to(torch.int8), scale_O1


class Int8Linear(nn.Module):
    """A linear layer whose weight is kept as int8 rows and their scales, and made anew for each product.

    `scale_O1` is the first parameter, as who asks a network for its dtype looks at the first.
    """

    def __init__(self, rows_OI: Tensor, scale_O1: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = rows_OI.shape
        self.scale_O1 = nn.Parameter(scale_O1, requires_grad=False)
        self.rows_OI = nn.Parameter(rows_OI, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weight that is multiplied by, `[O,I]`, made anew."""
        if self.rows_OI.is_cpu:  # where a product of unlike dtypes makes a whole copy of the rows first
            return self.rows_OI.to(self.scale_O1.dtype).mul_(self.scale_O1)
        return self.rows_OI * self.scale_O1

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _int8(layer: nn.Linear) -> nn.Module:
    bias = None if layer.bias is None else layer.bias.detach()
    return Int8Linear(*quantize_rows(layer.weight.detach()), bias)


def _by_torchao(name: str) -> Callable[[nn.Linear], nn.Module]:
    """What makes a layer's weight a tensor of torchao's, by the name of its configuration."""

    def quantize(layer: nn.Linear) -> nn.Module:
        with _quiet():
            try:
                from torchao import quantization  # pyright: ignore[reportMissingImports]  # an extra's
            except ImportError as error:
                raise MissingError("torchao, which this memory mode quantizes with,", INSTALL) from error
            quantization.quantize_(layer, getattr(quantization, name)())
        return layer.requires_grad_(False)

    return quantize


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao reports kernels that it cannot load on this machine, which nothing here needs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


SCHEMES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "8bit": _int8,
    "torchao-int8": _by_torchao("Int8WeightOnlyConfig"),
    "torchao-fp8": _by_torchao("Float8WeightOnlyConfig"),
}
"""What makes a quantized layer of a linear one, by the name of the memory mode."""


def quantize_layers(network: nn.Module, scheme: str) -> int:
    """Quantize every linear layer of a network in place, one at a time; how many there were. Raises MissingError."""
    places = linear_layers(network)
    for parent, name in places:
        setattr(parent, name, SCHEMES[scheme](getattr(parent, name)))
    return len(places)


def linear_layers(network: nn.Module, without: str = "") -> list[tuple[nn.Module, str]]:
    """Every plain linear layer below a network: what holds it and by what name, but not the layer, which may go.

    `without` leaves out networks whose class is called something that begins so.
    """
    found: list[tuple[nn.Module, str]] = []
    if without and type(network).__name__.startswith(without):
        return found
    for name, child in network.named_children():
        if type(child) is nn.Linear:
            found.append((network, name))
        else:
            found += linear_layers(child, without)
    return found


def quantized_bytes(layer: nn.Linear) -> int:
    """Bytes of a linear layer's parameters in 8 bits: a byte a number, a scale a row, and the bias as it is."""
    each = layer.weight.element_size()
    return layer.weight.numel() + each * layer.out_features + (0 if layer.bias is None else layer.bias.nbytes)
