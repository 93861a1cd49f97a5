"""The plain ``for`` loop over the six verbs: the slow, obvious way to paint a request, kept as the engine's oracle.

No threads, no company, no policies: one picture after the other, alone from its first step to its last.
"""

from __future__ import annotations

from gesso.pipelines.contract import Output, Pipeline, without_breaths
from gesso.request import GenerationRequest


def run_plainly(pipeline: Pipeline, request: GenerationRequest) -> list[Output]:
    """Paint a request whose seed is given; one output an image, in order."""
    plan = pipeline.plan(request)
    (conditioning,) = pipeline.encode([plan])
    outputs: list[Output] = []
    for image in range(plan.request.num_images):
        state = pipeline.begin(plan, conditioning, image)
        while state.remaining > 0:
            pipeline.step([state])
        outputs.extend(without_breaths(pipeline.decode([state])))
    return outputs
