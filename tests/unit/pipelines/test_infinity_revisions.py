"""Revisions of Infinity's pictures: against the slow painter, what they keep, what they cost, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gesso.errors import RequestError
from gesso.models.attention import sdpa
from gesso.models.infinity.layers import SelfAttention
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
    return GenerationRequest.model_validate({"prompt": prompt, "seed": 3, "revision_strength": 0.4} | fields)


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
    {"revisions": 3},
    {"revisions": 2, "revision_strength": 0.2},  # the last scale only: nothing of it is cached
    {"revisions": 2, "revision_strength": 0.8},
    {"revisions": 2, "guidance": 1.0},
    {"revisions": 2, "guidance": (3.0, 2.0, 1.0, 1.0, 1.0)},  # no null rows where a revision begins
    {"revisions": 2, "guidance": (1.0, 1.0, 1.0, 3.0, 1.0), "negative": "two blue rings"},
    {"revisions": 1, "temperature": (2.0, 1.0, 0.5, 0.25, 0.1)},
    {"revisions": 1, "width": 48, "revision_strength": 0.3},
]


@pytest.mark.parametrize("fields", REVISED, ids=str)
@pytest.mark.parametrize("patchify", [False, True])
def test_scales_read_at_once_are_scales_read_in_turn(fields: dict[str, object], patchify: bool) -> None:
    pipeline = tiny_pipeline(patchify=patchify)
    state, slow = finished(pipeline, ask(**fields)), paint_always_doubled(pipeline, ask(**fields))
    assert [bits_khw.tolist() for bits_khw in state.bits] == [bits_khw.tolist() for bits_khw in slow]


@torch.no_grad()
def test_a_token_of_several_scales_sees_its_own_and_earlier_ones(pipeline: InfinityPipeline) -> None:
    """Logits of scales read at once are those of training's forward, over a cache that held something else."""
    network, upto = pipeline.transformer, 3
    text = network.read_text(torch.randn(2, 4, network.config.text_width, generator=torch.Generator().manual_seed(0)))
    inputs_2LK = torch.randn(2, SQUARE.tokens - 1, network.config.bits, generator=torch.Generator().manual_seed(1))
    whole_2LV = network(inputs_2LK, text, network.layout(SQUARE))
    cache = network.empty_cache(2, SQUARE)
    cache.slab.fill_(math.nan)
    start, end = SQUARE.starts[upto], SQUARE.starts[upto + 1]
    logits_2nV = network.step(inputs_2LK[:, : end - 1], text, SQUARE, upto, cache, anew=True)
    assert torch.allclose(logits_2nV, whole_2LV[:, start:end], atol=1e-5)
    assert not cache.slab[..., :end, :].isnan().any()
    last = network.step(inputs_2LK[:, end - 1 :], text, SQUARE, upto + 1, cache)
    assert torch.allclose(last, whole_2LV[:, end:], atol=1e-5)


def test_a_revision_keeps_what_the_tokenizer_sees(pipeline: InfinityPipeline) -> None:
    plain = finished(pipeline, ask(revisions=0))
    state = begun(pipeline, ask(revisions=1))
    while state.scale < len(SQUARE):
        pipeline.step([state])
    assert torch.equal(state.sum_kHW, plain.sum_kHW)  # the first time through it is the same picture
    assert state.is_painted and state.remaining == 2
    pipeline.step([state])
    seen = quantize(pipeline.autoencoder.encode(pipeline.autoencoder.decode(plain.sum_kHW[None])), SQUARE.grids).bits
    assert [bits.tolist() for bits in state.bits[:3]] == [bits[0].tolist() for bits in seen[:3]]
    pipeline.step([state])
    assert state.remaining == 0
    whole = sum_of_codes([bits[None] for bits in state.bits], SQUARE.final_grid)[0]
    assert torch.allclose(state.sum_kHW, whole, atol=1e-6)


def test_scales_of_a_given_picture_are_not_painted_anew(pipeline: InfinityPipeline, tmp_path: Path) -> None:
    next(iter(run_plainly(pipeline, ask(revisions=0)))).image.save(tmp_path / "given.png")
    given = {"init_image": str(tmp_path / "given.png"), "revisions": 2}
    state = begun(pipeline, ask("a blue ring", init_strength=0.2, **given))
    assert (len(state.conditioning.prefix), state.kept, state.total) == (4, 4, 7)  # else three were kept
    assert begun(pipeline, ask("a blue ring", init_strength=0.9, **given)).kept == 3
    whole = finished(pipeline, ask("a blue ring", init_strength=0.0, **given))
    assert whole.total == 5
    assert [bits.tolist() for bits in whole.bits] == [bits[0].tolist() for bits in whole.conditioning.prefix]


def test_what_it_costs(pipeline: InfinityPipeline) -> None:
    plain, plan = pipeline.plan(ask(revisions=0)), pipeline.plan(ask(revisions=2))
    assert (plain.steps, plan.steps) == (5, 9)
    assert plan.peak_bytes >= plain.peak_bytes
    state = begun(pipeline, ask(revisions=2))
    flops = []
    while state.remaining:
        assert state.total - state.remaining == len(flops)
        flops.append(state.cost.flops)
        pipeline.step([state])
    assert len(flops) == plan.steps == state.total
    assert math.isclose(sum(flops) - sum(flops[:5]), plan.cost.flops - plain.cost.flops)
    once = pipeline.plan(ask(revisions=1)).cost.bytes - plain.cost.bytes
    assert once < 2 * state.costs[4].bytes + state.revision_cost.bytes  # weights are read once a step


@pytest.mark.parametrize("guidance", [3.0, (3.0, 2.0, 1.0, 1.0, 1.0), 1.0])
def test_operations_of_its_first_step(pipeline: InfinityPipeline, guidance: object) -> None:
    """Against those that torch counts; rows without guidance are counted once."""
    state = begun(pipeline, ask(revisions=1, guidance=guidance))
    while not state.is_painted:
        pipeline.step([state])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        stated = state.cost.flops
        pipeline.step([state])
    assert counter.get_total_flops() == pytest.approx(stated, rel=0.05)


def test_it_goes_by_kernels_that_take_no_mask(pipeline: InfinityPipeline) -> None:
    """Flash, sage and flex attention know masks of keys alone."""
    unmasked = tiny_pipeline()

    def kernel(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        assert mask is None
        return sdpa(q, k, v, scale=scale)

    for module in unmasked.transformer.modules():
        if isinstance(module, SelfAttention):
            module.kernel = kernel
    states = [finished(made, ask(revisions=1)) for made in (pipeline, unmasked)]
    assert [bits.tolist() for bits in states[0].bits] == [bits.tolist() for bits in states[1].bits]


def test_what_is_left_out_is_told(pipeline: InfinityPipeline) -> None:
    assert pipeline.plan(ask()).warnings == ("revision_strength has no effect without revisions",)
    assert pipeline.plan(ask(revisions=1)).warnings == ()
    revised = tiny_pipeline(replace(DEFAULTS, revisions=2))
    (warning,) = revised.plan(ask(guidance_layer=-1)).warnings
    assert warning == "a guidance_layer leaves out the 2 revisions that tiny has else"
    assert revised.plan(ask(guidance_layer=-1, revisions=0)).warnings == (
        "revision_strength has no effect without revisions",
    )


def test_strengths_leave_a_scale_to_keep_and_one_to_paint(pipeline: InfinityPipeline) -> None:
    plans = [pipeline.plan(ask(revisions=1, revision_strength=strength)) for strength in (0.0, 0.5, 1.0)]
    assert [plan.steps for plan in plans] == [6, 7, 9]


def test_pictures_that_begin_a_revision_step_with_their_like_alone(pipeline: InfinityPipeline) -> None:
    first, behind = begun(pipeline, ask(revisions=1)), begun(pipeline, ask(revisions=1))
    other = begun(pipeline, ask(revisions=1, revision_strength=0.2))
    for state in (first, other):
        for _ in range(5):
            pipeline.step([state])
    for _ in range(3):
        pipeline.step([behind])
    assert len({state.batch_key for state in (first, behind, other)}) == 3
    pipeline.step([first])
    pipeline.step([behind])
    assert first.batch_key == behind.batch_key  # in the midst of it they are at a scale like any other


def test_refusals(pipeline: InfinityPipeline) -> None:
    with pytest.raises(RequestError) as refused:
        pipeline.plan(ask(revisions=1, guidance_layer=-1))
    assert (refused.value.field, refused.value.hint) == ("revisions", "guide the logits: guidance_layer 0")
    single = tiny_pipeline()
    single.schedules[32, 32] = ScaleSchedule(((4, 4),), (4, 4))
    with pytest.raises(RequestError) as refused:
        single.plan(ask(revisions=1))
    assert refused.value.field == "revisions"
    for revisions in (-1, 101, 0.5, "many"):
        with pytest.raises(RequestError, match="revisions"):
            ask(revisions=revisions)


def test_guidance_inside_the_network_goes_without_those_of_the_model() -> None:
    pipeline = tiny_pipeline(replace(DEFAULTS, revisions=2))
    assert pipeline.plan(ask()).request.revisions == 2
    assert pipeline.plan(ask(guidance_layer=-1)).request.revisions == 0
