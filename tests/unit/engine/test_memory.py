"""Memory that runs out, in every verb and beside others, and a device that breaks for good; turned by hand."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence

import pytest
from PIL import Image

from gesso.engine.device import free_bytes
from gesso.engine.failures import is_out_of_memory
from gesso.engine.job import Job
from gesso.engine.places import PROBATION, Places
from gesso.errors import OutOfMemoryError, RunError
from gesso.events import Done, Failed, Preview
from gesso.pipelines.contract import Output, Plan
from gesso.request import GenerationRequest
from tests.oracle import run_plainly
from tests.unit.engine.numeric import NumericPipeline, Vector, ask, engine_of
from tests.unit.engine.turns import Turns


class Memory:
    """So much of it; a state holds one, and its prompt may say that it needs more to begin or to step."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.states: weakref.WeakSet[Vector] = weakref.WeakSet()

    def take(self, more: int) -> None:
        if len(self.states) + more > self.size:
            raise MemoryError


class Tight(NumericPipeline):
    """Shares its memory with others. A batch takes as much again as its states hold, ``huge`` ones take 3 more."""

    def __init__(self, memory: Memory, steps: int = 4) -> None:
        super().__init__(steps=steps)
        self.memory = memory
        self.begun = 0

    def begin(self, plan: Plan, conditioning: object, image: int) -> Vector:
        self.memory.take(1)
        state = super().begin(plan, conditioning, image)  # pyright: ignore[reportArgumentType]
        self.memory.states.add(state)
        self.begun += 1
        return state

    def step(self, states: Sequence[Vector]) -> None:
        if any(state.plan.request.prompt == "huge" for state in states):
            self.memory.take(3)
        super().step(states)


def as_alone(job: Job, request: GenerationRequest, steps: int = 4) -> bool:
    expected = [output.image.tobytes() for output in run_plainly(NumericPipeline(steps=steps), request)]
    return [result.image.tobytes() for result in job.result(timeout=0)] == expected


# ---- in each verb ---------------------------------------------------------------------------------------------------


def test_pictures_that_cannot_begin_beside_others_begin_when_these_are_done() -> None:
    pipeline = Tight(Memory(3))
    turns = Turns(pipeline, max_batch=8)
    requests = [ask("many", num_images=5), ask("more", num_images=2)]
    jobs = [turns.submit(request) for request in requests]
    turns.turn()
    assert len(turns.loop._fleet.rows) == 3
    turns.finish(*jobs, within=50)
    assert all(as_alone(job, request) for job, request in zip(jobs, requests, strict=True))
    assert pipeline.begun == 7


@pytest.mark.parametrize("other", ["0", "1"])
def test_a_picture_that_does_not_fit_beside_others_is_begun_anew_alone(other: str) -> None:
    """Of its own model at another size, or of another model: it waits until they are done, and they do not fail."""
    memory = Memory(4)
    pipelines = Tight(memory), Tight(memory)
    turns = Turns(*pipelines)
    small, huge = ask("small", num_images=3, model=other, width=16), ask("huge", num_images=2)
    jobs = [turns.submit(small), turns.submit(huge)]
    turns.turn(3)
    late = ask("late", model="1")
    jobs.append(turns.submit(late))
    turns.finish(*jobs, within=100)
    for job, request in zip(jobs, (small, huge, late), strict=True):
        assert as_alone(job, request)
    gc.collect()
    assert not memory.states


def test_one_for_which_other_models_hold_the_memory_begins_after_them() -> None:
    memory = Memory(2)
    turns = Turns(Tight(memory), Tight(memory))
    first = turns.submit(ask("first", num_images=2))
    turns.turn(2)
    second = turns.submit(ask("second", model="1"))
    assert turns.finish(first) == 2
    turns.finish(second, within=10)
    assert as_alone(second, ask("second", model="1"))


def test_one_that_does_not_fit_alone_fails_and_the_rest_go_on() -> None:
    memory = Memory(3)
    turns = Turns(Tight(memory))
    huge, small = turns.submit(ask("huge")), turns.submit(ask("small", num_images=2, width=16))
    turns.finish(huge, small, within=50)
    assert as_alone(small, ask("small", num_images=2, width=16))
    last = huge.wait(0)
    assert isinstance(last, Failed)
    assert isinstance(last.error, OutOfMemoryError)
    turns.finish(turns.submit(ask("after")), within=10)


def test_while_one_waits_to_be_alone_no_equal_begins_but_higher_ones_do() -> None:
    memory = Memory(6)
    turns = Turns(Tight(memory, steps=8))
    turns.submit(ask("small", num_images=3, width=16), priority=1)
    huge = turns.submit(ask("huge"), priority=2)
    turns.turn(2)
    assert turns.loop._fleet.models[0].solitary
    equal, higher = turns.submit(ask("equal", width=24), priority=2), turns.submit(ask("higher", width=32), priority=3)
    turns.finish(huge, within=200)
    assert higher.done()
    assert not equal.done()
    turns.finish(equal, within=20)


def test_a_prompt_that_cannot_be_encoded_beside_others_is_when_they_are_done() -> None:
    memory = Memory(1)

    class Encoding(Tight):
        def encode(self, plans: Sequence[Plan]) -> list:
            memory.take(1)
            return super().encode(plans)

    turns = Turns(Encoding(memory))
    jobs = [turns.submit(ask("first"))]
    turns.turn()
    jobs.append(turns.submit(ask("second")))
    turns.finish(*jobs, within=20)
    assert all(isinstance(job.wait(0), Done) for job in jobs)


def test_a_preview_that_does_not_fit_is_left_out() -> None:
    class Blind(NumericPipeline):
        def preview(self, state: Vector) -> Image.Image:
            raise MemoryError(state.name)

    turns = Turns(Blind())
    job = turns.submit(ask("a star"), preview_every=1)
    turns.finish(job)
    assert isinstance(job.wait(0), Done)
    assert not any(isinstance(event, Preview) for event in job.events())


def test_a_request_that_fails_in_one_batch_of_decoding_is_in_no_other() -> None:
    """Its pictures lie in two batches once places were halved; those decoded with it are none the worse."""

    class Undecodable(NumericPipeline):
        short = True

        def decode(self, states: Sequence[Vector]) -> Iterator[Output]:
            if self.short and len(states) > 2:
                raise MemoryError
            self.short = False
            if any(state.name[:2] == ("bad", 0) for state in states):
                raise ValueError("cannot be painted")
            yield from super().decode(states)

    turns = Turns(Undecodable(), max_batch=4)
    good, bad = ask("good", num_images=1), ask("bad", num_images=2)
    jobs = [turns.submit(request) for request in (bad, good)]
    jobs.insert(0, turns.submit(ask("first", num_images=1)))
    turns.finish(*jobs, within=20)
    model = turns.loop._fleet.models[0]
    assert isinstance(jobs[1].wait(0), Failed)
    assert not model.rows
    assert not model.flying
    assert as_alone(jobs[2], good)


# ---- fewer places, and more again -----------------------------------------------------------------------------------


def test_places_grow_again_and_later_after_each_try_that_fails() -> None:
    places = Places(most=8)
    places.shrink(4)
    places.shrink(1)
    for width in (1, 2, 4):
        for _ in range(PROBATION):
            assert places.now == width
            places.stepped(width)
    assert places.now == 8
    places.shrink(4)
    for _ in range(2 * PROBATION):
        assert places.now == 4
        places.stepped(3)
        places.stepped(4)
    assert places.now == 8
    places.shrink(0)
    assert places.now == 1
    places.reset()
    assert places.now == 8


def test_a_busy_model_gets_its_places_back() -> None:
    short = [True]

    def on_step(states: Sequence[Vector]) -> None:
        if short[0] and len(states) > 1:
            raise MemoryError

    pipeline = NumericPipeline(on_step=on_step)
    turns = Turns(pipeline, max_batch=4)
    turns.submit(ask("endless", num_images=10_000))
    turns.turn(10)
    assert len(pipeline.batches[-1]) == 1
    short[0] = False
    turns.turn(4 * PROBATION)
    assert len(pipeline.batches[-1]) == 4


# ---- what says so, and a device that breaks for good ----------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "MPS backend out of memory",
        "CUDA error: OUT OF MEMORY",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_words_of_memory_that_ran_out(words: str) -> None:
    assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(ValueError(words))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_free_bytes_of_a_device_that_cannot_be_asked_are_unknown() -> None:
    assert free_bytes("cuda:99") is None


def test_where_memory_cannot_be_given_back_jobs_end_and_the_engine_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def on_step(states: Sequence[Vector]) -> None:
        if any(state.name[0] == "bad" for state in states):
            raise MemoryError

    with engine_of(NumericPipeline(on_step=on_step)) as engine:
        with monkeypatch.context() as patch:
            patch.setattr("gesso.engine.fleet.release_memory", breaks)
            with pytest.raises((OutOfMemoryError, RunError)):
                engine.submit(ask("bad", num_images=2)).result(timeout=60)
        assert len(engine.submit(ask("good")).result(timeout=60)) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_ends_every_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever breaks in telling that something broke."""

    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("broken for good")

    def on_step(_: Sequence[Vector]) -> None:
        raise ValueError

    monkeypatch.setattr("gesso.engine.fleet.as_gesso_error", breaks)
    engine = engine_of(NumericPipeline(on_step=on_step))
    with pytest.raises(RunError, match="thread has ended"):
        engine.submit(ask("a star")).result(timeout=60)
    engine.close()
