"""Where a cache sits in each network: a table of module names per class, and nothing but names.

`*` stands for one part of a name. At *module* granularity the outputs of `slots` are kept before they are gated, and
what only slots read is not computed on forecast steps. At *block* granularity the residual of all blocks is kept; at
*trunk* granularity the network's output. Source of the diffusers networks' slots: the published TaylorSeer ports, whose
goldens these names reproduce.
Not here: what is done there (`sites`), how it is put on and taken off (`hooks`, `attach`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from gesso.cache_settings import Granularity
from gesso.errors import RequestError

Stream = Literal["image", "text", "joint"]


@dataclass(frozen=True)
class Slot:
    """Modules whose outputs are kept; `streams` says of which tokens each output is.

    `inputs` are modules whose outputs nothing but these reads.
    """

    pattern: str
    streams: tuple[Stream, ...]
    kind: Literal["attention", "feed_forward", "both"]
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """One class of networks.

    `blocks` are lists of blocks in the order they run; each takes hidden states first and, where there are two streams,
    those of the text second, and returns what `block_output` says. `joint` is the order of streams inside attention.
    `packed` networks lay the tokens of all samples out by a `layout`, and in a stream of their own those of pictures
    that several samples see alike; they return a list of samples. `refiners` are slots of blocks before the stack.
    `original_slots` stand for `slots` where the published code is to be repeated. `change`, relative, of the first
    block is what `first_block` takes for large where nobody says: ParaAttention's for FLUX, and cache-dit 1.5.3's for
    any network.
    """

    slots: tuple[Slot, ...]
    refiners: tuple[Slot, ...] = ()
    blocks: tuple[str, ...]
    block_output: tuple[Stream, ...]
    joint: tuple[Stream, ...]
    packed: bool = False
    change: float = 0.08
    original_slots: tuple[Slot, ...] | None = None


def _double(attention: str, image: str, text: str) -> tuple[Slot, ...]:
    blocks = "transformer_blocks.*"
    return (
        Slot(f"{blocks}.{attention}", ("image", "text"), "attention"),
        Slot(f"{blocks}.{image}", ("image",), "feed_forward"),
        Slot(f"{blocks}.{text}", ("text",), "feed_forward"),
    )


def _sandwiched(blocks: str, stream: Stream) -> tuple[Slot, ...]:
    return (
        Slot(f"{blocks}.*.attention", (stream,), "attention", (f"{blocks}.*.attention_norm1",)),
        Slot(f"{blocks}.*.feed_forward", (stream,), "feed_forward", (f"{blocks}.*.ffn_norm1",)),
    )


_SINGLE_INPUTS = ("single_transformer_blocks.*.attn", "single_transformer_blocks.*.proj_mlp")
_SINGLE = Slot("single_transformer_blocks.*.proj_out", ("joint",), "both", _SINGLE_INPUTS)
_BLOCKS = ("transformer_blocks", "single_transformer_blocks")
_HUNYUAN = Table(
    change=0.06,  # ParaAttention's
    slots=(*_double("attn", "ff", "ff_context"), _SINGLE),
    blocks=_BLOCKS,
    block_output=("image", "text"),
    joint=("image", "text"),
    # The published port keeps the whole output of a single block, so that a forecast depends on the last one alone.
    original_slots=(
        *_double("attn", "ff", "ff_context"),
        Slot("single_transformer_blocks.*", ("image", "text"), "both"),
    ),
)
TABLES: dict[str, Table] = {
    "FluxTransformer2DModel": Table(
        slots=(*_double("attn", "ff", "ff_context"), _SINGLE),
        blocks=_BLOCKS,
        block_output=("text", "image"),
        joint=("text", "image"),
    ),
    "QwenImageTransformer2DModel": Table(
        slots=_double("attn", "img_mlp", "txt_mlp"),
        blocks=("transformer_blocks",),
        block_output=("text", "image"),
        joint=("text", "image"),
    ),
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "HunyuanImageTransformer2DModel": _HUNYUAN,
    "S3DiT": Table(
        slots=_sandwiched("layers", "joint"),
        refiners=_sandwiched("noise_refiner", "image"),
        blocks=("layers",),
        block_output=("joint",),
        joint=("joint",),
        packed=True,
    ),
}
_VIDEO = ("HunyuanVideoTransformer3DModel",)


def table_of(network: nn.Module) -> Table:
    """The table of a network's class, or of the class it is made from. Raises RequestError for one that has none."""
    for kind in type(network).__mro__:
        if kind.__name__ in TABLES:
            return TABLES[kind.__name__]
    name = type(network).__name__
    raise RequestError("cache", name, "a network that step caches know", f"known: {', '.join(TABLES)}")


def default_granularity(network: nn.Module, allowed: tuple[Granularity, ...]) -> Granularity:
    """What is forecast where nothing is asked: the trunk of video, whose modules' features would fill the device."""
    video = any(kind.__name__ in _VIDEO for kind in type(network).__mro__)
    return "trunk" if video and "trunk" in allowed else allowed[0]


def matching(network: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a network by a pattern. Raises RequestError where there is none: the network is not the table's.

    A list of blocks that a network has none of (`num_layers` 0) is no error.
    """
    whole = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
    found = [(name, module) for name, module in network.named_modules() if whole.fullmatch(name)]
    if not found:
        container = pattern.partition(".")[0]
        blocks = getattr(network, container, None)
        if not isinstance(blocks, nn.ModuleList) or len(blocks):
            raise RequestError("cache", pattern, f"the name of a module of {type(network).__name__}")
    yield from found


def blocks_of(network: nn.Module, table: Table) -> list[tuple[str, nn.Module]]:
    """All blocks in the order they run. Raises RequestError where there is none."""
    blocks = [found for name in table.blocks for found in matching(network, f"{name}.*")]
    if not blocks:
        raise RequestError("cache", " and ".join(table.blocks), f"lists of blocks of {type(network).__name__}")
    return blocks
