"""A store of the test's own, and a host that serves into it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gesso.adapters import sources_record, sources_sites
from tests.adapter_server import Page, Site, served
from tests.unit.adapters.fetching import CONTENT


@pytest.fixture
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [f"{prefix}{site}_TOKEN" for prefix in ("", "GESSO_") for site in ("HF", "CIVITAI", "REPLICATE")]
    proxies = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    for name in ("GESSO_OFFLINE", "HF_HUB_OFFLINE", "GESSO_LARGEST_ADAPTER", *proxies, *tokens):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GESSO_ALLOW_PRIVATE_ADDRESSES", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setattr(sources_sites, "PAUSE", 0.01)
    monkeypatch.setattr(sources_record, "SEGMENT", 100_000)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with served(Site({"/a.safetensors": Page(CONTENT)})) as serving:
        monkeypatch.setenv("GESSO_CIVITAI_ENDPOINT", serving.address)
        monkeypatch.setattr(sources_sites, "REPLICATE", serving.address)
        yield serving
