"""A place of the test's own, and a hub that serves into it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gesso.weights import hub_transfer
from tests.hub_server import Hub, served
from tests.unit.weights.pulling import REPOSITORY, repository


@pytest.fixture
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "GESSO_HF_TOKEN", "GESSO_MODELSCOPE_TOKEN")
    for name in ("GESSO_OFFLINE", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", *tokens):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(hub_transfer, "_PAUSE", 0.01)


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """One server that both clients are pointed at."""
    with served(Hub({REPOSITORY: repository()})) as serving:
        monkeypatch.setenv("HF_ENDPOINT", serving.address)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", serving.address)
        yield serving
