"""FLUX and Infinity on one engine, fairly shared, and a picture that starts from another one."""

from pathlib import Path

import gesso

prompt = "a yellow star above a purple ring on a black background"
with gesso.Engine() as engine:
    patient = engine.submit(gesso.GenerationRequest(prompt=prompt, model="infinity-nano", seed=3, num_images=8))
    urgent = engine.submit(gesso.GenerationRequest(prompt=prompt, model="flux-nano", seed=3), priority=1)
    star = urgent.result(timeout=120)[0].save(Path("star.png"))
    print(f"{star} by flux-nano, {len(patient.result(timeout=120))} more by infinity-nano")

    request = gesso.GenerationRequest(
        prompt="a red star above a blue ring on a white background",
        model="flux-nano",
        seed=3,
        init_image=str(star),
        init_strength=0.8,
    )
    print(engine.run(request)[0].save(Path("repainted.png")))
