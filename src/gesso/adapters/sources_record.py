"""Which bytes of a file that is being fetched are on the disk: kept beside them, so that the next try goes on.

Not here: getting the bytes (`sources_download`).
"""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gesso.errors import FileError, RunError
from gesso.files import written_aside

SEGMENT = 1 << 24  # bytes that are asked for at once


@dataclass(frozen=True)
class First:
    """What the first answer tells: size, what marks this version, whether it comes in ranges, and whence."""

    size: int | None
    mark: str
    ranges: bool
    url: str


class Record:
    """Which bytes of a file are here, and of which version of it."""

    def __init__(self, first: First, missing: list[tuple[int, int]]) -> None:
        self.size = first.size
        self.mark = first.mark
        self.ranges = first.ranges
        self.missing = dict(missing)  # by where each begins
        self.lock = threading.Lock()

    @classmethod
    def read(cls, part: Path, first: First, sha256: str) -> Record:
        """What was kept, if it is of the same version of the file; else nothing is here.

        A host that marks no versions is believed where the site states the SHA-256: `part` is named by it.
        """
        fresh = [(0, first.size or 0)] if first.ranges else []
        try:
            kept = json.loads(beside(part).read_text(encoding="utf-8"))
            missing = sorted((int(begin), int(end)) for begin, end in kept["missing"])
            same = (kept["size"], kept["mark"]) == (first.size, first.mark) and part.stat().st_size == first.size
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return cls(first, fresh)
        whole = all(0 <= begin <= end <= (first.size or 0) for begin, end in missing)
        return cls(first, missing if first.ranges and (first.mark or sha256) and same and whole else fresh)

    @property
    def here(self) -> int:
        """Bytes that are here, if they come in ranges."""
        with self.lock:
            return (self.size or 0) - sum(end - begin for begin, end in self.missing.items()) if self.ranges else 0

    def segments(self) -> list[tuple[int, int]]:
        """What is missing, in pieces to be asked for."""
        with self.lock:
            pieces = [
                (at, min(at + SEGMENT, end)) for begin, end in self.missing.items() for at in range(begin, end, SEGMENT)
            ]
            self.missing = dict(pieces)
        return pieces

    def come(self, begin: int, end: int) -> None:
        """Bytes from `begin` to `end` are on the disk."""
        with self.lock:
            last = self.missing.pop(begin)
            if end < last:
                self.missing[end] = last

    def next(self, begin: int, end: int) -> int:
        """Where a range goes on that was asked for from `begin` to `end`."""
        with self.lock:
            return next((at for at, last in self.missing.items() if last == end and at >= begin), end)

    def save(self, part: Path) -> None:
        """Keep it for the next try; the bytes themselves have to be on the disk before."""
        with self.lock, suppress(FileError, RunError), written_aside(beside(part)) as aside:
            kept = {"size": self.size, "mark": self.mark, "missing": list(self.missing.items())}
            aside.write_text(json.dumps(kept), encoding="utf-8")


def beside(part: Path) -> Path:
    """Where the record of a file lies."""
    return part.with_suffix(".json")
