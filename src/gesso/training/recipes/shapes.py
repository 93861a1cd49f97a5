"""Recipes on the shapes world: the tokenizer, and the nano Infinity that ships in `zoo/`, in two turns."""

from __future__ import annotations

from dataclasses import fields, replace

from gesso.models.infinity.autoencoder import AutoencoderConfig
from gesso.models.infinity.scales import ScaleSchedule
from gesso.models.infinity.transformer import InfinityConfig
from gesso.models.word_encoder import WordEncoderConfig
from gesso.training.autoencoder import AutoencoderSettings, AutoencoderTask
from gesso.training.infinity import InfinitySettings, InfinityTask
from gesso.training.infinity_on_policy import InfinityOnPolicySettings, InfinityOnPolicyTask
from gesso.training.loop import LoopSettings
from gesso.training.recipes.recipe import Recipe
from gesso.worlds.shapes import VOCABULARY

GRIDS = ((1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 8), (8, 8), (8, 8))
"""The finest grid three times: an outline gets three chances instead of one."""


def shapes_tokenizer() -> Recipe:
    """16 bits a cell at stride 8, 64 pixels; about 35 minutes on two cores."""
    return Recipe(
        name="shapes-tokenizer",
        make=AutoencoderTask,
        settings=AutoencoderSettings(
            network=AutoencoderConfig(
                bits=16,
                width=16,
                encoder_multipliers=(1, 2, 4, 4),
                decoder_multipliers=(1, 2, 4, 4),
                residual_blocks=1,
                stride=8,
                groups=4,
            ),
            grids=GRIDS,
            side=64,
        ),
        loop=LoopSettings(steps=7500, batch=32, learning_rate=2e-3, warmup=50, clip=1.0, average_decay=0.998),
    )


def infinity_nano() -> Recipe:
    """Bits of the shapes tokenizer from captions: 3 million parameters, 64 pixels; about four hours on two cores."""
    return Recipe(
        name="infinity-nano",
        make=InfinityTask,
        settings=InfinitySettings(
            network=InfinityConfig(depth=6, width=160, heads=2, bits=16, text_width=128, text_length=32, pool_heads=2),
            text=WordEncoderConfig(vocabulary=VOCABULARY, width=128, depth=2, heads=4, length=32),
            tokenizer="runs/shapes-tokenizer/export",
            schedule=ScaleSchedule(GRIDS, rotary_grid=GRIDS[-1]),
            side=64,
            weigh_margins=True,
        ),
        loop=LoopSettings(
            steps=30_000,
            batch=32,
            learning_rate=1.5e-3,
            warmup=200,
            average_decay=0.9985,
            compile=True,
            attention=("MATH",),
        ),
    )


def infinity_nano_on_policy() -> Recipe:
    """`infinity_nano` goes on where its own bits and revisions lead it, with its word encoder; an hour on two cores
    without bfloat16, half a gigabyte.
    """
    base = infinity_nano()
    assert isinstance(base.settings, InfinitySettings)
    given = {field.name: getattr(base.settings, field.name) for field in fields(base.settings)}
    given |= {"start_from": f"runs/{base.name}/export", "flip_scales": 8, "score_prompts": 60}
    guidance = (2.5,) * 4 + (2.0,) + (1.6,) * 2 + (2.0,)
    revised = {"revisions": 1, "revision_strength": 0.25}
    given["generation"] = (("guidance", guidance), ("temperature", 0.1), *revised.items())
    loop = replace(base.loop, steps=2000, batch=12, learning_rate=4e-4, warmup=60, average_decay=0.998)
    return Recipe(
        name="infinity-nano-on-policy",
        make=InfinityOnPolicyTask,
        settings=InfinityOnPolicySettings(**given, paint_every=4, guidances=(1.0, 1.5, 2.5), revisions=1),
        loop=replace(loop, evaluate_every=400, checkpoint_every=200),
    )
