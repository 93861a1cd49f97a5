"""A model folder's `manifest.json`: size and SHA-256 of every file, made on export and checked on loading."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from gesso.errors import WeightsError

NAME = "manifest.json"


def make(folder: Path) -> dict[str, dict[str, object]]:
    """Size and digest of every file of a folder but the manifest itself."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != NAME
    }


def verify(folder: Path, names: tuple[str, ...]) -> str:
    """Check these files against the manifest and return one digest for all of them.

    Raises WeightsError that names each file that is missing, short or altered.
    """
    try:
        listed = json.loads((folder / NAME).read_text(encoding="utf-8"))
        wanted = {name: (int(listed[name]["bytes"]), str(listed[name]["sha256"])) for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(folder, detail=f"{NAME} is missing or does not list {', '.join(names)}") from error
    problems = []
    for name, (size, sha256) in wanted.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {size}")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            problems.append(f"{name} was altered")
    if problems:
        raise WeightsError(folder, detail="; ".join(problems))
    return hashlib.sha256("".join(digest for _, digest in wanted.values()).encode()).hexdigest()
