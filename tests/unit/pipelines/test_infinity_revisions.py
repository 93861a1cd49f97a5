"""Revisions of Infinity's pictures: against the slow painter, what they keep, what they cost, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gesso.errors import RequestError
from gesso.models.infinity.cost import cache_bytes
from gesso.models.infinity.quantizer import quantize, sum_of_codes
from gesso.models.infinity.scales import ScaleSchedule
from gesso.pipelines.infinity import InfinityPipeline
from gesso.pipelines.infinity_state import InfinityState
from gesso.request import GenerationRequest
from tests.oracle import run_plainly
from tests.tiny_infinity import DEFAULTS, SQUARE, tiny_pipeline
from tests.unit.pipelines.always_doubled import paint_always_doubled


@pytest.fixture(scope="module")
def pipeline() -> InfinityPipeline:
    return tiny_pipeline()


def ask(prompt: object = "a red star", **fields: object) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": prompt, "seed": 3} | fields)


def begun(pipeline: InfinityPipeline, request: GenerationRequest) -> InfinityState:
    plan = pipeline.plan(request)
    return pipeline.begin(plan, pipeline.encode([plan])[0], 0)


def finished(pipeline: InfinityPipeline, request: GenerationRequest) -> InfinityState:
    state = begun(pipeline, request)
    while state.remaining:
        pipeline.step([state])
    return state


REVISED: list[dict[str, object]] = [
    {"revisions": 1},
    {"revisions": 4},  # before every scale but the first
    {"revisions": 2, "guidance": 1.0},
    {"revisions": 2, "guidance": (3.0, 2.0, 1.0, 1.0, 1.0)},
    {"revisions": 2, "guidance": (1.0, 1.0, 1.0, 3.0, 1.0), "negative": "two blue rings"},
    {"revisions": 2, "guidance_layer": -1},
    {"revisions": 1, "temperature": (2.0, 1.0, 0.5, 0.25, 0.1)},
    {"revisions": 2, "width": 48},
]


@pytest.mark.parametrize("fields", REVISED, ids=str)
@pytest.mark.parametrize("patchify", [False, True])
def test_bits_are_those_of_the_slow_painter(fields: dict[str, object], patchify: bool) -> None:
    pipeline = tiny_pipeline(patchify=patchify)
    state, slow = finished(pipeline, ask(**fields)), paint_always_doubled(pipeline, ask(**fields))
    assert [bits_khw.tolist() for bits_khw in state.bits] == [bits_khw.tolist() for bits_khw in slow]
    assert state.bits[0].any() or state.bits[-1].any()


def test_a_revision_goes_on_from_what_the_tokenizer_sees(pipeline: InfinityPipeline) -> None:
    plain, state = begun(pipeline, ask(revisions=0)), begun(pipeline, ask(revisions=1))
    for _ in range(4):
        pipeline.step([plain])
        pipeline.step([state])
    seen = quantize(pipeline.autoencoder.encode(pipeline.autoencoder.decode(plain.sum_kHW[None])), SQUARE.grids).bits
    assert not torch.equal(state.sum_kHW, plain.sum_kHW)
    assert [bits.tolist() for bits in state.bits] == [bits[0].tolist() for bits in seen[:4]]
    pipeline.step([state])
    assert state.remaining == 0
    whole = sum_of_codes([bits[None] for bits in state.bits], SQUARE.final_grid)[0]
    assert torch.allclose(state.sum_kHW, whole, atol=1e-6)


def test_a_given_picture_is_not_revised_before_anything_is_painted(pipeline: InfinityPipeline, tmp_path: Path) -> None:
    next(iter(run_plainly(pipeline, ask(revisions=0)))).image.save(tmp_path / "given.png")
    given = {"init_image": str(tmp_path / "given.png"), "revisions": 3}
    for strength, scales in ((0.0, 5), (0.2, 4), (0.4, 3), (0.8, 1)):
        state = begun(pipeline, ask("a blue ring", init_strength=strength, **given))
        assert len(state.conditioning.prefix) == scales
        assert state.first_revised == max(2, scales + 1)
    state = begun(pipeline, ask("a blue ring", init_strength=0.8, **given))
    pipeline.step([state])
    assert torch.equal(state.bits[0], state.conditioning.prefix[0][0])
    pipeline.step([state])
    plain = begun(pipeline, ask("a blue ring", init_strength=0.8, **given | {"revisions": 0}))
    for _ in range(2):
        pipeline.step([plain])
    seen = quantize(pipeline.autoencoder.encode(pipeline.autoencoder.decode(plain.sum_kHW[None])), SQUARE.grids).bits
    assert torch.equal(plain.bits[0], state.conditioning.prefix[0][0])
    assert [bits.tolist() for bits in state.bits] == [bits[0].tolist() for bits in seen[:2]]
    whole = finished(pipeline, ask("a blue ring", init_strength=0.0, **given))
    assert [bits.tolist() for bits in whole.bits] == [bits[0].tolist() for bits in whole.conditioning.prefix]


def test_what_it_costs(pipeline: InfinityPipeline) -> None:
    plain, plan = pipeline.plan(ask(revisions=0)), pipeline.plan(ask(revisions=2))
    assert plain.steps == plan.steps == 5
    before, after = begun(pipeline, ask(revisions=0)).costs, begun(pipeline, ask(revisions=2)).costs
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, True, False, False, True]
    weights = sum(p.nbytes for part in (pipeline.transformer, pipeline.autoencoder) for p in part.parameters())
    assert plan.peak_bytes - plain.peak_bytes <= cache_bytes(pipeline.config, SQUARE, 2, 4) < plan.peak_bytes - weights
    assert plan.peak_bytes > plain.peak_bytes
    added = [after[scale].flops - before[scale].flops for scale in (2, 3)]
    assert math.isclose(sum(added), plan.cost.flops - plain.cost.flops) and added[0] == added[1] > 0


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_operations_of_a_step_with_one(pipeline: InfinityPipeline, guidance: object) -> None:
    """Against those that torch counts."""
    state = begun(pipeline, ask(revisions=1, guidance=guidance))
    for _ in range(3):
        pipeline.step([state])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        stated = state.cost.flops
        pipeline.step([state])
    assert counter.get_total_flops() == pytest.approx(stated, rel=0.05)


def test_pictures_with_and_without_share_steps(pipeline: InfinityPipeline) -> None:
    """Those that are not revised then are left as they are."""
    asked = [ask(revisions=revisions, seed=seed) for seed, revisions in enumerate((0, 2, 1))]
    asked.append(ask(revisions=3, guidance=(2.0, 1.5, 1.0, 1.0, 1.0)))
    alone = [finished(pipeline, request) for request in asked]
    states = [begun(pipeline, request) for request in asked]
    while states[0].remaining:
        assert len({state.batch_key for state in states}) == 1
        pipeline.step(states)
    for state, other in zip(states, alone, strict=True):
        assert [bits.tolist() for bits in state.bits] == [bits.tolist() for bits in other.bits]


def test_the_models_own_number_is_the_default() -> None:
    pipeline = tiny_pipeline(replace(DEFAULTS, revisions=2))
    assert pipeline.plan(ask()).request.revisions == 2
    assert pipeline.plan(ask(revisions=0)).request.revisions == 0
    pipeline.schedules[32, 32] = ScaleSchedule(((2, 2), (4, 4)), (4, 4))
    assert pipeline.plan(ask()).request.revisions == 1  # as many as there is room for


def test_refusals(pipeline: InfinityPipeline) -> None:
    with pytest.raises(RequestError, match="revisions 5 is not from 0 to 4 for tiny"):
        pipeline.plan(ask(revisions=5))
    single = tiny_pipeline()
    single.schedules[32, 32] = ScaleSchedule(((4, 4),), (4, 4))
    assert single.plan(ask(revisions=0)).steps == 1
    with pytest.raises(RequestError, match="revisions 1 is not 0 for tiny"):
        single.plan(ask(revisions=1))
    for revisions in (-1, 101, 0.5, "many"):
        with pytest.raises(RequestError, match="revisions"):
            ask(revisions=revisions)
