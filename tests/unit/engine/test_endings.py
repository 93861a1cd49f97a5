"""How jobs and engines end: cancelling, failing, running out of memory, timing out, closing."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch
from PIL import Image

from gesso.engine.inbox import Inbox
from gesso.engine.job import Job
from gesso.errors import CancelledError, GessoError, OutOfMemoryError, RequestError, RunError
from gesso.events import Cancelled, Done, Failed, Preview, Progress
from gesso.pipelines.contract import Output, Plan
from gesso.request import GenerationRequest
from tests.oracle import run_plainly
from tests.unit.engine.numeric import NumericPipeline, Vector, ask, engine_of
from tests.unit.engine.programs import run_program


def gated(steps: int = 4) -> tuple[NumericPipeline, threading.Semaphore]:
    gate = threading.Semaphore(0)
    return NumericPipeline(gate=gate, steps=steps), gate


def failing(problem: BaseException, prompt: str = "bad", at: int = 1) -> NumericPipeline:
    """A pipeline whose step raises when the prompt is at that step."""

    def on_step(states: Sequence[Vector]) -> None:
        if any(state.name[0] == prompt and state.name[2] == at for state in states):
            raise problem

    return NumericPipeline(on_step=on_step)


def test_cancel_takes_effect_at_the_next_step_and_leaves_others_alone() -> None:
    pipeline, gate = gated()
    with engine_of(pipeline) as engine:
        engine.submit(ask("before"))
        pipeline.wait_for_steps()  # So that the two arrive in one turn.
        jobs = {name: engine.submit(ask(name)) for name in ("stays", "goes")}
        while len(pipeline.batches[-1]) < 2:
            gate.release()
            pipeline.wait_for_steps()
        together = len(pipeline.batches)
        jobs["goes"].cancel()
        gate.release(100)
        kept = jobs["stays"].result(timeout=10)
        with pytest.raises(CancelledError):
            jobs["goes"].result(timeout=10)
    assert all(name == "stays" for batch in pipeline.batches[together:] for name, _, _ in batch)
    assert kept[0].image.tobytes() == run_plainly(NumericPipeline(), ask("stays"))[0].image.tobytes()


def test_cancelled_job_keeps_its_finished_pictures() -> None:
    pipeline, gate = gated(steps=2)
    with engine_of(pipeline, max_batch=1) as engine:
        job = engine.submit(ask("many", num_images=5))
        gate.release(4)
        pipeline.wait_for_steps(5)
        job.cancel()
        gate.release(100)
        last = job.wait(timeout=10)
        with pytest.raises(CancelledError, match="after 2 of 5"):
            job.result(timeout=10)
    assert isinstance(last, Cancelled)
    assert [result.index for result in last.results] == [0, 1]
    assert len(pipeline.batches) == 5


def test_cancel_before_the_start_and_after_the_end() -> None:
    pipeline, gate = gated(steps=1)
    with engine_of(pipeline, max_batch=1) as engine:
        first = engine.submit(ask("first"))
        pipeline.wait_for_steps()
        never = engine.submit(ask("never"))
        engine.cancel(never)
        never.cancel()
        gate.release(10)
        assert isinstance(never.wait(timeout=10), Cancelled)
        first.result(timeout=10)
        first.cancel()
        assert isinstance(first.wait(), Done)
    assert [batch[0][0] for batch in pipeline.batches] == ["first"]


def test_leaving_a_stream_cancels_it() -> None:
    pipeline, gate = gated(steps=3)
    with engine_of(pipeline) as engine:
        stream = engine.stream(ask("watched"))
        assert isinstance(stream, Iterator)
        for event in stream:
            if isinstance(event, Progress) and event.stage == "encode" and event.step:
                break
        pipeline.wait_for_steps()
        stream.close()  # pyright: ignore[reportAttributeAccessIssue]
        gate.release(100)
        engine.run(ask("next"))
    assert len([batch for batch in pipeline.batches if batch[0][0] == "watched"]) == 1


def test_letting_go_of_a_stream_that_was_never_begun_cancels_it() -> None:
    pipeline, gate = gated(steps=3)
    with engine_of(pipeline) as engine:
        stream = engine.stream(ask("watched"))
        pipeline.wait_for_steps()
        del stream
        gate.release(100)
        engine.run(ask("next"))
    assert len([batch for batch in pipeline.batches if batch[0][0] == "watched"]) == 1


def test_failure_ends_only_the_requests_of_that_batch() -> None:
    pipeline = failing(ZeroDivisionError("by nothing"))
    with engine_of(pipeline) as engine:
        bad = engine.submit(ask("bad", num_images=3))
        others = [engine.submit(ask("good", width=16)), engine.submit(ask("exact", deterministic=True))]
        with pytest.raises(RunError, match="ZeroDivisionError: by nothing") as caught:
            bad.result(timeout=10)
        for job in others:
            job.result(timeout=10)
        engine.run(ask("after"))
    cause = caught.value.__cause__
    assert isinstance(cause, ZeroDivisionError)
    assert "in on_step" in "".join(cause.__notes__)


def test_our_own_errors_pass_through() -> None:
    with engine_of(failing(RunError("the disk is full"))) as engine:
        with pytest.raises(RunError, match=r"^the disk is full$"):
            engine.run(ask("bad"))
        with pytest.raises(RequestError, match="width 9 is not a multiple of 8"):
            engine.run(ask("a star", width=9))
        with pytest.raises(RequestError, match='model "nowhere"'):
            engine.run(ask("a star", model="nowhere"))
        assert len(engine.run(ask("a star"))) == 1


@pytest.mark.parametrize(
    "problem",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_memory_that_runs_out_is_said_so_and_freed(problem: Exception) -> None:
    alive: list[weakref.ref[Vector]] = []
    pipeline = failing(problem)
    begin = pipeline.begin

    def remembering(plan: Plan, conditioning: object, image: int) -> Vector:
        state = begin(plan, conditioning, image)  # pyright: ignore[reportArgumentType]
        alive.append(weakref.ref(state))
        return state

    pipeline.begin = remembering  # pyright: ignore[reportAttributeAccessIssue]
    with engine_of(pipeline) as engine:
        with pytest.raises(OutOfMemoryError) as caught:
            engine.run(ask("bad", num_images=2))
        engine.run(ask("good"))
        gc.collect()
        assert not any(reference() for reference in alive[:2])
    assert caught.value.needed == 4096
    assert caught.value.modes == ("a smaller width and height",)


@pytest.mark.parametrize("verb", ["plan", "encode", "begin", "preview", "decode"])
def test_a_broken_verb_fails_its_request_and_no_other(verb: str) -> None:
    broken, sound = NumericPipeline(), NumericPipeline()

    def breaks(*_: object) -> None:
        raise KeyError(verb)

    setattr(broken, verb, breaks)
    with engine_of(broken, sound, preview_every=1) as engine:
        bad, good = engine.submit(ask("a", num_images=2)), engine.submit(ask("b", model="1"))
        with pytest.raises(RunError, match="KeyError"):
            bad.result(timeout=10)
        good.result(timeout=10)


def test_a_pipeline_that_breaks_the_contract_cannot_hang_the_loop() -> None:
    class Standing(NumericPipeline):
        def step(self, states: Sequence[Vector]) -> None:
            del states

    class Losing(NumericPipeline):
        def decode(self, states: Sequence[Vector]) -> Iterator[Output]:
            yield from list(super().decode(states))[:-1]

    class Doubling(NumericPipeline):
        def decode(self, states: Sequence[Vector]) -> Iterator[Output]:
            outputs = list(super().decode(states))
            yield from outputs + outputs

    class Leaving(NumericPipeline):
        def step(self, states: Sequence[Vector]) -> None:
            raise SystemExit(len(states))

    pipelines = Standing(), Losing(), Doubling(), Leaving(), NumericPipeline()
    with engine_of(*pipelines) as engine:
        for model, words in enumerate(["did not advance", "decoded 1 of 2", None, "SystemExit"]):
            job = engine.submit(ask("a", num_images=2, model=str(model)))
            if words is None:
                assert len(job.result(timeout=10)) == 2
                continue
            with pytest.raises(RunError, match=words):
                job.result(timeout=10)
        engine.run(ask("a", model="4"))


def test_run_raises_the_first_failure_and_cancels_the_rest() -> None:
    pipeline = failing(ValueError("no"), at=0)
    with engine_of(pipeline, max_batch=1) as engine:
        with pytest.raises(RunError, match="ValueError: no"):
            engine.run([ask("bad"), ask("many", num_images=10_000)])
        engine.run(ask("after"))
    assert len(pipeline.decoded) < 1000


def test_interrupted_run_cancels_and_the_engine_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, gate = gated()

    def interrupted(_: Job, timeout: float | None = None) -> None:
        pipeline.wait_for_steps()
        raise KeyboardInterrupt(timeout)

    with engine_of(pipeline) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(Job, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.run(ask("interrupted"))
        gate.release(100)
        engine.run(ask("after"))
    assert len([batch for batch in pipeline.batches if batch[0][0] == "interrupted"]) == 1


def test_result_times_out_and_the_job_runs_on() -> None:
    pipeline, gate = gated()
    with engine_of(pipeline) as engine:
        job = engine.submit(ask("slow"))
        with pytest.raises(TimeoutError):
            job.result(timeout=0.01)
        assert not job.done()
        gate.release(100)
        assert len(job.result(timeout=10)) == 1
        assert job.done()


def test_close_finishes_what_is_under_way() -> None:
    engine = engine_of(NumericPipeline(steps=20), max_batch=2)
    jobs = [engine.submit(ask(f"{index}", num_images=3)) for index in range(5)]
    engine.close()
    assert [len(job.result(timeout=0)) for job in jobs] == [3] * 5
    engine.close()
    engine.close(finish=False)
    with pytest.raises(RunError, match="closed"):
        engine.submit(ask("late"))


def test_close_can_cancel_what_another_close_waits_for() -> None:
    pipeline, gate = gated()
    engine = engine_of(pipeline, max_batch=1)
    jobs = [engine.submit(ask("one")), engine.submit(ask("two"))]
    pipeline.wait_for_steps()
    waiting = threading.Thread(target=engine.close)
    waiting.start()
    threading.Timer(0.02, gate.release, (100,)).start()
    engine.close(finish=False)
    waiting.join(10)
    assert not waiting.is_alive()
    assert [type(job.wait(0)) for job in jobs] == [Cancelled, Cancelled]
    assert len(pipeline.batches) == 1


def test_leaving_the_context_by_an_exception_cancels() -> None:
    pipeline, gate = gated()
    jobs: list[Job] = []

    def interrupted() -> None:
        with engine_of(pipeline) as engine:
            jobs.append(engine.submit(ask("one")))
            pipeline.wait_for_steps()
            gate.release()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert isinstance(jobs[0].wait(0), Cancelled)


def test_closing_an_engine_that_never_worked() -> None:
    engine = engine_of()
    engine.close()
    with pytest.raises(RunError, match="closed"):
        engine.submit(ask("late"))


def test_submitting_while_closing_either_ends_or_is_refused() -> None:
    engine = engine_of(NumericPipeline(steps=2))
    jobs: list[Job] = []

    def submit_until_refused() -> None:
        while True:
            try:
                jobs.append(engine.submit(ask("racing")))
            except RunError:
                return

    threads = [threading.Thread(target=submit_until_refused) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    engine.close(finish=False)
    for thread in threads:
        thread.join(10)
    assert jobs
    assert all(job.done() for job in jobs)


def test_forgotten_engine_closes_itself_but_not_before_its_jobs_end() -> None:
    before = set(threading.enumerate())
    job = engine_of(NumericPipeline(steps=20)).submit(ask("one", num_images=20))
    assert len(job.result(timeout=10)) == 20
    del job
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_interpreter_leaves_with_work_under_way() -> None:
    program = """
import time
from tests.unit.engine.numeric import NumericPipeline, ask, engine_of
engine = engine_of(NumericPipeline(on_step=lambda states: time.sleep(0.01)))
job = engine.submit(ask("endless", num_images=10_000))
next(job.events())
print("leaving")
"""
    assert run_program(program) == "leaving\n"


def test_every_reader_of_a_job_sees_its_end() -> None:
    job = Job(GenerationRequest(prompt="a"), preview_every=0, when_cancelled=lambda _: None)
    job.tell(Progress(job=job.id, image=0, step=1, steps=1, stage="step", seconds=0.0))
    error: GessoError = RunError("broke")
    job.end(Failed(job=job.id, error=error))
    job.end(Done(job=job.id, results=()))
    assert [type(event) for event in job.events()] == [Progress, Failed]
    assert [type(event) for event in job.events()] == [Failed]
    for _ in range(2):
        with pytest.raises(RunError, match="broke"):
            job.result()


def test_unread_progress_is_bounded_and_the_end_is_kept() -> None:
    job = Job(GenerationRequest(prompt="a"), preview_every=0, when_cancelled=lambda _: None)
    for step in range(10_000):
        job.tell(Progress(job=job.id, image=0, step=step, steps=10_000, stage="step", seconds=0.0))
    job.end(Done(job=job.id, results=()))
    events = list(job.events())
    assert len(events) == 4097
    assert isinstance(events[-2], Progress)
    assert events[-2].step == 9_999


def test_previews_that_nobody_read_stay_longer_than_progress() -> None:
    job = Job(GenerationRequest(prompt="a"), preview_every=0, when_cancelled=lambda _: None)
    picture = Image.new("RGB", (1, 1))
    for image in range(5000):
        job.tell(Preview(job=job.id, image=image, step=1, picture=picture))
        job.tell(Progress(job=job.id, image=image, step=2, steps=9, stage="step", seconds=0.0))
        if image == 99:
            events = job.events()
            assert [type(next(events)) for _ in range(3)] == [Preview, Progress, Preview]
        if image == 4000:
            assert [number in job._unread for number in (0, 2, 4)] == [False, False, True]
    job.end(Done(job=job.id, results=()))
    rest = list(job.events())
    assert len(rest) == 4097
    assert [event.image for event in rest if isinstance(event, Preview)] == list(range(904, 5000))


def test_inbox_takes_nothing_once_closed_and_cancelling_overrides_finishing() -> None:
    inbox = Inbox()
    inbox.close("cancel")
    inbox.close("finish")
    assert inbox.take(wait=True).closing == "cancel"
