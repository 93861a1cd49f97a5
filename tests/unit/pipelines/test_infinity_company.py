"""Infinity in company: pictures that join, leave and differ in every setting come out as each does alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from gesso.models.infinity.cache import KeyValueCache
from gesso.pipelines.infinity import InfinityPipeline
from gesso.pipelines.infinity_state import InfinityState
from gesso.request import GenerationRequest
from tests.oracle import run_plainly
from tests.tiny_infinity import tiny_pipeline


@pytest.fixture(scope="module")
def pipeline() -> InfinityPipeline:
    return tiny_pipeline()


def ask(prompt: str = "a red star", **fields: object) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": prompt, "seed": 3, **fields})


def begin(pipeline: InfinityPipeline, *requests: GenerationRequest) -> list[InfinityState]:
    """One state a request, their prompts read together."""
    plans = [pipeline.plan(request) for request in requests]
    made = pipeline.encode(plans)
    return [pipeline.begin(plan, conditioning, 0) for plan, conditioning in zip(plans, made, strict=True)]


def check_as_alone(pipeline: InfinityPipeline, states: list[InfinityState], requests: list[GenerationRequest]) -> None:
    """Sums of codes and pictures of finished states against the plain loop."""
    outputs = list(pipeline.decode(states))
    for state, output, request in zip(states, outputs, requests, strict=True):
        (alone,) = begin(pipeline, request)
        while alone.remaining:
            pipeline.step([alone])
        torch.testing.assert_close(state.sum_kHW, alone.sum_kHW, atol=1e-5, rtol=0)
        (expected,) = run_plainly(pipeline, request)
        difference = torch.tensor(list(output.image.tobytes())) - torch.tensor(list(expected.image.tobytes()))
        assert difference.abs().max() <= 1
        assert output.seed == expected.seed


REQUESTS = [
    ask("a red star", seed=1),
    ask("two blue rings on a white background", seed=2, guidance=1.0),
    ask("ring", seed=3, guidance=(1.0, 1.0, 3.0, 1.0, 1.0), temperature=0.3),
    ask("a star", seed=4, guidance=(4.0, 2.0, 1.0, 1.0, 1.0), top_k=1),
    ask("a star", seed=4, guidance=7.0, temperature=(2.0, 1.0, 0.5, 0.1, 0.1), top_p=0.7),
    ask("a large blue star", seed=5, negative="red", guidance=2.0),
    ask(
        "a large blue star", seed=5, negative="three red rings on a black background", guidance=2.0, top_k=1, top_p=0.9
    ),
    ask("black", seed=6, guidance=0.0),
]


def test_every_setting_is_each_pictures_own(pipeline: InfinityPipeline) -> None:
    states = begin(pipeline, *REQUESTS)
    assert len({state.batch_key for state in states}) == 1
    while states[0].remaining:
        pipeline.step(states)
    check_as_alone(pipeline, states, REQUESTS)


def test_settings_do_change_the_picture(pipeline: InfinityPipeline) -> None:
    """Otherwise the test above says little."""
    plain = run_plainly(pipeline, ask())[0].image.tobytes()
    for fields in (
        {"guidance": 1.0},
        {"guidance": (3.0, 3.0, 3.0, 3.0, 1.0)},
        {"guidance_layer": -1},
        {"temperature": 0.2},
        {"top_k": 1},
        {"top_p": 0.6},
        {"negative": "blue"},
        {"seed": 4},
        {"prompt": "a blue star"},
    ):
        assert run_plainly(pipeline, ask(**{"prompt": "a red star", **fields}))[0].image.tobytes() != plain, fields


@pytest.mark.parametrize("guidance_layer", [0, -1])
def test_joining_and_leaving_midway(pipeline: InfinityPipeline, guidance_layer: int) -> None:
    """Two begin; a third catches up and joins; one leaves for a while, comes back in another order, all finish."""
    requests = [
        request.model_copy(update={"guidance_layer": guidance_layer, "guidance": 3.0}) for request in REQUESTS[:3]
    ]
    one, two, three = begin(pipeline, *requests)
    pipeline.step([one, two])
    pipeline.step([two, one])
    pipeline.step([three])
    pipeline.step([three])
    pipeline.step([three, one, two])
    pipeline.step([two])
    pipeline.step([one, three])
    pipeline.step([one, two, three])
    assert [state.remaining for state in (one, two, three)] == [0, 0, 0]
    check_as_alone(pipeline, [one, two, three], requests)


def test_only_pictures_at_the_same_place_share_a_key(pipeline: InfinityPipeline) -> None:
    one, two, wide, inside, unguided = begin(
        pipeline, ask(), ask(seed=9, top_k=1), ask(width=48), ask(guidance_layer=-1), ask(guidance_layer=-1, guidance=1)
    )
    assert one.batch_key == two.batch_key
    assert len({state.batch_key for state in (one, wide, inside, unguided)}) == 4
    pipeline.step([one])
    assert one.batch_key != two.batch_key
    pipeline.step([two])
    assert one.batch_key == two.batch_key


def test_layer_guidance_in_company(pipeline: InfinityPipeline) -> None:
    requests = [
        ask("a red star", seed=1, guidance_layer=-1, guidance=2.0),
        ask("ring on white", seed=2, guidance_layer=-1, guidance=5.0, negative="a black star"),
    ]
    states = begin(pipeline, *requests)
    while states[0].remaining:
        pipeline.step(states)
    check_as_alone(pipeline, states, requests)


def test_patchified_tokens_in_company() -> None:
    pipeline = tiny_pipeline(patchify=True)
    states = begin(pipeline, *REQUESTS)
    while states[0].remaining:
        pipeline.step(states)
    check_as_alone(pipeline, states, REQUESTS)


def test_given_and_painted_pictures_in_company(pipeline: InfinityPipeline, tmp_path: Path) -> None:
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "given.png")
    requests = [ask(init_image=str(tmp_path / "given.png"), init_strength=0.4), ask()]
    states = begin(pipeline, *requests)
    while states[0].remaining:
        pipeline.step(states)
    check_as_alone(pipeline, states, requests)


def test_large_sets_are_decoded_in_parts(pipeline: InfinityPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    states = begin(pipeline, *REQUESTS)
    while states[0].remaining:
        pipeline.step(states)
    together = [output.image.tobytes() for output in pipeline.decode(states)]
    monkeypatch.setattr("gesso.pipelines.planning._DECODED_PIXELS", 3 * 32 * 32)
    parted = list(pipeline.decode(states))
    assert [output.seed for output in parted] == [request.seed for request in REQUESTS]
    for part, whole in zip(parted, together, strict=True):
        difference = torch.tensor(list(part.image.tobytes())) - torch.tensor(list(whole))
        assert difference.abs().max() <= 1
    assert list(pipeline.decode([])) == []


# ---- the cache ------------------------------------------------------------------------------------------------------


def _slab(state: InfinityState) -> torch.Tensor:
    assert state.company is not None
    return state.company.cache.slab


@contextmanager
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_company_that_stays_is_never_copied(pipeline: InfinityPipeline) -> None:
    states = begin(pipeline, *[ask(seed=seed, guidance=(3.0, 3.0, 1.0, 1.0, 1.0)) for seed in range(3)])
    pipeline.step(states)
    place = _slab(states[0]).data_ptr()
    assert _slab(states[0]).shape[2] == 6
    for rows in (6, 3, 3):  # when guidance ends, the prompts' rows go on where they lie
        pipeline.step(states)
        assert _slab(states[0]).data_ptr() == place
        assert _slab(states[0]).shape[2] == rows


def test_null_rows_run_only_as_long_as_they_matter(pipeline: InfinityPipeline) -> None:
    for guidance, rows in (
        (1.0, [1, 1, 1, 1]),
        ((1.0, 1.0, 1.0, 2.0, 1.0), [2, 2, 2, 2]),
        ((2.0, 1.0, 1.0, 1.0, 1.0), [2, 1, 1, 1]),
    ):
        (state,) = begin(pipeline, ask(guidance=guidance))
        assert (state.conditioning.null is None) == (guidance == 1.0)
        for expected in rows:
            pipeline.step([state])
            assert _slab(state).shape[2] == expected


def test_nothing_is_kept_after_the_last_scale(pipeline: InfinityPipeline) -> None:
    states = begin(pipeline, *[ask(seed=seed) for seed in range(3)])
    with _without_collector():
        pipeline.step(states)
        slab = weakref.ref(_slab(states[0]))
        for _ in range(3):
            pipeline.step(states)
        assert slab() is not None
        pipeline.step(states)
        assert slab() is None
    assert all(state.company is state.prompt_row is state.null_row is None for state in states)
    assert all(state.inputs_nK is None for state in states)


def test_dropped_pictures_free_their_memory_at_once(pipeline: InfinityPipeline) -> None:
    """As after a cancellation: no waiting for the collector of cycles."""
    states = begin(pipeline, *REQUESTS[:3])
    with _without_collector():
        pipeline.step(states)
        slab = weakref.ref(_slab(states[0]))
        del states[:]
        assert slab() is None


def test_a_cache_has_no_room_for_the_last_scale(pipeline: InfinityPipeline) -> None:
    (state,) = begin(pipeline, ask())
    pipeline.step([state])
    assert state.company is not None
    cache: KeyValueCache = state.company.cache
    assert cache.slab.shape[4] == state.schedule.starts[-2]
