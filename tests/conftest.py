"""Fixtures that several folders of tests share, and how property tests run everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("gesso", deadline=None)  # no test asserts how long anything takes
settings.load_profile("gesso")


@pytest.fixture(scope="session")
def tiny_infinity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Infinity with random weights; read it, never write to it."""
    from tests.tiny_infinity import write_tiny_infinity

    return write_tiny_infinity(tmp_path_factory.mktemp("models") / "tiny-infinity")
