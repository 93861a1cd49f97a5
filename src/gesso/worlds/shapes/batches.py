"""Batches of the shapes world: pictures with captions by consecutive seeds, as a training loop wants them.

In here: `batch`. Not in here: shuffling, tensors, workers; those belong to whoever trains.
"""

from __future__ import annotations

from gesso.worlds.shapes.captions import caption
from gesso.worlds.shapes.drawing import Pixels, draw
from gesso.worlds.shapes.scenes import Scene, scene, training_scene


def batch(
    first_seed: int, count: int, side: int = 64, *, training: bool = True
) -> tuple[Pixels, list[str], list[Scene]]:
    """Return the pictures (uint8 [count, side, side, 3]), captions and scenes of `count` consecutive seeds.

    With `training` no scene holds a held-out combination; without it scenes come as they fall.
    """
    draw_scene = training_scene if training else scene
    seeds = range(first_seed, first_seed + count)
    scenes = [draw_scene(seed) for seed in seeds]
    captions = [caption(drawn, seed) for drawn, seed in zip(scenes, seeds, strict=True)]
    return draw(scenes, side), captions, scenes
