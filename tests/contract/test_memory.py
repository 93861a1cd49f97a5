"""Every pipeline when memory runs out: one that does not fit fails alone, its states go, and the engine serves on."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from gesso.errors import OutOfMemoryError
from tests.contract.subjects import Subject
from tests.contract.watched import Watched
from tests.oracle import run_plainly

LARGE, SMALL = "a large star", ("a star", "two blue rings")


@pytest.fixture(scope="module", autouse=True)
def _what_was_there_before_is_not_looked_through() -> Iterator[None]:
    """The engine collects garbage when memory ran out; among all that a test process holds that takes its time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("verb", ["encode", "begin", "step", "decode"])
def test_what_does_not_fit_fails_alone_and_is_freed(subject: Subject, verb: str) -> None:
    def run_out(called: str, prompts: list[str]) -> None:
        if called == verb and LARGE in prompts:
            raise MemoryError

    watched = Watched(subject.pipeline, run_out)
    with subject.engine(pipeline=watched) as engine:
        large = engine.submit(subject.ask(LARGE, num_images=2), preview_every=1)
        small = [engine.submit(subject.ask(prompt)) for prompt in SMALL]
        with pytest.raises(OutOfMemoryError) as caught:
            large.result(timeout=60)
        made = [job.result(timeout=60)[0] for job in small]
        made += engine.run(subject.ask("a ring"))
        assert LARGE not in watched.alive()
    assert caught.value.needed == subject.pipeline.plan(subject.ask(LARGE)).peak_bytes
    assert watched.alive() == []
    for result, prompt in zip(made, (*SMALL, "a ring"), strict=True):
        assert subject.close(result.image, run_plainly(subject.pipeline, subject.ask(prompt))[0].image)


def test_a_preview_that_does_not_fit_is_left_out(subject: Subject) -> None:
    def run_out(called: str, prompts: list[str]) -> None:
        if called == "preview":
            raise MemoryError

    with subject.engine(pipeline=Watched(subject.pipeline, run_out)) as engine:
        (result,) = engine.submit(subject.ask(), preview_every=1).result(timeout=60)
    assert result.image.tobytes() == run_plainly(subject.pipeline, subject.ask())[0].image.tobytes()


@pytest.mark.parametrize("verb", ["encode", "step", "decode"])
def test_where_only_few_fit_together_all_are_made(subject: Subject, verb: str) -> None:
    batches: list[int] = []
    all_in = threading.Event()

    def run_out(called: str, prompts: list[str]) -> None:
        all_in.wait(timeout=60)
        if called == verb:
            batches.append(len(prompts))
            if len(prompts) > 2:
                raise MemoryError

    watched = Watched(subject.pipeline, run_out)
    requests = [subject.ask(prompt, seed=seed) for seed, prompt in enumerate((*SMALL, LARGE, "a ring", "a red ring"))]
    with subject.engine(pipeline=watched) as engine:
        jobs = [engine.submit(request) for request in requests]
        all_in.set()
        results = [result for job in jobs for result in job.result(timeout=60)]
    alone = verb == "encode" and "identity" in subject.fields  # requests that need a file are encoded one by one
    assert max(batches) > 2 or alone
    assert watched.alive() == []
    for result, request in zip(results, requests, strict=True):
        assert subject.close(result.image, run_plainly(subject.pipeline, request)[0].image)
