"""One module's tensors of a file to deltas for the modules of ours that they stand for, with every shape checked.

Not here: which module that is (`places`), files (`reading`), the arithmetic of a delta (`deltas`).
Shapes: O outputs, I inputs, r rank, k... the kernel of a convolution (none for a linear layer).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from gesso.adapters.formats.classification import kind_of
from gesso.adapters.formats.deltas import Delta, Kind
from gesso.adapters.formats.peft import PeftConfig, PeftSettings
from gesso.adapters.formats.places import Rows, Shape, Source, Target
from gesso.devices import META


class MisfitError(Exception):
    """Tensors of a module that make no delta; `shape` where they would in another network."""

    def __init__(self, message: str, *, shape: bool = False) -> None:
        super().__init__(message)
        self.shape = shape


@dataclass
class Group:
    """The tensors of one module under one of its names, by what they are (`keys`)."""

    name: str
    part: str
    module: str
    tensors: dict[str, Tensor] = field(default_factory=dict)


def unused(group: Group) -> list[str]:
    """Tensors that say something and that `assemble` does not read, since a module gains by one kind only."""
    kind: Any = kind_of(group.tensors)
    return [
        name for name, tensor in group.tensors.items() if name not in (*_FIELDS[kind], *_OF_ANY) and bool(tensor.any())
    ]


def assemble(group: Group, source: Source, peft: PeftSettings | PeftConfig) -> dict[str, Delta]:
    """Deltas by our modules.

    Raises MisfitError for tensors that are missing, empty or of other shapes, FileError for another's configuration.
    """
    kind: Any = kind_of(group.tensors)
    tensors, rank = _LORA_LIKE[kind](group, source)
    scale = _scale(group, peft, kind, rank)
    magnitude = _magnitude(group, source)
    bias_O = _bias(group, scale)
    if bias_O is not None and len(bias_O) != source.outputs:
        raise MisfitError(f"{group.name}: a bias of {len(bias_O)} where {source.outputs} is wanted", shape=True)
    found = {}
    for target in source.targets:
        found[target.module] = _cut(kind, target, tensors, scale, magnitude, bias_O)
    return found


def _cut(
    kind: Kind,
    target: Target,
    tensors: dict[str, Tensor],
    scale: float,
    magnitude: Tensor | None,
    bias_O: Tensor | None,
) -> Delta:
    """What of a source's is one module's."""
    rows = target.rows
    if rows is None:
        return Delta(kind, target.shape, tensors, scale, None, magnitude, bias_O)
    magnitude = None if magnitude is None else _rows_of(magnitude, rows)
    bias_O = None if bias_O is None else _rows_of(bias_O, rows)
    if kind == "lora":
        tensors = {"down": tensors["down"], "up": _rows_of(tensors["up"], rows)}
        return Delta(kind, target.shape, tensors, scale, None, magnitude, bias_O)
    return Delta(kind, target.shape, tensors, scale, rows, magnitude, bias_O)


def _rows_of(tensor: Tensor, rows: Rows) -> Tensor:
    parts = [tensor[begin:end] for begin, end in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _shape(source: Source) -> Shape:
    """The weight of the module as the file knows it."""
    first = source.targets[0].shape
    return Shape(source.outputs, first.inputs, first.kernel)


def _lora(group: Group, source: Source) -> tuple[dict[str, Tensor], int]:
    """`down` as `[r,I,k...]` and `up` as `[O,r]`; a core between them is multiplied into `down`."""
    down, up = _need(group, "down"), _need(group, "up")
    if down.ndim < 2 or up.ndim < 2 or 0 in (*down.shape, *up.shape):
        raise MisfitError(f"{group.name} has rank 0, or is no pair of matrices: {_show(down)} and {_show(up)}")
    if "mid" in group.tensors:
        down = _with_core(group, group.tensors["mid"], down)
    if up.shape[1] != len(down) or prod(up.shape[2:]) != 1:
        raise MisfitError(f"{group.name}: ranks differ, {_show(down)} and {_show(up)}")
    shape = _shape(source)
    if len(up) != shape.outputs or not _reads(down, shape):
        raise MisfitError(f"{group.name}: file {_show(up)} x {_show(down)}, network {shape.weight}", shape=True)
    return {"down": down.reshape(len(down), shape.inputs, *shape.kernel), "up": up.flatten(1)}, len(down)


def _with_core(group: Group, core: Tensor, down: Tensor) -> Tensor:
    """A convolution of one by one, then one of k by k, is one of k by k."""
    if core.ndim < 3 or core.shape[1] != len(down) or prod(down.shape[2:]) != 1:
        raise MisfitError(f"{group.name}: lora_mid {_show(core)} does not follow lora_down {_show(down)}")
    return torch.einsum("mr...,ri->mi...", core.float(), down.flatten(1).float()).to(down.dtype)


def _reads(down: Tensor, shape: Shape) -> bool:
    kernel = tuple(down.shape[2:])
    return down.shape[1] == shape.inputs and (kernel == shape.kernel or prod(kernel) == 1 == prod(shape.kernel))


def _loha(group: Group, source: Source) -> tuple[dict[str, Tensor], int]:
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    tensors = {name: _need(group, f"hada_{name}") for name in names}
    for core in ("t1", "t2"):
        if f"hada_{core}" in group.tensors:
            tensors[core] = group.tensors[f"hada_{core}"]
    return _checked(group, source, "loha", tensors), len(tensors["w1_b"])


def _lokr(group: Group, source: Source) -> tuple[dict[str, Tensor], int]:
    """The rank is 0 where both factors are whole: then alpha says nothing."""
    tensors: dict[str, Tensor] = {}
    rank = 0
    for factor in ("w1", "w2"):
        if f"lokr_{factor}" in group.tensors:
            tensors[factor] = group.tensors[f"lokr_{factor}"]
        else:
            tensors[f"{factor}_a"], tensors[f"{factor}_b"] = (_need(group, f"lokr_{factor}_{end}") for end in "ab")
            rank = len(tensors[f"{factor}_b"])
    if "lokr_t2" in group.tensors:
        tensors["t2"] = group.tensors["lokr_t2"]
    return _checked(group, source, "lokr", tensors), rank


def _full(group: Group, source: Source) -> tuple[dict[str, Tensor], int]:
    """The difference itself; none where only the bias differs."""
    diff = group.tensors.get("diff")
    if diff is None:
        diff = torch.zeros(1).expand(_shape(source).weight)
    return _checked(group, source, "full", {"diff": diff}), 0


_LORA_LIKE = {"lora": _lora, "loha": _loha, "lokr": _lokr, "full": _full}
_FIELDS: dict[Kind, tuple[str, ...]] = {
    "lora": ("down", "up", "mid", "down_bias", "up_bias"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "full": ("diff",),
}
_OF_ANY = ("alpha", "dora_scale", "magnitude", "diff_b")


def _checked(group: Group, source: Source, kind: Kind, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, once their product has been seen, on the meta device, to have the network's shape."""
    if any(tensor.ndim < 2 or 0 in tensor.shape for tensor in tensors.values()):
        raise MisfitError(f"{group.name} has rank 0, or tensors that are no matrices")
    shape = _shape(source)
    try:
        ghosts = {name: torch.empty(tensor.shape, device=META) for name, tensor in tensors.items()}
        made = Delta(kind, Shape(0, 0), ghosts).unshaped()
    except (RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{name} {_show(tensor)}" for name, tensor in tensors.items())
        raise MisfitError(f"{group.name}: tensors do not multiply ({shapes})") from error
    if tuple(made.shape) != (shape.outputs, shape.inputs * prod(shape.kernel)):
        raise MisfitError(f"{group.name}: file {_show(made)}, network {shape.weight}", shape=True)
    return tensors


def _scale(group: Group, peft: PeftSettings | PeftConfig, kind: Kind, rank: int) -> float:
    """Alpha over rank; where nothing says an alpha it is the rank. Raises MisfitError for one that is no number."""
    alpha = group.tensors.get("alpha")
    if alpha is None:
        return 1.0 if kind == "full" else peft.scale(group.name, rank, kind)
    if not rank:
        return 1.0
    if alpha.numel() != 1 or not math.isfinite(value := float(alpha.item())):
        raise MisfitError(f"{group.name}: alpha is not one finite number")
    return value / rank


def _magnitude(group: Group, source: Source) -> Tensor | None:
    """DoRA's, in float32, with the axes of the weight: PEFT and newer LyCORIS measure rows, older LyCORIS columns."""
    shape = _shape(source)
    ones = (1,) * len(shape.kernel)
    if (found := group.tensors.get("magnitude")) is not None:
        if found.numel() != shape.outputs:
            raise MisfitError(f"{group.name}: magnitude {_show(found)}, network {shape.weight}", shape=True)
        return found.float().reshape(shape.outputs, 1, *ones)
    if (found := group.tensors.get("dora_scale")) is None:
        return None
    if found.numel() == shape.outputs and (found.ndim == 1 or found.shape[0] == shape.outputs):
        return found.float().reshape(shape.outputs, 1, *ones)
    if found.numel() != shape.inputs:
        raise MisfitError(f"{group.name}: dora_scale {_show(found)}, network {shape.weight}", shape=True)
    if any(target.rows is not None for target in source.targets):
        raise MisfitError(f"{group.name} is a DoRA of columns over a fused layer, which cannot be taken apart")
    return found.float().reshape(1, shape.inputs, *ones)


def _bias(group: Group, scale: float) -> Tensor | None:
    """What is added to the bias: a difference as it is, biases of a LoRA's two layers with its scale."""
    tensors = group.tensors
    found = tensors["diff_b"].float().flatten() if "diff_b" in tensors else None
    if "up" in tensors and ("down_bias" in tensors or "up_bias" in tensors):
        up = tensors["up"].float().flatten(1)
        lower = tensors["down_bias"].float().flatten() if "down_bias" in tensors else up.new_zeros(up.shape[1])
        upper = tensors["up_bias"].float().flatten() if "up_bias" in tensors else up.new_zeros(len(up))
        if len(lower) != up.shape[1] or len(upper) != len(up):
            raise MisfitError(f"{group.name}: biases of {len(lower)} and {len(upper)} do not fit {_show(up)}")
        found = (0 if found is None else found) + scale * (up @ lower + upper)
    return found


def _need(group: Group, name: str) -> Tensor:
    if (found := group.tensors.get(name)) is None:
        raise MisfitError(f"{group.name} lacks {name}, and has {', '.join(sorted(group.tensors))}")
    return found


def _show(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
