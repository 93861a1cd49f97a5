"""Recipes on the shapes world: the tokenizer, and the nano Infinity that ships in `zoo/`, in three turns."""

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


_GUIDED = (2.5,) * 4 + (2.0,) + (1.6,) * 2 + (2.0,)
_TAUGHT = (3.0,) * 4 + (2.5,) + (1.6,) * 2 + (2.0,)


def infinity_nano_on_policy() -> Recipe:
    """`infinity_nano` goes on where its own bits and revisions lead it, with its word encoder; an hour on two cores
    without bfloat16, half a gigabyte.
    """
    return _on_its_own_way(
        "infinity-nano-on-policy",
        start_from="runs/infinity-nano/export",
        guidances=(1.0, 1.5, 2.5),
        generation=(("guidance", _GUIDED), ("temperature", 0.1), ("revisions", 1)),
    )


def infinity_nano_unguided() -> Recipe:
    """`infinity_nano_on_policy` learns to paint as guidance has it, without: half of the work of every picture; an hour
    and a half, likewise.
    """
    return _on_its_own_way(
        "infinity-nano-unguided",
        start_from="runs/infinity-nano-on-policy/export",
        guidances=(1.0,),
        taught_guidance=_TAUGHT,
        generation=(("guidance", 1.0), ("temperature", 0.1), ("revisions", 1), ("distilled", True)),
        steps=2200,
    )


def _on_its_own_way(name: str, steps: int = 2000, **settings: object) -> Recipe:
    """The recipe of a nano Infinity that goes on from an earlier one, with these settings."""
    base = infinity_nano()
    assert isinstance(base.settings, InfinitySettings)
    given = {field.name: getattr(base.settings, field.name) for field in fields(base.settings)}
    given |= {"flip_scales": 8, "score_prompts": 240, "paint_every": 4} | settings
    loop = replace(base.loop, steps=steps, batch=12, learning_rate=4e-4, warmup=60, average_decay=0.998)
    return Recipe(
        name=name,
        make=InfinityOnPolicyTask,
        settings=InfinityOnPolicySettings(**given),
        loop=replace(loop, evaluate_every=400, checkpoint_every=100),
    )
