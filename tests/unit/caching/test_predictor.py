"""Ladders: exact on polynomials whatever the gaps, as published where gaps are equal, and what smoothing does."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gesso.cache_settings import parse_cache
from gesso.caching.policy_choice import Policy
from gesso.caching.predictor import Ladder, Rule, Smoothing, extend, predict

FULL = st.lists(st.integers(1, 6), min_size=5, max_size=8).map(
    lambda gaps: [sum(gaps[:index]) for index in range(len(gaps))]
)
ORDERS = st.integers(0, 3)


def polynomial(coefficients: list[float], step: int) -> Tensor:
    value = sum(factor * (step / 10) ** power for power, factor in enumerate(coefficients))
    return torch.tensor([value, 1 - value], dtype=torch.float64)


def climbed(rule: Rule, coefficients: list[float], full: list[int]) -> Ladder:
    ladder = None
    for step in full:
        ladder = extend(ladder, polynomial(coefficients, step), step, rule)
    assert ladder is not None
    return ladder


@settings(max_examples=60)
@given(full=FULL, order=ORDERS, ahead=st.integers(1, 8), data=st.data())
def test_newton_is_exact_on_polynomials_of_its_order_over_any_gaps(
    full: list[int], order: int, ahead: int, data: st.DataObject
) -> None:
    coefficients = data.draw(st.lists(st.floats(-2, 2), min_size=order + 1, max_size=order + 1))
    rule = Rule(order=order, expansion="newton")
    forecast = predict(climbed(rule, coefficients, full), full[-1] + ahead, rule)
    torch.testing.assert_close(forecast, polynomial(coefficients, full[-1] + ahead), atol=1e-7, rtol=1e-7)


@settings(max_examples=40)
@given(full=FULL, data=st.data())
def test_the_highest_order_is_a_derivative_over_any_gaps(full: list[int], data: st.DataObject) -> None:
    coefficients = data.draw(st.lists(st.floats(-2, 2), min_size=4, max_size=4))
    ladder = climbed(Rule(order=3), coefficients, full)
    torch.testing.assert_close(ladder.factors[3][0].item(), 6 * coefficients[3] / 1000, atol=1e-8, rtol=1e-6)


@settings(max_examples=40)
@given(gap=st.integers(1, 6), count=st.integers(1, 6), order=ORDERS, seed=st.integers(0, 99))
def test_equal_gaps_make_both_spacings_the_published_ladder(gap: int, count: int, order: int, seed: int) -> None:
    features = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ladders: list[Ladder | None] = [None, None]
    rules = [Rule(order=order, spacing=spacing) for spacing in ("exact", "last_gap")]
    for index, feature in enumerate(features):
        ladders = [extend(ladder, feature, index * gap, rule) for ladder, rule in zip(ladders, rules, strict=True)]
    exact, published = ladders
    assert exact is not None and published is not None
    assert len(exact.factors) == min(order, count - 1) + 1
    for pair in zip(exact.factors, published.factors, strict=True):
        torch.testing.assert_close(*pair)


def test_a_guarded_ladder_waits_for_the_end_of_the_warm_up() -> None:
    heights: list[list[int]] = []
    for cache in ("taylorseer:order=2", "taylorseer:order=2,original=1", "taylorseer:order=2,guarded=0"):
        ladder, rule = None, Policy(parse_cache(cache)).rule
        heights.append([])
        for step in (0, 1, 2, 7, 12):
            ladder = extend(ladder, torch.ones(1), step, rule)
            heights[-1].append(len(ladder.factors))
    assert heights == [[1, 1, 1, 2, 3], [1, 1, 2, 3, 3], [1, 2, 3, 3, 3]]
    masked = Policy(parse_cache("taylorseer:mask=1101")).rule
    assert (masked.since, Policy(parse_cache("taylorseer:mask=1111")).rule.since) == (2, 4)


def test_a_step_that_is_not_later_begins_anew() -> None:
    rule = Rule(order=1)
    ladder = extend(extend(None, torch.ones(1), 0, rule), torch.zeros(1), 2, rule)
    assert ladder.steps == (2, 0)
    assert extend(ladder, torch.ones(1), 2, rule).steps == (2,)


def test_forecasts_are_tensors_of_their_own() -> None:
    rule = Rule(order=0)
    ladder = extend(None, torch.ones(2), 0, rule)
    predict(ladder, 1, rule).mul_(7)
    assert ladder.factors[0].tolist() == [1, 1]


@settings(max_examples=30)
@given(full=FULL, hybrid=st.booleans(), order=ORDERS, seed=st.integers(0, 99))
def test_smoothing_of_nothing_changes_nothing(full: list[int], hybrid: bool, order: int, seed: int) -> None:
    """All the weight on the newest: an exponential filter that filters nothing."""
    features = torch.randn(len(full), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plain, smooth = (
        Rule(order=order),
        Rule(order=order, smoothing=Smoothing(alpha=1.0, hybrid=hybrid)),
    )
    ladders: list[Ladder | None] = [None, None]
    for step, feature in zip(full, features, strict=True):
        ladders = [extend(ladder, feature, step, rule) for ladder, rule in zip(ladders, (plain, smooth), strict=True)]
    assert ladders[0] is not None and ladders[1] is not None
    for pair in zip(ladders[0].factors, ladders[1].factors, strict=True):
        torch.testing.assert_close(*pair)


def test_a_moving_average_is_of_the_newest_two() -> None:
    rule = Rule(order=1, smoothing=Smoothing(method="moving_average"))
    ladder = None
    for step, value in enumerate([0.0, 4.0, 2.0]):
        ladder = extend(ladder, torch.tensor([value]), step, rule)
    assert ladder is not None
    assert [factor.item() for factor in ladder.factors] == [3.0, 1.0]
    assert all(older < newer for newer, older in pairwise(ladder.steps))
