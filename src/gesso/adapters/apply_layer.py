"""What one layer adds to its output for the adapters of those who share a batch.

Low-rank adapters of all of them lie side by side, their ranks one after the other, and a scale for each row and rank
says whose they are: zero where a row has no such adapter (S-LoRA, arXiv:2311.03285, routes rows likewise). Two thin
products serve the whole batch, and the layer's own weight is not read. Other kinds make their whole difference anew at
each call, which costs a product of the weight's size and keeps nothing.
Not here: which rows are whose (`apply_rows`), what is used by whom (`apply`).
Shapes: S states, B rows, O outputs, I inputs, R ranks of all adapters together, k... the kernel of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.adapters.apply_rows import RowsOfCall
from gesso.adapters.formats.deltas import Delta

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass
class Part:
    """A delta, and how strongly each state wants it."""

    delta: Delta
    strengths: list[float]


class Layer:
    """What the adapters of one company add to one linear layer or convolution.

    Where all its states have the same, their strengths are those of one.
    """

    def __init__(self, module: nn.Module, parts: Sequence[Part]) -> None:
        self._module = module
        self._plain = [part for part in parts if part.delta.plain]
        self._others = [part for part in parts if not part.delta.plain]
        self._down: Tensor | None = None
        self._up_OR: Tensor | None = None
        self._scale_SR = torch.zeros(0)
        self._of_rows: tuple[Tensor, Tensor] | None = None

    def attach(self, name: str, rows: RowsOfCall | None) -> Callable[[], None]:
        """Have the layer add what its adapters add; what is returned takes that off, and nothing remains.

        `rows` tells those of states apart that are not all the same.
        """

        def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
            return self.added(args[0] if args else named["input"], output, name, rows)

        handle = self._module.register_forward_hook(hook, with_kwargs=True)

        def detach() -> None:
            handle.remove()
            self._of_rows = None

        return detach

    def added(self, x: Tensor, output: Tensor, name: str, rows: RowsOfCall | None) -> Tensor:
        """The layer's output with that of its adapters for the input `x`."""
        if self._plain:
            output = self._add_plain(x, output, name, rows)
        for part in self._others:
            output = self._add_other(part.delta, part.strengths[0], x, output)
        return output

    # ---- low-rank ---------------------------------------------------------------------------------------------------

    def _add_plain(self, x: Tensor, output: Tensor, name: str, rows: RowsOfCall | None) -> Tensor:
        down, up_OR = self._stacked(x)
        low = self._through(x, down)
        kernel = (1,) * (down.ndim - 2)
        if rows is None:
            low = low * self._scale_SR[0].reshape(-1, *kernel)
        else:
            # What another's adapter makes of a row may be infinite; zero times that would be NaN.
            scale = self._scale_of_rows(rows.states(name, x), low.ndim, kernel)
            low = torch.where(scale == 0, 0, low * scale)
        low = low.to(output.dtype)
        if kernel:
            return output + self._through(low, up_OR.reshape(*up_OR.shape, *kernel), one=True)
        # In one operation the sum is rounded once, which in 16 bits is nearer to a merged weight.
        flat = torch.addmm(output.reshape(-1, output.shape[-1]), low.reshape(-1, low.shape[-1]), up_OR.T)
        return flat.view(output.shape)

    def _through(self, x: Tensor, weight: Tensor, *, one: bool = False) -> Tensor:
        """An input times a weight in this layer's place: with its stride and padding, unless for `one`."""
        if weight.ndim == 2:
            return F.linear(x, weight)
        convolve, layer = _CONVOLUTIONS[weight.ndim - 2], self._module
        if one:
            return convolve(x, weight)
        return convolve(x, weight, None, layer.stride, layer.padding, layer.dilation)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def _stacked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`down` `[R,I,k...]` and `up` `[O,R]` of all, where and as the input is; no copy of one that is so."""
        if self._down is None or self._up_OR is None or (self._down.device, self._down.dtype) != (x.device, x.dtype):
            deltas = [part.delta.to(x.device, x.dtype) for part in self._plain]
            downs, ups = ([delta.tensors[name] for delta in deltas] for name in ("down", "up"))
            self._down = downs[0] if len(downs) == 1 else torch.cat(downs)
            self._up_OR = ups[0] if len(ups) == 1 else torch.cat(ups, dim=1)
            scales = [
                [part.delta.scale * part.strengths[state] for part in self._plain for _ in range(part.delta.rank)]
                for state in range(len(self._plain[0].strengths))
            ]
            self._scale_SR = torch.tensor(scales, dtype=torch.float32).to(x.device)
        return self._down, self._up_OR

    def _scale_of_rows(self, states: Tensor, axes: int, kernel: tuple[int, ...]) -> Tensor:
        """Of rows of these states, with axes of one for a row's tokens or pixels: `[B,1,R]`, or `[B,R,1,1]`."""
        if self._of_rows is None or self._of_rows[0] is not states:
            scale = self._scale_SR[states]
            between = (1,) * (axes - scale.ndim)
            shape = (*scale.shape, *between) if kernel else (*scale.shape[:-1], *between, scale.shape[-1])
            self._of_rows = states, scale.reshape(shape)
        return self._of_rows[1]

    # ---- everything else --------------------------------------------------------------------------------------------

    def _add_other(self, delta: Delta, strength: float, x: Tensor, output: Tensor) -> Tensor:
        """Strength times the difference that the adapter makes; for a DoRA that is between its weight and the plain."""
        weight = None if delta.magnitude is None else _weight_of(self._module)
        moved = delta.to(x.device)
        added = (moved.added(weight) * strength).to(x.dtype)
        output = output + self._through(x, added).to(output.dtype)
        if moved.bias_O is None:
            return output
        bias_O = (moved.bias_O * strength).to(output.dtype)
        return output + bias_O.reshape(-1, *(1,) * (added.ndim - 2))


def _weight_of(module: nn.Module) -> Tensor:
    """A layer's weight as numbers, whatever it is kept as."""
    weight: Any = module.weight
    return (weight if type(weight) is nn.Parameter else weight.dequantize()).detach()
