"""A model folder's `manifest.json`: size and SHA-256 of every file, made on export or after a pull.

Models of our own layout are checked against it on loading, published ones by `gesso models verify`.
A file that shipped models share (`weights/shared`) is listed with `"shared": true` and lies in the zoo's shared room.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gesso.errors import WeightsError
from gesso.files import inside
from gesso.weights import digests
from gesso.weights.checksums import Findings

NAME = "manifest.json"
UNFINISHED = ".gesso-pull"
"""Folder within a model's, there from a pull's beginning until all of its files are whole: what is half-fetched."""

_MISSING = "is missing"
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
        listed[name] = {"bytes": path.stat().st_size, "sha256": digests.sha256(path)}
        if name in shared:
            listed[name]["shared"] = True
    return listed


def sha256(path: Path) -> str:
    """Of a file of any size, in small letters."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def names(folder: Path) -> tuple[str, ...]:
    """All files that a folder's manifest lists. Raises WeightsError where it has none."""
    try:
        listed = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return tuple(str(name) for name in dict(listed))
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(folder, detail=f"{NAME} is missing or damaged") from error


def verify(folder: Path, names: tuple[str, ...]) -> str:
    """Check these files against the manifest and return one digest for all of them. A file's own is computed once.

    Raises WeightsError that names each file that is missing, short or altered.
    """
    wanted = _wanted(folder, names)
    problems = [f"{file.name} {problem}" for file in wanted if (problem := file.problem(digests.sha256))]
    if problems:
        raise WeightsError(folder, detail="; ".join(problems))
    return hashlib.sha256("".join(file.sha256 for file in wanted).encode()).hexdigest()


def findings(folder: Path, names: tuple[str, ...], *, contents: bool) -> Findings:
    """The same as an answer; without `contents` files only have to be there, and as long as they should be."""
    wanted = _wanted(folder, names)
    problems = {file.name: file.problem(sha256 if contents else None) for file in wanted}
    missing = tuple(name for name, problem in problems.items() if problem == _MISSING)
    short = tuple(file.name for file in wanted if problems[file.name] and file.is_short())
    altered = tuple(name for name, problem in problems.items() if problem and name not in (*missing, *short))
    return Findings(missing=missing, short=short, altered=altered)


@dataclass(frozen=True)
class _Listed:
    """A file as the manifest has it."""

    name: str
    path: Path
    size: int
    sha256: str

    def is_short(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size < self.size

    def problem(self, digest: Callable[[Path], str] | None) -> str:
        """What is wrong with it, "" if nothing is; without `digest` its content is not looked at."""
        if not self.path.is_file():
            return _MISSING
        if self.path.stat().st_size != self.size:
            return f"has {self.path.stat().st_size} bytes, not {self.size}"
        if digest is not None and digest(self.path) != self.sha256:
            return "was altered"
        return ""


def _wanted(folder: Path, names: tuple[str, ...]) -> list[_Listed]:
    """These files as the manifest has them. Raises WeightsError where it does not."""
    found = []
    try:
        listed = json.loads((folder / NAME).read_text(encoding="utf-8"))
        for name in names:
            size, sha256 = int(listed[name]["bytes"]), str(listed[name]["sha256"])
            if listed[name].get("shared") is True:
                path = shared_path(sha256)
                found.append(_Listed(f"{name} (shared: {path})", path, size, sha256))
            else:
                found.append(_Listed(name, inside(folder, name), size, sha256))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(folder, detail=f"{NAME} is missing or does not list {', '.join(names)}") from error
    return found
