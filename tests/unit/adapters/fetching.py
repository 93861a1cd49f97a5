"""Adapters that hosts of the tests serve, and fetching them into a store of the test's own."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from gesso.adapters.sources import parse
from gesso.adapters.store import AdapterStore, Fetched, Wishes
from gesso.errors import GessoError
from tests.adapter_server import lora

CONTENT = lora(rank=16, width=1024, layers=4)  # about half a megabyte
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OTHER = lora(value=0.25)


def have(text: str, **wishes: object) -> Fetched:
    return AdapterStore().ensure(parse(text), Wishes(**wishes))  # type: ignore[arg-type]


def refusal(kind: type[GessoError], text: str, **wishes: object) -> str:
    """The one line of an error of exactly this kind, after which nothing half-done is left."""
    with pytest.raises(kind) as caught:
        have(text, **wishes)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert AdapterStore().adapters() == []
    return str(caught.value)


def parts(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "home/adapters/.unfinished").glob("*"))
