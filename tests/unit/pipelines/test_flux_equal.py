"""FLUX against diffusers' own pipelines with the same weights, in the same batches: every bit of every step is equal.

Float32 on the CPU. Latents after each step and the finished pictures are compared; tokens are 20 a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux, pipeline_flux_img2img
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from PIL import Image
from torch import Tensor

from gesso.pipelines.flux import FluxPipeline
from gesso.pipelines.flux_state import FluxDefaults
from gesso.request import GenerationRequest
from tests.tiny_flux import DEFAULTS, DYNAMIC, LENGTH, STATIC, diffusers_pipeline, tiny_pipeline

TEXT_TO_IMAGE, IMAGE_TO_IMAGE = pipeline_flux.FluxPipeline, pipeline_flux_img2img.FluxImg2ImgPipeline
SEED = 7
SIZES = [(64, 64), (80, 48)]


class Painted(NamedTuple):
    """Tokens `[B,L,D]` after every step, and the pictures."""

    steps: list[Tensor]
    pictures: list[Image.Image]


@pytest.fixture(scope="module")
def dev() -> FluxPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def schnell() -> FluxPipeline:
    defaults = FluxDefaults(width=64, height=64, steps=4, guidance=0.0, distilled=True)
    return tiny_pipeline(defaults, guidance_embeds=False, scheduler=STATIC)


@pytest.fixture(scope="module")
def given_picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of other proportions than any that is painted."""
    path = tmp_path_factory.mktemp("pictures") / "given.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def paint(pipeline: FluxPipeline, requests: Sequence[GenerationRequest]) -> Painted:
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


def theirs(pipeline: FluxPipeline, kind: Any, count: int, scheduler: Any = None, **values: Any) -> Painted:
    """The same from diffusers: one call, one generator a picture."""
    steps: list[Tensor] = []

    def keep(_pipeline: object, _index: int, _timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(tensors["latents"].clone())
        return tensors

    generators = [torch.Generator().manual_seed(SEED + index) for index in range(count)]
    called = diffusers_pipeline(kind, pipeline, scheduler)
    made = called(generator=generators, max_sequence_length=LENGTH, callback_on_step_end=keep, **values)
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


def guided(on: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """True guidance in a request's fields, and as diffusers' arguments."""
    if not on:
        return {}, {}
    return {"true_guidance": 2.5, "negative": "a ring"}, {"true_cfg_scale": 2.5, "negative_prompt": "a ring"}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("on", [False, True], ids=["", "guided"])
def test_text_to_image(dev: FluxPipeline, size: tuple[int, int], on: bool, count: int) -> None:
    fields, values = guided(on)
    width, height = size
    ours = paint(dev, [request(width=width, height=height, num_images=count, guidance=3.0, **fields)])
    wanted = theirs(
        dev,
        TEXT_TO_IMAGE,
        count,
        prompt="a red star",
        width=width,
        height=height,
        num_inference_steps=4,
        num_images_per_prompt=count,
        guidance_scale=3.0,
        **values,
    )
    check(ours, wanted)


@pytest.mark.parametrize("on", [False, True], ids=["", "guided"])
def test_text_to_image_without_guidance_embedding(schnell: FluxPipeline, on: bool) -> None:
    fields, values = guided(on)
    ours = paint(schnell, [request(num_images=2, **fields)])
    values |= {"num_images_per_prompt": 2, "num_inference_steps": 4}
    check(ours, theirs(schnell, TEXT_TO_IMAGE, 2, prompt="a red star", width=64, height=64, **values))


def test_guidance_that_is_nanos_own_is_their_true_guidance() -> None:
    nano = tiny_pipeline(DEFAULTS, guidance_embeds=False, scheduler={"shift": 2.0})
    ours = paint(nano, [request(guidance=3.0)])
    values: dict[str, Any] = {"true_cfg_scale": 3.0, "negative_prompt": "", "num_inference_steps": 4}
    check(ours, theirs(nano, TEXT_TO_IMAGE, 1, prompt="a red star", width=64, height=64, **values))


def test_different_requests_in_one_batch(dev: FluxPipeline) -> None:
    prompts, negatives = ["a red star", "two blue rings", "a ring"], ["a blue star", "a ring", "rings"]
    requests = [
        request(prompt, negative=negative, true_guidance=2.0, guidance=4.0, seed=SEED + index)
        for index, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True))
    ]
    values = {"true_cfg_scale": 2.0, "negative_prompt": negatives, "guidance_scale": 4.0, "num_inference_steps": 4}
    check(paint(dev, requests), theirs(dev, TEXT_TO_IMAGE, 3, prompt=prompts, width=64, height=64, **values))


@pytest.mark.parametrize("steps", [1, 7])
def test_other_numbers_of_steps(dev: FluxPipeline, steps: int) -> None:
    wanted = theirs(dev, TEXT_TO_IMAGE, 1, prompt="a red star", width=64, height=64, num_inference_steps=steps)
    check(paint(dev, [request(steps=steps)]), wanted)


def test_a_text_that_is_too_long(dev: FluxPipeline) -> None:
    prompt = "two blue rings " * 30
    wanted = theirs(dev, TEXT_TO_IMAGE, 1, prompt=prompt.strip(), width=64, height=64, num_inference_steps=4)
    check(paint(dev, [request(prompt)]), wanted)


# ---- image to image -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("strength", "on"), [(0.6, False), (0.6, True), (1.0, False), (0.2, False)])
def test_image_to_image(
    dev: FluxPipeline, given_picture: Path, size: tuple[int, int], strength: float, on: bool
) -> None:
    fields, values = guided(on)
    width, height = size
    fields |= {"init_image": str(given_picture), "init_strength": strength}
    ours = paint(dev, [request(width=width, height=height, num_images=2, **fields)])
    wanted = theirs(
        dev,
        IMAGE_TO_IMAGE,
        2,
        prompt="a red star",
        image=[Image.open(given_picture)] * 2,  # one a picture, else all begin from a sample of the first one's
        strength=strength,
        width=width,
        height=height,
        num_inference_steps=4,
        num_images_per_prompt=2,
        guidance_scale=3.5,
        **values,
    )
    check(ours, wanted)


# ---- schedulers -----------------------------------------------------------------------------------------------------


def without(*names: str) -> Any:
    """diffusers' `retrieve_timesteps`, less the arguments that a scheduler does not take."""
    retrieve = pipeline_flux.retrieve_timesteps

    def called(*given: Any, **values: Any) -> Any:
        return retrieve(*given, **{name: value for name, value in values.items() if name not in names})

    return called


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_multistep_schedulers(dev: FluxPipeline, name: str, steps: int) -> None:
    kind = UniPCMultistepScheduler if name == "unipc" else DPMSolverMultistepScheduler
    scheduler: Any = kind(use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True)
    fields, values = guided(True)
    ours = paint(dev, [request(scheduler=name, steps=steps, num_images=2, **fields)])
    values |= {"num_images_per_prompt": 2, "num_inference_steps": steps}
    check(ours, theirs(dev, TEXT_TO_IMAGE, 2, scheduler, prompt="a red star", width=64, height=64, **values))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_multistep_schedulers_with_a_constant_shift(
    monkeypatch: pytest.MonkeyPatch, name: str, schnell: FluxPipeline
) -> None:
    kind = UniPCMultistepScheduler if name == "unipc" else DPMSolverMultistepScheduler
    pipeline = tiny_pipeline(schnell.defaults, guidance_embeds=False, scheduler={"shift": 2.0})
    scheduler: Any = kind(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0)
    monkeypatch.setattr(pipeline_flux, "retrieve_timesteps", without("mu"))
    ours = paint(pipeline, [request(scheduler=name)])
    values = {"width": 64, "height": 64, "num_inference_steps": 4}
    check(ours, theirs(pipeline, TEXT_TO_IMAGE, 1, scheduler, prompt="a red star", **values))


@pytest.mark.parametrize("config", [DYNAMIC, {"shift": 3.0}], ids=["dynamic", "constant"])
@pytest.mark.parametrize("strength", [None, 0.6])
def test_heun(
    monkeypatch: pytest.MonkeyPatch, given_picture: Path, config: dict[str, Any], strength: float | None
) -> None:
    """diffusers' loop hands Heun's scheduler more than it takes; less that, it runs it."""
    pipeline = tiny_pipeline(scheduler=config)
    mu = pipeline_flux.calculate_shift(16)
    shift = float(np.exp(mu)) if "use_dynamic_shifting" in config else 3.0
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    values: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 5, "num_images_per_prompt": 2}
    fields: dict[str, Any] = {"num_images": 2, "scheduler": "heun", "steps": 5}
    kind: Any = TEXT_TO_IMAGE
    if strength is not None:
        kind = IMAGE_TO_IMAGE
        values |= {"image": [Image.open(given_picture)] * 2, "strength": strength, "guidance_scale": 3.5}
        fields |= {"init_image": str(given_picture), "init_strength": strength}
    for module in (pipeline_flux, pipeline_flux_img2img):
        monkeypatch.setattr(module, "retrieve_timesteps", without("mu", "sigmas"))
    ours = paint(pipeline, [request(**fields)])
    assert len(ours.steps) == (9 if strength is None else 5)
    check(ours, theirs(pipeline, kind, 2, scheduler, prompt="a red star", **values))
