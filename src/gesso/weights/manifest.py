"""A model folder's `manifest.json`: size and SHA-256 of every file, made on export and checked on loading.

A file that shipped models share (`weights/shared`) is listed with `"shared": true` and lies in the zoo's shared room.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from gesso.errors import WeightsError

NAME = "manifest.json"
SHARED = Path(__file__).parent.parent / "zoo" / "shared"


def shared_path(digest: str) -> Path:
    """Where the shared file of this SHA-256 lies, or would lie."""
    return SHARED / f"{digest}.safetensors"


def make(folder: Path, shared: Mapping[str, str] | None = None) -> dict[str, dict[str, object]]:
    """Size and digest of every file of a folder but the manifest itself, and of those in the shared room.

    `shared` are the latter's digests by name.
    """
    shared = shared or {}
    own = {path.name: path for path in folder.iterdir() if path.is_file() and path.name not in (NAME, *shared)}
    paths = own | {name: shared_path(digest) for name, digest in shared.items()}
    listed: dict[str, dict[str, object]] = {}
    for name, path in sorted(paths.items()):
        listed[name] = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        if name in shared:
            listed[name]["shared"] = True
    return listed


def verify(folder: Path, names: tuple[str, ...]) -> str:
    """Check these files against the manifest and return one digest for all of them.

    Raises WeightsError that names each file that is missing, short or altered.
    """
    try:
        listed = json.loads((folder / NAME).read_text(encoding="utf-8"))
        wanted = {name: (int(listed[name]["bytes"]), str(listed[name]["sha256"])) for name in names}
        shared = {name for name in names if listed[name].get("shared") is True}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(folder, detail=f"{NAME} is missing or does not list {', '.join(names)}") from error
    problems = []
    for name, (size, sha256) in wanted.items():
        path = shared_path(sha256) if name in shared else folder / name
        name = f"{name} (shared: {path})" if name in shared else name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {size}")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            problems.append(f"{name} was altered")
    if problems:
        raise WeightsError(folder, detail="; ".join(problems))
    return hashlib.sha256("".join(digest for _, digest in wanted.values()).encode()).hexdigest()
