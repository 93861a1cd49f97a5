"""SDXL's refiner: bit for bit as diffusers' two pipelines one after the other; its company; what is refused.

Float32 on the CPU, latents after each evaluation and the finished pictures.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image
from torch import Tensor

from gesso.errors import RequestError
from gesso.pipelines.sdxl import SdxlPipeline
from gesso.pipelines.sdxl_refiner import RefinerNetwork
from gesso.pipelines.sdxl_state import SdxlState
from gesso.request import GenerationRequest
from tests.oracle import run_plainly
from tests.tiny_sdxl import diffusers_pipeline, diffusers_refiner, tiny_guest, tiny_pipeline, tiny_refiner

pytestmark = [  # of how some of diffusers' schedulers hand tensors to numpy
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
SEED, STEPS, PROMPT = 7, 6, "a red star"
SCHEDULERS = {
    "euler": "euler_discrete.EulerDiscreteScheduler",
    "euler-a": "euler_ancestral_discrete.EulerAncestralDiscreteScheduler",
    "ddim": "ddim.DDIMScheduler",
    "dpm++2m": "dpmsolver_multistep.DPMSolverMultistepScheduler",
}


def pair(*, zero_empty: bool = False, **values: Any) -> tuple[SdxlPipeline, RefinerNetwork]:
    network = tiny_refiner(zero_empty=zero_empty)
    return tiny_pipeline(refiner=tiny_guest(network), **values), network


@pytest.fixture(scope="module")
def refined() -> tuple[SdxlPipeline, RefinerNetwork]:
    return pair()


@pytest.fixture
def given(tmp_path: Path) -> dict[str, str]:
    """A picture, and a mask that is white at the left."""
    chance, mask = np.random.default_rng(0), np.zeros((64, 64), dtype=np.uint8)
    mask[:, :32] = 255
    Image.fromarray(chance.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return {"init_image": str(tmp_path / "a.png"), "mask": str(tmp_path / "mask.png")}


def request(prompt: str = PROMPT, **values: Any) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": prompt, "seed": SEED, "steps": STEPS, **values})


def begun(pipeline: SdxlPipeline, *requests: GenerationRequest) -> list[SdxlState]:
    plans = [pipeline.plan(each) for each in requests]
    made = zip(plans, pipeline.encode(plans), strict=True)
    return [pipeline.begin(plan, conditioning, 0) for plan, conditioning in made]


def latents(pipeline: SdxlPipeline, asked: GenerationRequest) -> tuple[list[Tensor], Image.Image]:
    """After each evaluation, and the picture."""
    (state,), found = begun(pipeline, asked), []
    while state.remaining:
        pipeline.step([state])
        found.append(state.latent_1Chw)
    (output,) = pipeline.decode([state])
    return found, output.image


def scheduler(name: str, config: Any) -> Any:
    module, kind = SCHEDULERS[name].split(".")
    return getattr(import_module(f"diffusers.schedulers.scheduling_{module}"), kind).from_config(dict(config))


def theirs(
    pipeline: SdxlPipeline,
    network: RefinerNetwork,
    first: dict[str, Any],
    second: dict[str, Any],
    name: str = "euler",
    **both: Any,
) -> tuple[list[Tensor], Image.Image]:
    """The model's latents into the refiner, by one generator, as diffusers has it."""
    steps: list[Tensor] = []

    def keep(_pipeline: object, _index: int, _timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(tensors["latents"].clone())
        return tensors

    both = {"prompt": PROMPT, "guidance_scale": 3.0, "callback_on_step_end": keep, **both}
    both["generator"] = torch.Generator().manual_seed(SEED)
    kind = StableDiffusionXLImg2ImgPipeline if "image" in first else StableDiffusionXLPipeline
    size = {} if "image" in first else {"width": 64, "height": 64}
    base = diffusers_pipeline(kind, pipeline, scheduler(name, pipeline.scheduler))
    latent = base(output_type="latent", num_inference_steps=STEPS, **size, **first, **both).images
    refiner = diffusers_refiner(pipeline, network, scheduler(name, network.scheduler))
    return steps, refiner(image=latent, **{"num_inference_steps": STEPS, **second}, **both).images[0]


def check(ours: tuple[list[Tensor], Image.Image], wanted: tuple[list[Tensor], Image.Image]) -> None:
    assert len(ours[0]) == len(wanted[0])
    for one, other in zip(ours[0], wanted[0], strict=True):
        assert torch.equal(one, other)
    assert ours[1].tobytes() == wanted[1].tobytes()
    assert np.asarray(ours[1]).std() > 5  # a grey picture would prove little


# ---- diffusers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("start", [0.8, 0.5])
def test_it_takes_over_what_noise_is_left(
    refined: tuple[SdxlPipeline, RefinerNetwork], name: str, start: float
) -> None:
    asked = request(scheduler=name, negative="a ring", refiner={"model": "any", "start": start})
    handed = {"denoising_end": start}, {"denoising_start": start}
    check(latents(refined[0], asked), theirs(*refined, *handed, name, negative_prompt="a ring"))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("strength", "steps"), [(0.3, None), (0.6, 10)])
def test_it_begins_anew_from_the_finished_latent(
    refined: tuple[SdxlPipeline, RefinerNetwork], name: str, strength: float, steps: int | None
) -> None:
    asked = request(scheduler=name, refiner={"model": "any", "strength": strength, "steps": steps})
    second = {"strength": strength, "num_inference_steps": steps or STEPS}
    ours, wanted = latents(refined[0], asked), theirs(*refined, {}, second, name)
    for steps_taken in (ours[0], wanted[0]):
        del steps_taken[STEPS - 1]  # ours has the new noise on it already
    check(ours, wanted)


@pytest.mark.parametrize("zero_empty", [False, True])
def test_of_an_empty_negative_each_has_its_own_idea(zero_empty: bool) -> None:
    pipeline, network = pair(zero_empty=zero_empty)
    handed = {"denoising_end": 0.5}, {"denoising_start": 0.5}
    check(latents(pipeline, request(refiner={"model": "any", "start": 0.5})), theirs(pipeline, network, *handed))


def test_without_guidance(refined: tuple[SdxlPipeline, RefinerNetwork]) -> None:
    handed = {"denoising_end": 0.8}, {"denoising_start": 0.8}
    check(latents(refined[0], request(guidance=1.0, refiner="any")), theirs(*refined, *handed, guidance_scale=1.0))


def test_from_a_picture(refined: tuple[SdxlPipeline, RefinerNetwork], given: dict[str, str]) -> None:
    asked = request(init_image=given["init_image"], init_strength=0.7, refiner="any")
    first = {"image": Image.open(given["init_image"]), "strength": 0.7, "denoising_end": 0.8}
    check(latents(refined[0], asked), theirs(*refined, first, {"denoising_start": 0.8}))


# ---- beside others --------------------------------------------------------------------------------------------------


def test_those_without_one_share_steps_until_it_comes(refined: tuple[SdxlPipeline, RefinerNetwork]) -> None:
    pipeline, asked = refined[0], [request(), request("a ring", refiner="any"), request("rings", refiner="any")]
    states = begun(pipeline, *asked)
    assert len({state.batch_key for state in states}) == 1
    shared = []
    while waiting := [state for state in states if state.remaining]:
        first = max(waiting, key=lambda state: state.remaining)
        together = [state for state in waiting if state.batch_key == first.batch_key]
        pipeline.step(together)
        shared.append(len(together))
        assert all(pipeline.preview(state).mode == "RGB" for state in together)
    assert shared == [3] * 4 + [1, 2] * 2
    for state, each in zip(states, asked, strict=True):
        (output,) = pipeline.decode([state])
        alone = np.asarray(run_plainly(pipeline, each)[0].image).astype(int)
        assert np.abs(np.asarray(output.image).astype(int) - alone).max() <= 1


@pytest.mark.parametrize("how", [{"start": 0.5}, {"strength": 0.5}])
def test_what_a_mask_keeps_stays(
    refined: tuple[SdxlPipeline, RefinerNetwork], given: dict[str, str], how: dict[str, float]
) -> None:
    asked = request(**given, refiner={"model": "any", **how})
    (state,) = begun(refined[0], asked)
    while state.remaining:
        refined[0].step([state])
    assert state.kept is not None
    assert torch.equal(state.latent_1Chw[..., 4:], state.kept.clean_1Chw[..., 4:])
    assert not torch.allclose(state.latent_1Chw[..., :4], state.kept.clean_1Chw[..., :4], atol=0.1)


def test_what_is_put_back_has_the_noise_of_what_is_around_it(
    refined: tuple[SdxlPipeline, RefinerNetwork], given: dict[str, str]
) -> None:
    (state,) = begun(refined[0], request(**given, refiner={"model": "any", "strength": 0.5}))
    noises = []
    while state.remaining > 1:
        refined[0].step([state])
        assert state.kept is not None
        sigma = float(state.leg.scheduler.sigmas[state.leg.skipped + state.index - state._passed])  # pyright: ignore
        noises.append(((state.latent_1Chw - state.kept.clean_1Chw) / sigma)[..., 4:])
    before, after = noises[: STEPS - 1], noises[STEPS - 1 :]
    assert len(after) == 3  # as new noise was laid on, and after two steps of the refiner
    for alike in (before, after):
        assert all(torch.allclose(alike[0], other, atol=1e-3) for other in alike)
    assert not torch.allclose(before[0], after[0], atol=0.1)


def test_heun_is_never_divided_within_a_step(refined: tuple[SdxlPipeline, RefinerNetwork]) -> None:
    (state,) = begun(refined[0], request(scheduler="heun", refiner={"model": "any", "start": 0.5}))
    own, left = (leg.timesteps_N.tolist() for leg in state.legs)
    assert [*own, *left] == state.legs[0].scheduler.timesteps.tolist()
    assert len(own) % 2 == 0 and own[-1] == left[0]  # the next step begins where the last one looked


# ---- plans ----------------------------------------------------------------------------------------------------------


def test_a_plan_counts_both(refined: tuple[SdxlPipeline, RefinerNetwork]) -> None:
    plain, plan = (refined[0].plan(request(**fields)) for fields in ({}, {"refiner": "any"}))
    assert plan.request.refiner is not None and plan.request.refiner.start == 0.8
    assert refined[0].plan(plan.request) == plan
    weights = sum(value.nbytes for value in refined[1].unet.parameters())
    assert (plan.steps, plan.guests, plain.guests) == (6, ("refiner",), ())
    assert plan.peak_bytes >= plain.peak_bytes + weights
    assert plan.cost != plain.cost
    again = refined[0].plan(request(refiner={"model": "any", "strength": 0.5, "steps": 8}))
    assert again.steps == 6 + 4 and again.cost.flops > plain.cost.flops
    with pytest.raises(RequestError, match="needs 10 values here"):
        refined[0].plan(request(refiner={"model": "any", "strength": 0.5, "steps": 8}, guidance=(1,) * 6))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"refiner": {"model": "any", "start": 0}}, "refiner.start 0.0 is not high enough to leave the model one of 6"),
        ({"refiner": {"model": "any", "start": 1}}, "refiner.start 1.0 is not low enough to leave one of 6 steps"),
        ({"refiner": {"model": "any", "strength": 0.1}}, "refiner.strength 0.1 is not enough to leave one of 6 steps"),
        ({"refiner": {"model": "any", "strength": 0.5, "steps": 1000}}, "refiner.steps 1000 is not at most 999"),
        ({"refiner": "any", "steps": 1000}, "steps 1000 is not at most 999"),
        ({"refiner": "any", "scheduler": "lms"}, "scheduler lms is not one that can begin part of the way"),
    ],
)
def test_what_leaves_nothing_to_do(
    refined: tuple[SdxlPipeline, RefinerNetwork], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        refined[0].plan(request(**fields))
    assert str(caught.value).replace('"', "").startswith(words)


def test_other_noise_is_not_taken_over() -> None:
    """A model that ends in pure noise has other steps than the refiner knows; it may still begin anew."""
    pipeline, _ = pair(prediction_type="v_prediction", timestep_spacing="trailing")
    with pytest.raises(RequestError, match=r"refiner\.start 0\.8 .*timestep_spacing is trailing and not leading"):
        pipeline.plan(request(refiner="any"))
    assert run_plainly(pipeline, request(refiner={"model": "any", "strength": 0.5}))[0].image.size == (64, 64)


def test_what_was_made_for_inpainting_has_none(given: dict[str, str]) -> None:
    pipeline = tiny_pipeline(in_channels=9, refiner=tiny_guest())
    with pytest.raises(RequestError, match='refiner "any" is not usable with tiny-sdxl; it knows nothing of the mask'):
        pipeline.plan(request(**given, refiner="any"))
