"""InfiniteYou as FLUX's guest: what is added when, what is drawn, what is loaded, what is refused, what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from gesso.cache_settings import parse_cache
from gesso.caching.attach import attach
from gesso.errors import FileError, RequestError
from gesso.pipelines.flux import FluxPipeline
from gesso.pipelines.flux_state import FluxState
from gesso.pipelines.infinite_you import scales_of
from gesso.request import GenerationRequest
from gesso.request_parts import Identity
from tests.tiny_flux import tiny_pipeline
from tests.tiny_infinite_you import PERSON, tiny_pipeline_with_guest


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return tiny_pipeline_with_guest()


def asked(seed: int = 7, steps: int = 4, **identity: object) -> GenerationRequest:
    given = {"image": str(PERSON), **identity}
    return GenerationRequest.model_validate(
        {"prompt": "a red star", "seed": seed, "steps": steps, "width": 32, "height": 32, "identity": given}
    )


def plain(seed: int = 7, steps: int = 4) -> GenerationRequest:
    return asked(seed, steps).model_copy(update={"identity": None})


def begun(pipeline: FluxPipeline, requests: Sequence[GenerationRequest]) -> list[FluxState]:
    plans = [pipeline.plan(request) for request in requests]
    made = zip(plans, pipeline.encode(plans), strict=True)
    return [pipeline.begin(plan, conditioning, 0) for plan, conditioning in made]


def painted(pipeline: FluxPipeline, request: GenerationRequest) -> Tensor:
    (state,) = begun(pipeline, [request])
    while state.remaining:
        pipeline.step([state])
    return state.tokens_1LD


def calls(pipeline: FluxPipeline, request: GenerationRequest) -> int:
    """How often InfuseNet is evaluated for a picture."""
    (state,) = begun(pipeline, [request])
    assert state.presence is not None
    counted: list[int] = []
    hook = state.presence.networks.infusenet.register_forward_hook(lambda *_: counted.append(1))
    while state.remaining:
        pipeline.step([state])
    hook.remove()
    return len(counted)


def test_flux_without_a_person_is_the_same_bits_with_and_without_a_guest(pipeline: FluxPipeline) -> None:
    assert torch.equal(painted(tiny_pipeline(), plain()), painted(pipeline, plain()))


def test_infusenet_acts_inside_its_window_only(pipeline: FluxPipeline) -> None:
    assert calls(pipeline, asked(steps=10)) == 10
    assert calls(pipeline, asked(steps=10, start=0.1, end=0.9)) == 8
    assert calls(pipeline, asked(steps=10, strength=0)) == 0
    assert scales_of(Identity(image="x", strength=0.5, end=0.5), 4) == (0.5, 0.5, 0, 0)


def test_a_person_shows_and_strength_counts(pipeline: FluxPipeline) -> None:
    whole, half = painted(pipeline, asked()), painted(pipeline, asked(strength=0.5))
    assert not torch.allclose(whole, half, atol=1e-3)
    assert not torch.allclose(whole, painted(pipeline, asked(pose=str(PERSON))), atol=1e-3)
    assert not torch.allclose(whole, painted(pipeline, asked(variant="sim_stage1")), atol=1e-3)


def test_the_control_picture_is_drawn_first_then_the_noise(pipeline: FluxPipeline) -> None:
    """As one generator of the reference gives them; with strength 0 what is left is FLUX on the second draw."""
    (state,) = begun(pipeline, [asked()])
    generator = torch.Generator().manual_seed(7)
    _, noise = torch.randn(1, 4, 4, 4, generator=generator), torch.randn(1, 4, 4, 4, generator=generator)
    (free,) = begun(tiny_pipeline(), [plain()])
    assert state.tokens_1LD.shape == free.tokens_1LD.shape and not torch.equal(state.tokens_1LD, free.tokens_1LD)
    assert torch.equal(state.tokens_1LD.flatten().sort().values, noise.flatten().sort().values)


def test_in_company_of_people_of_other_strength_and_of_nobody(pipeline: FluxPipeline) -> None:
    requests = [asked(1), asked(2, strength=0.5), plain(3), asked(4, end=0.5), asked(5, variant="sim_stage1")]
    states = begun(pipeline, requests)
    assert len({state.batch_key for state in states}) == 4  # the first and the fourth are alike, so far
    while any(state.remaining for state in states):
        for key in {state.batch_key for state in states if state.remaining}:
            pipeline.step([state for state in states if state.remaining and state.batch_key == key])
    for request, state in zip(requests, states, strict=True):
        torch.testing.assert_close(state.tokens_1LD, painted(pipeline, request), atol=1e-5, rtol=1e-4)


def test_true_guidance_evaluates_the_negative_without_the_person(pipeline: FluxPipeline) -> None:
    request = asked().model_copy(update={"true_guidance": 2.0, "negative": "a ring"})
    assert calls(pipeline, request) == 4


@pytest.mark.parametrize(("cache", "expected"), [("lite", 4), ("taylorseer:granularity=module", 8)])
def test_infusenet_rests_where_a_step_cache_forecasts_all_that_would_read_it(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch, cache: str, expected: int
) -> None:
    """By module its residuals are still added to what is forecast, so it is evaluated. The picture is the same bits."""
    settings = parse_cache(cache).model_copy(update={"interval": 3, "warmup": 2, "last_full": 1})
    request = asked(steps=8).model_copy(update={"cache": settings})

    def cached() -> tuple[int, Tensor]:
        (state,) = begun(pipeline, [request])
        assert state.presence is not None
        attached, counted = attach(pipeline.transformer, settings), []
        hook = state.presence.networks.infusenet.register_forward_hook(lambda *_: counted.append(1))
        while state.remaining:
            attached.begin_step("picture", state.index, state.total)
            with attached.call(["picture"]):
                pipeline.step([state])
        assert attached.taken("picture") == "FFTTFTTF"
        hook.remove()
        attached.detach()
        return len(counted), state.tokens_1LD

    count, rested = cached()
    monkeypatch.setattr("gesso.pipelines.flux.output_is_forecast", lambda branch: False)
    always, awake = cached()
    assert (count, always) == (expected, 8)
    assert torch.equal(rested, awake)


def test_changing_the_variant_loads_it_and_nothing_else() -> None:
    loaded: list[str] = []
    pipeline = tiny_pipeline_with_guest(loaded)
    transformer = pipeline.transformer
    for variant in (None, "aes_stage2", "sim_stage1", "sim_stage1"):
        painted(pipeline, asked(steps=1, variant=variant))
    assert loaded == ["aes_stage2", "sim_stage1"] and pipeline.transformer is transformer


def test_a_plan_fills_warns_and_counts(pipeline: FluxPipeline) -> None:
    plan, without = pipeline.plan(asked()), pipeline.plan(plain())
    identity = plan.request.identity
    assert identity == Identity(image=str(PERSON), strength=1, start=0, end=1, pose=None, variant="aes_stage2")
    assert any("shows 3 faces; the largest is used" in warning for warning in plan.warnings)
    assert plan.cost.flops > without.cost.flops and plan.peak_bytes > without.peak_bytes
    assert pipeline.plan(plan.request) == plan
    idle = pipeline.plan(asked(start=0.3, end=0.4))
    assert any("identity has no effect" in warning for warning in idle.warnings)


def test_bad_pictures_are_refused_before_any_work(pipeline: FluxPipeline, tmp_path: Path) -> None:
    Image.new("RGB", (200, 200), "grey").save(tmp_path / "wall.png")
    with pytest.raises(FileError, match=r"wall\.png: shows no face that can be found; use a photograph"):
        pipeline.plan(asked(image=str(tmp_path / "wall.png")))
    with pytest.raises(FileError, match=r"wall\.png: shows no face .* fitted to 32x32; use one in which"):
        pipeline.plan(asked(pose=str(tmp_path / "wall.png")))
    with pytest.raises(FileError, match=r"absent\.png: no such file"):
        pipeline.plan(asked(image=str(tmp_path / "absent.png")))
    with pytest.raises(RequestError, match="leave it out, or take flux-dev or infinite-you-nano"):
        tiny_pipeline().plan(asked())
