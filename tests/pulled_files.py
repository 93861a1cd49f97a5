"""Folders as a pull leaves them, with a manifest of what lies in them, and what loading makes of that.

Not here: hubs to pull from (`hub_server`).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gesso.engine.loading import load_pipeline
from gesso.errors import MissingError, WeightsError
from gesso.weights import catalogue, manifest


def list_files(folder: Path) -> Path:
    """Write the manifest of all files below a folder, and return the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": manifest.sha256(path)}
        for path in files
    }
    (folder / manifest.NAME).write_text(json.dumps(listed))
    return folder


def alter(path: Path) -> None:
    """Change one bit of a file's last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def assert_checked(called: str, folder: Path, file: Path) -> None:
    """That a pulled model is held against what was pulled, by whatever it is called; spoils it."""
    pull = f"gesso models pull {folder.name}$"
    assert catalogue.find(called).name == called
    assert load_pipeline(called, "cpu", "float32")
    (folder / manifest.UNFINISHED).mkdir()
    with pytest.raises(MissingError, match=rf"cut short in .*; get it with: {pull}"):
        load_pipeline(called, "cpu", "float32")
    (folder / manifest.UNFINISHED).rmdir()
    alter(file)
    with pytest.raises(WeightsError, match=rf"{file.name} was altered; mend it with: {pull}"):
        load_pipeline(called, "cpu", "float32")
