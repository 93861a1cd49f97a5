"""HunyuanVideo against diffusers' own pipeline with the same weights, in the same batches: every bit is equal.

Float32 on the CPU. Latents after each step and the finished frames are compared, decoded in the same tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gesso.pipelines.contract import without_breaths
from gesso.pipelines.hunyuan_video import HunyuanVideoPipeline
from gesso.request import GenerationRequest
from tests.tiny_hunyuan_video import diffusers_pipeline, tiny_pipeline

SEED = 7


class Painted(NamedTuple):
    """Latents `[B,C,f,h,w]` after every step, and the videos."""

    steps: list[Tensor]
    videos: list[Sequence[Image.Image]]


@pytest.fixture(scope="module")
def tiny() -> HunyuanVideoPipeline:
    """Its tiles are 32 pixels wide and 24 apart, so that a video of 64 by 48 has six of them in a stretch."""
    return tiny_pipeline(tile=32, stride=24)


def paint(pipeline: HunyuanVideoPipeline, requests: Sequence[GenerationRequest]) -> Painted:
    """All videos of all requests, in one batch at every step."""
    plans = [pipeline.plan(request) for request in requests]
    states = [
        pipeline.begin(plan, conditioning, image)
        for plan, conditioning in zip(plans, pipeline.encode(plans), strict=True)
        for image in range(plan.request.num_images)
    ]
    steps = []
    while states[0].remaining:
        pipeline.step(states)
        steps.append(torch.cat([state.latent_1Cfhw for state in states]))
    return Painted(steps, [output.frames for output in without_breaths(pipeline.decode(states))])


def theirs(pipeline: HunyuanVideoPipeline, count: int, **values: Any) -> Painted:
    """The same from diffusers: one call, one generator a video."""
    steps: list[Tensor] = []

    def keep(_pipeline: object, _index: int, _timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(tensors["latents"].clone())
        return tensors

    generators = [torch.Generator().manual_seed(SEED + index) for index in range(count)]
    values = {"width": 64, "height": 48, "num_inference_steps": 3, **values}
    made = diffusers_pipeline(pipeline)(generator=generators, callback_on_step_end=keep, **values)
    return Painted(steps, made.frames)


def check(ours: Painted, wanted: Painted) -> None:
    assert len(ours.steps) == len(wanted.steps) > 0
    for one, other in zip(ours.steps, wanted.steps, strict=True):
        assert torch.equal(one, other)
    assert len(ours.videos) == len(wanted.videos)
    for video, other in zip(ours.videos, wanted.videos, strict=True):
        assert [frame.tobytes() for frame in video] == [frame.tobytes() for frame in other]
    assert np.asarray(ours.videos[0][0]).std() > 5  # a grey video would prove little


def request(prompt: str = "a red star", **values: Any) -> GenerationRequest:
    fields = {"prompt": prompt, "seed": SEED, "width": 64, "height": 48, "frames": 5}
    return GenerationRequest.model_validate({**fields, **values})


@pytest.mark.parametrize("frames", [1, 13, 37])
def test_every_length(tiny: HunyuanVideoPipeline, frames: int) -> None:
    """One latent frame, one stretch of tiles, and several the last of which would add nothing."""
    ours = paint(tiny, [request(frames=frames, guidance=3.0)])
    assert len(ours.videos[0]) == frames
    check(ours, theirs(tiny, 1, prompt="a red star", num_frames=frames, guidance_scale=3.0))


@pytest.mark.parametrize("on", [False, True], ids=["", "guided"])
def test_several_of_a_prompt(tiny: HunyuanVideoPipeline, on: bool) -> None:
    fields: dict[str, Any] = {"true_guidance": 2.5, "negative": "a ring"} if on else {}
    values: dict[str, Any] = {"true_cfg_scale": 2.5, "negative_prompt": "a ring"} if on else {}
    ours = paint(tiny, [request(num_images=2, **fields)])
    check(ours, theirs(tiny, 2, prompt="a red star", num_frames=5, num_videos_per_prompt=2, **values))


def test_different_requests_in_one_batch(tiny: HunyuanVideoPipeline) -> None:
    prompts, negatives = ["a red star", "two blue rings"], ["a blue star", "rings"]
    requests = [
        request(prompt, negative=negative, true_guidance=2.0, guidance=4.0, seed=SEED + index, width=32, height=32)
        for index, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True))
    ]
    values: dict[str, Any] = {"true_cfg_scale": 2.0, "negative_prompt": negatives, "guidance_scale": 4.0}
    check(paint(tiny, requests), theirs(tiny, 2, prompt=prompts, num_frames=5, width=32, height=32, **values))


def test_a_text_that_is_too_long(tiny: HunyuanVideoPipeline) -> None:
    prompt = "two blue rings " * 100
    check(paint(tiny, [request(prompt)]), theirs(tiny, 1, prompt=prompt.strip(), num_frames=5))


def test_in_half_the_bits(tiny: HunyuanVideoPipeline) -> None:
    """In bfloat16 time and latents are rounded where diffusers rounds them."""
    half = tiny_pipeline(tile=32, stride=24)
    for part in (half.transformer, half.autoencoder, half.text.llama, half.text.clip):
        torch.nn.Module.to(part, torch.bfloat16)
    half = HunyuanVideoPipeline(
        transformer=half.transformer,
        autoencoder=half.autoencoder,
        text=half.text,
        scheduler=half.scheduler,
        defaults=half.defaults,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        name="half",
        digest="",
    )
    called = diffusers_pipeline(half)
    called.text_encoder.to(torch.bfloat16)
    called.text_encoder_2.to(torch.bfloat16)
    wanted = called(
        prompt="a red star",
        width=64,
        height=48,
        num_frames=5,
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(SEED)],
    ).frames[0]
    (video,) = paint(half, [request()]).videos
    assert [frame.tobytes() for frame in video] == [frame.tobytes() for frame in wanted]
