"""What FLUX makes of a request: blanks, bounds, warnings and costs, for dev, schnell and a network of neither kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gesso.errors import FileError, RequestError
from gesso.pipelines.flux import FluxPipeline
from gesso.pipelines.flux_state import FluxDefaults
from gesso.request import GenerationRequest
from tests.tiny_flux import DEFAULTS, STATIC, tiny_pipeline

VARIANTS: list[dict[str, Any]] = [
    {},
    {"guidance": 2.0},
    {"true_guidance": 2.0, "guidance": 4.0},
    {"guidance": (1, 2, 3, 4)},
]
UNUSED = {"temperature": 1.0, "top_k": 3, "top_p": 0.9, "guidance_layer": -1, "guidance_truncation": 0.5}
UNUSED |= {"refiner": "sdxl-refiner", "revisions": 2}


@pytest.fixture(scope="module")
def dev() -> FluxPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def schnell() -> FluxPipeline:
    defaults = FluxDefaults(width=64, height=64, steps=4, guidance=0.0, distilled=True)
    return tiny_pipeline(defaults, guidance_embeds=False, scheduler=STATIC)


@pytest.fixture(scope="module")
def nano() -> FluxPipeline:
    defaults = FluxDefaults(width=64, height=64, steps=4, guidance=3.0, sizes=((64, 64), (96, 64)))
    return tiny_pipeline(defaults, guidance_embeds=False, scheduler=STATIC)


def request(prompt: str = "a red star", **values: Any) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": prompt, "seed": 7, **values})


def refused(pipeline: FluxPipeline, field: str, **values: Any) -> str:
    with pytest.raises(RequestError) as caught:
        pipeline.plan(request(**values))
    assert caught.value.field == field
    return str(caught.value)


# ---- blanks ---------------------------------------------------------------------------------------------------------


def test_blanks_of_each_kind(dev: FluxPipeline, schnell: FluxPipeline, nano: FluxPipeline) -> None:
    for pipeline, guidance, true_guidance in ((dev, 3.5, 1.0), (schnell, 0.0, 1.0), (nano, 3.0, 3.0)):
        plan = pipeline.plan(GenerationRequest(prompt="a star"))
        filled = plan.request
        assert filled.seed is not None
        assert (filled.width, filled.height, filled.steps, filled.scheduler) == (64, 64, 4, "euler")
        assert (filled.guidance, filled.true_guidance, filled.init_strength) == (guidance, true_guidance, None)
        assert (plan.steps, plan.warnings) == (4, ())


def test_a_filled_plan_is_its_own_plan(dev: FluxPipeline, schnell: FluxPipeline, nano: FluxPipeline) -> None:
    for pipeline in (dev, schnell, nano):
        for values in VARIANTS:
            plan = pipeline.plan(request(**values))
            assert pipeline.plan(plan.request) == plan


def test_strength_is_filled_only_beside_a_picture(dev: FluxPipeline, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    plan = dev.plan(request(init_image=str(tmp_path / "a.png"), steps=10))
    assert (plan.request.init_strength, plan.steps) == (0.6, 6)


def test_steps_are_evaluations(dev: FluxPipeline) -> None:
    assert dev.plan(request(steps=3)).steps == 3
    assert dev.plan(request(steps=3, scheduler="heun")).steps == 5
    assert dev.plan(request(steps=1, scheduler="heun")).steps == 1


# ---- bounds ---------------------------------------------------------------------------------------------------------


def test_sizes_name_the_nearest(dev: FluxPipeline) -> None:
    assert "width 1000 is not a multiple of 16 for tiny-flux; nearest: 992 or 1008" in refused(dev, "width", width=1000)
    assert "nearest: 48 or 64" in refused(dev, "height", height=50)
    assert refused(dev, "width", width=8).endswith("nearest: 16")
    assert refused(dev, "height", height=4097).endswith("nearest: 4096")
    assert dev.plan(request(width=16, height=4096)).request.height == 4096


def test_schedulers(dev: FluxPipeline, tmp_path: Path) -> None:
    assert "one of: euler, euler-stochastic, heun, unipc, dpm++" in refused(dev, "scheduler", scheduler="ddim")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    text = refused(dev, "scheduler", scheduler="unipc", init_image=str(tmp_path / "a.png"))
    assert text.endswith("is not one that begins from a picture; one of: euler, euler-stochastic, heun")


def test_a_cache_cannot_forecast_through_fresh_noise(dev: FluxPipeline) -> None:
    text = refused(dev, "cache", scheduler="euler-stochastic", cache="lite")
    assert text.endswith("take scheduler=euler")


def test_a_list_needs_one_value_an_evaluation(dev: FluxPipeline) -> None:
    assert dev.plan(request(guidance=(1, 2, 3, 4))).warnings == ()
    assert "needs 4 values" in refused(dev, "guidance", guidance=(1, 2))
    assert "needs 7 values" in refused(dev, "guidance", guidance=(1, 2, 3, 4), scheduler="heun")


def test_a_strength_that_leaves_no_step(dev: FluxPipeline, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    text = refused(dev, "init_strength", init_image=str(tmp_path / "a.png"), init_strength=0.0)
    assert text == "init_strength 0.0 is not enough to leave one of 4 steps; raise it"
    assert dev.plan(request(init_image=str(tmp_path / "a.png"), init_strength=0.01)).steps == 1


def test_a_picture_that_is_none(dev: FluxPipeline, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(FileError, match="no such file"):
        dev.plan(request(init_image=str(path)))
    path.write_text("no picture")
    with pytest.raises(FileError, match="is no picture that can be read"):
        dev.plan(request(init_image=str(path)))


# ---- warnings -------------------------------------------------------------------------------------------------------


def test_what_is_too_long_is_quoted(dev: FluxPipeline) -> None:
    """Twenty tokens for T5, an end mark among them; CLIP reads 77 with two marks."""
    short = " ".join(["star"] * 19)
    assert dev.plan(request(short)).warnings == ()
    (warning,) = dev.plan(request(f"{short} two rings")).warnings
    assert warning == 'prompt is longer than the 20 tokens that tiny-flux reads; cut off: "two rings"'
    (negative,) = dev.plan(request(negative=f"{short} ring", true_guidance=2.0)).warnings
    assert negative == 'negative is longer than the 20 tokens that tiny-flux reads; cut off: "ring"'
    first, second = dev.plan(request(" ".join(["star"] * 75 + ["two", "rings"]))).warnings
    assert "(289 characters)" in first
    assert second.endswith('the 77 tokens that CLIP reads for the picture\'s overall style; cut off there: "two rings"')


def test_fields_without_effect(dev: FluxPipeline) -> None:
    warnings = dev.plan(request(**UNUSED)).warnings
    assert sorted(warnings) == sorted(f"tiny-flux has no use for {field}" for field in UNUSED)


def test_guidance_of_a_distilled_model(schnell: FluxPipeline) -> None:
    for value in (3.5, (0, 0, 2, 0)):
        (warning,) = schnell.plan(request(guidance=value)).warnings
        assert warning == "guidance has no effect: tiny-flux is distilled and paints without it"
    for value in (0, 1):
        assert schnell.plan(request(guidance=value)).warnings == ()
    (warning,) = schnell.plan(request(true_guidance=2.0, negative="a ring")).warnings
    assert warning == "tiny-flux is distilled: true_guidance doubles its work and harms the picture"


def test_a_negative_that_nothing_uses(dev: FluxPipeline, nano: FluxPipeline) -> None:
    (warning,) = dev.plan(request(negative="a ring")).warnings
    assert warning == "negative has no effect unless true_guidance is above 1"
    assert dev.plan(request(negative="a ring", true_guidance=1.0)).warnings == (warning,)
    assert nano.plan(request(negative="a ring")).warnings == ()
    assert nano.plan(request(negative="a ring", guidance=1.0)).warnings == (
        "negative has no effect unless guidance is above 1",
    )


def test_guidance_and_true_guidance_of_a_nano(nano: FluxPipeline) -> None:
    for field in ("guidance", "true_guidance"):
        plan = nano.plan(GenerationRequest.model_validate({"prompt": "a red star", field: 2.0}))
        assert (plan.request.guidance, plan.request.true_guidance, plan.warnings) == (2.0, 2.0, ())
    (warning,) = nano.plan(request(guidance=5.0, true_guidance=2.0)).warnings
    assert warning.startswith("true_guidance is taken")


def test_sizes_that_a_nano_never_saw(nano: FluxPipeline, dev: FluxPipeline) -> None:
    assert nano.plan(request(width=96)).warnings == ()
    (warning,) = nano.plan(request(width=80)).warnings
    assert warning == "tiny-flux was trained at 64x64, 96x64; other sizes come out worse"
    assert dev.plan(request(width=80)).warnings == ()


def test_a_picture_of_other_proportions(dev: FluxPipeline, tmp_path: Path) -> None:
    Image.new("RGB", (128, 64)).save(tmp_path / "a.png")
    (warning,) = dev.plan(request(init_image=str(tmp_path / "a.png"))).warnings
    assert warning == "init_image is 128x64 and is stretched to 64x64; crop it to keep its proportions"
    assert dev.plan(request(init_image=str(tmp_path / "a.png"), width=128)).warnings == ()


# ---- costs ----------------------------------------------------------------------------------------------------------


def test_cost_follows_the_work(dev: FluxPipeline, tmp_path: Path) -> None:
    def flops(**values: Any) -> float:
        return dev.plan(request(**values)).cost.flops

    once = flops(steps=1)
    step = flops(steps=2) - once
    assert flops(steps=9) == pytest.approx(once + 8 * step)
    assert flops(steps=2, true_guidance=2.0) > flops(steps=2) + 2 * step
    assert flops(steps=1, width=128) > 1.5 * once
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert flops(steps=2, init_image=str(tmp_path / "a.png"), init_strength=0.5) > once


def test_peak_holds_the_weights(dev: FluxPipeline) -> None:
    assert isinstance(dev.text, torch.nn.Module)
    parts = (dev.transformer, dev.autoencoder, dev.text)
    weights = sum(parameter.nbytes for part in parts for parameter in part.parameters())
    small, large = dev.plan(request()).peak_bytes, dev.plan(request(width=512, height=512)).peak_bytes
    assert weights < small < large


def test_it_plans_without_weights(dev: FluxPipeline) -> None:
    empty = tiny_pipeline(DEFAULTS)
    for part in (empty.transformer, empty.autoencoder):
        torch.nn.Module.to(part, "meta")
    for values in ({}, {"true_guidance": 2.0, "negative": "a ring"}, {"scheduler": "heun"}):
        assert empty.plan(request(**values)) == dev.plan(request(**values))
