"""Folders as a pull leaves them: with a manifest of what lies in them. Not here: hubs to pull from (`hub_server`)."""

from __future__ import annotations

import json
from pathlib import Path

from gesso.weights import manifest


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
