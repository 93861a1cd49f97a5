"""What training computes in: asked for, or what suits the processor."""

import pytest
import torch

from gesso.training.precision import autocast


@pytest.mark.parametrize(("precision", "half"), [("bf16", True), ("fp32", False)])
def test_matmuls_are_in_what_was_asked_for(precision: str, half: bool) -> None:
    matrix = torch.eye(2)
    with autocast(precision):
        assert (matrix @ matrix).dtype == (torch.bfloat16 if half else torch.float32)


@pytest.mark.parametrize("half", [False, True])
def test_auto_goes_by_the_processor(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gesso.training.precision.has_fast_bfloat16", lambda: half)
    with autocast():
        assert torch.is_autocast_enabled("cpu") is half
