"""Decisions: properties of every schedule, adaptive courses step by step, and the words of bad settings."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.cache_settings import CacheSettings, parse_cache
from gesso.caching.policy import Action
from gesso.caching.policy_choice import Policy
from gesso.caching.policy_clusters import cluster, first_centroids, representatives, shared
from gesso.caching.policy_interval import Kind, full_steps, planned_steps
from gesso.caching.policy_tokens import age_after, select, with_bonus
from gesso.errors import RequestError

STEPS, INTERVALS, WARMUPS = st.integers(1, 60), st.integers(1, 12), st.integers(1, 6)
SCHEDULED = st.sampled_from(["taylorseer", "lite", "residual", "toca", "duca", "random", "clusca"])


@settings(max_examples=80)
@given(policy=SCHEDULED, steps=STEPS, interval=INTERVALS, warmup=WARMUPS, last=st.integers(0, 4))
def test_schedules(policy: str, steps: int, interval: int, warmup: int, last: int) -> None:
    """The first and last as asked, no gap longer than the interval, and forecasts only of what is known."""
    values = {"policy": policy, "interval": interval, "warmup": warmup, "last_full": last}
    kinds = planned_steps(CacheSettings.model_validate(values).filled(), steps)
    full = [step for step, kind in enumerate(kinds) if kind is Kind.FULL]
    assert len(kinds) == steps and full[: min(warmup, steps)] == list(range(min(warmup, steps)))
    assert set(range(max(0, steps - last), steps)) <= set(full)
    assert max((after - before for before, after in pairwise(full)), default=0) <= interval
    course = Policy(CacheSettings.model_validate(values)).course(steps)
    assert [course.decide(step).full for step in range(steps)] == [kind is Kind.FULL for kind in kinds]


@settings(max_examples=30)
@given(steps=STEPS, warmup=WARMUPS)
def test_interval_one_is_no_cache(steps: int, warmup: int) -> None:
    assert all(full_steps(steps, 1, warmup))


@settings(max_examples=30)
@given(mask=st.lists(st.booleans(), min_size=1, max_size=20))
def test_a_mask_is_followed(mask: list[bool]) -> None:
    mask = [True, *mask]
    course = Policy(CacheSettings(policy="lite", mask=tuple(mask))).course(len(mask))
    assert [course.decide(step).full for step in range(len(mask))] == mask


@settings(max_examples=60)
@given(errors=st.lists(st.floats(0, 2), min_size=3, max_size=30), low=st.integers(1, 3), more=st.integers(0, 4))
def test_speculation_skips_not_too_often_and_keeps_nothing_that_failed(
    errors: list[float], low: int, more: int
) -> None:
    values = {"policy": "speca", "warmup": 2, "threshold": 1.0, "min_skips": low, "max_skips": low + more}
    course, skips = Policy(CacheSettings.model_validate(values)).course(len(errors)), 0
    for step, error in enumerate(errors):
        decision = course.decide(step)
        assert decision.full or step >= 2
        assert decision.check == (not decision.full and skips >= low)
        refused = decision.check and course.refuses(step, error)
        course.settle(step, decision.full or refused, error if decision.check else None)
        skips = 0 if decision.full or refused else skips + 1
        assert skips <= low + more


def test_accumulated_changes_add_up_and_single_ones_do_not() -> None:
    for policy, expected in (("first_block", "FTTTTT"), ("accumulated", "FTTFTT")):
        course = Policy(parse_cache(f"{policy}:warmup=1,threshold=1,max_skips=9")).course(6)
        taken = ""
        for step in range(6):
            decision = course.decide(step)
            full = decision.full or course.refuses(step, 0.4)
            assert decision.action is (Action.COMPUTE if step == 0 else Action.PROBE)
            course.settle(step, full, None if decision.full else 0.4)
            taken += "F" if full else "T"
        assert taken == expected


@pytest.mark.parametrize(
    ("cache", "steps", "reached"),
    [
        ("lite:interval=9,warmup=1", 5, 0),
        ("taylorseer:interval=5", 10, 1),  # steps 0 to 2 warm up, step 7 makes a derivative
        ("taylorseer:interval=5,guarded=false", 10, 3),
        ("taylorseer:interval=5,last_full=2", 10, 0),  # no forecast follows step 7
        ("taylorseer:interval=2,warmup=1", 9, 3),
        ("lite:interval=5,warmup=3", 3, 0),  # no step is forecast
    ],
)
def test_an_order_that_is_asked_for_must_be_reached(cache: str, steps: int, reached: int) -> None:
    """By what some forecast is made of; one that was left blank is as high as it gets."""
    blank = Policy(parse_cache(cache))
    blank.course(steps)
    assert blank.settled(steps).order == min(reached, blank.rule.order)
    Policy(parse_cache(f"{cache},order={reached}")).course(steps)
    if reached < 3:
        with pytest.raises(RequestError, match=rf"cache\.order {reached + 1} is not at most {reached}, since so many"):
            Policy(parse_cache(f"{cache},order={reached + 1}")).course(steps)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tailorseer", 'cache.policy "tailorseer" is not one of: taylorseer, lite'),
        ("taylorseer:interval=0", "cache.interval"),
        ("taylorseer:order=4", "cache.order"),
        ("taylorseer:intervall=3", "did you mean interval?"),
        ("taylorseer:clusters=3", "cache.clusters 3 is not used by taylorseer; it is for clusca"),
        ("taylorseer:mask=01", "nothing is known before it is computed"),
        ("taylorseer:mask=1x", "cache.mask"),
        ("taylorseer:interval", "is not key=value"),
        ("lite:granularity=module", "cache.granularity"),
        ("lite:schedule=adaptive", "cache.schedule"),
        ("speca:min_skips=9", "cache.min_skips 9 is not at most max_skips, 8"),
        ("residual:granularity=block,front_blocks=-1", "cache.front_blocks"),
        ("first_block:threshold=nan", "cache.threshold"),
        ("first_block:front_blocks=0", "cache.front_blocks 0 is not at least 1; first_block looks at"),
        ("accumulated:front_blocks=0", "cache.front_blocks 0 is not at least 1; accumulated looks at"),
        ("taylorseer:hybrid=true", "cache.hybrid True is not usable without smoothing; add smoothing=exponential"),
        ("taylorseer:alpha=0.5", "cache.alpha 0.5 is not usable without smoothing; add smoothing=exponential"),
        ("taylorseer:smoothing=moving_average,alpha=0.5", "cache.alpha 0.5 is not used by a moving average; take"),
    ],
)
def test_bad_settings_are_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_cache(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_lines_spelling() -> None:
    found = parse_cache("taylorseer:interval=4,order=2,smoothing=exponential,hybrid=true,last-full=1")
    assert (found.interval, found.order, found.hybrid, found.last_full) == (4, 2, True, 1)
    assert hash(found) == hash(CacheSettings.model_validate(found.model_dump()))


def test_an_odd_picture_has_smaller_cells_at_its_edges() -> None:
    score_1n = torch.arange(1.0, 10.0)[None]  # 3 x 3: cells of 4, 2, 2 and 1 tokens, each with its last token best
    lifted = with_bonus(score_1n, 1.0, (3, 3))
    assert (lifted / score_1n).tolist() == [[1, 1, 1, 1, 2, 2, 1, 2, 2]]


def test_select_and_ages() -> None:
    index = select(torch.tensor([[0.1, 0.9, 0.5]]), 0.7)
    assert index.tolist() == [[1, 2]]
    assert age_after(torch.tensor([[4, 4, 4]]), index).tolist() == [[5, 0, 0]]
    assert select(torch.ones(1, 3), -1).shape == (1, 0)
    assert select(torch.ones(1, 3), 2).shape == (1, 3)


def test_an_empty_cluster_stays_where_it_is_and_counts_for_nothing() -> None:
    tokens = torch.tensor([[[0.0], [1.0], [10.0], [11.0]]])
    label, centroid = cluster(tokens, torch.tensor([[[0.0], [10.0], [99.0]]]))
    assert label.tolist() == [[0, 0, 1, 1]]
    assert centroid.flatten().tolist() == [0.5, 10.5, 99.0]
    index = representatives(label, torch.tensor([[0.1, 0.2, 0.3, 0.4]]), 3)
    assert index.tolist() == [[1, 3, 0]]
    fresh = torch.tensor([[[2.0], [20.0], [4.0]]])
    mixed = shared(tokens, label, index, fresh, 0.5)
    assert mixed.flatten().tolist() == [4.0, 2.0, 15.0, 20.0]  # fresh ones stay true; others go halfway to their mean
    assert first_centroids(tokens, torch.rand(1, 4), 9).shape == (1, 4, 1)
