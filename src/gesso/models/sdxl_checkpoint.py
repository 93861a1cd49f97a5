"""Names of a Stable Diffusion XL in a single file: where a tensor of diffusers' networks lies in the original naming.

The original code calls the parts `model.diffusion_model` (UNet), `first_stage_model` (autoencoder) and
`conditioner.embedders.0` and `.1` (CLIP-L as transformers names it, OpenCLIP bigG). The places are made from a
network's own names, so that each of its tensors has one place and nothing is guessed from the file. They are what
`diffusers.loaders.single_file_utils` goes by; a test compares. Not here: files (`weights/sdxl_file`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
"""Parts, by the names of their folders in diffusers' layout, and how their tensors' names begin."""

IGNORED = (
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",  # a count
    "conditioner.embedders.1.model.logit_scale",  # of CLIP's training
    "conditioner.embedders.1.model.attn_mask",  # a triangle
    "denoiser.sigmas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "betas",
    "log_one_minus_alphas_cumprod",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)
"""Tensors that such files may hold and that no network needs."""

VELOCITY, ZERO_TERMINAL = "v_pred", "ztsnr"
"""Empty tensors whose presence says that the network predicts velocity, and that its schedule ends in pure noise."""


class Place(NamedTuple):
    """Where a tensor lies: a name; which third of that tensor's rows, where three share one; whether transposed."""

    name: str
    third: int | None = None
    turned: bool = False


_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_AUTOENCODER_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_THIRDS = ("q_proj", "k_proj", "v_proj")
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def places(part: str, network: nn.Module) -> dict[str, Place]:
    """The place of each tensor of a part's network, by the network's name of it."""
    config: Any = network.config
    prefix = PREFIXES[part]
    found = {}
    for name in network.state_dict():
        if part == "unet":
            place = Place(_of_unet(name, config["layers_per_block"], config["up_block_types"]))
        elif part == "vae":
            place = Place(_of_autoencoder(name, len(config["block_out_channels"])))
        elif part == "text_encoder":
            place = Place(f"text_model.{name.removeprefix('text_model.')}")
        else:
            place = _of_open_clip(name.removeprefix("text_model."))
        found[name] = place._replace(name=prefix + place.name)
    return found


def _of_unet(name: str, layers: int, up_block_types: list[str]) -> str:
    """Blocks are counted through: one for each layer and each change of size, which on the way up is in a layer's."""
    if end := _renamed(name, _UNET_ENDS):
        return end
    way, rest = name.split(".", 1)
    if way == "mid_block":
        kind, number, rest = rest.split(".", 2)
        return f"middle_block.{_MIDDLE[f'{kind}.{number}']}.{_inside(kind, rest)}"
    block, kind, number, rest = rest.split(".", 3)
    first = int(block) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":
        place = 2 if up_block_types[int(block)].startswith("CrossAttn") else 1
        return f"output_blocks.{first + layers}.{place}.{rest}"
    index = first + int(number) + (1 if way == "down_blocks" else 0)
    blocks = "input_blocks" if way == "down_blocks" else "output_blocks"
    return f"{blocks}.{index}.{0 if kind == 'resnets' else 1}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    """Names within a residual block; those within attention are the same."""
    return _renamed(rest, _RESIDUAL) if kind == "resnets" else rest


def _of_autoencoder(name: str, levels: int) -> str:
    """On the way up, diffusers counts levels from the coarsest and the original from the finest."""
    if not name.startswith(("encoder.", "decoder.")):
        return name  # quant_conv and post_quant_conv
    way, rest = name.split(".", 1)
    rest = rest.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if found := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", rest):
        return f"{way}.mid.attn_1.{_renamed(found[1], _AUTOENCODER_ATTENTION)}"
    if found := re.fullmatch(r"mid_block\.resnets\.(\d+)\.(.+)", rest):
        return f"{way}.mid.block_{int(found[1]) + 1}.{found[2]}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.(.+)", rest):
        return f"{way}.down.{found[1]}.{_level(found[2])}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.(.+)", rest):
        return f"{way}.up.{levels - 1 - int(found[1])}.{_level(found[2])}"
    return f"{way}.{rest}"


def _level(rest: str) -> str:
    return rest.replace("resnets", "block").replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")


def _of_open_clip(name: str) -> Place:
    """OpenCLIP holds query, key and value as one, and its projection transposed."""
    if name == "text_projection.weight":
        return Place("text_projection", turned=True)
    if name in _OPEN_CLIP:
        return Place(_OPEN_CLIP[name])
    found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
    assert found is not None, name
    layer, rest = f"transformer.resblocks.{found[1]}", found[2]
    for third, projection in enumerate(_THIRDS):
        if rest.startswith(f"self_attn.{projection}."):
            return Place(f"{layer}.attn.in_proj_{rest.rpartition('.')[2]}", third)
    return Place(f"{layer}.{_renamed(rest, _OPEN_CLIP_LAYER)}")


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """The name with its beginning as `names` has it, "" where it begins otherwise."""
    for ours, theirs in names.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    return ""
