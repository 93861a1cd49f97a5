"""Batches of a synthetic world as tensors, and sheets of pictures. Not here: what a world draws (`worlds/`).

A setting `world` names one of `WORLDS`; what trains on a world knows of it what is said here and in `painting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gesso.worlds import faces, shapes
from gesso.worlds.shapes import Claim, Scene

World = Literal["shapes", "faces"]
WORLDS: tuple[World, ...] = get_args(World)

HELD_OUT_FROM = 2**40  # seeds that no training step reaches
_PAINTED_FROM = 2**32  # above a run's own scenes are those whose captions it paints


def scenes_of_step(step: int, count: int, side: int, seed: int, world: World = "shapes") -> tuple[Tensor, list[str]]:
    """Pictures `[B,3,side,side]` in [-1,1] and captions of one training step; a function of its arguments only."""
    batch = faces.batch if world == "faces" else shapes.batch
    pictures, captions, _ = batch(first_seed(step, count, seed), count, side, training=True)
    return to_tensor(pictures), captions


def first_seed(step: int, count: int, seed: int) -> int:
    """The world's seed of the first of a step's `count` scenes; the others follow it."""
    return seed * 2**33 + step * count


def stated_scenes(first: int, count: int) -> tuple[list[Scene], list[tuple[Claim, str]]]:
    """Training scenes of consecutive seeds of the shapes world, and of each a caption and what that claims."""
    scenes = [shapes.training_scene(seed) for seed in range(first, first + count)]
    return scenes, [shapes.stated(scene, seed) for seed, scene in enumerate(scenes, first)]


def captions_to_paint(round_: int, count: int, seed: int) -> list[tuple[Claim, str, int]]:
    """What a run paints of the shapes world in one of its rounds: claims, captions, and seeds of the pictures.

    Of scenes that no step learns from. Seeds differ in the 32 bits that PyTorch heeds.
    """
    first = first_seed(round_, count, seed) + _PAINTED_FROM
    _, stated = stated_scenes(first, count)
    seeds = np.random.SeedSequence(first).generate_state(count).tolist()
    return [(*text, own) for text, own in zip(stated, seeds, strict=True)]


def held_out_scenes(count: int, side: int, world: World = "shapes") -> tuple[Tensor, list[str]]:
    """Pictures and captions of scenes whose combinations, or people, training never sees."""
    if world == "faces":
        portraits = [faces.held_out_portrait(HELD_OUT_FROM + index) for index in range(count)]
        texts = [faces.caption(portrait, HELD_OUT_FROM + index) for index, portrait in enumerate(portraits)]
        return to_tensor(faces.draw(portraits, side)), texts
    scenes = [shapes.held_out_scene(HELD_OUT_FROM + index) for index in range(count)]
    captions = [shapes.caption(scene, HELD_OUT_FROM + index) for index, scene in enumerate(scenes)]
    return to_tensor(shapes.draw(scenes, side)), captions


def to_tensor(pictures_BHW3: np.ndarray) -> Tensor:
    """Bytes `[B,H,W,3]` to `[B,3,H,W]` in [-1,1]."""
    return torch.from_numpy(pictures_BHW3).movedim(-1, 1).float() / 127.5 - 1


def sheet(rows: Sequence[Sequence[Tensor]], scale: int = 2) -> Image.Image:
    """Pictures `[3,H,W]` in [-1,1], laid out in rows with a thin gap."""
    height, width = rows[0][0].shape[-2:]
    gap = 2
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(0, -1).numpy()
            top, left = y * (height + gap), x * (width + gap)
            canvas[top : top + height, left : left + width] = pixels
    image = Image.fromarray(canvas)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
