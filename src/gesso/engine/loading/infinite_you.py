"""Puts InfiniteYou together as FLUX's guest: where its files lie, and its networks read when a request wants them.

The default variant lies in `GESSO_HOME/weights/infinite-you`, the recogniser's file in it; the other one there too, or
in a folder of its own; the user's face pack in `GESSO_HOME/weights/antelopev2`, or where the published repository has
it. Nothing of this is looked for before a request has an identity, so that FLUX needs none of it. Not here: reading
(`weights/infinite_you`), FLUX (`flux`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gesso.engine.loading import check_pulled
from gesso.engine.loading.build import Build
from gesso.errors import FileError, MissingError
from gesso.identity.detection import FaceDetector
from gesso.identity.reader import FaceReader
from gesso.models.infusenet import IDENTITY_TOKENS
from gesso.models.resampler import Resampler
from gesso.pipelines.infinite_you import INFUSENET, RESAMPLER, InfiniteYou, Networks
from gesso.settings import load_settings
from gesso.weights import catalogue
from gesso.weights import infinite_you as weights

if TYPE_CHECKING:
    from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel

FOLDER = "infinite-you"
PACK = "antelopev2"
# What InfuseNet's and FLUX's configurations must have in common.
_COMMON = ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim", "pooled_projection_dim")
_COMMON += ("axes_dims_rope",)
_PACK_IN_REPOSITORY = Path("supports/insightface/models") / PACK


def guest(build: Build, network: Mapping[str, Any]) -> InfiniteYou:
    """The guest of a FLUX whose transformer has this configuration."""
    home = load_settings().home / "weights" / FOLDER

    def shapes(variant: str) -> FluxControlNetModel:
        folder = _folder(home, variant)
        weights.require_arcface(home / weights.RECOGNISER)  # now, and not once FLUX is there
        made = _infusenet(folder, variant, build.dtype, network, with_weights=False)
        build.footprint.expect(INFUSENET, made)
        build.footprint.expect(RESAMPLER, (folder / weights.variant_files(variant)[1]).stat().st_size)
        return made

    def load(variant: str) -> Networks:
        folder = _folder(home, variant)
        entry = catalogue.find(weights.ENTRIES[variant])
        with build.reading_guest(INFUSENET):
            resampler = weights.load_resampler(folder, variant, torch.float32)
            _check_resampler(folder, resampler, network)
            infusenet = _infusenet(folder, variant, build.dtype, network, with_weights=True)
            build.place({INFUSENET: infusenet})
            if folder == entry.folder:
                check_pulled(entry)
        return Networks(variant, infusenet, resampler, build.return_to(INFUSENET))

    return InfiniteYou(
        faces=face_reader(home),
        load=load,
        shapes=shapes,
        device=torch.device(build.device),
        dtype=build.dtype,
    )


def face_reader(folder: Path | None = None) -> FaceReader:
    """Faces by the user's own pack and the recogniser's file, in `folder` where that is not where it belongs."""
    home = load_settings().home / "weights"
    folder = folder or home / FOLDER
    own, published = home / PACK, folder / _PACK_IN_REPOSITORY
    pack = published if published.is_dir() and not own.is_dir() else own
    return FaceReader(FaceDetector(pack), lambda: weights.load_arcface(folder / weights.RECOGNISER))


def _folder(home: Path, variant: str) -> Path:
    """Where a variant lies: by itself, as it is pulled, or with the other. Raises MissingError with the way to it."""
    files, entry = weights.variant_files(variant), catalogue.find(weights.ENTRIES[variant])
    if all((home / name).exists() for name in files) and entry.folder != home:
        return home
    if missing := entry.missing_files():
        what = f"InfiniteYou's {variant} ({', '.join(missing)} in {entry.folder}; {entry.licence})"
        raise MissingError(what, entry.fetch)
    return entry.folder


def _infusenet(
    folder: Path, variant: str, dtype: torch.dtype, network: Mapping[str, Any], *, with_weights: bool
) -> FluxControlNetModel:
    """InfuseNet of a variant, its fit checked. Raises FileError, WeightsError."""
    made = weights.load_infusenet(folder, variant, dtype, weights=with_weights)
    ours: Any = made.config
    for name in _COMMON:
        if tuple(_listed(ours[name])) != tuple(_listed(network[name])):
            problem = f"does not fit this FLUX: its {name} is {ours[name]}, not {network[name]}"
            raise FileError(folder / weights.variant_files(variant)[0], problem, "use FLUX.1")
    return made


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


def _check_resampler(folder: Path, resampler: Resampler, network: Mapping[str, Any]) -> None:
    config = resampler.config
    if config.num_queries != IDENTITY_TOKENS or config.output_dim != network["joint_attention_dim"]:
        made = f"{config.num_queries} tokens of {config.output_dim}"
        wanted = f"{IDENTITY_TOKENS} of {network['joint_attention_dim']}"
        raise FileError(folder, f"its resampler makes {made} where this FLUX wants {wanted}")
