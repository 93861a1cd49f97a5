"""Every test here runs once for each pipeline."""

from __future__ import annotations

import pytest

from tests.contract.subjects import SUBJECTS, Subject


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]()
