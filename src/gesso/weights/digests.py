"""SHA-256 of files of weights, computed once for as long as a file stays what it was.

What was computed is remembered in `digests.json` of the home folder, with what tells that a file was written to since:
its size, inode and times of change. Hashing goes at about the speed of a good disk, so that it would otherwise nearly
double the time that a model takes to load. `gesso models verify` never asks here: it reads every byte. Not here:
manifests and what they promise (`manifest`).
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from gesso.errors import FileError, GessoError
from gesso.files import written_aside
from gesso.settings import load_settings

NAME = "digests.json"
_SETTLED = 2_000_000_000  # nanoseconds: within them a file may be written to again at the same time of change,
_TICK = 50_000_000  # or on the file systems of most machines within these, which is enough for one process
_MOST = 4096  # files that are remembered
_AT_ONCE = min(4, os.cpu_count() or 1)  # files that are hashed: one processor does not keep up with a good disk

_Digest = tuple[list[int], str]  # what tells that the file was written to since, and the digest

_lock = threading.Lock()
_under_way: dict[Path, Future[_Digest]] = {}
_known: dict[Path, _Digest] = {}


def begin(paths: Iterable[Path]) -> None:
    """Compute what is not remembered, beside other work; `sha256` then waits for it. Errors are told there."""
    waiting: deque[tuple[Path, Future[_Digest]]] = deque()
    with _lock:
        for path in paths:
            if path not in _under_way or _under_way[path].done():  # by who never asked for it
                waiting.append((path, Future()))
        _under_way.update(waiting)
    for _ in range(min(len(waiting), _AT_ONCE)):
        threading.Thread(target=_compute, args=(waiting,), name="gesso-digests", daemon=True).start()


def sha256(path: Path) -> str:
    """Of a file, in small letters: as remembered, if it was not written to since. Raises FileError."""
    with _lock:
        begun = _under_way.pop(path, None)
    if begun is not None:
        marks, found = begun.result()
        with suppress(OSError):
            if _marks(path.stat()) == marks:
                return found
    return _sha256(path)[1]


def _compute(waiting: deque[tuple[Path, Future[_Digest]]]) -> None:
    while True:
        try:
            path, future = waiting.popleft()
        except IndexError:
            return
        try:
            future.set_result(_sha256(path))
        except BaseException as error:  # for who asks; nobody may
            future.set_exception(error)


def _sha256(path: Path) -> _Digest:
    try:
        with path.open("rb") as file:
            marks = _marks(os.fstat(file.fileno()))
            if path in _known and _known[path][0] == marks:
                return _known[path]
            kept = _remembered().get(str(path.absolute()))
            if isinstance(kept, list) and kept[:-1] == marks:
                return marks, str(kept[-1])
            found = hashlib.file_digest(file, "sha256").hexdigest()
            unchanged = _marks(os.fstat(file.fileno())) == marks
    except OSError as error:
        raise FileError(path, f"cannot be read ({(error.strerror or str(error)).lower()})") from error
    age = time.time_ns() - max(marks[2:]) if unchanged else 0
    if age > _TICK:
        _known[path] = marks, found
    if age > _SETTLED:
        _remember(path, [*marks, found])
    return marks, found


def _marks(status: os.stat_result) -> list[int]:
    """What changes when a file does: size, inode, and both times of change in nanoseconds."""
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _remembered() -> dict[str, object]:
    try:
        found = json.loads((load_settings().home / NAME).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError, GessoError):
        return {}


def _remember(path: Path, entry: list[object]) -> None:
    """Nothing depends on it, so a home that cannot be written to only costs time."""
    with _lock, suppress(OSError, GessoError):
        known = _remembered()
        known.pop(str(path.absolute()), None)
        kept = dict(list(known.items())[1 - _MOST :]) | {str(path.absolute()): entry}
        home = load_settings().home
        home.mkdir(parents=True, exist_ok=True)
        with written_aside(home / NAME) as aside:
            aside.write_text(json.dumps(kept), encoding="utf-8")
