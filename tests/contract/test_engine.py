"""Every pipeline through the engine: equal to the plain loop, cancelled between steps, watched, and failing alone.

What happens when memory runs out is in `test_memory`.
"""

from __future__ import annotations

import time

import pytest

from gesso.engine import Job
from gesso.errors import CancelledError, RequestError
from gesso.events import Cancelled, Done, Preview, Progress
from tests.contract.subjects import Subject
from tests.contract.watched import Watched
from tests.oracle import run_plainly


@pytest.mark.parametrize("max_batch", [1, 8])
def test_deterministic_pictures_equal_the_plain_loop_bit_for_bit(subject: Subject, max_batch: int) -> None:
    requests = [subject.ask(num_images=3, deterministic=True), subject.ask("two blue rings", deterministic=True)]
    with subject.engine(max_batch=max_batch) as engine:
        neighbours = [engine.submit(subject.ask("a ring", seed=seed)) for seed in range(3)]
        results = engine.run(requests)
        for neighbour in neighbours:
            neighbour.result(timeout=60)
    expected = [output for request in requests for output in run_plainly(subject.pipeline, request)]
    assert [result.image.tobytes() for result in results] == [output.image.tobytes() for output in expected]


def test_in_company_equal_up_to_float_noise(subject: Subject) -> None:
    requests = [subject.ask(prompt, num_images=2) for prompt in ("a star", "two blue rings", "a red ring")]
    with subject.engine() as engine:
        results = engine.run(requests)
    expected = [output for request in requests for output in run_plainly(subject.pipeline, request)]
    for result, output in zip(results, expected, strict=True):
        assert result.seed == output.seed
        assert subject.close(result.image, output.image)


def test_cancelling_ends_one_request_and_no_other(subject: Subject) -> None:
    with subject.engine(max_batch=4) as engine:
        doomed = engine.submit(subject.ask(num_images=500))
        for event in doomed.events():
            if isinstance(event, Progress) and event.stage == "step":
                doomed.cancel()
                break
        kept = engine.run(subject.ask("two blue rings"))
        last = doomed.wait(timeout=60)
        assert isinstance(last, Cancelled)
        assert len(last.results) < 500
        with pytest.raises(CancelledError):
            doomed.result()
    assert subject.close(kept[0].image, run_plainly(subject.pipeline, subject.ask("two blue rings"))[0].image)


def test_cancelled_within_one_step(subject: Subject) -> None:
    jobs: list[Job] = []
    stepped: list[str] = []

    def cancel_in_the_first_step(verb: str, prompts: list[str]) -> None:
        if verb == "step":
            stepped.extend(prompts)
            while not jobs:  # the thread that submits may be a moment behind
                time.sleep(0.001)
            jobs[0].cancel()

    watched = Watched(subject.pipeline, cancel_in_the_first_step)
    with subject.engine(max_batch=1, pipeline=watched) as engine:
        jobs.append(engine.submit(subject.ask("a star", num_images=10)))
        last = jobs[0].wait(timeout=60)
        engine.run(subject.ask("a ring"))
    assert isinstance(last, Cancelled)
    assert stepped.count("a star") == 1
    assert watched.alive() == []


def test_it_can_be_watched(subject: Subject) -> None:
    request = subject.ask(num_images=2)
    steps = subject.pipeline.plan(request).steps
    with subject.engine() as engine:
        events = list(engine.stream(request, preview_every=1))
    told = [(event.image, event.step) for event in events if isinstance(event, Progress) and event.stage == "step"]
    assert sorted(told) == [(image, step) for image in range(2) for step in range(1, steps + 1)]
    assert all(event.picture.mode == "RGB" for event in events if isinstance(event, Preview))
    last = events[-1]
    assert isinstance(last, Done)
    expected = run_plainly(subject.pipeline, request)
    for result, output in zip(last.results, expected, strict=True):
        assert subject.close(result.image, output.image)


def test_a_bad_request_fails_alone(subject: Subject) -> None:
    with subject.engine() as engine:
        bad = engine.submit(subject.ask(width=8, height=16384))
        good = engine.run(subject.ask())
        with pytest.raises(RequestError):
            bad.result(timeout=60)
    assert len(good) == 1


def test_what_is_recorded_makes_the_picture_again(subject: Subject) -> None:
    with subject.engine() as engine:
        (result,) = engine.run(subject.ask(seed=None, deterministic=True))
        record = result.metadata["request"]
        assert isinstance(record, dict)
        (again,) = engine.run(subject.ask(**record))
    assert again.image.tobytes() == result.image.tobytes()
    assert again.metadata["pixels"] == result.metadata["pixels"]
