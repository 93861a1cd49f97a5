"""Qwen-Image's states: company at any step and of any prompts, what is shared, previews, given pictures, what matters.

Equality with diffusers is in `test_qwen_image_equal`, plans in `test_qwen_image_plan`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gesso.pipelines.qwen_image import QwenImagePipeline, padded
from gesso.pipelines.qwen_image_state import QwenImageState
from gesso.request import GenerationRequest
from tests.oracle import run_plainly
from tests.tiny_qwen_image import tiny_pipeline

NOISE = 2e-4  # of latents, whose values are about 1: what the shape of a batch may do to sums


@pytest.fixture(scope="module")
def pipeline() -> QwenImagePipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def given_picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "given.png"
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(path)
    return str(path)


def request(prompt: str = "a red star", **values: Any) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": prompt, "seed": 7, **values})


def begin(pipeline: QwenImagePipeline, *requests: GenerationRequest) -> list[QwenImageState]:
    plans = [pipeline.plan(one) for one in requests]
    conditionings = pipeline.encode(plans)
    return [pipeline.begin(plan, made, 0) for plan, made in zip(plans, conditionings, strict=True)]


def alone(pipeline: QwenImagePipeline, one: GenerationRequest) -> torch.Tensor:
    """The finished tokens of the first picture, made alone."""
    (state,) = begin(pipeline, one)
    while state.remaining:
        pipeline.step([state])
    return state.tokens_1LD


# ---- company --------------------------------------------------------------------------------------------------------


def test_different_steps_prompts_schedulers_and_scales_share_one_evaluation(pipeline: QwenImagePipeline) -> None:
    requests = [
        request(steps=5),
        request("two blue rings on a red star", seed=1, steps=3, guidance=2.0, negative="a ring"),
        request("ring", seed=2, scheduler="unipc"),
    ]
    states = begin(pipeline, *requests)
    assert len({len(state.conditioning.prompt_TE) for state in states}) == 3
    pipeline.step([states[0]])
    pipeline.step(states[:2])
    assert [state.index for state in states] == [2, 1, 0]
    assert len({state.batch_key for state in states}) == 1
    while waiting := [state for state in states if state.remaining]:
        pipeline.step(waiting)
    for state, one in zip(states, requests, strict=True):
        assert torch.allclose(state.tokens_1LD, alone(pipeline, one), atol=NOISE)


def test_what_cannot_share_has_other_keys(pipeline: QwenImagePipeline) -> None:
    plain, wide, unguided = begin(pipeline, request(), request(width=80), request(guidance=1.0))
    assert len({plain.batch_key, wide.batch_key, unguided.batch_key}) == 3
    assert plain.doubled and not unguided.doubled


def test_texts_are_padded_and_masked_only_where_lengths_differ() -> None:
    one, two = torch.ones(2, 3), torch.full((4, 3), 2.0)
    assert padded([two, two])[1] is None
    features_BTE, mask_BT = padded([one, two])
    assert mask_BT is not None
    assert mask_BT.tolist() == [[True, True, False, False], [True] * 4]
    assert (features_BTE[0, 2:] == 0).all()


def test_texts_are_read_once_for_all_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_pipeline()
    asked: list[list[str]] = []
    read = pipeline.text.features
    monkeypatch.setattr(
        pipeline.text, "features", lambda prompts, device: asked.append(list(prompts)) or read(prompts, device)
    )
    requests = [request(num_images=4), request("a ring", guidance=1.0), request(guidance=3.0, seed=1)]
    conditionings = pipeline.encode([pipeline.plan(one) for one in requests])
    assert asked == [["a red star", "a ring"], [" "]]
    assert [conditioning.negative_TE is not None for conditioning in conditionings] == [True, False, True]


def test_a_step_that_fails_changes_nothing(pipeline: QwenImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    (state,) = begin(pipeline, request())
    pipeline.step([state])
    before = state.tokens_1LD.clone()
    calls = []
    forward = pipeline.transformer.forward

    def fail_at_the_negative(**values: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return forward(**values)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.transformer, "forward", fail_at_the_negative)
        with pytest.raises(MemoryError):
            pipeline.step([state])
    assert torch.equal(state.tokens_1LD, before) and state.index == 1
    while state.remaining:
        pipeline.step([state])
    assert torch.equal(state.tokens_1LD, alone(pipeline, request()))


# ---- what matters ---------------------------------------------------------------------------------------------------


def test_text_guidance_and_the_negative_matter(pipeline: QwenImagePipeline) -> None:
    variants = [
        request(),
        request("two blue rings"),
        request(guidance=1.0),
        request(guidance=(4.0, 4.0, 1.0, 1.0)),
        request(negative="a ring"),
    ]
    made = [alone(pipeline, one) for one in variants]
    for index, one in enumerate(made):
        assert all((one - other).abs().max() > 10 * NOISE for other in made[:index])


def test_guidance_may_stop_in_mid_way(pipeline: QwenImagePipeline) -> None:
    (state,) = begin(pipeline, request(guidance=(3.0, 3.0, 1.0, 1.0)))
    doubled = []
    while state.remaining:
        doubled.append(state.doubled)
        pipeline.step([state])
    assert doubled == [True, True, False, False]
    costs = [cost.flops for cost in state.costs]
    assert costs[0] == costs[1] > 1.5 * costs[2] == 1.5 * costs[3]


def test_a_given_picture_shows_in_what_is_painted(pipeline: QwenImagePipeline, given_picture: str) -> None:
    """Weak repainting keeps the latents near those of the given picture; each of a set has a sample of its own."""
    picture = pipeline.encode([pipeline.plan(request(init_image=given_picture))])[0].picture
    assert picture is not None
    clean_BC1hw = pipeline._scaled(picture.mode())
    cells = clean_BC1hw[:, :, 0].unflatten(-1, (4, 2)).unflatten(-3, (4, 2))  # rows and columns of tokens of 2 x 2
    tokens_1LD = cells.permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 16)
    away = []
    for strength in (0.1, 0.5, 1.0):
        made = alone(pipeline, request(init_image=given_picture, init_strength=strength, steps=10, guidance=1.0))
        away.append(float((made - tokens_1LD).abs().mean()))
    assert away[0] < away[1] < away[2]
    fields = {"init_image": given_picture, "steps": 3}
    many = run_plainly(pipeline, request(num_images=2, **fields))
    (one,) = run_plainly(pipeline, request(seed=8, **fields))
    assert many[1].image.tobytes() == one.image.tobytes() != many[0].image.tobytes()


# ---- pixels ---------------------------------------------------------------------------------------------------------


def test_previews_change_nothing_and_come_closer(pipeline: QwenImagePipeline) -> None:
    (state,) = begin(pipeline, request(width=80, height=48))
    shown = []
    while state.remaining:
        shown.append(pipeline.preview(state))
        pipeline.step([state])
    shown.append(pipeline.preview(state))
    assert {(picture.mode, picture.size) for picture in shown} == {("RGB", (80, 48))}
    pixels = [np.asarray(picture).astype(int) for picture in shown]
    away = [np.abs(one - pixels[-1]).mean() for one in pixels]
    assert away[-2] < away[0]
    assert torch.equal(state.tokens_1LD, alone(pipeline, request(width=80, height=48)))


def test_tiles_are_diffusers_own() -> None:
    """Where somebody has turned tiling on, pictures come out of diffusers' tiles; small ones fit into one."""
    pipeline = tiny_pipeline()
    (state,) = begin(pipeline, request(steps=2))
    while state.remaining:
        pipeline.step([state])
    (whole,) = pipeline.decode([state])
    pipeline.autoencoder.enable_tiling(
        tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=24, tile_sample_stride_width=24
    )
    (tiled,) = pipeline.decode([state])
    assert tiled.image.size == whole.image.size
    assert tiled.image.tobytes() != whole.image.tobytes()


def test_bfloat16_paints(given_picture: str) -> None:
    pipeline = tiny_pipeline(dtype=torch.bfloat16)
    assert isinstance(pipeline.transformer, nn.Module)
    for fields in ({}, {"init_image": given_picture}, {"scheduler": "unipc"}):
        (state,) = begin(pipeline, request(**fields))
        pipeline.step([state])
        assert state.tokens_1LD.dtype == torch.bfloat16
        assert pipeline.preview(state).size == (64, 64)
        assert run_plainly(pipeline, request(**fields))[0].image.size == (64, 64)


def test_no_picture_no_work(pipeline: QwenImagePipeline) -> None:
    assert list(pipeline.decode([])) == []
    assert pipeline.encode([]) == []
