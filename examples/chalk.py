"""Pictures in one style to train a LoRA on: large shapes as chalk outlines on a blackboard, and captions.

Strokes are broad and of pure colours: the autoencoder of the nano models knows no others.
Then: gesso train lora --model flux-nano --data chalk --set trigger=chalk (docs/lora.md).
"""

from itertools import count, islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from gesso.worlds import shapes

COUNT, SIDE, FINE = 96, 64, 4  # pictures, pixels, and how much finer they are drawn
STROKE = 4  # pixels
LARGE = 0.22  # of the side: what is smaller has nothing left inside its outline


def chalk(picture: np.ndarray) -> Image.Image:
    """What lies on a flat picture's ground, by its outlines in its own colours; black chalk is white."""
    colours = picture.astype(int)
    inside = Image.fromarray((np.abs(colours - colours[0, 0]).sum(axis=2) > 60).astype(np.uint8) * 255)
    outline = inside
    for _ in range(STROKE):
        outline = outline.filter(ImageFilter.MinFilter(2 * FINE + 1))
    strokes = (np.asarray(inside) > 0) & (np.asarray(outline) == 0)
    light = np.where(colours.max(axis=2, keepdims=True) < 60, 255, colours)
    drawn = Image.fromarray((strokes[..., None] * light).astype(np.uint8))
    return drawn.resize((SIDE, SIDE), Image.Resampling.BOX)


folder = Path("chalk")
folder.mkdir(exist_ok=True)
large = (seed for seed in count() if shapes.training_scene(seed).objects[0].radius > LARGE)
seeds = list(islice(large, COUNT))
scenes = [shapes.training_scene(seed) for seed in seeds]
for number, (seed, scene, flat) in enumerate(zip(seeds, scenes, shapes.draw(scenes, SIDE * FINE), strict=True)):
    chalk(flat).save(folder / f"{number:03}.png")
    (folder / f"{number:03}.txt").write_text(shapes.caption(scene, seed) + "\n")
print(f"{COUNT} pictures with captions in {folder}")
