"""The engine against its oracle: pictures, joining, company, metadata, events (test_endings has how they end)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from gesso.engine import Engine
from gesso.errors import RequestError
from gesso.events import Done, Preview, Progress
from gesso.metadata import pixels_digest
from gesso.request import GenerationRequest
from tests.oracle import run_plainly
from tests.unit.engine.numeric import NumericPipeline, ask, engine_of, steps_of

POLICIES = ("fair", "laggards", "oldest")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_equals_the_plain_loop(policy: str, max_batch: int) -> None:
    requests = [
        ask("a red star", num_images=5),
        ask("a blue ring", seed=2**40),
        ask("wide", width=24, num_images=2),
        ask("elsewhere", model="1", num_images=3),
        ask("alone", deterministic=True, num_images=2),
    ]
    pipelines = NumericPipeline(), NumericPipeline(steps=7, level=False)
    with engine_of(*pipelines, policy=policy, max_batch=max_batch) as engine:
        results = engine.run(requests)
    oracles = {"0": NumericPipeline(), "1": NumericPipeline(steps=7, level=False)}
    expected = [output for request in requests for output in run_plainly(oracles[request.model], request)]
    assert [result.seed for result in results] == [output.seed for output in expected]
    assert [result.image.tobytes() for result in results] == [output.image.tobytes() for output in expected]
    assert max(len(batch) for pipeline in pipelines for batch in pipeline.batches) <= max_batch


def test_image_of_a_set_is_the_image_made_alone_with_its_seed() -> None:
    with engine_of(NumericPipeline()) as engine:
        many = engine.run(ask("a star", seed=10, num_images=3))
        alone = engine.run(ask("a star", seed=12))
    assert [result.index for result in many] == [0, 1, 2]
    assert many[2].image.tobytes() == alone[0].image.tobytes()


def test_blank_seed_is_drawn_and_recorded() -> None:
    with engine_of(NumericPipeline()) as engine:
        job = engine.submit(GenerationRequest(prompt="a star", model="0", num_images=2))
        first, second = job.result(timeout=10)
        again = engine.run(ask("a star", seed=first.seed, num_images=2))
    assert job.request.seed == first.seed == second.seed - 1
    assert again[1].image.tobytes() == second.image.tobytes()


def test_newcomer_catches_up_and_merges() -> None:
    pipeline = NumericPipeline(gate=threading.Semaphore(0), steps=4)
    assert pipeline.gate is not None
    with engine_of(pipeline, policy="laggards") as engine:
        first = engine.submit(ask("first"))
        pipeline.wait_for_steps()
        pipeline.gate.release()
        pipeline.wait_for_steps()  # The first is in its second step now.
        second = engine.submit(ask("second"))
        pipeline.gate.release(100)
        results = [*first.result(timeout=10), *second.result(timeout=10)]
    assert pipeline.batches == [
        [("first", 0, 0)],
        [("first", 0, 1)],
        [("second", 0, 0)],
        [("second", 0, 1)],
        [("first", 0, 2), ("second", 0, 2)],
        [("first", 0, 3), ("second", 0, 3)],
    ]
    assert [result.metadata["company"] for result in results] == [2, 2]
    assert pipeline.decoded == [[("first", 0), ("second", 0)]]


def test_oldest_does_not_wait_for_a_newcomer() -> None:
    pipeline = NumericPipeline(gate=threading.Semaphore(0), steps=3)
    assert pipeline.gate is not None
    with engine_of(pipeline, policy="oldest") as engine:
        first = engine.submit(ask("first"))
        pipeline.wait_for_steps()
        second = engine.submit(ask("second"))
        pipeline.gate.release(100)
        assert first.result(timeout=10)[0].metadata["company"] == 1
        second.result(timeout=10)
    assert [batch[0][0] for batch in pipeline.batches] == ["first"] * 3 + ["second"] * 3


def test_pictures_at_any_step_merge_where_the_key_allows() -> None:
    pipeline = NumericPipeline(gate=threading.Semaphore(0), steps=3, level=False)
    assert pipeline.gate is not None
    with engine_of(pipeline, policy="oldest") as engine:
        first = engine.submit(ask("first"))
        pipeline.wait_for_steps()
        second = engine.submit(ask("second"))
        pipeline.gate.release(100)
        first.result(timeout=10)
        second.result(timeout=10)
    assert pipeline.batches[1] == [("first", 0, 1), ("second", 0, 0)]


def test_deterministic_is_independent_of_company() -> None:
    request = ask("exact", deterministic=True, num_images=3)
    expected = [output.image.tobytes() for output in run_plainly(NumericPipeline(), request)]
    pipeline = NumericPipeline(company_noise=0.25)
    with engine_of(pipeline) as engine:
        neighbours = [engine.submit(ask(f"neighbour {index}", num_images=2)) for index in range(4)]
        exact = engine.submit(request).result(timeout=10)
        noisy = [result for job in neighbours for result in job.result(timeout=10)]
    assert [result.image.tobytes() for result in exact] == expected
    assert [result.metadata["company"] for result in exact] == [1, 1, 1]
    assert max(int(str(result.metadata["company"])) for result in noisy) > 1
    assert all(len(batch) == 1 for batch in pipeline.batches if batch[0][0] == "exact")
    assert all(len(batch) == 1 for batch in pipeline.decoded if batch[0][0] == "exact")
    assert all(len(batch) == 1 for batch in pipeline.encoded if batch[0] == "exact")


def test_encodes_a_prompt_once_whatever_the_number_of_images() -> None:
    pipeline = NumericPipeline()
    with engine_of(pipeline, max_batch=2) as engine:
        engine.run([ask("many", num_images=7), ask("one")])
    assert sorted(prompt for batch in pipeline.encoded for prompt in batch) == ["many", "one"]


@pytest.mark.parametrize("max_batch", [1, 4])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_large_request_shares_with_a_later_small_one(max_batch: int, deterministic: bool) -> None:
    pipeline = NumericPipeline(gate=threading.Semaphore(0), steps=2)
    assert pipeline.gate is not None
    with engine_of(pipeline, max_batch=max_batch) as engine:
        large = engine.submit(ask("large", num_images=100, deterministic=deterministic))
        pipeline.wait_for_steps()
        small = engine.submit(ask("small"))
        pipeline.gate.release(1000)
        small.result(timeout=10)
        large.result(timeout=10)
    first_of_small = next(index for index, batch in enumerate(pipeline.batches) if ("small", 0, 0) in batch)
    assert first_of_small <= 8


def test_loads_a_model_once_and_keeps_it() -> None:
    loads: list[tuple[str, str, str | None]] = []

    def load(name: str, device: str, dtype: str | None) -> NumericPipeline:
        loads.append((name, device, dtype))
        return NumericPipeline()

    with Engine(device="cpu", dtype="float32", load=load) as engine:
        first = engine.run([ask("one", model="a"), ask("two", model="b")])
        second = engine.run(ask("three", model="a"))
    assert loads == [("a", "cpu", "float32"), ("b", "cpu", "float32")]
    assert first[0].metadata["device"] == second[0].metadata["device"] == "cpu"


def test_metadata_says_how_the_picture_was_made() -> None:
    with engine_of(NumericPipeline()) as engine:
        result = engine.run(ask("a star", num_images=2))[1]
    metadata = result.metadata
    request = metadata["request"]
    assert isinstance(request, dict)
    assert (request["width"], request["seed"], request["guidance"]) == (8, 7, 1.0)
    assert (metadata["index"], metadata["seed"], metadata["company"]) == (1, 8, 2)
    assert metadata["model"] == {"name": "0", "digest": "sha256:numeric"}
    assert metadata["dtype"] == "float64"
    assert metadata["warnings"] == ["numbers only"]
    assert metadata["pixels"] == pixels_digest(result.image)
    seconds = metadata["seconds"]
    assert isinstance(seconds, dict)
    assert set(seconds) == {"load", "encode", "step", "decode"}


def test_events_come_in_order() -> None:
    with engine_of(NumericPipeline(steps=3), max_batch=1) as engine:
        events = list(engine.stream(ask("a star", num_images=2)))
    told = [(event.stage, event.image, event.step, event.steps) for event in events if isinstance(event, Progress)]
    before = [("load", 0, 0, 1), ("load", 0, 1, 1), ("encode", 0, 0, 1), ("encode", 0, 1, 1)]
    pictures = [
        told_of
        for image in range(2)
        for told_of in [*(("step", image, step, 3) for step in (1, 2, 3)), ("decode", image, 3, 3)]
    ]
    assert told == before + pictures
    last = events[-1]
    assert isinstance(last, Done)
    assert [result.index for result in last.results] == [0, 1]
    seconds = [event.seconds for event in events if isinstance(event, Progress)]
    assert seconds == sorted(seconds)
    assert {event.job for event in events} == {last.job}


def test_previews_come_only_when_asked_for() -> None:
    with engine_of(NumericPipeline(steps=5), preview_every=2) as engine:
        asked = list(engine.stream(ask("a star")))
        unasked = list(engine.stream(ask("a star"), preview_every=0))
    assert len([event for event in asked if isinstance(event, Preview)]) <= 2
    assert not any(isinstance(event, Preview) for event in unasked)


def test_preview_is_of_the_step_it_names_and_not_of_the_last() -> None:
    pipeline = NumericPipeline(steps=4, gate=threading.Semaphore(0))
    assert pipeline.gate is not None
    shown: list[int] = []
    with engine_of(pipeline, preview_every=2) as engine:
        for event in engine.stream(ask("a star")):
            if isinstance(event, Preview):
                shown.append(event.step)
            if isinstance(event, Progress) and event.stage in ("encode", "step") and event.step:
                pipeline.gate.release()
    assert shown == [2]


def test_slow_reader_blocks_nobody_and_gets_the_end() -> None:
    pipeline = NumericPipeline(steps=50)
    with engine_of(pipeline, preview_every=1) as engine:
        slow = engine.submit(ask("slow", num_images=120))
        events = slow.events()
        next(events)
        engine.submit(ask("quick")).result(timeout=10)
        slow.wait(timeout=10)
        rest = list(events)
    assert isinstance(rest[-1], Done)
    assert len(rest[-1].results) == 120
    assert len(rest) <= 4097
    previews = [event.image for event in rest if isinstance(event, Preview)]
    assert len(previews) == len(set(previews))


def test_many_submitters() -> None:
    with engine_of(NumericPipeline(steps=3), max_batch=8) as engine, ThreadPoolExecutor(16) as pool:
        requests = [ask(f"prompt {index % 20}", seed=index) for index in range(120)]
        painted = list(pool.map(lambda request: engine.run(request)[0].image.tobytes(), requests))
    oracle = NumericPipeline(steps=3)
    assert painted == [run_plainly(oracle, request)[0].image.tobytes() for request in requests]


def test_stream_tells_every_step_of_every_image() -> None:
    with engine_of(NumericPipeline(steps=3)) as engine:
        events = list(engine.stream(ask("a star", num_images=2)))
    assert sorted(steps_of(events)) == [(image, step) for image in range(2) for step in (1, 2, 3)]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"policy": "fastest"}, "policy"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_batch": 2.5}, "max_batch"),
        ({"max_batch": True}, "max_batch"),
        ({"preview_every": -1}, "preview_every"),
        ({"preview_every": 1.5}, "preview_every"),
    ],
)
def test_refuses_arguments_out_of_range(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        Engine(**arguments)  # pyright: ignore[reportArgumentType]
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("preview_every", 1.5),
        ("preview_every", True),
        ("priority", 0.5),
        ("priority", 11),
        ("priority", False),
        ("deadline", 0),
        ("deadline", float("nan")),
        ("deadline", True),
        ("deadline", "soon"),
    ],
)
def test_refuses_what_is_submitted_out_of_range(field: str, value: object) -> None:
    with engine_of(NumericPipeline()) as engine, pytest.raises(RequestError, match="is not a") as caught:
        engine.submit(ask("a star"), **{field: value})  # pyright: ignore[reportArgumentType]
    assert caught.value.field == field
