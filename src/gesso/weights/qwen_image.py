"""Qwen-Image's transformer and autoencoder from a folder in diffusers' layout, strict in field, name and shape.

Both are made without memory and then take the tensors themselves; with `weights` false they stay so, for planning.
Not here: text (`models/qwen_image_text`), schedules (`flow_schedule`), whether parts fit each other (`engine/loading`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gesso.errors import FileError
from gesso.models.diffusers_parts import qwen_image_autoencoder, qwen_image_transformer
from gesso.weights.diffusers_layout import filled, load_network, part_config

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

    from gesso.models.qwen_image_autoencoder import PictureAutoencoder

_AUTOENCODER = "AutoencoderKLQwenImage"  # what diffusers calls it
_MENDED = "fetch it again"
_IDLE = ("pooled_projection_dim",)  # in the first published configurations
# Of relatives that edit, paint in layers or are distilled, whose networks are called otherwise than this pipeline does.
_PLAIN = {
    "patch_size": 2,
    "guidance_embeds": False,
    "zero_cond_t": False,
    "use_additional_t_cond": False,
    "use_layer3d_rope": False,
}


def load_transformer(folder: Path, dtype: torch.dtype, *, weights: bool = True) -> QwenImageTransformer2DModel:
    """The transformer of a model's folder, on the CPU.

    Raises FileError for a configuration of something else or of no network, WeightsError for weights that do not fit
    it, MissingError without diffusers.
    """
    part, kind = folder / "transformer", qwen_image_transformer()
    config = part_config(part, kind.__name__)
    for name, wanted in _PLAIN.items():
        if config.get(name, wanted) != wanted:
            raise FileError(part / "config.json", f"{name} {config[name]} is not {wanted}", "no other is supported")
    network = load_network(part, kind, dtype, weights=weights, idle=_IDLE)
    values: Any = network.config
    axes, head = list(values["axes_dims_rope"]), values["attention_head_dim"]
    if sum(axes) != head:
        raise FileError(part / "config.json", f"axes_dims_rope {axes} are not {head} in all, as a head is", _MENDED)
    if network.pos_embed.pos_freqs.is_meta:  # computed and in no file: made without memory, they are made again
        network.pos_embed = type(network.pos_embed)(theta=network.pos_embed.theta, axes_dim=axes, scale_rope=True)
    return network


def load_autoencoder(folder: Path, dtype: torch.dtype, *, weights: bool = True) -> PictureAutoencoder:
    """The autoencoder of a model's folder. Raises as `load_transformer`."""
    part, kind = folder / "vae", qwen_image_autoencoder()
    config = part_config(part, _AUTOENCODER)
    return filled(part, _AUTOENCODER, lambda: _checked(kind(**config), part), dtype, weights=weights)


def _checked(network: PictureAutoencoder, part: Path) -> PictureAutoencoder:
    """The network, whose configuration is complete by now. Raises FileError for numbers to calculate with that fail."""
    values: Mapping[str, Any] = network.config  # pyright: ignore[reportAssignmentType]
    problem = ""
    for name, low in (("latents_mean", -math.inf), ("latents_std", 0.0)):
        given = values[name]
        if len(given) != values["z_dim"] or not all(_is_number(value) and value > low for value in given):
            allowed = "finite numbers" if math.isinf(low) else "finite numbers above 0"
            problem = f"{name} are not {values['z_dim']} {allowed}"
    if len(values["temperal_downsample"]) != len(values["dim_mult"]) - 1:
        problem = "temperal_downsample does not have one value for each of dim_mult but the last"
    elif values["input_channels"] != 3:
        problem = f"input_channels {values['input_channels']} are not 3"
    if problem:
        raise FileError(part / "config.json", problem, _MENDED)
    return network


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
