"""What Stable Diffusion XL makes of a request: blanks, bounds, warnings, pictures and masks; and its company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gesso.errors import FileError, RequestError
from gesso.pipelines.sdxl import SdxlPipeline
from gesso.request import GenerationRequest
from gesso.sampling.noise_schedulers import NAMES
from tests.oracle import run_plainly
from tests.tiny_sdxl import tiny_pipeline


@pytest.fixture(scope="module")
def sdxl() -> SdxlPipeline:
    return tiny_pipeline()


@pytest.fixture
def given(tmp_path: Path) -> dict[str, str]:
    """A picture, and a mask that is white at the left."""
    pixels = np.zeros((64, 64), dtype=np.uint8)
    pixels[:, :32] = 255
    Image.new("RGB", (64, 64), "orange").save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    return {"init_image": str(tmp_path / "a.png"), "mask": str(tmp_path / "mask.png")}


def request(prompt: str = "a red star", **values: Any) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": prompt, "seed": 7, **values})


def refused(pipeline: SdxlPipeline, field: str, **values: Any) -> str:
    with pytest.raises(RequestError) as caught:
        pipeline.plan(request(**values))
    assert caught.value.field == field
    return str(caught.value)


# ---- blanks and bounds ----------------------------------------------------------------------------------------------


def test_blanks(sdxl: SdxlPipeline, given: dict[str, str]) -> None:
    plan = sdxl.plan(GenerationRequest(prompt="a star"))
    filled = plan.request
    assert (filled.width, filled.height, filled.steps, filled.guidance, filled.scheduler) == (64, 64, 4, 3.0, "euler")
    assert (filled.init_strength, plan.steps, plan.warnings) == (None, 4, ())
    picture = given["init_image"]
    assert sdxl.plan(request(init_image=picture, steps=10)).request.init_strength == 0.6
    masked = sdxl.plan(request(**given, steps=10))
    assert (masked.request.init_strength, masked.steps, masked.warnings) == (1.0, 10, ())
    assert sdxl.plan(masked.request) == masked


def test_steps_are_evaluations(sdxl: SdxlPipeline, given: dict[str, str]) -> None:
    counts = {name: sdxl.plan(request(scheduler=name, steps=6)).steps for name in NAMES}
    assert {name: count for name, count in counts.items() if count != 6} == {"heun": 11, "pndm": 7}
    picture = given["init_image"]
    assert sdxl.plan(request(init_image=picture, init_strength=0.5, steps=6, scheduler="heun")).steps == 5
    assert sdxl.plan(request(steps=1, scheduler="heun")).steps == 1


def test_sizes_name_the_nearest(sdxl: SdxlPipeline) -> None:
    assert "nearest: 4096" in refused(sdxl, "width", width=9999)
    assert "width 1001 is not a multiple of 8 for tiny-sdxl; nearest: 1000 or 1008" in refused(
        sdxl, "width", width=1001
    )
    assert refused(sdxl, "height", height=9).endswith("nearest: 8 or 16")


def test_schedulers_and_steps(sdxl: SdxlPipeline, given: dict[str, str]) -> None:
    assert refused(sdxl, "scheduler", scheduler="Euler a").endswith(f"one of: {', '.join(NAMES)}")
    assert "at most 50 for the scheduler lcm; nearest: 50" in refused(sdxl, "steps", scheduler="lcm", steps=51)
    assert "at most 999" in refused(sdxl, "steps", scheduler="ddim", steps=1000)
    begun = {"init_image": given["init_image"], "init_strength": 0.6}
    assert "not one that can begin part of the way; one of: euler" in refused(
        sdxl, "scheduler", scheduler="lms", **begun
    )
    assert sdxl.plan(request(scheduler="lms", **given)).steps == 4  # all of them, under a mask
    with pytest.raises(RequestError, match="steps 0 is not"):
        request(steps=0)
    ends_in_noise = tiny_pipeline(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert "one of: euler, euler-karras, euler-a" in refused(ends_in_noise, "scheduler", scheduler="heun")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_every_scheduler_takes_few_steps_and_many(sdxl: SdxlPipeline, name: str, steps: int) -> None:
    if steps < 50:
        assert run_plainly(sdxl, request(scheduler=name, steps=steps, width=32, height=32))[0].image.size == (32, 32)
    else:
        assert sdxl.plan(request(scheduler=name, steps=steps)).steps >= 50


def test_a_list_needs_one_value_an_evaluation(sdxl: SdxlPipeline) -> None:
    assert sdxl.plan(request(guidance=(1, 2, 3, 4))).warnings == ()
    assert "needs 4 values" in refused(sdxl, "guidance", guidance=(1, 2))
    some, none = (run_plainly(sdxl, request(guidance=scales))[0].image for scales in ((1, 5, 5, 1), (1, 1, 1, 1)))
    assert some.tobytes() != none.tobytes()


def test_a_strength_that_leaves_no_step(sdxl: SdxlPipeline, given: dict[str, str]) -> None:
    text = refused(sdxl, "init_strength", init_image=given["init_image"], init_strength=0.2)
    assert text == "init_strength 0.2 is not enough to leave one of 4 steps; raise it"


# ---- warnings -------------------------------------------------------------------------------------------------------


def test_what_is_too_long_is_quoted(sdxl: SdxlPipeline) -> None:
    """Seventy-seven tokens, two marks among them."""
    short = " ".join(["star"] * 75)
    assert sdxl.plan(request(short)).warnings == ()
    (warning,) = sdxl.plan(request(f"{short} two rings")).warnings
    assert warning == 'prompt is longer than the 77 tokens that tiny-sdxl reads; cut off: "two rings"'


def test_what_has_no_effect(sdxl: SdxlPipeline) -> None:
    fields = {"true_guidance": 2.0, "temperature": 1.0, "top_k": 3, "guidance_layer": -1, "frames": 5}
    assert sorted(sdxl.plan(request(**fields)).warnings) == sorted(
        f"tiny-sdxl has no use for {name}" for name in fields
    )
    (warning,) = sdxl.plan(request(guidance=1.0, negative="a ring")).warnings
    assert warning == "negative has no effect unless guidance is above 1"
    (warning,) = sdxl.plan(request(width=512, height=512)).warnings
    assert "trained on pictures of about as many pixels as 64x64" in warning


def test_pictures_of_other_proportions(sdxl: SdxlPipeline, given: dict[str, str]) -> None:
    first, second = sdxl.plan(request(**given, width=72)).warnings
    assert first == "init_image is 64x64 and is stretched to 72x64; crop it to keep its proportions"
    assert second == "mask is 64x64 and is stretched to 72x64; it should be as the picture is"


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_a_mask_needs_a_picture(given: dict[str, str]) -> None:
    with pytest.raises(RequestError, match=r"mask .* is not usable alone; name the picture with init_image"):
        request(mask=given["mask"])


def test_a_mask_that_is_none(sdxl: SdxlPipeline, given: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"mask .*absent\.png: no such file"):
        sdxl.plan(request(init_image=given["init_image"], mask=str(tmp_path / "absent.png")))
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    plan = sdxl.plan(request(init_image=given["init_image"], mask=str(tmp_path / "black.png")))
    assert plan.warnings == ("mask has no white in it: nothing is painted anew",)


def test_a_mask_that_is_white_everywhere(sdxl: SdxlPipeline, given: dict[str, str], tmp_path: Path) -> None:
    Image.new("L", (64, 64), "white").save(tmp_path / "white.png")
    plan = sdxl.plan(request(init_image=given["init_image"], mask=str(tmp_path / "white.png")))
    assert plan.warnings == ("mask is white everywhere: all of init_image is painted anew",)


def test_white_strokes_on_nothing(sdxl: SdxlPipeline, given: dict[str, str], tmp_path: Path) -> None:
    """What programs to draw in export: what is transparent stays, as if it were black."""
    strokes = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    strokes.paste((255, 255, 255, 255), (0, 0, 32, 64))
    strokes.save(tmp_path / "strokes.png")
    drawn = request(init_image=given["init_image"], mask=str(tmp_path / "strokes.png"))
    assert sdxl.plan(drawn).warnings == ()
    made, expected = (run_plainly(sdxl, each)[0].image for each in (drawn, request(**given)))
    assert made.tobytes() == expected.tobytes()


def test_only_what_is_white_is_painted_anew(sdxl: SdxlPipeline, given: dict[str, str]) -> None:
    one, other = (np.asarray(run_plainly(sdxl, request(**given, seed=seed))[0].image).astype(int) for seed in range(2))
    left, right = np.abs(one - other)[:, :24].mean(), np.abs(one - other)[:, 40:].mean()
    assert left > 4 * right


def test_a_mask_of_another_size_is_stretched(sdxl: SdxlPipeline, given: dict[str, str], tmp_path: Path) -> None:
    expected = run_plainly(sdxl, request(**given))[0].image
    Image.open(given["mask"]).resize((32, 32), Image.Resampling.NEAREST).save(tmp_path / "small.png")
    made = run_plainly(sdxl, request(init_image=given["init_image"], mask=str(tmp_path / "small.png")))[0].image
    assert made.tobytes() == expected.tobytes()


def test_what_was_made_for_inpainting_paints_nothing_else(given: dict[str, str]) -> None:
    pipeline = tiny_pipeline(in_channels=9)
    hint = "give init_image and mask: it was made to paint over parts of a picture"
    assert refused(pipeline, "mask").endswith(hint)
    assert refused(pipeline, "mask", init_image=given["init_image"]).endswith(hint)
    assert pipeline.plan(request(**given)).warnings == ()


# ---- company and previews -------------------------------------------------------------------------------------------


def test_any_schedulers_and_pictures_share_a_step(sdxl: SdxlPipeline, given: dict[str, str]) -> None:
    """Noise comes from each picture's own generator, so that company does not matter beyond the last bits."""
    requests = [
        request("a star", scheduler="euler-a", steps=6),
        request("two rings", scheduler="dpm++2m-sde-karras", seed=8),
        request("a ring", scheduler="dpm++sde", seed=9, **given),
        request("a blue ring", scheduler="lcm", seed=10, init_image=given["init_image"], init_strength=0.9),
    ]
    plans = [sdxl.plan(each) for each in requests]
    states = [sdxl.begin(plan, made, 0) for plan, made in zip(plans, sdxl.encode(plans), strict=True)]
    assert len({state.batch_key for state in states}) == 1
    while waiting := [state for state in states if state.remaining]:
        sdxl.step(waiting)
        for state in waiting:
            assert sdxl.preview(state).mode == "RGB"
    for state, each in zip(states, requests, strict=True):
        (output,) = sdxl.decode([state])
        alone = run_plainly(sdxl, each)[0].image
        assert np.abs(np.asarray(output.image).astype(int) - np.asarray(alone).astype(int)).max() <= 1


@pytest.mark.parametrize("name", ["euler", "ddim", "dpm++2m", "heun"])
def test_a_preview_comes_to_what_is_painted(sdxl: SdxlPipeline, name: str) -> None:
    """The estimate of the last evaluation is the latent that these solvers end in, or nearly."""
    plan = sdxl.plan(request(scheduler=name, steps=8))
    state = sdxl.begin(plan, sdxl.encode([plan])[0], 0)
    for _ in range(plan.steps - 1):
        sdxl.step([state])
    before = state.clean()
    sdxl.step([state])
    assert (before - state.latent_1Chw).norm() < 0.2 * state.latent_1Chw.norm()
