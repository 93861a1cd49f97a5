"""Puts a nano InfiniteYou together as the guest of the nano FLUX whose folder it lies in, when a request wants it.

Not here: reading (`weights/infinite_you_nano`), FLUX (`flow_nano`), the published one (`infinite_you`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gesso.engine.loading.build import Build
from gesso.errors import RequestError
from gesso.identity.nano_reader import NanoFaceReader
from gesso.pipelines.infinite_you import INFUSENET, RESAMPLER, VARIANT, InfiniteYou, Networks
from gesso.weights import infinite_you_nano as weights
from gesso.weights.face_recogniser import load_recogniser

if TYPE_CHECKING:
    from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel


def guest(folder: Path, build: Build) -> InfiniteYou:
    """The guest of the FLUX in a folder, which paints by the person of a portrait of the faces world."""

    def shapes(variant: str) -> FluxControlNetModel:
        if variant != VARIANT:
            raise RequestError("identity.variant", variant, VARIANT, "this model has one variant")
        made = weights.load_infusenet(folder, build.dtype, weights=False)
        build.footprint.expect(INFUSENET, made)
        build.footprint.expect(RESAMPLER, 2 * (folder / weights.FILES[1]).stat().st_size)  # to float32
        return made

    def load(variant: str) -> Networks:
        with build.reading_guest(INFUSENET):
            resampler = weights.load_resampler(folder)
            infusenet = weights.load_infusenet(folder, build.dtype)
            build.place({INFUSENET: infusenet})
        return Networks(variant, infusenet, resampler, build.return_to(INFUSENET))

    return InfiniteYou(
        faces=NanoFaceReader(lambda: load_recogniser(folder)),
        load=load,
        shapes=shapes,
        device=torch.device(build.device),
        dtype=build.dtype,
    )
