"""What one layer adds to its output for the adapters of those who share a batch.

Low-rank adapters are two thin products for the whole batch, in which the layer's own weight is not read. Where rows
are samples, each is multiplied by its own state's matrices, padded to the most ranks that one has (S-LoRA,
arXiv:2311.03285, routes rows likewise). Where samples share a row, and in convolutions, adapters of all lie side by
side, their ranks one after the other, and a scale for each token and rank says whose they are: zero where it has no
such adapter. Other kinds make their whole difference anew at each call, which costs a product of the weight's size and
keeps nothing.
Not here: which rows are whose (`apply_rows`), what is used by whom (`apply`).
Shapes: S states, B rows, n what a row has in between, O outputs, I inputs, R ranks of all adapters together, r the most
of one state, k... the kernel of a convolution.
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
        self._of_states: tuple[Tensor, Tensor, Tensor] | None = None
        states = range(len(parts[0].strengths))
        self._used = [[part for part in self._plain if part.strengths[state]] for state in states]
        linear = all(len(part.delta.shape.weight) == 2 for part in self._plain)
        self._by_samples = linear and max(map(len, self._used)) < len(self._plain)

    def attach(self, name: str, rows: RowsOfCall | None) -> Callable[[], None]:
        """Have the layer add what its adapters add; what is returned takes that off, and nothing remains.

        `rows` tells those of states apart that are not all the same.
        """

        def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
            return self.added(args[0] if args else named["input"], output, name, rows)

        remove = _beneath(self._module, hook)

        def detach() -> None:
            remove()
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
        states = None if rows is None else rows.states(name, x)
        if rows is not None and states is not None and rows.are_samples and self._by_samples:
            return self._add_by_state(x, output, states)
        down, up_OR = self._stacked(x)
        low = self._through(x, down)
        kernel = (1,) * (down.ndim - 2)
        if states is None:
            low = low * self._scale_SR[0].reshape(-1, *kernel)
        else:
            # What another's adapter makes of a row may be infinite; zero times that would be NaN.
            scale = self._scale_of_rows(states, low.ndim, kernel)
            low = torch.where(scale == 0, 0, low * scale)
        low = low.to(output.dtype)
        if kernel:
            return output + self._through(low, up_OR.reshape(*up_OR.shape, *kernel), one=True)
        # In one operation the sum is rounded once, which in 16 bits is nearer to a merged weight.
        flat = torch.addmm(output.reshape(-1, output.shape[-1]), low.reshape(-1, low.shape[-1]), up_OR.T)
        return flat.view(output.shape)

    def _add_by_state(self, x: Tensor, output: Tensor, states_B: Tensor) -> Tensor:
        """To each sample what its own state adds."""
        down_SIr, up_SrO, scale_S1r = self._by_state(x)
        x_BnI = x.reshape(len(x), -1, x.shape[-1])
        low_Bnr = (torch.bmm(x_BnI, down_SIr[states_B]) * scale_S1r[states_B]).to(output.dtype)
        added = torch.baddbmm(output.reshape(len(x), -1, output.shape[-1]), low_Bnr, up_SrO[states_B])
        return added.view(output.shape)

    def _by_state(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`down` `[S,I,r]`, `up` `[S,r,O]` and scale `[S,1,r]` of each state, where and as the input is."""
        known = self._of_states
        if known is not None and (known[0].device, known[0].dtype) == (x.device, x.dtype):
            return known
        states, most = len(self._used), max(sum(part.delta.rank for part in used) for used in self._used)
        outputs, inputs = self._plain[0].delta.shape.weight
        down_SrI = torch.zeros(states, most, inputs, device=x.device, dtype=x.dtype)
        up_SrO = torch.zeros(states, most, outputs, device=x.device, dtype=x.dtype)
        scale_Sr = torch.zeros(states, most)
        for state, used in enumerate(self._used):
            begin = 0
            for part in used:
                end = begin + part.delta.rank
                down_SrI[state, begin:end] = part.delta.tensors["down"]
                up_SrO[state, begin:end] = part.delta.tensors["up"].T
                scale_Sr[state, begin:end] = part.delta.scale * part.strengths[state]
                begin = end
        self._of_states = down_SrI.transpose(1, 2), up_SrO, scale_Sr[:, None].to(x.device)
        return self._of_states

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


def _weight_of(module: nn.Module) -> Tensor:
    """A layer's weight as numbers, whatever it is kept as."""
    weight: Any = module.weight
    return (weight if type(weight) is nn.Parameter else weight.dequantize()).detach()
