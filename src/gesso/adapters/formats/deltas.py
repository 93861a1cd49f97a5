"""What an adapter adds to the weight of one module, in one neutral form whatever the file called it.

    LoRA    up @ down                                        arXiv:2106.09685
    LoHa    (w1_a @ w1_b) * (w2_a @ w2_b)                    arXiv:2108.06098, as LyCORIS writes it
    LoKr    w1 (x) w2, the Kronecker product                 arXiv:2212.10650, as LyCORIS writes it
    full    the difference itself

times alpha over rank, the adapter's own scale; the strength that a request asks for is not in here (`apply`). With a
magnitude (DoRA, arXiv:2402.09353) what is added depends on the weight it is added to. Not here: names (`places`).
Shapes: O outputs, I inputs, r rank, k... the kernel of a convolution (none for a linear layer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gesso.adapters.formats.places import Rows, Shape

Kind = Literal["lora", "loha", "lokr", "full"]


@dataclass(frozen=True, eq=False)
class Delta:
    """What one module gains.

    `tensors` are those of its kind, by the names in `RULES`; `scale` is alpha over rank. `rows` are those of the result
    that are this module's, where a file has one for several modules (a LoRA's are cut at once, so it has none).
    `magnitude` is DoRA's, `[O,1...]` for the length of each row of the whole weight or `[1,I,1...]` for that of each
    column. `bias_O` is added to the bias.
    """

    kind: Kind
    shape: Shape
    tensors: Mapping[str, Tensor]
    scale: float = 1.0
    rows: Rows | None = None
    magnitude: Tensor | None = None
    bias_O: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether it is a low-rank product and nothing else, which rows of one batch may each have their own of."""
        return self.kind == "lora" and self.magnitude is None and self.bias_O is None

    @property
    def rank(self) -> int:
        """Of a LoRA; 0 for other kinds."""
        return len(self.tensors["down"]) if self.kind == "lora" else 0

    def everything(self) -> list[Tensor]:
        """All its tensors."""
        return [*self.tensors.values(), *(each for each in (self.magnitude, self.bias_O) if each is not None)]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Delta:
        """The same elsewhere. A magnitude stays in float32, since a length is divided by another nearly equal one."""
        moved = {name: tensor.to(device, dtype) for name, tensor in self.tensors.items()}
        magnitude = None if self.magnitude is None else self.magnitude.to(device)
        bias_O = None if self.bias_O is None else self.bias_O.to(device, dtype)
        return replace(self, tensors=moved, magnitude=magnitude, bias_O=bias_O)

    def product(self) -> Tensor:
        """What is added where there is no magnitude, `[O,I,k...]` in float32."""
        found = self.unshaped() * self.scale
        if self.rows is not None:
            found = torch.cat([found[begin:end] for begin, end in self.rows])
        return found.reshape(self.shape.weight)

    def unshaped(self) -> Tensor:
        """The product of the tensors as a matrix of all its rows, in float32, without the scale."""
        return RULES[self.kind]({name: tensor.float() for name, tensor in self.tensors.items()})

    def added(self, weight_OI: Tensor | None) -> Tensor:
        """What is added to a weight `[O,I,k...]`, which only a magnitude asks for, in float32."""
        product_OI = self.product()
        if self.magnitude is None:
            return product_OI
        if weight_OI is None:
            raise ValueError("a DoRA needs the weight that it is added to")
        plain_OI = weight_OI.float()
        whole_OI = plain_OI + product_OI
        magnitude = self.magnitude.to(whole_OI.device)
        axes = tuple(axis for axis in range(whole_OI.ndim) if magnitude.shape[axis] == 1) or (1,)
        lengths = torch.linalg.vector_norm(whole_OI, dim=axes, keepdim=True)
        return whole_OI * (magnitude / lengths.clamp_min(torch.finfo(torch.float32).tiny)) - plain_OI


def _lora(tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors["up"] @ tensors["down"].flatten(1)


def _loha(tensors: Mapping[str, Tensor]) -> Tensor:
    return (_factor(tensors, "w1", "t1") * _factor(tensors, "w2", "t2")).flatten(1)


def _factor(tensors: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """One of the two products of LoHa; around a core `[r,r,k,k]` for convolutions (Tucker)."""
    a_rO, b_rI = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if core not in tensors:
        return a_rO @ b_rI
    return torch.einsum("ijkl,jr,ip->prkl", tensors[core], b_rI, a_rO)


def _lokr(tensors: Mapping[str, Tensor]) -> Tensor:
    w1 = tensors["w1"] if "w1" in tensors else tensors["w1_a"] @ tensors["w1_b"]
    if "w2" in tensors:
        w2 = tensors["w2"]
    elif "t2" in tensors:
        w2 = torch.einsum("ijkl,jr,ip->prkl", tensors["t2"], tensors["w2_b"], tensors["w2_a"])
    else:
        w2 = tensors["w2_a"] @ tensors["w2_b"]
    w1 = w1.reshape(*w1.shape, *(1,) * (w2.ndim - w1.ndim))
    return torch.kron(w1, w2.contiguous()).flatten(1)


def _full(tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors["diff"].flatten(1)


RULES: dict[Kind, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "full": _full,
}
"""How each kind's tensors make `[O, I * k...]`, by kind."""
