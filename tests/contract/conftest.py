"""Every test here runs once for each pipeline."""

from __future__ import annotations

import pytest

from tests.contract.subjects import SUBJECTS, TRAINED, Subject

_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in TRAINED]


@pytest.fixture(scope="module", params=[*SUBJECTS, *_SLOW])
def subject(request: pytest.FixtureRequest) -> Subject:
    return (SUBJECTS | TRAINED)[request.param]()
