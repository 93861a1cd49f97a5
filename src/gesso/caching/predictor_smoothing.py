"""Smoothed ladders: features are filtered before their differences are taken, to keep noise out of high orders.

Here: the three forms that `Smoothing` names. Not here: ladders without smoothing, and reading ladders (`predictor`).
"""

from __future__ import annotations

from torch import Tensor

from gesso.caching.predictor import Ladder, Rule, Smoothing, differences, gap


def extend_smoothed(ladder: Ladder | None, feature: Tensor, step: int, rule: Rule, smoothing: Smoothing) -> Ladder:
    """As `predictor.extend`, with a rule that smooths."""
    averages = smoothing.form == "filter" and not smoothing.hybrid and smoothing.method == "moving_average"
    if ladder is None or step < rule.since:
        return Ladder((step,), (feature,), (feature,) if averages else ())
    if smoothing.form != "filter":
        return _published(ladder, feature, step, rule, smoothing)
    if smoothing.hybrid:
        return _hybrid(ladder, feature, step, rule, smoothing)
    if averages:
        smoothed = _blend(feature, ladder.older[0].to(feature), 0.5)
        return Ladder(*differences(ladder, smoothed, step, rule), (feature,))
    smoothed = _blend(feature, ladder.factors[0].to(feature), smoothing.alpha)
    return Ladder(*differences(ladder, smoothed, step, rule))


def _hybrid(ladder: Ladder, feature: Tensor, step: int, rule: Rule, smoothing: Smoothing) -> Ladder:
    """Orders 0 and 1 of features as they are; order 2 of a filtered window of three, order 3 of the order 2 before."""
    previous = ladder.factors[0].to(feature)
    _, factors = differences(ladder, feature, step, rule, min(rule.order, 1))
    if rule.order > 1 and ladder.older:
        window = _window(ladder.older[0].to(feature), previous, feature, smoothing)
        newest, before = step - ladder.steps[0], ladder.steps[0] - ladder.steps[1]
        factors = (*factors, _second(window, newest, newest if rule.spacing == "last_gap" else before))
        if rule.order > 2 and len(ladder.factors) > 2:
            factors = (*factors, (factors[2] - ladder.factors[2].to(feature)) / gap(ladder, step, 2, rule))
    kept = max(len(factors), 2)  # the step of the older entry is needed before there is an order 2
    return Ladder((step, *ladder.steps)[:kept], factors, (previous,) if rule.order > 1 else ())


def _published(ladder: Ladder, feature: Tensor, step: int, rule: Rule, smoothing: Smoothing) -> Ladder:
    """A window over three cached entries, of which a global filter's older ones are filtered already.

    As it runs, the published code overwrites its history just before it is read, so that the window is (previous,
    previous, new): a global filter becomes a running one, and a hybrid order 2 a share of order 1 over the gap. In both
    forms order 1 is kept even where order 0 is asked for.
    """
    previous, h = ladder.factors[0].to(feature), step - ladder.steps[0]
    order = max(rule.order, 1)
    if smoothing.form == "documented" and not ladder.older:
        return Ladder(*differences(ladder, feature, step, rule, order), (previous,))
    older = previous if smoothing.form == "as_run" else ladder.older[0].to(feature)
    window = _window(older, previous, feature, smoothing)
    if smoothing.hybrid:
        factors = [feature, (feature - previous) / h, _second(window, h, h)]
    else:
        factors = [window[2], (window[2] - window[1]) / h]
    for lower in range(len(factors) - 1, order):
        if lower >= len(ladder.factors):
            break
        factors.append((factors[lower] - ladder.factors[lower].to(feature)) / gap(ladder, step, lower, rule))
    factors = factors[: order + 1]
    kept = () if smoothing.form == "as_run" else (previous,)
    return Ladder((step, *ladder.steps)[: len(factors)], tuple(factors), kept)


def _second(window: tuple[Tensor, Tensor, Tensor], newest: float, before: float) -> Tensor:
    """The second derivative of the parabola through three entries, that many steps apart."""
    first, middle, last = window
    return ((last - middle) / newest - (middle - first) / before) / ((newest + before) / 2)


def _window(older: Tensor, previous: Tensor, feature: Tensor, smoothing: Smoothing) -> tuple[Tensor, Tensor, Tensor]:
    """Three entries, filtered one after the other; the first stays as it is."""
    if smoothing.method == "moving_average":
        return older, _blend(previous, older, 0.5), _blend(feature, previous, 0.5)
    middle = _blend(previous, older, smoothing.alpha)
    return older, middle, _blend(feature, middle, smoothing.alpha)


def _blend(new: Tensor, old: Tensor, alpha: float) -> Tensor:
    return alpha * new + (1 - alpha) * old
