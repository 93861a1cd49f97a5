"""Priorities, deadlines and fair shares in the real loop, turned by hand, so that who steps when is said exactly."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.engine import job, loop
from gesso.engine.job import Job
from gesso.engine.scheduler import POLICIES, SHARE
from gesso.engine.standing import AGEING, HIGHEST, LOWEST, URGENT
from gesso.events import Done
from gesso.pipelines.contract import Plan
from tests.unit.engine.numeric import NumericPipeline, Vector, ask
from tests.unit.engine.turns import Turns


def names(pipeline: NumericPipeline) -> list[set[str]]:
    """Who was in each batch."""
    return [{name for name, _, _ in batch} for batch in pipeline.batches]


# ---- priorities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_higher_priority_steps_next_though_all_places_are_taken(policy: str) -> None:
    pipeline = NumericPipeline(steps=20)
    turns = Turns(pipeline, policy=policy, max_batch=2)
    turns.submit(ask("patient", num_images=50))
    turns.turn(3)
    important = turns.submit(ask("important"), priority=1)
    assert turns.finish(important) == 20
    assert all("important" in batch for batch in names(pipeline)[3:])
    turns.turn()
    assert names(pipeline)[-1] == {"patient"}


def test_a_higher_priority_goes_before_other_models() -> None:
    here, there = NumericPipeline(steps=8), NumericPipeline(steps=8)
    turns = Turns(here, there)
    turns.submit(ask("patient", num_images=20))
    turns.turn(2)
    important = turns.submit(ask("important", model="1"), priority=HIGHEST)
    assert turns.finish(important) == 8
    assert len(here.batches) == 2


def test_rows_of_a_batch_are_given_to_those_who_rank_highest() -> None:
    """At any step together: the important ones take the places of a batch, the rest stand back and lose nothing."""
    pipeline = NumericPipeline(steps=10, level=False)
    turns = Turns(pipeline, max_batch=4)
    patient = turns.submit(ask("patient", num_images=4))
    turns.turn(5)
    important = turns.submit(ask("important", num_images=3), priority=5)
    turns.turn()
    assert Counter(name for name, _, _ in pipeline.batches[-1]) == {"important": 3, "patient": 1}
    assert turns.finish(important) == 9
    turns.finish(patient)
    assert max(len(batch) for batch in pipeline.batches) == 4


def test_places_have_an_end() -> None:
    pipeline = NumericPipeline(steps=10)
    turns = Turns(pipeline, max_batch=2)
    jobs = [turns.submit(ask(f"{level}", num_images=4), priority=level) for level in range(4)]
    turns.turn()
    assert len(turns.loop._fleet.models[0].rows) <= 4
    for level in (4, 5):
        jobs.append(turns.submit(ask(f"{level}", num_images=4), priority=level))
        turns.turn()
        assert len(turns.loop._fleet.models[0].rows) <= 4
    turns.finish(*jobs)
    assert all(isinstance(each.wait(0), Done) for each in jobs)


def test_unimportant_work_gets_a_turn_and_costs_the_important_little() -> None:
    here, there = NumericPipeline(steps=5), NumericPipeline(steps=5)
    turns = Turns(here, there, max_batch=2)
    important = turns.submit(ask("important", num_images=10_000), priority=0)
    for number in range(30):
        turns.submit(ask(f"{number}", model="1", num_images=4), priority=-2)
    turns.turn(20 * 2 * AGEING)
    assert 18 <= len(there.batches) <= 21
    assert not important.done()


@pytest.mark.parametrize("policy", POLICIES)
def test_one_that_waits_for_a_busy_model_gets_its_turn_while_its_equals_step_elsewhere(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gesso.engine.standing.AGEING", 3)
    turns = Turns(NumericPipeline(steps=3), NumericPipeline(steps=3), policy=policy, max_batch=2)
    turns.submit(ask("important", num_images=10_000))
    turns.submit(ask("important too", num_images=10_000), priority=1)
    turns.submit(ask("elsewhere", model="1", num_images=10_000), priority=-1)
    turns.turn(5)
    turns.finish(turns.submit(ask("waits"), priority=-1), within=300)


# ---- fair shares ----------------------------------------------------------------------------------------------------


def test_a_hundred_large_pictures_do_not_hold_back_one_of_another_model() -> None:
    large, small = NumericPipeline(steps=50), NumericPipeline(steps=4)
    turns = Turns(large, small)
    hundred = turns.submit(ask("hundred", num_images=100))
    turns.turn(5)
    assert turns.finish(turns.submit(ask("one", model="1"))) == 4
    turns.turn(30)
    assert turns.finish(turns.submit(ask("one", model="1"))) == 4
    assert not hundred.done()


@pytest.mark.parametrize("level", [False, True])
def test_nor_one_of_the_same_model(level: bool) -> None:
    pipeline = NumericPipeline(steps=50, level=level)
    turns = Turns(pipeline, max_batch=8)
    turns.submit(ask("hundred", num_images=100))
    turns.turn(5)
    assert turns.finish(turns.submit(ask("one"))) <= 51


def test_equal_requests_are_done_one_after_the_other() -> None:
    """Those that cannot share a step do not turn about, which would make both late."""
    here, there = NumericPipeline(steps=6), NumericPipeline(steps=6)
    turns = Turns(here, there)
    first = turns.submit(ask("first"))
    turns.turn(2)
    second = turns.submit(ask("second", model="1"))
    assert turns.finish(first) == 4
    assert turns.finish(second) == 6

    alone = NumericPipeline(steps=6)
    turns = Turns(alone)
    jobs = [turns.submit(ask(f"{index}", deterministic=True)) for index in range(5)]
    assert [turns.finish(each) for each in jobs] == [6] * 5


@pytest.mark.parametrize(("steps", "flops"), [((3, 3), (1.0, 4.0)), ((12, 2), (2.0, 3.0)), ((5, 9), (1e14, 1e13))])
def test_models_share_by_cost(steps: tuple[int, int], flops: tuple[float, float]) -> None:
    models = [NumericPipeline(steps=count, flops=each) for count, each in zip(steps, flops, strict=True)]
    turns = Turns(*models, max_batch=2)
    for model in range(2):
        for request in range(3):
            turns.submit(ask(f"{request}", model=f"{model}", num_images=10_000))
    largest = max(2 * count * each for count, each in zip(steps, flops, strict=True))
    for _ in range(40):
        turns.turn(10)
        used = [sum(map(len, model.batches)) * each for model, each in zip(models, flops, strict=True)]
        assert abs(used[0] - used[1]) <= 2 * largest


def test_requests_of_a_model_share_by_cost() -> None:
    pipeline = NumericPipeline(steps=4)
    turns = Turns(pipeline, max_batch=4)
    for name, width in (("wide", 16), ("narrow", 8)):
        turns.submit(ask(name, width=width, num_images=10_000))
    turns.turn(400)
    used = Counter(name for batch in pipeline.batches for name, _, _ in batch)
    assert abs(used["wide"] - used["narrow"]) <= 2 * 4 * 4


def test_a_newcomer_is_owed_nothing_for_the_time_before() -> None:
    here, there = NumericPipeline(steps=4), NumericPipeline(steps=4)
    turns = Turns(here, there, max_batch=2)
    turns.submit(ask("old", num_images=10_000))
    turns.turn(400)
    turns.submit(ask("new", model="1", num_images=10_000))
    before = len(here.batches)
    turns.turn(100)
    assert 40 <= len(here.batches) - before <= 60


def test_nothing_is_kept_of_what_is_done() -> None:
    made: list[weakref.ref[np.ndarray]] = []

    class Remembering(NumericPipeline):
        def encode(self, plans: Sequence[Plan]) -> list[np.ndarray]:
            conditionings = super().encode(plans)
            made.extend(weakref.ref(conditioning) for conditioning in conditionings)
            return conditionings

    turns = Turns(Remembering())
    turns.finish(*(turns.submit(ask("any"), priority=priority, deadline=9.0) for priority in range(3)))
    gc.collect()
    assert len(made) == 3
    assert all(reference() is None for reference in made)


def test_costs_that_cannot_be_counted_stop_nobody() -> None:
    models = [NumericPipeline(flops=flops) for flops in (float("nan"), float("inf"), -1.0, 0.0)]
    turns = Turns(*models)
    jobs = [turns.submit(ask("any", model=f"{model}", num_images=9), deadline=100) for model in range(4)]
    turns.finish(*jobs, within=200)
    assert all(isinstance(each.wait(0), Done) for each in jobs)


# ---- deadlines ------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass only in steps: one for each step of a batch, unless told otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        for module in (loop, job):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def tick(self, states: Sequence[Vector]) -> None:
        assert states
        self.now += 1.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_request_goes_first_when_waiting_would_miss_its_deadline(clock: Clock) -> None:
    here, there = NumericPipeline(steps=10, on_step=clock.tick), NumericPipeline(steps=10, on_step=clock.tick)
    turns = Turns(here, there)
    turns.submit(ask("measured", model="1"))
    turns.turn(10)
    turns.submit(ask("important", num_images=1000), priority=HIGHEST)
    turns.turn(10)
    due = turns.submit(ask("due", model="1"), deadline=40, priority=LOWEST)
    started = clock.now
    turns.finish(due, within=100)
    assert clock.now - started <= 40
    assert len(here.batches) - 10 >= 20  # not before it had to


def test_several_deadlines_are_met_that_only_one_after_the_other_can_be(clock: Clock) -> None:
    models = [NumericPipeline(steps=10, on_step=clock.tick) for _ in range(4)]
    turns = Turns(*models)
    turns.finish(*(turns.submit(ask("measured", model=f"{model}")) for model in range(4)))
    turns.submit(ask("endless", num_images=1000), priority=1)
    turns.turn(3)
    started = clock.now
    jobs = [turns.submit(ask("due", model=f"{model}"), deadline=60 - model) for model in (1, 2, 3)]
    turns.finish(*jobs)
    assert clock.now - started <= 60


def test_one_that_is_missed_does_not_block_one_that_can_be_met(clock: Clock) -> None:
    models = [NumericPipeline(steps=10, on_step=clock.tick) for _ in range(2)]
    turns = Turns(*models)
    turns.finish(*(turns.submit(ask("measured", model=f"{model}")) for model in range(2)))
    missed = turns.submit(ask("missed", num_images=100), deadline=3)
    turns.turn(5)
    started = clock.now
    met = turns.submit(ask("met", model="1"), deadline=11)
    turns.finish(met)
    assert clock.now - started <= 11
    turns.finish(missed)


@pytest.mark.parametrize("flops", [1.0, 0.0, float("nan")])
def test_in_a_hurry_and_unmeasured_the_first_step_measures(clock: Clock, flops: float) -> None:
    """Where FLOPs are not counted too."""
    here = NumericPipeline(steps=10, on_step=clock.tick)
    there = NumericPipeline(steps=10, flops=flops, on_step=clock.tick)
    turns = Turns(here, there)
    turns.submit(ask("endless", num_images=1000), priority=3)
    turns.turn(3)
    turns.submit(ask("due", model="1"), deadline=1000)
    turns.turn(5)
    assert len(there.batches) == 1


def test_a_deadline_out_of_reach_holds_back_nobody(clock: Clock) -> None:
    models = [NumericPipeline(steps=20, on_step=clock.tick) for _ in range(2)]
    turns = Turns(*models)
    turns.submit(ask("out of reach", num_images=10_000), priority=LOWEST, deadline=3)
    turns.turn()
    assert turns.finish(turns.submit(ask("important", model="1"), priority=HIGHEST)) == 20


# ---- nobody starves -------------------------------------------------------------------------------------------------

ASKED = st.tuples(
    st.integers(0, 2),  # model
    st.integers(-2, 2),  # priority
    st.sampled_from([None, None, 0.5, 8.0, 60.0]),  # deadline
    st.integers(1, 9),  # pictures
    st.sampled_from([8, 16]),  # width
    st.booleans(),  # deterministic
)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=12)
@given(asked=st.lists(ASKED, min_size=1, max_size=12), places=st.integers(1, 4))
def test_nobody_starves_under_a_stream_of_newcomers(policy: str, asked: list[tuple], places: int) -> None:
    """Important newcomers, small and large, in a hurry and not, at every turn; what came first is done in the end.

    What came first has the lowest priority there is, so it steps in turns of its own only: the last of n requests with
    w steps each at the latest in the turn (n w) of these. One more picture is what a place may have to be waited for.
    """
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        patch.setattr("gesso.engine.standing.AGEING", 2)
        steps = (1, 3, 4)
        models = [
            NumericPipeline(steps=count, flops=flops, level=count != 3, on_step=clock.tick)
            for count, flops in zip(steps, (1.0, 5.0, 2.0), strict=True)
        ]
        turns = Turns(*models, policy=policy, max_batch=places)
        first = [turns.submit(ask("first", model=f"{model}", num_images=2), priority=-3) for model in range(3)]
        longest = 2 * (URGENT + 3) + 6 + max(steps) * 2 * places
        flying: list[Job] = []
        for turn in range(longest * 3 * 2 * max(steps) * 2):
            if all(each.done() for each in first):
                return
            model, priority, deadline, pictures, width, alone = asked[turn % len(asked)]
            flying = [each for each in flying if not each.done()]
            if len(flying) < 8:
                request = ask("next", model=f"{model}", num_images=pictures, width=width, deterministic=alone)
                flying.append(turns.submit(request, priority=priority, deadline=deadline))
            turns.turn()
        raise AssertionError("somebody starves")


@settings(max_examples=25)
@given(
    steps=st.tuples(*[st.integers(1, 8)] * 3),
    flops=st.tuples(*[st.sampled_from([1, 3, 10])] * 3),
    pictures=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    places=st.integers(1, 4),
)
def test_equals_wait_no_longer_than_their_own_work_takes_the_others(
    steps: tuple[int, ...], flops: tuple[int, ...], pictures: list[int], places: int
) -> None:
    """Under ``fair``, against newcomers to two other models at every turn.

    While the first waits, neither of these uses more than the first's own work beyond what it had a right to before: a
    picture of each of its places, and a step.
    """
    models = [NumericPipeline(steps=count, flops=each) for count, each in zip(steps, flops, strict=True)]
    turns = Turns(*models, max_batch=places)
    for turn in range(20):
        turns.submit(ask("before", model=f"{1 + turn % 2}", num_images=pictures[turn % len(pictures)]))
        turns.turn()
    used = [sum(map(len, model.batches)) * each for model, each in zip(models, flops, strict=True)]
    first = turns.submit(ask("first"))
    for turn in range(10_000):
        if first.done():
            break
        turns.submit(ask("next", model=f"{1 + turn % 2}", num_images=pictures[turn % len(pictures)]))
        turns.turn()
    for model in (1, 2):
        more = sum(map(len, models[model].batches)) * flops[model] - used[model]
        assert more <= steps[0] * flops[0] + 2 * places * (steps[model] + 1) * flops[model]


def test_a_usual_request_begins_whole() -> None:
    pipeline = NumericPipeline(steps=2)
    turns = Turns(pipeline, max_batch=SHARE)
    jobs = [turns.submit(ask(f"{index}", num_images=SHARE)) for index in range(3)]
    assert [turns.finish(each) for each in jobs] == [2, 2, 2]
