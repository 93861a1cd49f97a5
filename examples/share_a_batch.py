"""Requests with their own seed, guidance and temperature share one running batch; one of them is cancelled."""

import gesso
from gesso.errors import CancelledError

prompts = [
    "three green hearts on a black background",
    "a blue circle on white",
    "two red squares on a yellow background",
]
with gesso.Engine() as engine:
    jobs = [
        engine.submit(gesso.GenerationRequest(prompt=prompt, seed=seed, guidance=2.0 + seed, temperature=0.5))
        for seed, prompt in enumerate(prompts)
    ]
    jobs[1].cancel()
    for prompt, job in zip(prompts, jobs, strict=True):
        try:
            result = job.result(timeout=60)[0]
            print(f"{prompt}: shared its batches with {result.metadata['company']} at most")
        except CancelledError:
            print(f"{prompt}: cancelled")
