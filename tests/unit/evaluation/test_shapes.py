"""Counting answers: shares, Wilson's interval, and the refusal of numbers out of range."""

import pytest

from gesso.engine import Engine
from gesso.errors import RequestError
from gesso.evaluation.shapes import Share, evaluate


@pytest.mark.parametrize(
    # Wilson's interval as tabulated by others: statsmodels' proportion_confint(method="wilson").
    ("right", "asked", "low", "high"),
    [(85, 100, 0.7671, 0.9069), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 2, 0.0945, 0.9055)],
)
def test_wilsons_interval(right: int, asked: int, low: float, high: float) -> None:
    assert Share(right=right, asked=asked).interval == pytest.approx((low, high), abs=1e-4)


def test_every_category_needs_a_prompt() -> None:
    with Engine(device="cpu") as engine, pytest.raises(RequestError, match="prompts"):
        evaluate(engine, prompts=5)
