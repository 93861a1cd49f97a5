"""FLUX's states: company at any step, what is shared and what is not, previews, given pictures, fields that matter.

Equality with diffusers is in `test_flux_equal`, plans in `test_flux_plan`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gesso.engine import Engine
from gesso.models.word_encoder import WordEncoder, WordEncoderConfig
from gesso.models.word_features import FluxWordFeatures
from gesso.pipelines.flux import FluxPipeline
from gesso.pipelines.flux_state import FluxDefaults, FluxState
from gesso.request import GenerationRequest
from gesso.sampling.schedulers import NAMES
from tests.oracle import run_plainly
from tests.tiny_flux import TEXT_WIDTH, WORDS, tiny_autoencoder, tiny_pipeline, tiny_text, tiny_transformer

NOISE = 2e-4  # of latents, whose values are about 1: what the shape of a batch may do to sums


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def given_picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "given.png"
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(path)
    return str(path)


def request(prompt: str = "a red star", **values: Any) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": prompt, "seed": 7, **values})


def begin(pipeline: FluxPipeline, *requests: GenerationRequest) -> list[FluxState]:
    plans = [pipeline.plan(one) for one in requests]
    conditionings = pipeline.encode(plans)
    return [pipeline.begin(plan, made, 0) for plan, made in zip(plans, conditionings, strict=True)]


def alone(pipeline: FluxPipeline, one: GenerationRequest) -> torch.Tensor:
    """The finished tokens of the first picture, made alone."""
    (state,) = begin(pipeline, one)
    while state.remaining:
        pipeline.step([state])
    return state.tokens_1LD


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


# ---- company --------------------------------------------------------------------------------------------------------


def test_pictures_at_different_steps_share_one_evaluation(pipeline: FluxPipeline) -> None:
    requests = [request(steps=5), request("two blue rings", seed=1, steps=3, guidance=2.0), request("a ring", seed=2)]
    states = begin(pipeline, *requests)
    pipeline.step([states[0]])
    pipeline.step(states[:2])
    assert [state.index for state in states] == [2, 1, 0]
    assert len({state.batch_key for state in states}) == 1
    while waiting := [state for state in states if state.remaining]:
        pipeline.step(waiting)
    for state, one in zip(states, requests, strict=True):
        assert torch.allclose(state.tokens_1LD, alone(pipeline, one), atol=NOISE)


def test_different_schedulers_share_one_evaluation(pipeline: FluxPipeline) -> None:
    requests = [request(scheduler=name, steps=3, seed=seed) for seed, name in enumerate(NAMES)]
    states = begin(pipeline, *requests)
    assert len({state.batch_key for state in states}) == 1
    while waiting := [state for state in states if state.remaining]:
        pipeline.step(waiting)
    for state, one in zip(states, requests, strict=True):
        assert torch.allclose(state.tokens_1LD, alone(pipeline, one), atol=NOISE)


def test_previews_show_no_noise(pipeline: FluxPipeline) -> None:
    """They are of where the last step pointed, whatever noise came after it."""
    plain, noisy = begin(pipeline, request(steps=4), request(steps=4, scheduler="euler-stochastic"))
    pipeline.step([plain, noisy])
    assert not torch.allclose(plain.tokens_1LD, noisy.tokens_1LD, atol=0.01)
    assert torch.allclose(plain.clean_tokens(), noisy.clean_tokens(), atol=1e-5)
    assert not torch.allclose(plain.clean_tokens(), plain.tokens_1LD, atol=0.01)


def test_what_cannot_share_has_other_keys(pipeline: FluxPipeline) -> None:
    plain, wide, guided = begin(pipeline, request(), request(width=80), request(true_guidance=2.0))
    assert len({plain.batch_key, wide.batch_key, guided.batch_key}) == 3
    assert not plain.doubled and guided.doubled


def test_guided_pictures_share_with_their_own_scales(pipeline: FluxPipeline) -> None:
    requests = [
        request(true_guidance=2.0, negative="a ring"),
        request("two rings", true_guidance=4.0, seed=3),
    ]
    states = begin(pipeline, *requests)
    while states[0].remaining:
        pipeline.step(states)
    for state, one in zip(states, requests, strict=True):
        assert torch.allclose(state.tokens_1LD, alone(pipeline, one), atol=NOISE)


def test_a_picture_that_is_dropped_takes_nothing_with_it(pipeline: FluxPipeline) -> None:
    kept, dropped = begin(pipeline, request(), request("a ring", seed=9))
    pipeline.step([kept, dropped])
    del dropped
    while kept.remaining:
        pipeline.step([kept])
    assert torch.allclose(kept.tokens_1LD, alone(pipeline, request()), atol=NOISE)


def test_a_step_that_fails_leaves_others_able_to_go_on(pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    (state,) = begin(pipeline, request())
    pipeline.step([state])
    before, index = state.tokens_1LD.clone(), state.index
    with monkeypatch.context() as patch:

        def fail(**_: object) -> None:
            raise MemoryError

        patch.setattr(pipeline.transformer, "forward", fail)
        with pytest.raises(MemoryError):
            pipeline.step([state])
    assert torch.equal(state.tokens_1LD, before) and state.index == index
    while state.remaining:
        pipeline.step([state])
    assert torch.equal(state.tokens_1LD, alone(pipeline, request()))


def test_schedulers_are_nobodys_but_the_pictures_own(pipeline: FluxPipeline) -> None:
    plan = pipeline.plan(request(num_images=2))
    (conditioning,) = pipeline.encode([plan])
    one, two = (pipeline.begin(plan, conditioning, image) for image in range(2))
    assert one.scheduler is not two.scheduler
    assert one.conditioning is two.conditioning


def test_through_the_engine_deterministically(pipeline: FluxPipeline) -> None:
    asked = [request(num_images=2, deterministic=True, steps=2), request("a ring", deterministic=True, steps=3)]
    with Engine(device="cpu", load=lambda name, device, dtype: pipeline) as engine:
        neighbour = engine.submit(request("two rings", seed=1))
        results = engine.run(asked)
        neighbour.result(timeout=60)
    expected = [output for one in asked for output in run_plainly(pipeline, one)]
    assert [result.image.tobytes() for result in results] == [output.image.tobytes() for output in expected]


# ---- text -----------------------------------------------------------------------------------------------------------


def test_a_text_is_read_once_for_all_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_pipeline()
    asked: list[list[str]] = []
    read = pipeline.text.encode
    monkeypatch.setattr(pipeline.text, "encode", lambda prompts: asked.append(list(prompts)) or read(prompts))
    requests = [request(num_images=4), request("a ring", true_guidance=2.0), request(true_guidance=3.0, seed=1)]
    conditionings = pipeline.encode([pipeline.plan(one) for one in requests])
    assert asked == [["a red star", "a ring"], [""]]
    assert [conditioning.negative is not None for conditioning in conditionings] == [False, True, True]


def test_text_guidance_and_the_negative_matter(pipeline: FluxPipeline) -> None:
    variants = [
        request(),
        request("two blue rings"),
        request(guidance=1.0),
        request(guidance=(3.5, 3.5, 1.0, 1.0)),
        request(true_guidance=2.0),
        request(true_guidance=2.0, negative="a ring"),
    ]
    made = [alone(pipeline, one) for one in variants]
    for index, one in enumerate(made):
        assert all((one - other).abs().max() > 10 * NOISE for other in made[:index])


def test_guidance_of_a_nano_may_stop_in_mid_way() -> None:
    pipeline = tiny_pipeline(FluxDefaults(width=64, height=64, steps=4, guidance=3.0), guidance_embeds=False)
    (state,) = begin(pipeline, request(guidance=(3.0, 3.0, 1.0, 1.0)))
    doubled = []
    while state.remaining:
        doubled.append(state.doubled)
        pipeline.step([state])
    assert doubled == [True, True, False, False]
    costs = [cost.flops for cost in state.costs]
    assert costs[0] == costs[1] == 2 * costs[2] == 2 * costs[3]


def test_the_word_encoder_of_nano_models_will_do() -> None:
    torch.manual_seed(0)
    words = WordEncoderConfig(vocabulary=WORDS, width=TEXT_WIDTH, depth=1, heads=2, length=6)
    text = FluxWordFeatures(WordEncoder(words).eval().requires_grad_(False))
    transformer = tiny_transformer(guidance_embeds=False)
    transformer.time_text_embed.text_embedder.linear_1 = torch.nn.Linear(TEXT_WIDTH, 32)
    pipeline = FluxPipeline(
        transformer=transformer,
        autoencoder=tiny_autoencoder(),
        text=text,
        scheduler={"shift": 2.0},
        defaults=FluxDefaults(width=64, height=64, steps=2, guidance=3.0),
        name="flux-nano",
        digest="",
    )
    plan = pipeline.plan(request("a red star on two purple rings"))
    assert any('cut off: "purple rings"' in warning for warning in plan.warnings)
    assert any("'on', 'purple'" in warning for warning in plan.warnings)
    assert plan.peak_bytes > 0
    assert run_plainly(pipeline, request())[0].image.size == (64, 64)


# ---- pixels ---------------------------------------------------------------------------------------------------------


def test_previews_change_nothing_and_come_closer(pipeline: FluxPipeline) -> None:
    (state,) = begin(pipeline, request(width=80, height=48))
    shown = []
    while state.remaining:
        shown.append(pipeline.preview(state))
        pipeline.step([state])
    shown.append(pipeline.preview(state))
    assert {(picture.mode, picture.size) for picture in shown} == {("RGB", (80, 48))}
    away = [np.abs(pixels(picture) - pixels(shown[-1])).mean() for picture in shown]
    assert away[-2] < away[0]
    assert torch.equal(state.tokens_1LD, alone(pipeline, request(width=80, height=48)))


def test_a_given_picture_shows_in_what_is_painted(pipeline: FluxPipeline, given_picture: str) -> None:
    """Weak repainting keeps the latents near those of the given picture."""
    picture = pipeline.encode([pipeline.plan(request(init_image=given_picture))])[0].picture
    assert picture is not None
    values: Any = pipeline.autoencoder.config
    clean = (picture.mode() - values["shift_factor"]) * values["scaling_factor"]
    away = []
    for strength in (0.1, 0.5, 1.0):
        (state,) = begin(pipeline, request(init_image=given_picture, init_strength=strength, steps=10))
        assert state.total == 10 * strength
        tokens = alone(pipeline, request(init_image=given_picture, init_strength=strength, steps=10))
        latent = tokens.reshape(1, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(clean.shape)
        away.append(float((latent - clean).abs().mean()))
    assert away[0] < away[1] < away[2]


def test_pictures_of_a_set_from_a_given_picture_are_those_made_alone(
    pipeline: FluxPipeline, given_picture: str
) -> None:
    fields = {"init_image": given_picture, "steps": 3}
    many = run_plainly(pipeline, request(num_images=3, **fields))
    (one,) = run_plainly(pipeline, request(seed=9, **fields))
    assert many[2].image.tobytes() == one.image.tobytes()
    assert many[0].image.tobytes() != one.image.tobytes()


def test_many_large_pictures_are_decoded_in_parts(pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gesso.pipelines.planning._DECODED_PIXELS", 64 * 64 * 2)
    plan = pipeline.plan(request(num_images=5, steps=1))
    (conditioning,) = pipeline.encode([plan])
    states = [pipeline.begin(plan, conditioning, image) for image in range(5)]
    pipeline.step(states)
    sizes = []
    decode = pipeline.autoencoder.decode
    monkeypatch.setattr(pipeline.autoencoder, "decode", lambda z, **rest: sizes.append(len(z)) or decode(z, **rest))
    outputs = pipeline.decode(states)
    assert next(outputs).seed == 7 and sizes == [2]
    assert [output.seed for output in outputs] == [8, 9, 10, 11]
    assert sizes == [2, 2, 1]


def test_bfloat16_paints(given_picture: str) -> None:
    pipeline = tiny_pipeline(text=tiny_text())
    for part in (pipeline.transformer, pipeline.autoencoder, pipeline.text):
        assert isinstance(part, torch.nn.Module)
        torch.nn.Module.to(part, torch.bfloat16)
    pipeline.dtype = torch.bfloat16
    for fields in ({}, {"init_image": given_picture, "true_guidance": 2.0}, {"scheduler": "unipc"}):
        (state,) = begin(pipeline, request(**fields))
        pipeline.step([state])
        assert state.tokens_1LD.dtype == torch.bfloat16
        assert pipeline.preview(state).size == (64, 64)
        assert run_plainly(pipeline, request(**fields))[0].image.size == (64, 64)


def test_no_picture_no_work(pipeline: FluxPipeline, tmp_path: Path) -> None:
    assert list(pipeline.decode([])) == []
    assert pipeline.encode([]) == []
