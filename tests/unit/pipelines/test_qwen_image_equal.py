"""Qwen-Image against diffusers' own pipelines with the same weights, in the same batches: every bit of every step.

Float32 on the CPU. Latents after each step and the finished pictures are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage, pipeline_qwenimage_img2img
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from PIL import Image
from torch import Tensor

from gesso.pipelines.qwen_image import QwenImagePipeline
from gesso.request import GenerationRequest
from tests.tiny_qwen_image import STATIC, STRETCHED, diffusers_pipeline, tiny_pipeline

TEXT_TO_IMAGE = pipeline_qwenimage.QwenImagePipeline
IMAGE_TO_IMAGE = pipeline_qwenimage_img2img.QwenImageImg2ImgPipeline
SEED = 7
SIZES = [(64, 64), (80, 48)]


class Painted(NamedTuple):
    """Tokens `[B,L,D]` after every step, and the pictures."""

    steps: list[Tensor]
    pictures: list[Image.Image]


@pytest.fixture(scope="module")
def pipeline() -> QwenImagePipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def given_picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of other proportions than any that is painted."""
    path = tmp_path_factory.mktemp("pictures") / "given.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def paint(pipeline: QwenImagePipeline, requests: Sequence[GenerationRequest]) -> Painted:
    """All pictures of all requests, in one batch at every step."""
    plans = [pipeline.plan(request) for request in requests]
    conditionings = pipeline.encode(plans)
    states = [
        pipeline.begin(plan, conditioning, image)
        for plan, conditioning in zip(plans, conditionings, strict=True)
        for image in range(plan.request.num_images)
    ]
    steps = []
    while states[0].remaining:
        pipeline.step(states)
        steps.append(torch.cat([state.tokens_1LD for state in states]))
    return Painted(steps, [output.image for output in pipeline.decode(states)])


def theirs(kind: Any, count: int, scheduler: Any = None, **values: Any) -> Painted:
    """The same from diffusers: one call, one generator a picture."""
    steps: list[Tensor] = []

    def keep(_pipeline: object, _index: int, _timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(tensors["latents"].clone())
        return tensors

    generators = [torch.Generator().manual_seed(SEED + index) for index in range(count)]
    called = diffusers_pipeline(kind, scheduler)
    made = called(generator=generators, callback_on_step_end=keep, **{"num_inference_steps": 4} | values)
    return Painted(steps, made.images)


def check(ours: Painted, wanted: Painted) -> None:
    assert len(ours.steps) == len(wanted.steps) > 0
    for one, other in zip(ours.steps, wanted.steps, strict=True):
        assert torch.equal(one, other)
    assert len(ours.pictures) == len(wanted.pictures)
    for picture, other in zip(ours.pictures, wanted.pictures, strict=True):
        assert picture.tobytes() == other.tobytes()
    assert np.asarray(ours.pictures[0]).std() > 5  # a grey picture would prove little


def request(prompt: str = "a red star", **values: Any) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": prompt, "seed": SEED, **values})


GUIDANCE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"guidance": 1.0}, {"true_cfg_scale": 1.0}),
    ({}, {"negative_prompt": " "}),
    ({"guidance": 2.5, "negative": "a ring"}, {"true_cfg_scale": 2.5, "negative_prompt": "a ring"}),
]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("fields", "values"), GUIDANCE, ids=["unguided", "default", "negative"])
def test_text_to_image(
    pipeline: QwenImagePipeline, size: tuple[int, int], fields: dict[str, Any], values: dict[str, Any], count: int
) -> None:
    width, height = size
    ours = paint(pipeline, [request(width=width, height=height, num_images=count, **fields)])
    shape = {"width": width, "height": height, "num_images_per_prompt": count}
    check(ours, theirs(TEXT_TO_IMAGE, count, prompt="a red star", **shape, **values))


@pytest.mark.parametrize("negatives", [["a star", "a ring", "rings"], ["a blue star in two rings", "", "a"]])
def test_different_requests_in_one_batch(pipeline: QwenImagePipeline, negatives: list[str]) -> None:
    """Prompts of unequal length are padded and masked as they are there."""
    prompts = ["a red star", "two blue rings on a star", "ring"]
    requests = [
        request(prompt, negative=negative, guidance=2.0, seed=SEED + index)
        for index, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True))
    ]
    values = {"true_cfg_scale": 2.0, "negative_prompt": [negative or " " for negative in negatives]}
    check(paint(pipeline, requests), theirs(TEXT_TO_IMAGE, 3, prompt=prompts, width=64, height=64, **values))


@pytest.mark.parametrize("steps", [2, 7])
def test_other_numbers_of_steps(pipeline: QwenImagePipeline, steps: int) -> None:
    values = {"width": 64, "height": 64, "num_inference_steps": steps, "negative_prompt": " "}
    check(paint(pipeline, [request(steps=steps)]), theirs(TEXT_TO_IMAGE, 1, prompt="a red star", **values))


@pytest.mark.parametrize("times", [300, 900])
def test_a_text_that_is_too_long(pipeline: QwenImagePipeline, times: int) -> None:
    """600 tokens, of which the transformer gets 512, and 1800, which are more than the encoder is shown."""
    prompt = "qz" * times
    assert pipeline.text.count(prompt) == 2 * times + 5
    values = {"width": 64, "height": 64, "num_inference_steps": 2, "true_cfg_scale": 1.0}
    ours = paint(pipeline, [request(prompt, steps=2, guidance=1.0)])
    check(ours, theirs(TEXT_TO_IMAGE, 1, prompt=prompt, **values))


def test_a_schedule_that_is_not_stretched() -> None:
    ours = paint(tiny_pipeline(scheduler=STATIC), [request(guidance=1.0, steps=1)])
    values = {"width": 64, "height": 64, "num_inference_steps": 1, "true_cfg_scale": 1.0}
    check(ours, theirs(TEXT_TO_IMAGE, 1, FlowMatchEulerDiscreteScheduler(**STATIC), prompt="a red star", **values))


@pytest.mark.parametrize("steps", [2, 6])
def test_unipc(pipeline: QwenImagePipeline, steps: int) -> None:
    settings = {name: STRETCHED[name] for name in ("use_dynamic_shifting", "shift_terminal")}
    bend = {name: STRETCHED[name] for name in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")}
    scheduler: Any = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", **settings)
    scheduler.register_to_config(**bend)  # where their pipeline looks for it
    ours = paint(pipeline, [request(scheduler="unipc", steps=steps, num_images=2)])
    values = {"width": 64, "height": 64, "num_images_per_prompt": 2, "negative_prompt": " "}
    wanted = theirs(TEXT_TO_IMAGE, 2, scheduler, prompt="a red star", num_inference_steps=steps, **values)
    check(ours, wanted)


# ---- image to image -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strength", [0.6, 1.0, 0.2])
@pytest.mark.parametrize(("fields", "values"), GUIDANCE[:2], ids=["unguided", "default"])
def test_image_to_image(
    pipeline: QwenImagePipeline,
    given_picture: Path,
    size: tuple[int, int],
    strength: float,
    fields: dict[str, Any],
    values: dict[str, Any],
) -> None:
    width, height = size
    start = {"init_image": str(given_picture), "init_strength": strength}
    ours = paint(pipeline, [request(width=width, height=height, num_images=2, **start, **fields)])
    wanted = theirs(
        IMAGE_TO_IMAGE,
        2,
        prompt="a red star",
        image=[Image.open(given_picture)] * 2,  # one a picture, else all begin from a sample of the first one's
        strength=strength,
        width=width,
        height=height,
        num_images_per_prompt=2,
        **values,
    )
    check(ours, wanted)
