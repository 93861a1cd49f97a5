"""LoRA layers beside the layers of a frozen network: which of them, what is trained, and its names in a file.

They work by hooks on the network's own layers, so that no class is edited and no weight is changed; with the hooks
off it is the network that it was. What they add is what `adapters/apply_layer` adds for a file of them. Not here: what
is learned (`objectives`), metadata (`file`).
Source: LoRA, arXiv:2106.09685. Shapes: O outputs, I inputs, r rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.adapters.formats.places import Shape, shapes_of
from gesso.errors import RequestError
from gesso.training.lora.settings import ATTENTION, FEED_FORWARD, GROUPS

_JOINT = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
_TWO_STREAMS = {
    ATTENTION: rf"(single_)?transformer_blocks\.\d+\.{_JOINT}",
    FEED_FORWARD: (
        r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)|single_transformer_blocks\.\d+\.proj_(mlp|out)"
    ),
}
# Families, and their groups of linear layers as patterns of whole names.
_TARGETS: dict[str, Mapping[str, str]] = {
    "flux": _TWO_STREAMS,
    "hunyuan-video": _TWO_STREAMS,
    "qwen-image": {
        ATTENTION: rf"transformer_blocks\.\d+\.{_JOINT}",
        FEED_FORWARD: r"transformer_blocks\.\d+\.(img|txt)_mlp\.net\.(0\.proj|2)",
    },
    "z-image": {
        ATTENTION: r"(layers|noise_refiner|context_refiner)\.\d+\.attention\.(to_[qkv]|to_out\.0)",
        FEED_FORWARD: r"(layers|noise_refiner|context_refiner)\.\d+\.feed_forward\.w[123]",
    },
    "sdxl": {
        ATTENTION: r".+\.transformer_blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0)",
        FEED_FORWARD: r".+\.transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",
    },
    "infinity": {
        ATTENTION: r"blocks\.\d+\.(self_attention\.(qkv|out)|cross_attention\.(query|key_value|out))",
        FEED_FORWARD: r"blocks\.\d+\.feed_forward\.fc[12]",
    },
}
FAMILIES = tuple(_TARGETS)


class LoraLayer(nn.Module):
    """Two thin matrices, `down` `[r,I]` drawn and `up` `[O,r]` zero, so that nothing is added at first."""

    def __init__(self, shape: Shape, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Linear(shape.inputs, rank, bias=False)
        self.up = nn.Linear(rank, shape.outputs, bias=False)
        bound = 1 / math.sqrt(shape.inputs)  # that of PEFT: Kaiming's, for a slope of the root of 5
        with torch.no_grad():
            self.down.weight.copy_((2 * torch.rand(rank, shape.inputs, generator=generator) - 1) * bound)
            self.up.weight.zero_()

    def forward(self, x: Tensor, output: Tensor, scale: float) -> Tensor:
        """The layer's output with what is added for its input; matmuls in the input's dtype."""
        low = F.linear(x, self.down.weight.to(x.dtype)) * scale
        return output + F.linear(low, self.up.weight.to(x.dtype)).to(output.dtype)


class LoraNetwork(nn.Module):
    """The LoRA layers of a network by its modules' names: all that is trained, and all that a checkpoint holds."""

    def __init__(self, shapes: Mapping[str, Shape], rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.rank, self.alpha, self._active = rank, alpha, True
        layers = {name: LoraLayer(shape, rank, generator) for name, shape in shapes.items()}
        self.layers = nn.ModuleDict({_key(name): layer for name, layer in layers.items()})
        self._by_name = layers

    def attach(self, network: nn.Module) -> None:
        """Have the network's layers add what these add."""
        for name, layer in self._by_name.items():
            network.get_submodule(name).register_forward_hook(self._hook(layer), with_kwargs=True)

    def _hook(self, layer: LoraLayer) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
            if not self._active:
                return output
            return layer(args[0] if args else named["input"], output, self.alpha / self.rank)

        return hook

    @contextmanager
    def put_aside(self) -> Iterator[None]:
        """Inside, nothing is added."""
        self._active = False
        try:
            yield
        finally:
            self._active = True

    @torch.no_grad()
    def tensors(self, role: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """In diffusers' and PEFT's spelling. Alpha over rank is in `up`, so that every reader applies the same."""
        found: dict[str, Tensor] = {}
        for name, layer in self._by_name.items():
            found[f"{role}.{name}.lora_A.weight"] = layer.down.weight.detach().to(dtype).contiguous().cpu()
            up_Or = layer.up.weight.detach() * (self.alpha / self.rank)
            found[f"{role}.{name}.lora_B.weight"] = up_Or.to(dtype).contiguous().cpu()
        return found


def target_layers(network: nn.Module, family: str, targets: Sequence[str], rank: int) -> dict[str, Shape]:
    """The linear layers that get a LoRA, by name, in the network's order; it may be on the meta device.

    A target is a group of the family's or the end of layers' names ("attn.to_q"). Raises RequestError for one that
    means no layer, and for a rank beyond the size of a layer.
    """
    linear = {name: shape for name, shape in shapes_of(network).items() if not shape.kernel}
    chosen: set[str] = set()
    for target in targets:
        pattern = _TARGETS[family].get(target) or rf"(.+\.)?{re.escape(target)}"
        found = {name for name in linear if re.fullmatch(pattern, name)}
        if not found:
            some = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise RequestError("targets", target, f"layers of this {family}", f"{', '.join(GROUPS)}, or an end: {some}")
        chosen |= found
    shapes = {name: shape for name, shape in linear.items() if name in chosen}
    least = min(shapes, key=lambda name: min(shapes[name].weight))
    if rank > (size := min(shapes[least].weight)):
        raise RequestError("rank", rank, f"at most {size}, the size of {least}")
    return shapes


def _key(name: str) -> str:
    """A name that modules may have, which have no dots."""
    return name.replace(".", "-")
