"""Tiny recipes on the faces world: recogniser, autoencoder, FLUX, and InfiniteYou on top of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gesso.models.face_recogniser import FaceRecogniserConfig
from gesso.models.resampler import ResamplerConfig
from gesso.models.word_encoder import WordEncoderConfig
from gesso.training.face_recogniser import FaceRecogniserSettings, FaceRecogniserTask
from gesso.training.flow import FlowSettings, FlowTask
from gesso.training.infinite_you import InfiniteYouSettings, InfiniteYouTask
from gesso.training.kl_autoencoder import KLAutoencoderSettings, KLAutoencoderTask
from gesso.training.recipes.recipe import Recipe
from gesso.worlds.faces import VOCABULARY
from tests.unit.training.tiny_recipes import FLUX, KL_AUTOENCODER, tiny_loop

SIDE = 32
WIDTH = FLUX.joint_attention_dim


def recogniser_recipe() -> Recipe:
    settings = FaceRecogniserSettings(
        network=FaceRecogniserConfig(side=SIDE, widths=(4, 8), vector=8), people=6, pictures=3, held_out=20
    )
    return Recipe(name="tiny-recogniser", make=FaceRecogniserTask, settings=settings, loop=tiny_loop(batch=8))


def autoencoder_recipe() -> Recipe:
    settings = KLAutoencoderSettings(network=KL_AUTOENCODER, world="faces", side=SIDE, held_out=4, measured=64)
    return Recipe(name="tiny-faces-autoencoder", make=KLAutoencoderTask, settings=settings, loop=tiny_loop(steps=2))


def flux_recipe(autoencoder: Path, **fields: object) -> Recipe:
    """With a word encoder of its own, trained with it."""
    settings = FlowSettings(
        network=FLUX,
        autoencoder=str(autoencoder),
        text=WordEncoderConfig(vocabulary=VOCABULARY, width=WIDTH, depth=1, heads=2, length=24),
        train_text=True,
        world="faces",
        side=SIDE,
        held_out=4,
        generation=(("steps", 2), ("guidance", 2.0)),
    )
    return Recipe(name="tiny-faces-flux", make=FlowTask, settings=replace(settings, **fields), loop=tiny_loop())  # type: ignore[arg-type]


def infinite_you_recipe(flux: Path, recogniser: Path, **fields: object) -> Recipe:
    """With everything that draws at random."""
    settings = InfiniteYouSettings(
        network=replace(FLUX, num_layers=1, num_single_layers=1),
        resampler=ResamplerConfig(dim=8, depth=1, dim_head=4, heads=2, embedding_dim=8, output_dim=WIDTH, ff_mult=2),
        flux=str(flux),
        recogniser=str(recogniser),
        condition_drop=0.3,
        held_out=4,
    )
    made = replace(settings, **fields)  # type: ignore[arg-type]
    return Recipe(name="tiny-infinite-you", make=InfiniteYouTask, settings=made, loop=tiny_loop())
