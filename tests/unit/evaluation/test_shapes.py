"""Counting answers: shares, Wilson's interval, and the refusal of numbers out of range."""

import pytest

from gesso.engine import Engine
from gesso.errors import FileError, RequestError
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


def test_a_safety_setting_does_not_come_before_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GESSO_SAFETY", "blur")
    monkeypatch.setenv("GESSO_SAFETY_MODEL", "/no/checker")
    with Engine(device="cpu") as engine:
        assert len(evaluate(engine, {"model": "infinity-nano"}, prompts=6).answers) == 6
        with pytest.raises(FileError, match="is no safety checker"):  # one that asks for it has it
            evaluate(engine, {"model": "infinity-nano", "safety": "blur"}, prompts=6)
