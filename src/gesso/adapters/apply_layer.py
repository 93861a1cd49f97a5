"""What one layer adds to its output for the adapters of those who share a batch.

Low-rank adapters are two thin products for the whole batch, in which the layer's own weight is not read. Where rows
are samples, each is multiplied by its own state's matrices, padded to the most ranks that one has (S-LoRA,
arXiv:2311.03285, routes rows likewise). Where samples share a row, and in convolutions, adapters of all lie side by
side, their ranks one after the other, and a scale for each token and rank says whose they are: zero where it has no
such adapter. Other kinds make their whole difference anew at each call, which costs a product of the weight's size.
Between calls nothing is kept but scales: matrices are laid together from the adapters' own at each call, so that
adapters take the memory that they are counted with, whoever shares a batch.
Not here: which rows are whose (`apply_rows`), what is used by whom (`apply`).
Shapes: S states, B rows, n what a row has in between, O outputs, I inputs, R ranks of all that lie side by side, r the
most of one state, k... the kernel of a convolution.
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
        self._scales: Tensor | None = None
        states = range(len(parts[0].strengths))
        self._used = [[part for part in self._plain if part.strengths[state]] for state in states]
        self._ranks = [sum(part.delta.rank for part in used) for used in self._used]
        linear = all(len(part.delta.shape.weight) == 2 for part in self._plain)
        self._by_samples = linear and max(map(len, self._used)) < len(self._plain)

    def attach(self, name: str, rows: RowsOfCall | None) -> Callable[[], None]:
        """Have the layer add what its adapters add; what is returned takes that off, and nothing remains.

        `rows` tells those of states apart that are not all the same.
        """

        def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
            return self.added(args[0] if args else named["input"], output, name, rows)

        return _beneath(self._module, hook)

    def added(self, x: Tensor, output: Tensor, name: str, rows: RowsOfCall | None) -> Tensor:
        """The layer's output with that of its adapters for the input `x`."""
        if self._plain:
            output = self._add_plain(x, output, name, rows)
        for part in self._others:
            output = self._add_other(part.delta, part.strengths[0], x, output)
        return output

    # ---- low-rank ---------------------------------------------------------------------------------------------------

    def _add_plain(self, x: Tensor, output: Tensor, name: str, rows: RowsOfCall | None) -> Tensor:
        states = None if rows is None else rows.states(name, x)
        samples = None if rows is None or not self._by_samples else rows.samples(name, x)
        if states is not None and samples is not None:
            return self._add_by_state(x, output, states, samples)
        down, up_OR = _side_by_side([_factors(part.delta, x) for part in self._plain])
        low = self._through(x, down)
        kernel = (1,) * (down.ndim - 2)
        scale_SR = self._scale_of_all(x)
        if states is None:
            low = low * scale_SR[0].reshape(-1, *kernel)
        else:
            # What another's adapter makes of a row may be infinite; zero times that would be NaN.
            scale = _scale_of_rows(scale_SR[states], low.ndim, kernel)
            low = torch.where(scale == 0, 0, low * scale)
        low = low.to(output.dtype)
        if kernel:
            return output + self._through(low, up_OR.reshape(*up_OR.shape, *kernel), one=True)
        # In one operation the sum is rounded once, which in 16 bits is nearer to a merged weight.
        flat = torch.addmm(output.reshape(-1, output.shape[-1]), low.reshape(-1, low.shape[-1]), up_OR.T)
        return flat.view(output.shape)

    def _add_by_state(self, x: Tensor, output: Tensor, states_B: Tensor, samples: tuple[int, ...]) -> Tensor:
        """To each sample what its own state adds; zeros stand where it has fewer ranks than another."""
        most, (outputs, inputs) = max(self._ranks), self._plain[0].delta.shape.weight
        factors: list[tuple[Tensor, Tensor]] = []
        for state in samples:
            factors += [_factors(part.delta, x) for part in self._used[state]]
            if missing := most - self._ranks[state]:
                factors.append((x.new_zeros(missing, inputs), x.new_zeros(outputs, missing)))
        down_RI, up_OR = _side_by_side(factors)
        down_BIr = down_RI.view(len(x), most, inputs).transpose(1, 2)
        up_BrO = up_OR.view(outputs, len(x), most).permute(1, 2, 0)
        x_BnI = x.reshape(len(x), -1, inputs)
        low_Bnr = (torch.bmm(x_BnI, down_BIr) * self._scale_of_each(x)[states_B]).to(output.dtype)
        added = torch.baddbmm(output.reshape(len(x), -1, outputs), low_Bnr, up_BrO)
        return added.view(output.shape)

    def _scale_of_all(self, x: Tensor) -> Tensor:
        """What each state multiplies all ranks by, `[S,R]`, in float32."""
        if self._scales is None or self._scales.device != x.device:
            scales = [
                [part.delta.scale * part.strengths[state] for part in self._plain for _ in range(part.delta.rank)]
                for state in range(len(self._used))
            ]
            self._scales = torch.tensor(scales, dtype=torch.float32).to(x.device)
        return self._scales

    def _scale_of_each(self, x: Tensor) -> Tensor:
        """What each state multiplies its own ranks by, `[S,1,r]`, in float32."""
        if self._scales is None or self._scales.device != x.device:
            scales_S1r = torch.zeros(len(self._used), 1, max(self._ranks))
            for state, used in enumerate(self._used):
                own = [part.delta.scale * part.strengths[state] for part in used for _ in range(part.delta.rank)]
                scales_S1r[state, 0, : len(own)] = torch.tensor(own)
            self._scales = scales_S1r.to(x.device)
        return self._scales

    def _through(self, x: Tensor, weight: Tensor, *, one: bool = False) -> Tensor:
        """An input times a weight in this layer's place: with its stride and padding, unless for `one`."""
        if weight.ndim == 2:
            return F.linear(x, weight)
        convolve, layer = _CONVOLUTIONS[weight.ndim - 2], self._module
        if one:
            return convolve(x, weight)
        return convolve(x, weight, None, layer.stride, layer.padding, layer.dilation)  # pyright: ignore[reportCallIssue, reportArgumentType]

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


def _beneath(module: nn.Module, hook: Callable[..., Tensor]) -> Callable[[], None]:
    """Have a forward hook called; what is returned takes it off.

    Where something stands in for the layer's forward by diffusers' hooks, as a step cache does, it is called beneath
    that: what is kept of the layer has to be what it gives with its adapters, and where the layer is not called,
    nothing is to be added.
    """
    registry: Any = getattr(module, "_diffusers_hook", None)
    references = [] if registry is None else registry._fn_refs[:1]  # the first that was put on lies lowest
    if not references:
        return module.register_forward_hook(hook, with_kwargs=True).remove
    (lowest,) = references
    place = "forward" if lowest.original_forward is None else "original_forward"
    bare = getattr(lowest, place)

    def forward(*args: Any, **named: Any) -> Tensor:
        return hook(module, args, named, bare(*args, **named))

    setattr(lowest, place, forward)
    return lambda: setattr(lowest, place, bare)


def _factors(delta: Delta, x: Tensor) -> tuple[Tensor, Tensor]:
    """`down` `[r,I,k...]` and `up` `[O,r]` of a delta, where and as the input is."""
    return delta.tensors["down"].to(x.device, x.dtype), delta.tensors["up"].to(x.device, x.dtype)


def _side_by_side(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`down` `[R,I,k...]` and `up` `[O,R]` of several, their ranks one after the other; no copy of one alone."""
    if len(factors) == 1:
        return factors[0]
    downs, ups = zip(*factors, strict=True)
    return torch.cat(downs), torch.cat(ups, dim=1)


def _scale_of_rows(scale: Tensor, axes: int, kernel: tuple[int, ...]) -> Tensor:
    """Rows' scales with axes of one for what a row has in between: `[B,1,R]`, or `[B,R,1,1]` in a convolution."""
    between = (1,) * (axes - scale.ndim)
    return scale.reshape((*scale.shape, *between) if kernel else (*scale.shape[:-1], *between, scale.shape[-1]))


def _weight_of(module: nn.Module) -> Tensor:
    """A layer's weight as numbers, whatever it is kept as."""
    weight: Any = module.weight
    return (weight if type(weight) is nn.Parameter else weight.dequantize()).detach()
