"""Pictures by a pipeline while its networks are in training: the recipes' prompts, and the six verbs in a plain loop.

Not here: any pipeline, and the engine, which does this for everybody else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gesso.devices import CPU
from gesso.pipelines.contract import Pipeline, State, without_breaths
from gesso.request import GenerationRequest
from gesso.training.pictures import World, sheet, to_tensor
from gesso.worlds import shapes

_SHAPES_PROMPTS = (
    "a large red circle on a white background",
    "a small blue star on a yellow background",
    "three green hearts on a black background",
    "a red square to the left of a blue circle on a white background",
    "a yellow star above a purple ring on a black background",
    "four orange diamonds on a blue background",
    "two white crosses on a red background",
    "a green triangle to the left of an orange heart on a purple background",
)
_FACES_PROMPTS = (
    "a person with a calm face in a red shirt on a blue background, facing ahead",
    "a person with a smiling face in a white shirt on a green background, facing left",
    "a person with a laughing face in a blue shirt on a yellow background, facing right",
    "a person with a sad face in a black shirt on a grey background, facing ahead",
    "a person with a surprised face in a green shirt on a pink background, facing left",
    "a person with an angry face in a purple shirt on an orange background, facing right",
    "somebody smiling",
    "a portrait of a person in a yellow shirt",
)
SAMPLE_PROMPTS: dict[World, tuple[str, ...]] = {"shapes": _SHAPES_PROMPTS, "faces": _FACES_PROMPTS}


_QUESTIONS = 1  # seed of the questions asked while training
_TOGETHER = 30  # pictures painted at once


def sample_sheet(pipeline: Pipeline, world: World = "shapes") -> Image.Image:
    """Rows: the world's `SAMPLE_PROMPTS`; columns: six seeds."""
    requests = [GenerationRequest(prompt=prompt, seed=0, num_images=6) for prompt in SAMPLE_PROMPTS[world]]
    return sheet([[_tensor(picture) for picture in paint(pipeline, [request])] for request in requests])


def shapes_score(pipeline: Pipeline, count: int) -> float:
    """Share of `count` held-out questions that the shapes world's judge calls right, one picture each.

    They are other questions than those that `gesso eval shapes` asks unless told otherwise, so that these stay unseen.
    """
    questions = shapes.prompts(count, seed=_QUESTIONS)
    requests = [GenerationRequest(prompt=question.prompt, seed=seed) for seed, question in enumerate(questions)]
    right = 0
    for first in range(0, count, _TOGETHER):
        pictures = paint(pipeline, requests[first : first + _TOGETHER])
        asked = questions[first : first + _TOGETHER]
        right += sum(shapes.judge(question, picture).right for question, picture in zip(asked, pictures, strict=True))
    return right / count


def paint(pipeline: Pipeline, requests: Sequence[GenerationRequest]) -> list[Image.Image]:
    """All pictures of requests of one size and number of steps, stepped as one batch."""
    *_, states = walk(pipeline, requests)
    return [output.image for output in without_breaths(pipeline.decode(states))]


def walk(pipeline: Pipeline, requests: Sequence[GenerationRequest]) -> Iterator[list[State]]:
    """The pictures of `paint` before each step of their way, and once more at its end; always the same states."""
    plans = [pipeline.plan(request) for request in requests]
    states = [
        pipeline.begin(plan, conditioning, image)
        for plan, conditioning in zip(plans, pipeline.encode(plans), strict=True)
        for image in range(plan.request.num_images)
    ]
    for _ in range(plans[0].steps):
        yield states
        pipeline.step(states)
    yield states


@contextmanager
def at_rest(network: nn.Module) -> Iterator[None]:
    """A network in the middle of a training step, as it paints.

    It runs eagerly, for batches have other sizes than in training, and without autocast's cache, where weights cast in
    inference would be found by the loss.
    """
    precision, kind = torch.is_autocast_enabled(CPU), torch.get_autocast_dtype(CPU)
    trained = network.training
    network.eval()
    try:
        with torch.compiler.set_stance("force_eager"), torch.autocast(CPU, kind, precision, cache_enabled=False):
            yield
    finally:
        network.train(trained)


def _tensor(picture: Image.Image) -> Tensor:
    return to_tensor(np.array(picture)[None])[0]
