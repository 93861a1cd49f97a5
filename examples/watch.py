"""Watch a picture take shape: the events of a run, and its previews side by side."""

from pathlib import Path

from PIL import Image

import gesso
from gesso.events import Done, Preview, Progress

request = gesso.GenerationRequest(prompt="a yellow star above a purple ring on a black background", seed=3)
stages: list[Image.Image] = []
with gesso.Engine() as engine:
    for event in engine.stream(request, preview_every=1):
        match event:
            case Progress(stage="step", step=step, steps=steps, seconds=seconds):
                print(f"scale {step} of {steps}, {1000 * seconds:.0f} ms after the request")
            case Preview(picture=picture):
                stages.append(picture)
            case Done(results=results):
                stages.append(results[0].image)
            case _:
                pass

strip = Image.new("RGB", (sum(stage.width for stage in stages), max(stage.height for stage in stages)), "white")
left = 0
for stage in stages:
    strip.paste(stage, (left, 0))
    left += stage.width
strip.save(Path("stages.png"))
print(f"stages.png: {len(stages)} stages")
