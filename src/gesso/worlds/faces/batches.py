"""Batches of the faces world: portraits with captions by consecutive seeds, as a training loop wants them.

In here: `batch`. Not in here: shuffling, tensors, workers; those belong to whoever trains.
"""

from __future__ import annotations

from gesso.worlds.faces.captions import caption
from gesso.worlds.faces.drawing import Pixels, draw
from gesso.worlds.faces.portraits import Portrait, portrait, training_portrait


def batch(
    first_seed: int, count: int, side: int = 64, *, training: bool = True
) -> tuple[Pixels, list[str], list[Portrait]]:
    """Return the pictures (uint8 [count, side, side, 3]), captions and portraits of `count` consecutive seeds.

    With `training` nobody is held out; without it people come as they fall.
    """
    seeds = range(first_seed, first_seed + count)
    portraits = [training_portrait(seed) if training else portrait(seed) for seed in seeds]
    captions = [caption(drawn, seed) for drawn, seed in zip(portraits, seeds, strict=True)]
    return draw(portraits, side), captions, portraits
