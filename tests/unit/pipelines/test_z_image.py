"""Z-Image's verbs: company of unequal pictures, guidance, pictures to start from, editing, previews."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gesso.pipelines.z_image import ZImagePipeline, to_uint8
from gesso.pipelines.z_image_state import EDIT, ZImageState
from gesso.request import GenerationRequest
from gesso.sampling.flow import (
    FlowSchedule,
    complete,
    euler_step,
    guide_velocity,
    linear_sigmas,
    share_of_way,
    static_shift,
)
from tests.oracle import run_plainly
from tests.tiny_z_image import DEFAULTS, editing_network, tiny_pipeline, tiny_text


@pytest.fixture(scope="module")
def pipeline() -> ZImagePipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def editor() -> ZImagePipeline:
    defaults = replace(EDIT, width=64, height=64, steps=3, guidance=2.0)
    return tiny_pipeline(defaults, network=editing_network(), text=tiny_text(), pictures=Colours())


class Colours:
    """Features of pictures: their mean colours on a grid."""

    max_tokens = 12

    def features(self, image: Image.Image) -> Tensor:
        small = torch.from_numpy(np.array(image.resize((4, 3)))).float() / 127.5 - 1
        return torch.nn.functional.pad(small, (0, 7), value=0.5)


def ask(prompt: str = "a red star", **fields: object) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": prompt, "seed": 3, **fields})


def begin(pipeline: ZImagePipeline, *requests: GenerationRequest) -> list[ZImageState]:
    """One state a request, their prompts read together."""
    plans = [pipeline.plan(request) for request in requests]
    made = pipeline.encode(plans)
    return [pipeline.begin(plan, conditioning, 0) for plan, conditioning in zip(plans, made, strict=True)]


def alone(pipeline: ZImagePipeline, request: GenerationRequest) -> ZImageState:
    (state,) = begin(pipeline, request)
    while state.remaining:
        pipeline.step([state])
    return state


def check_as_alone(pipeline: ZImagePipeline, states: list[ZImageState], requests: list[GenerationRequest]) -> None:
    for state, request in zip(states, requests, strict=True):
        assert state.remaining == 0
        torch.testing.assert_close(state.latent_C1hw, alone(pipeline, request).latent_C1hw, atol=1e-4, rtol=0)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.linear_gradient("L").convert("RGB").resize((80, 48)).save(tmp_path / "given.png")
    return str(tmp_path / "given.png")


REQUESTS = [
    ask(seed=1),
    ask("two blue rings on white", seed=2, guidance=0.0, width=96),
    ask("ring", seed=3, guidance=5.0, negative="a blue star", guidance_normalization=1.0, height=32),
    ask("a star", seed=4, steps=4, guidance=2.0, guidance_truncation=0.2),
    ask("a star", seed=4, guidance=(4.0, 0.0, 1.0, 2.0)),
    ask("a " * 38 + "ring", seed=5, negative="two " * 34, width=48, height=80),
    ask("a star", seed=4, scheduler="euler-stochastic"),
]


def test_pictures_of_all_kinds_step_together(pipeline: ZImagePipeline) -> None:
    """Other prompts, sizes, guidance, truncation and normalisation; each is the picture made alone."""
    states = begin(pipeline, *REQUESTS)
    assert len({state.batch_key for state in states}) == 1
    while states[0].remaining:
        pipeline.step(states)
    check_as_alone(pipeline, states, REQUESTS)
    outputs = list(pipeline.decode(states))
    sizes = [(64, 64), (96, 64), (64, 32), (64, 64), (64, 64), (48, 80), (64, 64)]
    assert [output.image.size for output in outputs] == sizes
    assert [output.seed for output in outputs] == [1, 2, 3, 4, 4, 5, 4]


def test_other_steps_of_the_way_share_a_step(pipeline: ZImagePipeline) -> None:
    requests = [ask(seed=1, steps=5), ask("two blue rings", seed=2, steps=2), ask("ring", steps=3, width=32)]
    one, two, three = begin(pipeline, *requests)
    pipeline.step([one])
    pipeline.step([one, two])
    pipeline.step([three, one, two])
    pipeline.step([one, three])
    pipeline.step([three, one])
    check_as_alone(pipeline, [one, two, three], requests)


def test_settings_do_change_the_picture(pipeline: ZImagePipeline, picture: str) -> None:
    plain = alone(pipeline, ask()).latent_C1hw
    for fields in (
        {"guidance": 1.0},
        {"guidance": (3.0, 3.0, 3.0, 0.0)},
        {"guidance_normalization": 0.5},
        {"guidance_truncation": 0.1},
        {"negative": "blue"},
        {"steps": 5},
        {"seed": 4},
        {"prompt": "a blue star"},
        {"init_image": picture},
        {"scheduler": "euler-stochastic"},
    ):
        other = alone(pipeline, ask(**{"prompt": "a red star", **fields})).latent_C1hw
        assert float((other - plain).abs().max()) > 1e-3, fields


@torch.no_grad()
def test_the_loop_as_it_is_written_down(pipeline: ZImagePipeline) -> None:
    """Shift 3, time from noise to clean, output negated, guided by the difference; float32 throughout."""
    network, sigmas = pipeline.transformer, complete(static_shift(linear_sigmas(4), 3.0))
    positive, negative = (
        conditioning.prompt
        for conditioning in pipeline.encode(
            [pipeline.plan(ask(guidance=0.0)), pipeline.plan(ask("blue", guidance=0.0))]
        )
    )
    latent = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(3))[:, None]
    for step in range(4):
        time = share_of_way(sigmas[step : step + 1])
        (guided,) = network([latent], time, network.join([(1, 8, 8)], [positive]))
        (away,) = network([latent], time, network.join([(1, 8, 8)], [negative]))
        velocity = -guide_velocity(guided, away, 3.0, 0.8)
        latent = euler_step(latent, velocity, float(sigmas[step]), float(sigmas[step + 1]))
    state = alone(pipeline, ask(negative="blue", guidance=3.0, guidance_normalization=0.8))
    assert state.latent_C1hw.dtype == torch.float32
    torch.testing.assert_close(state.latent_C1hw, latent, atol=1e-4, rtol=0)


def test_the_stochastic_scheduler_is_that_of_diffusers(pipeline: ZImagePipeline) -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    (state,) = begin(pipeline, ask(scheduler="euler-stochastic"))
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=linear_sigmas(4).tolist())
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn((4, 8, 8), generator=generator)[:, None]
    for timestep in scheduler.timesteps:
        torch.testing.assert_close(state.latent_C1hw, sample)
        pipeline.step([state])
        assert state.velocity_C1hw is not None
        (sample,) = scheduler.step(state.velocity_C1hw, timestep, sample, generator=generator, return_dict=False)
    torch.testing.assert_close(state.latent_C1hw, sample)


@pytest.mark.parametrize("scheduler", ["euler", "euler-stochastic"])
def test_previews_show_no_noise(pipeline: ZImagePipeline, scheduler: str) -> None:
    """They are of where the last step pointed, whatever noise came after it."""
    (state,) = begin(pipeline, ask(scheduler=scheduler))
    pipeline.step([state])
    before, sigma = state.latent_C1hw, state.sigma
    pipeline.step([state])
    assert state.velocity_C1hw is not None
    torch.testing.assert_close(state.estimate(), before - sigma * state.velocity_C1hw)


def test_negative_prompts_run_only_where_they_count(pipeline: ZImagePipeline) -> None:
    for fields, rows in (
        ({"guidance": 1.0}, [1, 1, 1, 1]),
        ({"guidance": 3.0}, [2, 2, 2, 2]),
        ({"guidance": (3.0, 0.5, 0.0, 3.0)}, [2, 1, 1, 2]),
        ({"guidance_truncation": 0.2}, [2, 2, 1, 1]),
        ({"guidance_truncation": 0.0}, [2, 1, 1, 1]),
    ):
        (state,) = begin(pipeline, ask(**fields))  # pyright: ignore[reportArgumentType]
        assert (state.conditioning.negative is None) == (max(rows) == 1)
        for expected in rows:
            assert state.guided == (expected == 2)
            pipeline.step([state])
            if state.remaining:
                assert state.together is not None
                assert len(state.together.company.layout.sizes) == expected


def test_what_stays_the_same_is_made_once(pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    states = begin(pipeline, ask(seed=1), ask("ring", seed=2, width=32))
    calls: list[str] = []
    for name in ("read", "join"):
        real = getattr(pipeline.transformer, name)
        monkeypatch.setattr(pipeline.transformer, name, lambda *given, n=name, r=real: (calls.append(n), r(*given))[1])
    while states[0].remaining:
        pipeline.step(states)
    assert calls == ["join"]


def test_nothing_is_kept_after_the_last_step(pipeline: ZImagePipeline) -> None:
    states = begin(pipeline, ask(), ask("ring"))
    gc.collect()
    gc.disable()
    try:
        pipeline.step(states)
        assert states[0].together is not None
        tokens = weakref.ref(states[0].together.company.tokens_ND)
        while states[0].remaining:
            assert tokens() is not None
            pipeline.step(states)
        assert tokens() is None
    finally:
        gc.enable()
    assert all(state.together is None for state in states)


# ---- pictures to start from -----------------------------------------------------------------------------------------


def test_a_given_picture_is_where_painting_starts(pipeline: ZImagePipeline, picture: str) -> None:
    request = ask(steps=10, init_image=picture, init_strength=0.3, width=80, height=48)
    plan = pipeline.plan(request)
    assert plan.steps == 3
    (state,) = begin(pipeline, request)
    start = state.conditioning.start_C1hw
    assert start is not None
    noise = torch.randn((4, 6, 10), generator=torch.Generator().manual_seed(3))[:, None]
    sigma = float(complete(static_shift(linear_sigmas(10), 3.0))[7])
    assert state.sigma == sigma
    torch.testing.assert_close(state.latent_C1hw, sigma * noise + (1 - sigma) * start)
    faint, strong = (alone(pipeline, ask(steps=10, init_image=picture, init_strength=s, width=80, height=48))
                     for s in (0.1, 1.0))  # fmt: skip
    assert float((faint.latent_C1hw - start).norm()) < 0.5 * float((strong.latent_C1hw - start).norm())
    torch.testing.assert_close(strong.latent_C1hw, alone(pipeline, ask(steps=10, width=80, height=48)).latent_C1hw)


def test_given_and_painted_pictures_in_company(pipeline: ZImagePipeline, picture: str) -> None:
    requests = [ask(init_image=picture, init_strength=0.5), ask("ring", width=32)]
    states = begin(pipeline, *requests)
    while waiting := [state for state in states if state.remaining]:
        pipeline.step(waiting)
    check_as_alone(pipeline, states, requests)


# ---- editing --------------------------------------------------------------------------------------------------------


def test_editing_takes_the_picture_as_a_condition(editor: ZImagePipeline, picture: str, tmp_path: Path) -> None:
    plan = editor.plan(ask(init_image=picture))
    assert (plan.request.width, plan.request.height, plan.steps) == (80, 48, 3)
    (state,) = begin(editor, ask(init_image=picture))
    shape = state.conditioning.prompt.shape
    assert (shape.conditions, shape.features, len(shape.captions)) == (((1, 6, 10),), ((3, 4),), 3)
    assert state.conditioning.start_C1hw is None
    edited = alone(editor, ask(init_image=picture)).latent_C1hw
    Image.new("RGB", (80, 48), "red").save(tmp_path / "other.png")
    other = alone(editor, ask(init_image=str(tmp_path / "other.png"))).latent_C1hw
    assert float((edited - other).abs().max()) > 1e-3


def test_editing_and_painting_in_company(editor: ZImagePipeline, picture: str) -> None:
    requests = [ask(init_image=picture), ask("ring"), ask("two rings", init_image=picture, width=32, guidance=0.0)]
    states = begin(editor, *requests)
    while states[0].remaining:
        editor.step(states)
    check_as_alone(editor, states, requests)


def test_large_pictures_are_reduced_before_they_are_edited(editor: ZImagePipeline) -> None:
    assert editor.planner.condition_sizes(1024, 1024) == ((1024, 1024), (1024, 1024))
    (width, height), cut = editor.planner.condition_sizes(4000, 1000)
    assert width * height <= 1024 * 1024 < (width + 4) * (height + 4)
    assert cut == (width // 16 * 16, height // 16 * 16)
    assert editor.planner.condition_sizes(5, 3) == ((5, 3), (16, 16))


# ---- schedules and pixels -------------------------------------------------------------------------------------------


def test_a_dynamic_shift_goes_by_the_size() -> None:
    pipeline = tiny_pipeline(shift=FlowSchedule(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=16))
    small, large = (pipeline.planner.sigmas(pipeline.plan(ask(width=side, height=side)).request) for side in (32, 64))
    for sigmas, mu in ((small, 0.5), (large, 1.15)):
        expected = [math.exp(mu) / (math.exp(mu) + 1 / u - 1) for u in (1.0, 0.75, 0.5, 0.25)]
        torch.testing.assert_close(sigmas, torch.tensor([*expected, 0.0]))


def test_previews_show_where_it_goes(pipeline: ZImagePipeline) -> None:
    seen: list[Tensor] = []

    def remember(latent_Chw: Tensor) -> Image.Image:
        seen.append(latent_Chw.clone())
        return Image.new("RGB", (8, 8))

    watched = ZImagePipeline(
        transformer=pipeline.transformer,
        autoencoder=pipeline.autoencoder,
        text=pipeline.text,
        shift=FlowSchedule(shift=3.0),
        defaults=DEFAULTS,
        name="tiny",
        digest="",
        preview=remember,
    )
    (state,) = begin(watched, ask())
    watched.preview(state)
    assert torch.equal(seen[0], state.latent_C1hw[:, 0])
    watched.step([state])
    watched.preview(state)
    assert state.velocity_C1hw is not None
    torch.testing.assert_close(seen[1], (state.latent_C1hw - state.sigma * state.velocity_C1hw)[:, 0])
    assert pipeline.preview(state).mode == "RGB"


def test_decoded_in_parts_as_at_once(pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    states = [alone(pipeline, request) for request in REQUESTS[:4]]
    together = [np.asarray(output.image).astype(int) for output in pipeline.decode(states)]
    monkeypatch.setattr("gesso.pipelines.planning._DECODED_PIXELS", 1)
    parted = [np.asarray(output.image).astype(int) for output in pipeline.decode(states)]
    assert all(abs(one - other).max() <= 1 for one, other in zip(together, parted, strict=True))
    assert list(pipeline.decode([])) == []


def test_pixels_are_rounded_to_the_nearest() -> None:
    image = torch.tensor([-2.0, -1.0, 0.0, 0.0041, 1.0, 3.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(image)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]


def test_half_precision_is_the_networks_alone() -> None:
    pipeline = tiny_pipeline()
    pipeline.transformer.to(torch.bfloat16)
    pipeline.dtype = torch.bfloat16
    state = alone(pipeline, ask())
    assert (pipeline.dtype, state.latent_C1hw.dtype) == (torch.bfloat16, torch.float32)
    assert state.latent_C1hw.isfinite().all()


def test_a_seed_is_one_picture(pipeline: ZImagePipeline) -> None:
    many = run_plainly(pipeline, ask(num_images=2))
    (second,) = run_plainly(pipeline, ask(seed=4))
    assert many[1].image.tobytes() == second.image.tobytes()
    assert many[0].image.tobytes() != second.image.tobytes()
