"""Every pipeline with a step cache: in company as alone, freed whatever the end, and nothing left on the network.

A pipeline without steps to forecast refuses a cache in one line. What caches compute is tested in `unit/caching`.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
from torch import nn

from gesso.engine import Engine
from gesso.engine.planning import planned
from gesso.errors import GessoError, RequestError
from gesso.events import Cancelled, Progress, Result
from gesso.sampling.flow import STOCHASTIC
from tests.contract.subjects import Subject
from tests.contract.watched import Watched
from tests.oracle import run_plainly

TAYLOR = "taylorseer:interval=3,warmup=2,order=1,granularity=trunk"
PROMPTS = ("a star", "two blue rings", "a red ring")
STEPS = 8


class WatchedNetwork(Watched):
    """Shows the network, which step caches are put on."""

    @property
    def transformer(self) -> Any:
        return self._pipeline.transformer  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def dtype(self) -> Any:
        return self._pipeline.dtype  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def cached(subject: Subject) -> Subject:
    """Those that step caches are for."""
    plan = subject.pipeline.plan(subject.ask())
    if plan.shape is None:
        pytest.skip("has no steps to forecast")
    if subject.fields.get("scheduler") == STOCHASTIC:
        pytest.skip("draws noise that no cache forecasts")
    return subject


def paint(subject: Subject, *prompts: str, max_batch: int = 16, **fields: object) -> list[Result]:
    requests = [subject.ask(prompt, **{"cache": TAYLOR, "steps": STEPS, **fields}) for prompt in prompts]
    with subject.engine(max_batch=max_batch) as engine:
        return engine.run(requests)


def kept_in(engine: Engine) -> tuple[int, int]:
    """Bytes that step caches keep, and pictures that they keep them for."""
    shared = [one for model in engine._loop._fleet.models for one in model.caches._shared.values()]
    return sum(one.attached.store.bytes() for one in shared), sum(len(one.attached.runs) for one in shared)


def is_bare(subject: Subject) -> bool:
    network = subject.pipeline.transformer  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(network, nn.Module)
    return not any(hasattr(module, "_diffusers_hook") or "forward" in vars(module) for module in network.modules())


def test_a_cache_is_planned_or_refused_in_one_line(subject: Subject) -> None:
    plain = subject.pipeline.plan(subject.ask(steps=STEPS))
    request = subject.ask(steps=STEPS, cache=TAYLOR)
    if plain.shape is None or subject.fields.get("scheduler") == STOCHASTIC:
        with pytest.raises(RequestError, match=r"cache .* is not usable with .*; (leave it out|.* take s)") as caught:
            planned(subject.pipeline, request)
        assert caught.value.field == "cache"
        return
    plan = planned(subject.pipeline, request)
    assert plan.cache_bytes > 0
    assert plan.peak_bytes >= plain.peak_bytes
    again = planned(subject.pipeline, plan.request)
    # A scheduler that gave way to the cache is told of once: the filled request names the one that paints.
    assert set(again.warnings) <= set(plan.warnings)
    assert dataclasses.replace(again, warnings=plan.warnings) == plan
    assert planned(subject.pipeline, subject.ask(steps=STEPS)) == plain


@pytest.mark.parametrize("cache", [TAYLOR, "taylorseer:interval=4,warmup=1,order=1,granularity=module"])
def test_cached_pictures_in_company_are_those_made_alone(cached: Subject, cache: str) -> None:
    plain = run_plainly(cached.pipeline, cached.ask("a star", steps=STEPS))[0]
    alone = [paint(cached, prompt, cache=cache)[0] for prompt in PROMPTS]
    assert alone[0].image.tobytes() != plain.image.tobytes()
    for result, expected in zip(paint(cached, *PROMPTS, cache=cache), alone, strict=True):
        assert cached.close(result.image, expected.image)
        record, record_alone = result.metadata["cache"], expected.metadata["cache"]
        assert isinstance(record, dict) and isinstance(record_alone, dict)
        assert record["steps"] == record_alone["steps"] == ("FFTTFTTF" if cache == TAYLOR else "FTTTFTTT")
        request = expected.metadata["request"]
        assert isinstance(request, dict)
        assert 0 < record_alone["bytes"] <= planned(cached.pipeline, cached.ask(**request)).cache_bytes
    assert is_bare(cached)


def test_those_that_leave_earlier_change_nothing(cached: Subject) -> None:
    """With `strict_shapes`, so that a feature of another shape would be an error."""
    cache = "taylorseer:interval=4,warmup=1,order=1,granularity=module,strict_shapes=true"
    (alone,) = paint(cached, "a star", cache=cache)
    requests = [cached.ask("a star", cache=cache, steps=STEPS), cached.ask("two blue rings", cache=cache, steps=7)]
    with cached.engine() as engine:
        longer, _ = engine.run(requests)
    assert longer.metadata["cache"] == alone.metadata["cache"]
    assert cached.close(longer.image, alone.image)


def test_cached_and_plain_share_an_engine_without_touching_each_other(cached: Subject) -> None:
    """Cached ones of two kinds and a plain one, all on one network; the plain one is the plain loop's bit for bit."""
    requests = [cached.ask(prompt, steps=STEPS, deterministic=True) for prompt in PROMPTS]
    caches = (None, TAYLOR, "lite:interval=2,warmup=1")
    requests = [
        request if cache is None else cached.ask(**{**request.model_dump(), "cache": cache})
        for request, cache in zip(requests, caches, strict=True)
    ]
    with cached.engine() as engine:
        results = engine.run(requests)
        assert kept_in(engine) == (0, 0)
    expected = run_plainly(cached.pipeline, requests[0])[0]
    assert results[0].image.tobytes() == expected.image.tobytes()
    assert "cache" not in results[0].metadata
    for prompt, cache, result in zip(PROMPTS[1:], caches[1:], results[1:], strict=True):
        (again,) = paint(cached, prompt, cache=cache, deterministic=True)
        assert again.image.tobytes() == result.image.tobytes()
    assert is_bare(cached)


def test_what_is_recorded_makes_the_cached_picture_again(cached: Subject) -> None:
    (first,) = paint(cached, "a star", deterministic=True, cache="taylorseer")
    record = first.metadata["request"]
    assert isinstance(record, dict) and record["cache"]["interval"] == 5
    with cached.engine() as engine:
        (again,) = engine.run(cached.ask(**record))
    assert again.image.tobytes() == first.image.tobytes()


def test_cancelling_in_mid_run_leaves_no_state(cached: Subject) -> None:
    with cached.engine() as engine:
        doomed = engine.submit(cached.ask(steps=500, cache=TAYLOR))
        held = 0
        for event in doomed.events():
            if isinstance(event, Progress) and event.stage == "step" and event.step == 3:
                held = kept_in(engine)[0]
                doomed.cancel()
        assert isinstance(doomed.wait(timeout=60), Cancelled)
        assert held > 0
        assert kept_in(engine) == (0, 0)
        engine.run(cached.ask())
    assert is_bare(cached)


@pytest.mark.parametrize(("verb", "problem"), [("step", RuntimeError("broken")), ("decode", MemoryError())])
def test_failing_leaves_no_state(cached: Subject, verb: str, problem: Exception) -> None:
    steps = 0

    def fail(called: str, prompts: list[str]) -> None:
        nonlocal steps
        steps += called == "step"
        if called == verb and (verb == "decode" or steps > 3):
            raise problem

    watched = WatchedNetwork(cached.pipeline, fail)
    with cached.engine(pipeline=watched) as engine:
        job = engine.submit(cached.ask(steps=STEPS, cache=TAYLOR))
        with pytest.raises(GessoError):
            job.result(timeout=60)
        assert kept_in(engine) == (0, 0)
    assert watched.alive() == []
    assert is_bare(cached)


def test_pictures_begun_anew_for_want_of_memory_are_those_made_alone(cached: Subject) -> None:
    steps, all_in = 0, threading.Event()

    def run_out(called: str, prompts: list[str]) -> None:
        nonlocal steps
        all_in.wait(timeout=60)
        if called == "step":
            steps += 1
            if len(prompts) > 1 and steps > 3:
                raise MemoryError

    with cached.engine(pipeline=WatchedNetwork(cached.pipeline, run_out)) as engine:
        jobs = [engine.submit(cached.ask(prompt, steps=STEPS, cache=TAYLOR)) for prompt in PROMPTS]
        all_in.set()
        results = [job.result(timeout=60)[0] for job in jobs]
        assert kept_in(engine) == (0, 0)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert cached.close(result.image, paint(cached, prompt)[0].image)
