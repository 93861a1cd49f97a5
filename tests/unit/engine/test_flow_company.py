"""Requests at different steps of a flow family in one batch, in the real loop: joining, leaving, watching, failing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image

from gesso.engine.job import Job
from gesso.errors import OutOfMemoryError
from gesso.events import Done, Failed, Preview, Progress, Result
from gesso.pipelines.contract import Plan
from gesso.request import GenerationRequest
from tests.oracle import run_plainly
from tests.tiny_flow import FlowState, TinyFlowPipeline
from tests.unit.engine.numeric import ask
from tests.unit.engine.turns import Turns


def result_of(job: Job) -> Result:
    (result,) = job.result(timeout=0)
    return result


def as_alone(result: Result, request: GenerationRequest) -> bool:
    """Whether it is the picture of the plain loop, up to what company may do to sums."""
    expected = run_plainly(TinyFlowPipeline(), request)[result.index].image
    difference = np.asarray(result.image).astype(int) - np.asarray(expected).astype(int)
    return int(np.abs(difference).max()) <= 1


def steps_told(job: Job) -> list[tuple[int, int]]:
    return [
        (event.step, event.steps) for event in job.events() if isinstance(event, Progress) and event.stage == "step"
    ]


def test_a_newcomer_joins_at_once_and_leaves_before_the_other() -> None:
    pipeline = TinyFlowPipeline()
    turns = Turns(pipeline)
    long, short = ask("a red star", steps=9), ask("two blue rings", seed=8, steps=3)
    first = turns.submit(long)
    turns.turn(4)
    second = turns.submit(short)
    assert turns.finish(second) == 3
    assert not first.done()
    assert turns.finish(first) == 2
    assert pipeline.batches[4:7] == [[("a red star", 4 + step), ("two blue rings", step)] for step in range(3)]
    assert as_alone(result_of(first), long)
    assert as_alone(result_of(second), short)
    assert [result_of(each).metadata["company"] for each in (first, second)] == [2, 2]
    assert steps_told(first) == [(step, 9) for step in range(1, 10)]
    assert steps_told(second) == [(step, 3) for step in range(1, 4)]


def test_guided_and_unguided_and_any_number_of_steps_share_a_batch_but_sizes_do_not() -> None:
    pipeline = TinyFlowPipeline()
    turns = Turns(pipeline, max_batch=8)
    requests = [
        ask("a", steps=4, guidance=1.0),
        ask("b", steps=5, guidance=3.0, negative="red"),
        ask("c", steps=6),
        ask("d", steps=4, width=48),
    ]
    jobs = [turns.submit(request) for request in requests]
    turns.finish(*jobs)
    companies = {frozenset(prompt for prompt, _ in batch) for batch in pipeline.batches}
    assert companies == {frozenset("abc"), frozenset("bc"), frozenset("c"), frozenset("d")}
    assert all(as_alone(result_of(each), request) for each, request in zip(jobs, requests, strict=True))


def test_a_stream_of_newcomers_keeps_the_batch_full() -> None:
    pipeline = TinyFlowPipeline()
    turns = Turns(pipeline, max_batch=4)
    requests = [ask("a star", seed=seed, steps=2 + seed % 5) for seed in range(20)]
    jobs: list[Job] = []
    for request in requests:
        jobs.append(turns.submit(request))
        turns.turn()
    turns.finish(*jobs)
    assert max(len(batch) for batch in pipeline.batches) == 4
    assert sum(len({step for _, step in batch}) > 1 for batch in pipeline.batches) > 10
    assert all(as_alone(result_of(each), request) for each, request in zip(jobs, requests, strict=True))


def test_previews_are_of_each_ones_own_step() -> None:
    """After every two steps of its own: in a batch the one is due when the other is not."""
    pipeline = TinyFlowPipeline()
    turns = Turns(pipeline)
    first = turns.submit(ask("first", steps=6), preview_every=2)
    turns.turn(3)
    second = turns.submit(ask("second", steps=5), preview_every=2)
    shown: dict[str, list[tuple[int, Image.Image]]] = {"first": [], "second": []}
    turns.finish(first, second)
    for name, each in (("first", first), ("second", second)):
        shown[name] = [(event.step, event.picture) for event in each.events() if isinstance(event, Preview)]
    # Of what nobody read only the latest is kept: that after four of six, and of five, steps.
    assert [step for step, _ in shown["first"]] == [4]
    assert [step for step, _ in shown["second"]] == [4]
    state = lone_state(ask("first", steps=6), 4)
    assert np.abs(np.asarray(shown["first"][0][1], int) - np.asarray(pipeline.preview(state), int)).max() <= 1


def lone_state(request: GenerationRequest, steps: int) -> FlowState:
    pipeline = TinyFlowPipeline()
    plan = pipeline.plan(request)
    state = pipeline.begin(plan, pipeline.encode([plan])[0], 0)
    for _ in range(steps):
        pipeline.step([state])
    return state


def test_deterministic_ones_step_alone_and_equal_the_plain_loop() -> None:
    pipeline = TinyFlowPipeline()
    turns = Turns(pipeline)
    exact = ask("exact", steps=5, num_images=2, deterministic=True)
    others = [turns.submit(ask("other", seed=seed, steps=7)) for seed in range(2)]
    turns.turn(2)
    job = turns.submit(exact)
    turns.finish(job, *others)
    assert all(len(batch) == 1 for batch in pipeline.batches if batch[0][0] == "exact")
    expected = [output.image.tobytes() for output in run_plainly(TinyFlowPipeline(), exact)]
    assert [result.image.tobytes() for result in job.result(timeout=0)] == expected


def test_cancelling_one_of_a_batch_leaves_the_others_where_they_are() -> None:
    pipeline = TinyFlowPipeline()
    turns = Turns(pipeline)
    stays, goes = turns.submit(ask("stays", steps=8)), turns.submit(ask("goes", seed=9, steps=8))
    turns.turn(3)
    goes.cancel()
    assert turns.finish(stays) == 5
    assert [len(batch) for batch in pipeline.batches] == [2] * 3 + [1] * 5
    assert as_alone(result_of(stays), ask("stays", steps=8))


# ---- memory ---------------------------------------------------------------------------------------------------------


class Short(TinyFlowPipeline):
    """Memory runs out in the steps that ``fails`` says, after the batch's tensors were made."""

    def __init__(self, fails: Callable[[list[str]], bool]) -> None:
        super().__init__()
        self.fails = fails
        self.begun: list[weakref.ref[FlowState]] = []

    def begin(self, plan: Plan, conditioning: object, image: int) -> FlowState:
        state = super().begin(plan, conditioning, image)  # pyright: ignore[reportArgumentType]
        self.begun.append(weakref.ref(state))
        return state

    def step(self, states: Sequence[FlowState]) -> None:
        if self.fails([state.request.prompt for state in states]):
            states[0].done += 1  # what a broken step leaves behind can be anything
            raise MemoryError
        super().step(states)


def test_what_does_not_fit_together_is_begun_anew_in_halves_with_the_same_pictures() -> None:
    pipeline = Short(lambda prompts: len(prompts) > 2)
    turns = Turns(pipeline, max_batch=8)
    requests = [ask("a star", seed=seed, steps=4) for seed in range(6)]
    jobs = [turns.submit(request) for request in requests]
    other = turns.submit(ask("wide", width=48, steps=12))
    turns.turn()
    assert pipeline.batches == []
    gc.collect()
    assert sum(reference() is not None for reference in pipeline.begun) == 1  # the one that was not in that batch
    turns.finish(*jobs, other)
    assert max(len(batch) for batch in pipeline.batches) == 2
    assert all(as_alone(result_of(each), request) for each, request in zip(jobs, requests, strict=True))
    assert as_alone(result_of(other), ask("wide", width=48, steps=12))
    assert len(pipeline.begun) == 6 + 1 + 6 + 0


def test_all_places_are_tried_again_once_there_was_nothing_to_do() -> None:
    short_of_memory = True
    pipeline = Short(lambda prompts: short_of_memory and len(prompts) > 1)
    turns = Turns(pipeline, max_batch=4)
    turns.finish(turns.submit(ask("first", num_images=4, steps=2)))
    assert max(len(batch) for batch in pipeline.batches) == 1
    short_of_memory = False
    turns.finish(turns.submit(ask("second", num_images=4, steps=2)))
    assert len(pipeline.batches[-1]) == 4


def test_only_the_one_that_does_not_fit_even_alone_fails_and_is_freed() -> None:
    pipeline = Short(lambda prompts: "huge" in prompts)
    turns = Turns(pipeline)
    huge = turns.submit(ask("huge", steps=3, num_images=2))
    small = turns.submit(ask("small", steps=3))
    turns.finish(small, huge)
    last = huge.wait(0)
    assert isinstance(last, Failed)
    assert isinstance(last.error, OutOfMemoryError)
    assert last.error.modes == ("a smaller width and height",)
    assert isinstance(small.wait(0), Done)
    assert as_alone(result_of(small), ask("small", steps=3))
    gc.collect()
    assert not any(reference() for reference in pipeline.begun)
    with pytest.raises(OutOfMemoryError):
        huge.result()
    turns.finish(turns.submit(ask("after")))
