"""What Infinity's `plan` fills in, refuses and counts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gesso.errors import FileError, RequestError
from gesso.models.infinity.cost import cache_bytes, decode_flops, encode_flops, scale_flops, text_flops
from gesso.pipelines.infinity import InfinityPipeline
from gesso.request import GenerationRequest
from tests.tiny_infinity import DEFAULTS, NETWORK, SQUARE, TOKENIZER, tiny_pipeline


@pytest.fixture(scope="module")
def pipeline() -> InfinityPipeline:
    return tiny_pipeline()


def ask(**fields: object) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": "a red star", **fields})


def _refusal(pipeline: InfinityPipeline, **fields: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        pipeline.plan(ask(**fields))
    return caught.value


WITHOUT_EFFECT = {"steps", "scheduler", "true_guidance", "guidance_normalization", "guidance_truncation"}
WITHOUT_EFFECT |= {"frames", "fps", "mask", "clip_skip", "cache", "identity", "refiner"}
ENGINES = {"safety"}  # filled by the engine


def test_fields_of_diffusion_have_no_effect_and_a_warning(pipeline: InfinityPipeline) -> None:
    plan = pipeline.plan(ask(steps=9, scheduler="euler"))
    assert plan.warnings == ("tiny has no use for steps", "tiny has no use for scheduler")


def test_every_blank_is_filled(pipeline: InfinityPipeline) -> None:
    plan = pipeline.plan(ask())
    blanks = {name for name, value in plan.request.model_dump().items() if value is None}
    assert blanks == {"init_image", "init_strength", *WITHOUT_EFFECT, *ENGINES}  # the first two: no picture was given
    assert plan.request.seed is not None
    assert pipeline.plan(plan.request).request == plan.request
    assert plan.steps == len(SQUARE)
    assert (plan.request.width, plan.request.guidance, plan.request.top_k) == (32, 3.0, 0)


def test_what_is_given_stays(pipeline: InfinityPipeline) -> None:
    given = {
        "width": 48,
        "height": 32,
        "seed": 0,
        "guidance": 0.0,
        "guidance_layer": -1,
        "temperature": (0.5, 1.0, 2.0),
        "top_k": 1,
        "top_p": 0.0,
    }
    plan = pipeline.plan(ask(**given))
    assert plan.request.model_dump(include=set(given)) == given
    assert plan.steps == 3


def test_defaults_are_the_models() -> None:
    pipeline = tiny_pipeline(replace(DEFAULTS, guidance=(1.0, 2.0, 3.0, 4.0, 5.0), width=32, top_p=0.5, top_k=2))
    filled = pipeline.plan(ask()).request
    assert (filled.guidance, filled.top_p, filled.top_k) == ((1.0, 2.0, 3.0, 4.0, 5.0), 0.5, 2)


def test_one_edge_is_enough_where_it_tells_the_other(pipeline: InfinityPipeline) -> None:
    assert pipeline.plan(ask(width=48)).request.height == 32


def test_sizes_that_are_not_painted_offer_the_nearest(pipeline: InfinityPipeline) -> None:
    error = _refusal(pipeline, width=40, height=32)
    assert (error.field, error.value, error.hint) == ("width", 40, "nearest: 32x32 or 48x32")
    assert (_refusal(pipeline, width=48, height=64).field, _refusal(pipeline, height=64).field) == ("height", "height")
    assert _refusal(pipeline, width=1000).hint == "nearest: 48x32 or 32x32"


@pytest.mark.parametrize("field", ["guidance", "temperature"])
@pytest.mark.parametrize("length", [1, 4, 6])
def test_lists_have_one_value_a_scale(pipeline: InfinityPipeline, field: str, length: int) -> None:
    error = _refusal(pipeline, **{field: (1.0,) * length})
    assert error.field == field
    assert "5 values" in error.hint
    pipeline.plan(ask(**{field: (1.0,) * 5}))


def test_layers_that_the_network_does_not_have(pipeline: InfinityPipeline) -> None:
    for layer in (-2, -3, -1000):
        error = _refusal(pipeline, guidance_layer=layer)
        assert (error.field, error.allowed) == ("guidance_layer", "0 or from -1 to -1 for tiny")
    assert pipeline.plan(ask(guidance_layer=-1)).request.guidance_layer == -1


@pytest.mark.parametrize("field", ["prompt", "negative"])
def test_long_prompts_are_counted(pipeline: InfinityPipeline, field: str) -> None:
    longest = " ".join(["red"] * 11)  # and the end mark
    pipeline.plan(ask(**{field: longest}))
    error = _refusal(pipeline, **{field: longest + " star"})
    assert (error.field, error.hint) == (field, "it has 13; shorten it")
    assert "at most 12 tokens" in error.allowed


def test_a_given_picture_is_looked_at(pipeline: InfinityPipeline, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "given.png")
    plan = pipeline.plan(ask(init_image=str(tmp_path / "given.png")))
    assert plan.request.init_strength == DEFAULTS.init_strength
    with pytest.raises(FileError):
        pipeline.plan(ask(init_image=str(tmp_path / "absent.png")))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(FileError):
        pipeline.plan(ask(init_image=str(tmp_path / "broken.png")))


@given(guidance=st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=5, max_size=5))
def test_costs_add_up(guidance: list[float]) -> None:
    """A plan's operations are those of its text, its scales, and its picture; guided scales run two rows."""
    pipeline = PIPELINE
    plan = pipeline.plan(ask(seed=1, guidance=tuple(guidance)))
    (conditioning,) = pipeline.encode([plan])
    state = pipeline.begin(plan, conditioning, 0)
    last = max((scale for scale, value in enumerate(guidance) if value != 1), default=-1)
    total = text_flops(NETWORK, 4) + decode_flops(TOKENIZER, SQUARE.final_grid)
    for scale in range(plan.steps):
        assert state.cost.flops == (2 if scale <= last else 1) * scale_flops(NETWORK, SQUARE, scale, 4)
        assert state.cost.bytes > 0
        total += state.cost.flops
        pipeline.step([state])
    assert math.isclose(plan.cost.flops, total)
    assert plan.peak_bytes > cache_bytes(NETWORK, SQUARE, 2, 4)


PIPELINE = tiny_pipeline()


def test_bytes_go_by_the_dtype_of_the_blocks() -> None:
    plain, half = tiny_pipeline(), tiny_pipeline(dtype=torch.bfloat16)
    whole, halved = (pipeline.plan(ask()).cost.bytes for pipeline in (plain, half))
    assert halved == whole / 2
    assert (plain.dtype, half.dtype) == (torch.float32, torch.bfloat16)


@torch.no_grad()
def test_operations_are_those_that_torch_counts(pipeline: InfinityPipeline) -> None:
    network, tokenizer = pipeline.transformer, pipeline.autoencoder
    with FlopCounterMode(display=False) as counter:
        text = network.read_text(torch.zeros(1, 4, NETWORK.text_width))
    _close(text_flops(NETWORK, 4), counter, 0.05)
    cache = network.empty_cache(1, SQUARE)
    for scale in range(len(SQUARE)):
        tokens = SQUARE.starts[scale + 1] - SQUARE.starts[scale]
        inputs = torch.zeros(1, tokens, NETWORK.bits) if scale else None
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it counts no fused kernels
            network.step(inputs, text, SQUARE, scale, cache)
        _close(scale_flops(NETWORK, SQUARE, scale, 4), counter, 0.05)
    with FlopCounterMode(display=False) as counter:
        tokenizer.decode(torch.zeros(1, TOKENIZER.bits, 4, 4))
    _close(decode_flops(TOKENIZER, (4, 4)), counter, 0.001)
    with FlopCounterMode(display=False) as counter:
        tokenizer.encode(torch.zeros(1, 3, 4 * TOKENIZER.stride, 4 * TOKENIZER.stride))
    _close(encode_flops(TOKENIZER, (4, 4)), counter, 0.001)


def _close(stated: float, counter: FlopCounterMode, share: float) -> None:
    assert abs(stated - counter.get_total_flops()) <= share * stated


def test_words_it_does_not_know_are_told(pipeline: InfinityPipeline) -> None:
    plan = pipeline.plan(ask(prompt="a red Zebra on a zebra", negative="fog"))
    assert len(plan.warnings) == 1
    assert "'zebra', 'fog'" in plan.warnings[0]
    assert pipeline.plan(ask()).warnings == ()


def test_guidance_of_a_distilled_model_is_told() -> None:
    distilled = tiny_pipeline(replace(DEFAULTS, guidance=1.0, distilled=True))
    assert distilled.plan(ask()).warnings == ()
    words = ("tiny is distilled: guidance doubles its work and harms the picture",)
    assert distilled.plan(ask(guidance=3.0)).warnings == words


@pytest.mark.parametrize(("guidance", "warned"), [(1.0, True), ((1.0,) * 5, True), (2.0, False), (None, False)])
def test_a_negative_prompt_that_nothing_is_guided_from_is_told(
    pipeline: InfinityPipeline, guidance: object, warned: bool
) -> None:
    words = ("negative has no effect where guidance is 1",)
    assert pipeline.plan(ask(negative="a blue ring", guidance=guidance)).warnings == (words if warned else ())
