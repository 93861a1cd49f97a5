"""Stable Diffusion XL against diffusers' own pipelines with the same weights, in the same batches: every bit is equal.

Float32 on the CPU. Latents after each step and the finished pictures are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint import (
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image
from torch import Tensor

from gesso.errors import RequestError
from gesso.pipelines.sdxl import SdxlPipeline
from gesso.request import GenerationRequest
from gesso.sampling.noise_schedulers import FROM_NOISE_ALONE, NAMES
from tests.tiny_sdxl import diffusers_pipeline, tiny_pipeline

pytestmark = [  # of how some of diffusers' schedulers hand tensors to numpy
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
SEED = 7

# What the names mean to diffusers: class, and what stands over the model's own configuration.
MULTISTEP = "dpmsolver_multistep.DPMSolverMultistepScheduler"
SINGLE_STEP = "dpmsolver_singlestep.DPMSolverSinglestepScheduler"
KARRAS: dict[str, Any] = {"use_karras_sigmas": True}
SDE: dict[str, Any] = {"algorithm_type": "sde-dpmsolver++"}
SINGLE_SDE: dict[str, Any] = {**SDE, "lower_order_final": True}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("euler_discrete.EulerDiscreteScheduler", {}),
    "euler-karras": ("euler_discrete.EulerDiscreteScheduler", KARRAS),
    "euler-a": ("euler_ancestral_discrete.EulerAncestralDiscreteScheduler", {}),
    "heun": ("heun_discrete.HeunDiscreteScheduler", {}),
    "dpm++2m": (MULTISTEP, {}),
    "dpm++2m-karras": (MULTISTEP, KARRAS),
    "dpm++2m-sde": (MULTISTEP, SDE),
    "dpm++2m-sde-karras": (MULTISTEP, SDE | KARRAS),
    "dpm++sde": (SINGLE_STEP, SINGLE_SDE),
    "dpm++sde-karras": (SINGLE_STEP, SINGLE_SDE | KARRAS),
    "ddim": ("ddim.DDIMScheduler", {}),
    "ddpm": ("ddpm.DDPMScheduler", {}),
    "pndm": ("pndm.PNDMScheduler", {"skip_prk_steps": True}),
    "deis": ("deis_multistep.DEISMultistepScheduler", {}),
    "lms": ("lms_discrete.LMSDiscreteScheduler", {}),
    "lms-karras": ("lms_discrete.LMSDiscreteScheduler", KARRAS),
    "unipc": ("unipc_multistep.UniPCMultistepScheduler", {}),
    "lcm": ("lcm.LCMScheduler", {}),
}


class Painted(NamedTuple):
    """Latents `[B,C,h,w]` after every step, and the pictures."""

    steps: list[Tensor]
    pictures: list[Image.Image]


@pytest.fixture(scope="module")
def sdxl() -> SdxlPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A picture of other proportions than any that is painted, and a mask of another size again."""
    folder, chance = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    Image.fromarray(chance.integers(0, 256, (60, 100, 3), dtype=np.uint8)).save(folder / "given.png")
    mask = np.zeros((50, 70), dtype=np.uint8)
    mask[10:40, 20:60] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return {"init_image": str(folder / "given.png"), "mask": str(folder / "mask.png")}


def scheduler(name: str, pipeline: SdxlPipeline) -> Any:
    path, settings = THEIRS[name]
    module, kind = path.split(".")
    return getattr(import_module(f"diffusers.schedulers.scheduling_{module}"), kind).from_config(
        pipeline.scheduler, **settings
    )


def paint(pipeline: SdxlPipeline, requests: Sequence[GenerationRequest]) -> Painted:
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
        assert len({state.batch_key for state in states}) == 1
        pipeline.step(states)
        steps.append(torch.cat([state.latent_1Chw for state in states]))
    return Painted(steps, [output.image for output in pipeline.decode(states)])


def theirs(pipeline: SdxlPipeline, kind: Any, count: int, name: str = "euler", **values: Any) -> Painted:
    """The same from diffusers: one call, one generator a picture."""
    steps: list[Tensor] = []

    def keep(_pipeline: object, _index: int, _timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(tensors["latents"].clone())
        return tensors

    generators = [torch.Generator().manual_seed(SEED + index) for index in range(count)]
    called = diffusers_pipeline(kind, pipeline, scheduler(name, pipeline))
    usual = {"prompt": "a red star", "guidance_scale": 3.0, "num_inference_steps": 4}
    if kind is not StableDiffusionXLImg2ImgPipeline:  # which paints in the size of its picture
        usual |= {"width": 64, "height": 64}
    made = called(generator=generators, callback_on_step_end=keep, **{**usual, **values})
    return Painted(steps, made.images)


def check(ours: Painted, wanted: Painted) -> None:
    assert len(ours.steps) == len(wanted.steps) > 0
    for one, other in zip(ours.steps, wanted.steps, strict=True):
        assert torch.equal(one, other)
    assert len(ours.pictures) == len(wanted.pictures)
    for picture, other in zip(ours.pictures, wanted.pictures, strict=True):
        assert picture.tobytes() == other.tobytes()
    assert np.asarray(ours.pictures[0]).std() > 5  # a grey picture would prove little


def fitted(path: str) -> Image.Image:
    return Image.open(path).resize((64, 64), Image.Resampling.LANCZOS)


def request(prompt: str = "a red star", **values: Any) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": prompt, "seed": SEED, **values})


def test_every_name_is_compared() -> None:
    assert tuple(THEIRS) == NAMES


# ---- text to image --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_text_to_image_by_every_scheduler(sdxl: SdxlPipeline, name: str) -> None:
    fields: dict[str, Any] = {"scheduler": name, "steps": 5, "num_images": 2, "negative": "a ring"}
    values: dict[str, Any] = {"num_inference_steps": 5, "num_images_per_prompt": 2, "negative_prompt": "a ring"}
    check(paint(sdxl, [request(**fields)]), theirs(sdxl, StableDiffusionXLPipeline, 2, name, **values))


@pytest.mark.parametrize("name", ["euler", "euler-a", "dpm++2m-karras", "ddim", "unipc", "lcm"])
@pytest.mark.parametrize("ends_in_noise", [False, True])
def test_velocity(name: str, ends_in_noise: bool) -> None:
    pipeline = tiny_pipeline(
        prediction_type="v_prediction", rescale_betas_zero_snr=ends_in_noise, timestep_spacing="trailing"
    )
    check(paint(pipeline, [request(scheduler=name)]), theirs(pipeline, StableDiffusionXLPipeline, 1, name))


@pytest.mark.parametrize(("width", "height"), [(80, 48), (72, 88)])
def test_other_sizes(sdxl: SdxlPipeline, width: int, height: int) -> None:
    wanted = theirs(sdxl, StableDiffusionXLPipeline, 1, width=width, height=height)
    check(paint(sdxl, [request(width=width, height=height)]), wanted)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 7.5])
def test_guidance(sdxl: SdxlPipeline, guidance: float) -> None:
    wanted = theirs(sdxl, StableDiffusionXLPipeline, 1, guidance_scale=guidance)
    check(paint(sdxl, [request(guidance=guidance)]), wanted)


@pytest.mark.parametrize("zero_empty", [False, True])
def test_without_a_negative_prompt(zero_empty: bool) -> None:
    pipeline = tiny_pipeline(zero_empty=zero_empty)
    check(paint(pipeline, [request()]), theirs(pipeline, StableDiffusionXLPipeline, 1))


def test_fewer_layers_of_text(sdxl: SdxlPipeline) -> None:
    requests = [request(negative="a ring", clip_skip=1), request(negative="a ring")]
    ours = paint(sdxl, requests)
    wanted = theirs(sdxl, StableDiffusionXLPipeline, 1, negative_prompt="a ring", clip_skip=1)
    check(paint(sdxl, requests[:1]), wanted)
    assert ours.pictures[0].tobytes() != ours.pictures[1].tobytes()
    with pytest.raises(RequestError, match="clip_skip 2 is not from 0 to 1"):
        sdxl.plan(request(clip_skip=2))


def test_different_requests_in_one_batch(sdxl: SdxlPipeline) -> None:
    prompts, negatives = ["a red star", "two blue rings", "a ring"], ["a blue star", "a ring", "rings"]
    requests = [
        request(prompt, negative=negative, seed=SEED + index)
        for index, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True))
    ]
    wanted = theirs(sdxl, StableDiffusionXLPipeline, 3, prompt=prompts, negative_prompt=negatives)
    check(paint(sdxl, requests), wanted)


def test_a_text_that_is_too_long(sdxl: SdxlPipeline) -> None:
    prompt = ("two blue rings " * 30).strip()
    check(paint(sdxl, [request(prompt)]), theirs(sdxl, StableDiffusionXLPipeline, 1, prompt=prompt))


# ---- image to image, inpainting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FROM_NOISE_ALONE])
def test_image_to_image_by_every_scheduler(sdxl: SdxlPipeline, given: dict[str, str], name: str) -> None:
    fields = {"init_image": given["init_image"], "init_strength": 0.6, "steps": 6, "scheduler": name, "num_images": 2}
    picture = fitted(given["init_image"])
    values: dict[str, Any] = {"num_inference_steps": 6, "num_images_per_prompt": 2, "strength": 0.6}
    wanted = theirs(sdxl, StableDiffusionXLImg2ImgPipeline, 2, name, image=picture, **values)
    check(paint(sdxl, [request(**fields)]), wanted)


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_image_to_image_by_strength(sdxl: SdxlPipeline, given: dict[str, str], strength: float) -> None:
    picture = fitted(given["init_image"])
    wanted = theirs(sdxl, StableDiffusionXLImg2ImgPipeline, 1, image=picture, strength=strength)
    check(paint(sdxl, [request(init_image=given["init_image"], init_strength=strength)]), wanted)


@pytest.mark.parametrize("strength", [None, 0.6])
@pytest.mark.parametrize(
    ("name", "channels"),
    [("euler-a", 4), ("heun", 4), ("dpm++2m-sde-karras", 4), ("ddim", 4), ("pndm", 4), ("lcm", 4), ("euler-a", 9)],
)
def test_inpainting(given: dict[str, str], name: str, strength: float | None, channels: int) -> None:
    pipeline = tiny_pipeline(in_channels=channels)
    fields = given | {"scheduler": name, "num_images": 2, "negative": "a ring"}
    fields |= {} if strength is None else {"init_strength": strength}
    values: dict[str, Any] = {
        # One a picture, else all begin from a sample of the first one's.
        "image": [Image.open(given["init_image"]).convert("RGB")] * 2,
        "mask_image": [Image.open(given["mask"])] * 2,
        "strength": strength or 1.0,
        "num_images_per_prompt": 2,
        "negative_prompt": "a ring",
    }
    wanted = theirs(pipeline, StableDiffusionXLInpaintPipeline, 2, name, **values)
    check(paint(pipeline, [request(**fields)]), wanted)
