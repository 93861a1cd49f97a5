"""What Qwen-Image makes of a request: blanks, bounds, warnings and costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gesso.errors import FileError, RequestError
from gesso.pipelines.qwen_image import QwenImagePipeline
from gesso.request import GenerationRequest
from tests.tiny_qwen_image import STATIC, tiny_pipeline, tiny_text

UNUSED = {"true_guidance": 2.0, "temperature": 1.0, "top_k": 3, "top_p": 0.9, "guidance_layer": -1}
UNUSED |= {"guidance_truncation": 0.5, "guidance_normalization": 1.0, "frames": 5, "fps": 8.0}
UNUSED |= {"refiner": "sdxl-refiner", "revisions": 2}


@pytest.fixture(scope="module")
def pipeline() -> QwenImagePipeline:
    return tiny_pipeline()


@pytest.fixture
def square(tmp_path: Path) -> str:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def request(prompt: str = "a red star", **values: Any) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": prompt, "seed": 7, **values})


def refused(pipeline: QwenImagePipeline, field: str, **values: Any) -> str:
    with pytest.raises(RequestError) as caught:
        pipeline.plan(request(**values))
    assert caught.value.field == field
    return str(caught.value)


def test_blanks(pipeline: QwenImagePipeline, square: str) -> None:
    plan = pipeline.plan(GenerationRequest(prompt="a star"))
    filled = plan.request
    assert filled.seed is not None
    assert (filled.width, filled.height, filled.steps, filled.scheduler) == (64, 64, 4, "euler")
    assert (filled.guidance, filled.init_strength, plan.steps, plan.warnings) == (4.0, None, 4, ())
    started = pipeline.plan(request(init_image=square, steps=10))
    assert (started.request.init_strength, started.steps) == (0.6, 6)


@pytest.mark.parametrize("values", [{}, {"guidance": 1.0}, {"guidance": (1, 2, 3, 4)}, {"scheduler": "unipc"}])
def test_a_filled_plan_is_its_own_plan(pipeline: QwenImagePipeline, values: dict[str, Any]) -> None:
    plan = pipeline.plan(request(**values))
    assert pipeline.plan(plan.request) == plan


# ---- bounds ---------------------------------------------------------------------------------------------------------


def test_sizes_name_the_nearest(pipeline: QwenImagePipeline) -> None:
    text = refused(pipeline, "width", width=1000)
    assert text == "width 1000 is not a multiple of 16 for tiny-qwen-image; nearest: 992 or 1008"
    assert refused(pipeline, "width", width=8).endswith("nearest: 16")
    assert refused(pipeline, "height", height=9999) == (
        "height 9999 is not at most 4096 for tiny-qwen-image; nearest: 4096"
    )
    assert pipeline.plan(request(width=16, height=4096)).request.height == 4096


def test_schedulers(pipeline: QwenImagePipeline, square: str) -> None:
    assert refused(pipeline, "scheduler", scheduler="ddim").endswith(
        "is not a scheduler that is known; one of: euler, euler-stochastic, unipc"
    )
    for name in ("heun", "dpm++"):  # they know nothing of a schedule that is stretched
        text = refused(pipeline, "scheduler", scheduler=name)
        assert text.startswith(f'scheduler "{name}" is not one that ends where this model\'s does; one of: euler, ')
    text = refused(pipeline, "scheduler", scheduler="unipc", init_image=square)
    assert text.endswith("is not one that begins from a picture; one of: euler, euler-stochastic")
    assert tiny_pipeline(scheduler=STATIC).plan(request(scheduler="heun")).steps == 7


def test_a_single_step_cannot_be_stretched(pipeline: QwenImagePipeline) -> None:
    text = refused(pipeline, "steps", steps=1)
    assert text == "steps 1 is not at least 2 for a model whose schedule ends above 0; nearest: 2"
    assert tiny_pipeline(scheduler=STATIC).plan(request(steps=1)).steps == 1


def test_a_list_needs_one_value_an_evaluation(pipeline: QwenImagePipeline) -> None:
    assert pipeline.plan(request(guidance=(1, 2, 3, 4))).warnings == ()
    assert "needs 4 values" in refused(pipeline, "guidance", guidance=(1, 2))


def test_a_given_picture(pipeline: QwenImagePipeline, square: str, tmp_path: Path) -> None:
    text = refused(pipeline, "init_strength", init_image=square, init_strength=0.0)
    assert text == "init_strength 0.0 is not enough to leave one of 4 steps; raise it"
    (warning,) = pipeline.plan(request(init_image=square, width=128)).warnings
    assert warning == "init_image is 64x64 and is stretched to 128x64; crop it to keep its proportions"
    with pytest.raises(FileError, match="no such file"):
        pipeline.plan(request(init_image=str(tmp_path / "absent.png")))


def test_an_identity_is_flux_own(pipeline: QwenImagePipeline) -> None:
    text = refused(pipeline, "identity", identity="face.png")
    way_out = "leave it out, or take flux-dev or infinite-you-nano"
    assert text == f'identity "face.png" is not usable with tiny-qwen-image; {way_out}'


# ---- warnings -------------------------------------------------------------------------------------------------------


def test_what_is_too_long_is_quoted() -> None:
    """Five of the twenty tokens are the template's after the prompt; they are cut off before the prompt is."""
    pipeline = tiny_pipeline(text=tiny_text(20))
    assert pipeline.plan(request(" ".join(["star"] * 20))).warnings == ()
    (warning,) = pipeline.plan(request(" ".join(["star"] * 20) + " two rings")).warnings
    assert warning == 'prompt is longer than the 20 tokens that tiny-qwen-image reads; cut off: "two rings"'


def test_fields_without_effect(pipeline: QwenImagePipeline) -> None:
    warnings = pipeline.plan(request(**UNUSED)).warnings
    assert sorted(warnings) == sorted(f"tiny-qwen-image has no use for {field}" for field in UNUSED)


def test_guidance_that_does_nothing(pipeline: QwenImagePipeline) -> None:
    assert pipeline.plan(request(negative="a ring")).warnings == ()
    for value in (0, 1):
        (warning,) = pipeline.plan(request(negative="a ring", guidance=value)).warnings
        assert warning == "negative has no effect unless guidance is above 1"
        assert pipeline.plan(request(guidance=value)).warnings == ()
    (warning,) = pipeline.plan(request(guidance=0.5)).warnings
    assert warning == "guidance has no effect unless it is above 1"


# ---- costs ----------------------------------------------------------------------------------------------------------


def test_cost_follows_the_work(pipeline: QwenImagePipeline, square: str) -> None:
    def flops(**values: Any) -> float:
        return pipeline.plan(request(**values)).cost.flops

    step = flops(steps=3) - flops(steps=2)
    assert flops(steps=9) == pytest.approx(flops(steps=2) + 7 * step)
    assert flops(steps=2, guidance=1.0) < flops(steps=2) - 0.9 * step
    assert flops(steps=2, negative="a blue star on two rings") > flops(steps=2)
    assert flops(steps=2, width=128) > 1.5 * flops(steps=2)
    assert flops(steps=4, init_image=square, init_strength=0.5) > flops(steps=2)


def test_peak_holds_the_weights(pipeline: QwenImagePipeline) -> None:
    parts = (pipeline.transformer, pipeline.autoencoder, pipeline.text.network)
    weights = sum(parameter.nbytes for part in parts for parameter in part.parameters())
    small, large = pipeline.plan(request()).peak_bytes, pipeline.plan(request(width=512, height=512)).peak_bytes
    assert weights < small < large


def test_it_plans_without_weights(pipeline: QwenImagePipeline) -> None:
    empty = tiny_pipeline()
    for part in (empty.transformer, empty.autoencoder, empty.text.network):
        torch.nn.Module.to(part, "meta")
    for values in ({}, {"negative": "a ring"}, {"scheduler": "unipc"}):
        assert empty.plan(request(**values)) == pipeline.plan(request(**values))
