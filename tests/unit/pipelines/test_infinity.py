"""Infinity's pictures: against a slow painter that always runs both rows, against themselves, from a given picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gesso.engine import Engine
from gesso.models.infinity.autoencoder import to_uint8
from gesso.models.infinity.quantizer import quantize, shrink, sum_of_codes
from gesso.pictures import cover_crop, read_pixels
from gesso.pipelines.infinity import InfinityPipeline
from gesso.pipelines.infinity_state import InfinityState
from gesso.request import GenerationRequest
from tests.oracle import run_plainly
from tests.tiny_infinity import SQUARE, tiny_pipeline
from tests.unit.pipelines.always_doubled import paint_always_doubled


@pytest.fixture(scope="module")
def pipeline() -> InfinityPipeline:
    return tiny_pipeline()


def ask(prompt: object = "a red star", **fields: object) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": prompt, "seed": 3, **fields})


def painted(pipeline: InfinityPipeline, request: GenerationRequest) -> InfinityState:
    """The finished state of the request's first picture."""
    plan = pipeline.plan(request)
    state = pipeline.begin(plan, pipeline.encode([plan])[0], 0)
    while state.remaining:
        pipeline.step([state])
    return state


def pixels(pipeline: InfinityPipeline, request: GenerationRequest) -> list[bytes]:
    return [output.image.tobytes() for output in run_plainly(pipeline, request)]


# ---- against the slow painter ---------------------------------------------------------------------------------------

GUIDED: list[dict[str, object]] = [
    {},
    {"guidance": 1.0},
    {"guidance": 0.0},
    {"guidance": (1.0, 1.0, 1.0, 1.0, 5.0)},
    {"guidance": (5.0, 1.0, 1.0, 1.0, 1.0)},
    {"guidance": (1.0, 4.0, 1.0, 2.0, 1.0)},
    {"guidance": (3.0, 3.0, 3.0, 1.0, 1.0), "temperature": (2.0, 1.0, 0.5, 0.25, 0.1)},
    {"negative": "blue"},
    {"negative": "two blue rings on a black background", "guidance": (3.0, 1.0, 2.0, 1.0, 1.0)},
    {"guidance_layer": -1},
    {"guidance_layer": -1, "guidance": (1.0, 3.0, 1.0, 3.0, 1.0), "negative": "blue ring"},
    {"guidance_layer": -1, "guidance": 1.0},
    {"top_k": 1},
    {"top_k": 2, "top_p": 0.8},
    {"top_p": 0.6, "temperature": 0.7},
    {"top_k": 1, "top_p": 0.5},
]


@pytest.mark.parametrize("patchify", [False, True])
@pytest.mark.parametrize("fields", GUIDED, ids=str)
def test_equals_the_slow_painter(fields: dict[str, object], patchify: bool) -> None:
    pipeline = tiny_pipeline(patchify=patchify)
    request = ask(**fields)
    expected = paint_always_doubled(pipeline, request)
    grids = SQUARE.latent_grids(patchify)
    sum_1kHW = sum_of_codes([bits[None] for bits in expected], grids[-1])
    torch.testing.assert_close(painted(pipeline, request).sum_kHW[None], sum_1kHW, atol=1e-5, rtol=0)


def test_another_schedule_equals_the_slow_painter(pipeline: InfinityPipeline) -> None:
    request = ask(width=48, guidance=(3.0, 1.0, 2.0))
    expected = sum_of_codes([bits[None] for bits in paint_always_doubled(pipeline, request)], (4, 6))
    torch.testing.assert_close(painted(pipeline, request).sum_kHW[None], expected, atol=1e-5, rtol=0)
    assert run_plainly(pipeline, request)[0].image.size == (48, 32)


# ---- seeds ----------------------------------------------------------------------------------------------------------


def test_alone_a_run_repeats_bit_for_bit(pipeline: InfinityPipeline) -> None:
    request = ask(num_images=3)
    first = pixels(pipeline, request)
    assert pixels(pipeline, request) == first == pixels(tiny_pipeline(), request)
    assert len(set(first)) == 3


def test_a_picture_of_a_set_is_the_picture_made_alone(pipeline: InfinityPipeline) -> None:
    assert pixels(pipeline, ask(num_images=3))[2:] == pixels(pipeline, ask(seed=5))


def test_the_largest_seed(pipeline: InfinityPipeline) -> None:
    assert run_plainly(pipeline, ask(seed=2**63 - 1))[0].seed == 2**63 - 1


def test_greedy_pictures_do_not_depend_on_the_seed(pipeline: InfinityPipeline) -> None:
    assert pixels(pipeline, ask(top_k=1)) == pixels(pipeline, ask(top_k=1, seed=99))


@pytest.mark.parametrize("neighbours", [0, 5])
def test_the_engine_equals_the_plain_loop(tiny_infinity: Path, neighbours: int) -> None:
    """Deterministic pictures bit for bit, whatever else is painted."""
    from gesso.engine.loading import load_pipeline

    requests = [
        ask(num_images=3, deterministic=True, model=str(tiny_infinity)),
        ask("two blue rings", width=48, negative="red", deterministic=True, model=str(tiny_infinity)),
    ]
    others = [ask("a ring", seed=seed, num_images=2, model=str(tiny_infinity)) for seed in range(neighbours)]
    with Engine(device="cpu") as engine:
        jobs = [engine.submit(request) for request in [*others, *requests]]
        results = [result for job in jobs[len(others) :] for result in job.result(timeout=60)]
    pipeline = load_pipeline(str(tiny_infinity), "cpu")
    expected = [output for request in requests for output in run_plainly(pipeline, request)]
    assert [result.image.tobytes() for result in results] == [output.image.tobytes() for output in expected]
    assert [result.seed for result in results] == [output.seed for output in expected]


# ---- a given picture ------------------------------------------------------------------------------------------------


@pytest.fixture
def given(tmp_path: Path) -> Path:
    drawn = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(drawn).resize((90, 60)).save(tmp_path / "given.png")
    return tmp_path / "given.png"


def _bits_of(pipeline: InfinityPipeline, path: Path) -> list[Tensor]:
    picture = np.asarray(cover_crop(read_pixels(path), 32, 32))
    image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    return quantize(pipeline.autoencoder.encode(image), SQUARE.latent_grids(pipeline.config.patchify)).bits


@pytest.mark.parametrize("patchify", [False, True])
@pytest.mark.parametrize(("strength", "kept"), [(0.0, 5), (0.2, 4), (0.4, 3), (0.6, 2), (0.8, 1), (1.0, 0)])
def test_the_first_scales_are_the_given_pictures(given: Path, patchify: bool, strength: float, kept: int) -> None:
    pipeline = tiny_pipeline(patchify=patchify)
    plan = pipeline.plan(ask(init_image=str(given), init_strength=strength))
    state = pipeline.begin(plan, pipeline.encode([plan])[0], 0)
    bits, final = _bits_of(pipeline, given), SQUARE.latent_grids(patchify)[-1]
    for scale in range(1, plan.steps + 1):
        pipeline.step([state])
        same = torch.allclose(state.sum_kHW, sum_of_codes(bits[:scale], final)[0], atol=1e-6)
        assert same == (scale <= kept)


def test_strength_0_is_the_tokenizers_reconstruction(pipeline: InfinityPipeline, given: Path) -> None:
    latent = sum_of_codes(_bits_of(pipeline, given), SQUARE.final_grid)
    expected = to_uint8(pipeline.autoencoder.decode(latent))[0].numpy()
    (output,) = run_plainly(pipeline, ask(init_image=str(given), init_strength=0.0))
    assert np.abs(np.asarray(output.image).astype(int) - expected.astype(int)).max() <= 1


def test_strength_1_ignores_the_picture(pipeline: InfinityPipeline, given: Path) -> None:
    assert pixels(pipeline, ask(init_image=str(given), init_strength=1.0)) == pixels(pipeline, ask())


def test_the_rest_is_painted_as_the_prompt_and_the_seed_say(pipeline: InfinityPipeline, given: Path) -> None:
    """Noise is drawn for the given scales too, so that the picture of a seed does not move with the strength."""
    one, two, three = (
        pixels(pipeline, ask(prompt, seed=seed, init_image=str(given), init_strength=0.8))
        for prompt, seed in (("a red star", 1), ("a red star", 2), ("a blue ring", 1))
    )
    assert len({*one, *two, *three}) == 3


# ---- previews and dtypes --------------------------------------------------------------------------------------------


def test_a_preview_shows_the_sum_so_far_and_changes_nothing(pipeline: InfinityPipeline) -> None:
    plan = pipeline.plan(ask())
    state = pipeline.begin(plan, pipeline.encode([plan])[0], 0)
    shown: list[bytes] = []
    while True:
        before = state.sum_kHW.clone()
        shown.append(pipeline.preview(state).tobytes())
        assert torch.equal(state.sum_kHW, before)
        if not state.remaining:
            break
        pipeline.step([state])
    assert len(set(shown)) == plan.steps + 1
    assert shown[-1] == next(pipeline.decode([state])).image.tobytes() == pixels(pipeline, ask())[0]


def test_previews_of_large_pictures_are_small(pipeline: InfinityPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gesso.pipelines.infinity._PREVIEW_CELLS", 3)
    state = painted(pipeline, ask(width=48))
    assert pipeline.preview(state).size == (24, 16)
    expected = to_uint8(pipeline.autoencoder.decode(shrink(state.sum_kHW[None], (2, 3))))[0].numpy()
    assert np.array_equal(np.asarray(pipeline.preview(state)), expected)


@torch.inference_mode()
def test_blocks_in_bfloat16_stay_near_float32() -> None:
    """Logits of every scale on the same inputs, and a whole picture that runs through."""
    plain, half = tiny_pipeline(), tiny_pipeline()
    half.transformer.cast_blocks(torch.bfloat16)
    features = plain.text.features(["a red star"])[0][None]
    inputs = torch.randn(1, SQUARE.tokens, 8, generator=torch.Generator().manual_seed(0)) * 0.5
    logits = []
    for network in (plain.transformer, half.transformer):
        text, cache = network.read_text(features), network.empty_cache(1, SQUARE)
        assert cache.slab.dtype == network.dtype
        steps = [
            network.step(inputs[:, SQUARE.starts[i] : SQUARE.starts[i + 1]] if i else None, text, SQUARE, i, cache)
            for i in range(len(SQUARE))
        ]
        logits.append(torch.cat(steps, dim=1))
    assert logits[1].dtype == torch.float32
    error = (logits[1] - logits[0]).abs()
    assert 0 < error.max() < 0.1 * logits[0].std()
    half.autoencoder.cast(torch.bfloat16)
    (output,) = run_plainly(half, ask(num_images=1))
    assert output.image.size == (32, 32)


def test_a_tokenizer_in_bfloat16_reconstructs_nearly_the_same(pipeline: InfinityPipeline) -> None:
    half = tiny_pipeline()
    half.autoencoder.cast(torch.bfloat16)
    state = painted(pipeline, ask())
    plain, rounded = (np.asarray(next(p.decode([state])).image).astype(int) for p in (pipeline, half))
    assert 0 < np.abs(plain - rounded).max() <= 8
