"""InfiniteYou's networks from the folder that its authors publish, strict by name and shape. Reads local files only.

The folder is that of `ByteDance/InfiniteYou`: `infu_flux_v1.0/<variant>/InfuseNetModel` in diffusers' layout and
`image_proj_model.bin` beside it, a pickle of which only tensors are read. The recogniser is facexlib's file, of its
own. Not here: names and places (`catalogue`), the face detector (`identity/detection`), pipelines (`engine/loading`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from gesso.devices import META
from gesso.errors import FileError, MissingError, WeightsError
from gesso.models import infusenet
from gesso.models.arcface import ArcFace
from gesso.models.resampler import Resampler, infer_config
from gesso.weights import diffusers_layout
from gesso.weights.files import fill, read_tensors

if TYPE_CHECKING:
    from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel

VARIANTS = ("aes_stage2", "sim_stage1")
"""Trained further for text and looks, the default; and before that, nearer to the face."""
ENTRIES = {"aes_stage2": "infinite-you", "sim_stage1": "infinite-you-sim"}
"""Names of the catalogue by variant."""
RECOGNISER = "recognition_arcface_ir_se50.pth"

_VERSION = "infu_flux_v1.0"
_RESAMPLER = "image_proj_model.bin"
_WRAPPED = ("image_proj",)
_RECOGNISER_ADDRESS = f"https://github.com/xinntao/facexlib/releases/download/v0.1.0/{RECOGNISER}"


def variant_files(variant: str) -> tuple[str, str]:
    """What a variant consists of, below the published folder."""
    return f"{_VERSION}/{variant}/InfuseNetModel", f"{_VERSION}/{variant}/{_RESAMPLER}"


def load_infusenet(folder: Path, variant: str, dtype: torch.dtype, *, weights: bool = True) -> FluxControlNetModel:
    """InfuseNet of a variant, on the CPU; without `weights` it has its shapes and lies on the meta device.

    Raises FileError for a folder of something else, WeightsError for weights that do not fit, MissingError without
    diffusers.
    """
    part = folder / variant_files(variant)[0]
    config = diffusers_layout.part_config(part, "FluxControlNetModel")
    for name in ("num_mode", "conditioning_embedding_channels"):
        if config.get(name) is not None:
            raise FileError(part, f"is no InfuseNet: its configuration has {name}", "fetch it again")
    return diffusers_layout.filled(part, "FluxControlNetModel", lambda: infusenet.build(config), dtype, weights=weights)


def load_resampler(folder: Path, variant: str, dtype: torch.dtype) -> Resampler:
    """The resampler of a variant, on the CPU. Raises FileError, WeightsError."""
    path = folder / variant_files(variant)[1]
    state = read_tensors(path, keys=_WRAPPED, dtype=dtype)
    try:
        with torch.device(META):
            network = Resampler(infer_config(state))
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise WeightsError(path, detail=f"not InfiniteYou's resampler ({error})") from error
    fill(network, state, path)
    return network.eval().requires_grad_(False)


def require_arcface(path: Path) -> None:
    """Raise MissingError, which says where the recogniser is from, if it is not here."""
    if not path.is_file():
        what = f"the face recogniser ({path})"
        raise MissingError(what, f"curl -L --create-dirs -o {path} {_RECOGNISER_ADDRESS}")


def load_arcface(path: Path) -> nn.Module:
    """The recogniser, in float32, on the CPU. Raises MissingError that says where it is, WeightsError."""
    require_arcface(path)
    with torch.device(META):
        network = ArcFace()
    fill(network, read_tensors(path, dtype=torch.float32), path)
    return network.eval().requires_grad_(False)
