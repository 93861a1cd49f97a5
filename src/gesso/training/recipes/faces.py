"""Recipes on the faces world: the recogniser, the autoencoder, the nano FLUX, and InfiniteYou on top of it."""

from __future__ import annotations

from dataclasses import replace

from gesso.models.face_recogniser import FaceRecogniserConfig
from gesso.models.flux_network import FluxConfig
from gesso.models.kl_autoencoder import KLAutoencoderConfig
from gesso.models.resampler import ResamplerConfig
from gesso.models.word_encoder import WordEncoderConfig
from gesso.training.face_recogniser import FaceRecogniserSettings, FaceRecogniserTask
from gesso.training.flow import FlowSettings, FlowTask
from gesso.training.infinite_you import InfiniteYouSettings, InfiniteYouTask
from gesso.training.kl_autoencoder import KLAutoencoderSettings, KLAutoencoderTask
from gesso.training.loop import LoopSettings
from gesso.training.recipes.recipe import Recipe
from gesso.worlds.faces import VOCABULARY

SIDE = 64
LATENT_CHANNELS = 8

_WIDTH = 128
_FLOW = LoopSettings(
    steps=12_000,
    batch=64,
    learning_rate=2e-3,
    warmup=200,
    average_decay=0.999,
    compile=True,
    attention=("MATH",),
    evaluate_every=1000,
)


def faces_recogniser() -> Recipe:
    """Vectors of 64 numbers, 0.2 million parameters; two minutes of one core."""
    return Recipe(
        name="faces-recogniser",
        make=FaceRecogniserTask,
        settings=FaceRecogniserSettings(network=FaceRecogniserConfig(side=SIDE)),
        loop=LoopSettings(
            steps=700,
            batch=64,
            learning_rate=2e-3,
            warmup=50,
            average_decay=0.99,
            precision="fp32",
            evaluate_every=350,
        ),
    )


def faces_autoencoder() -> Recipe:
    """8 channels at stride 4, as the shapes' one; 0.7 million parameters."""
    return Recipe(
        name="faces-autoencoder",
        make=KLAutoencoderTask,
        settings=KLAutoencoderSettings(
            network=KLAutoencoderConfig(latent_channels=LATENT_CHANNELS, widths=(16, 32, 64), groups=4),
            world="faces",
            side=SIDE,
        ),
        loop=LoopSettings(steps=5000, batch=32, learning_rate=2e-3, warmup=50, clip=1.0, average_decay=0.998),
    )


def flux_faces_nano() -> Recipe:
    """FLUX on 64 tokens of pictures and 24 of text, with a word encoder of its own: 1.9 million parameters."""
    return Recipe(
        name="flux-faces-nano",
        make=FlowTask,
        settings=FlowSettings(
            network=_flux(double=1, single=4),
            autoencoder="runs/faces-autoencoder/export",
            text=WordEncoderConfig(vocabulary=VOCABULARY, width=_WIDTH, depth=1, heads=4, length=24),
            train_text=True,
            world="faces",
            side=SIDE,
            precompute=65_536,
            # As with shapes: what is still open is settled under much noise, but a face has finer parts.
            time_shift=3.0,
            sampling_shift=3.0,
            generation=(("steps", 20), ("guidance", 3.0)),
        ),
        loop=_FLOW,
    )


def infinite_you_nano() -> Recipe:
    """InfuseNet of one double and one single block, and a resampler, beside frozen FLUX: 1.1 million parameters."""
    return Recipe(
        name="infinite-you-nano",
        make=InfiniteYouTask,
        settings=InfiniteYouSettings(
            network=_flux(double=1, single=1),
            resampler=ResamplerConfig(
                dim=_WIDTH, depth=1, dim_head=32, heads=4, embedding_dim=64, output_dim=_WIDTH, ff_mult=2
            ),
            flux="runs/flux-faces-nano/export",
            recogniser="runs/faces-recogniser/export",
            precompute=65_536,
            time_shift=3.0,
            trials=40,
        ),
        loop=replace(_FLOW, steps=8000, learning_rate=1e-3),
    )


def _flux(*, double: int, single: int) -> FluxConfig:
    """FLUX, or its side network, of so many blocks."""
    return FluxConfig(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
