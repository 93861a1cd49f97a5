"""Which modules of a loaded network the published names mean: fused layers taken apart, halves put in our order.

The places are made from the network's own modules, so that each of them is found under every name that trainers give it
and nothing is guessed from a file. A fused layer (`img_attn.qkv`) has rows for several modules of ours (to_q, to_k,
to_v); how many is read off these. Sources: diffusers' `lora_conversion_utils` and checkpoint converters, and for SDXL
and Infinity the tables that read their checkpoints (`models/sdxl_checkpoint`, `models/infinity/checkpoint`).
Not here: prefixes and endings (`keys`), tensors (`deltas`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from gesso.adapters.formats.keys import flatten
from gesso.models import sdxl_checkpoint
from gesso.models.infinity.checkpoint import published_transformer_name

Rows = tuple[tuple[int, int], ...]
"""Spans of a source's rows, in the order in which the module has them."""


class Shape(NamedTuple):
    """A module's weight: rows, what they read, and the kernel of a convolution (empty for a linear layer)."""

    outputs: int
    inputs: int
    kernel: tuple[int, ...] = ()

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.outputs, self.inputs, *self.kernel)


class Target(NamedTuple):
    """A module of ours, and which of the source's rows are its own; None for all."""

    module: str
    shape: Shape
    rows: Rows | None = None


class Source(NamedTuple):
    """A module as a file knows it: its rows in all, and whose they are. `own` where it has our name."""

    outputs: int
    targets: tuple[Target, ...]
    own: bool


class _Place(NamedTuple):
    """Another name for a module: it is that part of what is called so; with halves exchanged if `turned`."""

    name: str
    part: int = 0
    turned: bool = False


# (our module, its name elsewhere, which part of it), with "#" for a number. Fused parts are in order of their rows.
_Table = tuple[tuple[str, str, int], ...]

_FLUX_BLOCKS: _Table = (
    ("transformer_blocks.#.attn.to_q", "double_blocks.#.img_attn.qkv", 0),
    ("transformer_blocks.#.attn.to_k", "double_blocks.#.img_attn.qkv", 1),
    ("transformer_blocks.#.attn.to_v", "double_blocks.#.img_attn.qkv", 2),
    ("transformer_blocks.#.attn.add_q_proj", "double_blocks.#.txt_attn.qkv", 0),
    ("transformer_blocks.#.attn.add_k_proj", "double_blocks.#.txt_attn.qkv", 1),
    ("transformer_blocks.#.attn.add_v_proj", "double_blocks.#.txt_attn.qkv", 2),
    ("transformer_blocks.#.attn.to_out.0", "double_blocks.#.img_attn.proj", 0),
    ("transformer_blocks.#.attn.to_add_out", "double_blocks.#.txt_attn.proj", 0),
    ("single_transformer_blocks.#.attn.to_q", "single_blocks.#.linear1", 0),
    ("single_transformer_blocks.#.attn.to_k", "single_blocks.#.linear1", 1),
    ("single_transformer_blocks.#.attn.to_v", "single_blocks.#.linear1", 2),
    ("single_transformer_blocks.#.proj_mlp", "single_blocks.#.linear1", 3),
    ("single_transformer_blocks.#.proj_out", "single_blocks.#.linear2", 0),
    ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer", 0),
    ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer", 0),
    ("proj_out", "final_layer.linear", 0),
)
_FLUX: _Table = (
    *_FLUX_BLOCKS,
    ("transformer_blocks.#.ff.net.0.proj", "double_blocks.#.img_mlp.0", 0),
    ("transformer_blocks.#.ff.net.2", "double_blocks.#.img_mlp.2", 0),
    ("transformer_blocks.#.ff_context.net.0.proj", "double_blocks.#.txt_mlp.0", 0),
    ("transformer_blocks.#.ff_context.net.2", "double_blocks.#.txt_mlp.2", 0),
    ("transformer_blocks.#.norm1.linear", "double_blocks.#.img_mod.lin", 0),
    ("transformer_blocks.#.norm1_context.linear", "double_blocks.#.txt_mod.lin", 0),
    ("single_transformer_blocks.#.norm.linear", "single_blocks.#.modulation.lin", 0),
    ("x_embedder", "img_in", 0),
    ("context_embedder", "txt_in", 0),
    ("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer", 0),
    ("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer", 0),
    ("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer", 0),
    ("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer", 0),
    # XLabs; the streams' numbers are those of `keys`.
    ("transformer_blocks.#.attn.to_q", "double_blocks.#.qkv1", 0),
    ("transformer_blocks.#.attn.to_k", "double_blocks.#.qkv1", 1),
    ("transformer_blocks.#.attn.to_v", "double_blocks.#.qkv1", 2),
    ("transformer_blocks.#.attn.add_q_proj", "double_blocks.#.qkv2", 0),
    ("transformer_blocks.#.attn.add_k_proj", "double_blocks.#.qkv2", 1),
    ("transformer_blocks.#.attn.add_v_proj", "double_blocks.#.qkv2", 2),
    ("transformer_blocks.#.attn.to_out.0", "double_blocks.#.proj1", 0),
    ("transformer_blocks.#.attn.to_add_out", "double_blocks.#.proj2", 0),
    ("single_transformer_blocks.#.attn.to_q", "single_blocks.#.qkv", 0),
    ("single_transformer_blocks.#.attn.to_k", "single_blocks.#.qkv", 1),
    ("single_transformer_blocks.#.attn.to_v", "single_blocks.#.qkv", 2),
    ("single_transformer_blocks.#.proj_out", "single_blocks.#.proj", 0),
)
_REFINER = "context_embedder.token_refiner.refiner_blocks.#"
_TEXT_BLOCKS = "txt_in.individual_token_refiner.blocks.#"
_HUNYUAN_VIDEO: _Table = (
    *_FLUX_BLOCKS,
    ("transformer_blocks.#.ff.net.0.proj", "double_blocks.#.img_mlp.fc1", 0),
    ("transformer_blocks.#.ff.net.2", "double_blocks.#.img_mlp.fc2", 0),
    ("transformer_blocks.#.ff_context.net.0.proj", "double_blocks.#.txt_mlp.fc1", 0),
    ("transformer_blocks.#.ff_context.net.2", "double_blocks.#.txt_mlp.fc2", 0),
    ("transformer_blocks.#.norm1.linear", "double_blocks.#.img_mod.linear", 0),
    ("transformer_blocks.#.norm1_context.linear", "double_blocks.#.txt_mod.linear", 0),
    ("single_transformer_blocks.#.norm.linear", "single_blocks.#.modulation.linear", 0),
    ("x_embedder.proj", "img_in.proj", 0),
    ("time_text_embed.timestep_embedder.linear_1", "time_in.mlp.0", 0),
    ("time_text_embed.timestep_embedder.linear_2", "time_in.mlp.2", 0),
    ("time_text_embed.guidance_embedder.linear_1", "guidance_in.mlp.0", 0),
    ("time_text_embed.guidance_embedder.linear_2", "guidance_in.mlp.2", 0),
    ("context_embedder.proj_in", "txt_in.input_embedder", 0),
    ("context_embedder.time_text_embed.timestep_embedder.linear_1", "txt_in.t_embedder.mlp.0", 0),
    ("context_embedder.time_text_embed.timestep_embedder.linear_2", "txt_in.t_embedder.mlp.2", 0),
    ("context_embedder.time_text_embed.text_embedder.linear_1", "txt_in.c_embedder.linear_1", 0),
    ("context_embedder.time_text_embed.text_embedder.linear_2", "txt_in.c_embedder.linear_2", 0),
    (f"{_REFINER}.attn.to_q", f"{_TEXT_BLOCKS}.self_attn_qkv", 0),
    (f"{_REFINER}.attn.to_k", f"{_TEXT_BLOCKS}.self_attn_qkv", 1),
    (f"{_REFINER}.attn.to_v", f"{_TEXT_BLOCKS}.self_attn_qkv", 2),
    (f"{_REFINER}.attn.to_out.0", f"{_TEXT_BLOCKS}.self_attn_proj", 0),
    (f"{_REFINER}.ff.net.0.proj", f"{_TEXT_BLOCKS}.mlp.fc1", 0),
    (f"{_REFINER}.ff.net.2", f"{_TEXT_BLOCKS}.mlp.fc2", 0),
    (f"{_REFINER}.norm_out.linear", f"{_TEXT_BLOCKS}.adaLN_modulation.1", 0),
)
_Z_IMAGE: _Table = (
    *(
        row
        for part in ("layers", "noise_refiner", "context_refiner", "siglip_refiner")
        for row in (
            (f"{part}.#.attention.to_q", f"{part}.#.attention.qkv", 0),
            (f"{part}.#.attention.to_k", f"{part}.#.attention.qkv", 1),
            (f"{part}.#.attention.to_v", f"{part}.#.attention.qkv", 2),
            (f"{part}.#.attention.to_out.0", f"{part}.#.attention.out", 0),
        )
    ),
    ("all_x_embedder.#-#", "x_embedder", 0),
    ("all_final_layer.#-#.linear", "final_layer.linear", 0),
    ("all_final_layer.#-#.adaLN_modulation.1", "final_layer.adaLN_modulation.1", 0),
)
_TABLES: dict[str, _Table] = {
    "flux": _FLUX,
    "hunyuan-video": _HUNYUAN_VIDEO,
    "z-image": _Z_IMAGE,
    "qwen-image": (),
}
# diffusers' last modulation has scale before shift, the originals shift before scale.
_TURNED = "norm_out.linear"
_TURNED_NAME = "final_layer.adaLN_modulation.1"

_CLASSES = {
    "FluxTransformer2DModel": "flux",
    "HunyuanVideoTransformer3DModel": "hunyuan-video",
    "QwenImageTransformer2DModel": "qwen-image",
    "S3DiT": "z-image",
    "ZImageTransformer2DModel": "z-image",
    "UNet2DConditionModel": "sdxl",
    "InfinityTransformer": "infinity",
}


def family_of(network: nn.Module) -> str:
    """The family of a network by its class, "" for one that has none: a text encoder, for instance."""
    return _CLASSES.get(type(getattr(network, "_orig_mod", network)).__name__, "")


def shapes_of(network: nn.Module) -> dict[str, Shape]:
    """Every linear layer and convolution of a network that can be adapted, by its name; weights are not read."""
    found = {name: shape_of(module) for name, module in network.named_modules()}
    return {name: shape for name, shape in found.items() if shape is not None}


def shape_of(module: nn.Module) -> Shape | None:
    """The shape of a layer's weight, whatever it is kept as; None for what is no linear layer or convolution."""
    layer: Any = module
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Shape(layer.out_channels, layer.in_channels // layer.groups, tuple(layer.kernel_size))
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return Shape(layer.out_features, layer.in_features)
    return None


def sources(network: nn.Module, chunk: int | None = None) -> dict[str, Source]:
    """What a file may call the modules of a network, by flat name (`keys.flatten`).

    `chunk` is how many blocks of a published Infinity lie in one of its chunks. The network may be on the meta device.
    """
    network = getattr(network, "_orig_mod", network)
    shapes = shapes_of(network)
    parts: dict[str, dict[int, tuple[str, bool]]] = {}
    for module, place in _places(network, shapes, chunk):
        parts.setdefault(flatten(place.name), {}).setdefault(place.part, (module, place.turned))
    found = {}
    for name, places in parts.items():
        ordered = [places[part] for part in sorted(places)]
        found[name] = _source(ordered, shapes, own=False)
    own = {flatten(module): Source(shape.outputs, (Target(module, shape),), True) for module, shape in shapes.items()}
    return found | own


def _source(places: list[tuple[str, bool]], shapes: Mapping[str, Shape], *, own: bool) -> Source:
    """What has the rows of these modules one after the other."""
    targets, begin = [], 0
    for module, turned in places:
        shape = shapes[module]
        end, middle = begin + shape.outputs, begin + shape.outputs // 2
        rows: Rows | None = ((middle, end), (begin, middle)) if turned else ((begin, end),)
        if len(places) == 1 and not turned:
            rows = None
        targets.append(Target(module, shape, rows))
        begin = end
    return Source(begin, tuple(targets), own)


def _places(network: nn.Module, shapes: Mapping[str, Shape], chunk: int | None) -> Iterator[tuple[str, _Place]]:
    """Every module with the other names that it has."""
    family = family_of(network)
    unet = _unet_names(network) if family == "sdxl" else {}
    table = [
        (re.compile(re.escape(ours).replace(r"\#", "([0-9]+)")), theirs, part)
        for ours, theirs, part in _TABLES.get(family, ())
    ]
    for module in shapes:
        if module.endswith("to_out.0"):
            yield module, _Place(module.removesuffix(".0"))
        if not family:
            yield from _text_places(module)
        if family == "infinity":
            yield from _infinity_places(module, chunk)
        if module in unet:
            yield module, _Place(unet[module])
        if module == _TURNED and family in ("flux", "hunyuan-video"):
            yield module, _Place(_TURNED_NAME, turned=True)
        for rule, theirs, part in table:
            if found := rule.fullmatch(module):
                numbers = iter(found.groups())
                yield module, _Place(re.sub("#", lambda _, numbers=numbers: next(numbers), theirs), part)


def _text_places(module: str) -> Iterator[tuple[str, _Place]]:
    """transformers has dropped "text_model." from the names of CLIP; files have it, or not."""
    bare = module.removeprefix("text_model.")
    yield module, _Place(f"text_model.{bare}")
    yield module, _Place(bare)
    found = re.fullmatch(r"(.+self_attn)\.(q|k|v|out)_proj", bare)
    if found is not None:
        yield module, _Place(f"text_model.{found[1]}.to_{found[2]}")


def _infinity_places(module: str, chunk: int | None) -> Iterator[tuple[str, _Place]]:
    suffix = ".weight"
    for blocks in (None, chunk):
        yield module, _Place(published_transformer_name(module + suffix, blocks).removesuffix(suffix))


def _unet_names(network: nn.Module) -> dict[str, str]:
    """Modules of a UNet by their names in the original code, without the prefix."""
    prefix = sdxl_checkpoint.PREFIXES["unet"]
    names = {}
    for name, place in sdxl_checkpoint.places("unet", network).items():
        names[name.rpartition(".")[0]] = place.name.removeprefix(prefix).rpartition(".")[0]
    return names
