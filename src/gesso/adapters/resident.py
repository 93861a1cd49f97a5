"""Adapters in memory: those used last, as many as fit into so many bytes; what is in use stays.

The bound holds at every moment: room is made before anything is read. Not here: adapters on the disk (`store`), reading
one, and putting it into a network.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from gesso.errors import CancelledError, OutOfMemoryError

_Value = TypeVar("_Value")
_TICK = 0.05  # seconds between looks at whether to stop


@dataclass(frozen=True, kw_only=True)
class ResidentCounters:
    """What is in memory now, and what was done since the beginning, for metrics."""

    entries: int = 0
    pinned: int = 0
    bytes: int = 0
    limit: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    failures: int = 0
    loading_seconds: float = 0.0


@dataclass
class _Entry(Generic[_Value]):
    size: int  # bytes that are reserved for it
    pins: int = 0
    value: _Value | None = None  # None while it is being read


class Resident(Generic[_Value]):
    """Values by name, bounded in bytes; the ones unused for longest go first. Threads may use it at once.

    Args:
        limit: bytes of all values together.
        size_of: bytes of a value.
        leaving: told of each value that is let go, by whichever thread makes room, before it makes any.

    Example:
        >>> adapters = Resident[bytes](limit=100, size_of=len)
        >>> with adapters.held("style", 60, lambda: bytes(60)) as style:
        ...     len(style)
        60
        >>> adapters.counters().bytes
        60
    """

    def __init__(
        self, limit: int, size_of: Callable[[_Value], int], leaving: Callable[[_Value], None] | None = None
    ) -> None:
        self._limit = limit
        self._size_of = size_of
        self._leaving = leaving
        self._entries: OrderedDict[str, _Entry[_Value]] = OrderedDict()
        self._changed = threading.Condition()
        self._hits = self._misses = self._evictions = self._failures = 0
        self._seconds = 0.0

    @contextmanager
    def held(
        self, name: str, expected: int, read: Callable[[], _Value], *, cancelled: threading.Event | None = None
    ) -> Iterator[_Value]:
        """A value that stays while the block runs: what is here, else what `read` gives.

        Args:
            name: what it is known by, such as the SHA-256 of its file.
            expected: bytes that it will have; room is made for them first.
            read: called by one thread at a time for a name, without a lock held; what it raises leaves nothing behind.
            cancelled: ends waiting for another thread's `read`.

        Raises:
            OutOfMemoryError: it does not fit beside what is in use.
            CancelledError: it was cancelled while it waited.
        """
        entry = self._pinned(name, expected, cancelled)
        try:
            if entry.value is None:
                self._fill(name, entry, read)
            assert entry.value is not None
            yield entry.value
        finally:
            with self._changed:
                entry.pins -= 1
                if entry.value is None:  # reading it failed
                    self._entries.pop(name, None)
                self._changed.notify_all()

    def forget(self, name: str) -> bool:
        """Let a value go that is not in use; returns whether it is gone."""
        with self._changed:
            entry = self._entries.get(name)
            if entry is not None and entry.pins == 0:
                self._let_go(name)
            return name not in self._entries

    def names(self) -> list[str]:
        """What is here, the one unused for longest first."""
        with self._changed:
            return [name for name, entry in self._entries.items() if entry.value is not None]

    def counters(self) -> ResidentCounters:
        """How things stand."""
        with self._changed:
            return ResidentCounters(
                entries=len(self._entries),
                pinned=sum(entry.pins > 0 for entry in self._entries.values()),
                bytes=self._bytes(),
                limit=self._limit,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                failures=self._failures,
                loading_seconds=self._seconds,
            )

    def _pinned(self, name: str, expected: int, cancelled: threading.Event | None) -> _Entry[_Value]:
        """The entry, in use from now on; without a value if this thread is to read it."""
        with self._changed:
            while (entry := self._entries.get(name)) is not None and entry.value is None:
                if cancelled is not None and cancelled.is_set():
                    raise CancelledError
                self._changed.wait(_TICK)
            if entry is not None:
                self._hits += 1
                self._entries.move_to_end(name)
            else:
                self._misses += 1
                self._make_room(expected)
                entry = self._entries[name] = _Entry(expected)
            entry.pins += 1
            return entry

    def _fill(self, name: str, entry: _Entry[_Value], read: Callable[[], _Value]) -> None:
        began = time.monotonic()
        try:
            value = read()
            with self._changed:
                size = self._size_of(value)
                self._make_room(size - entry.size)  # it may have more than was expected
                entry.size, entry.value = size, value
                self._entries.move_to_end(name)
        except BaseException:
            with self._changed:
                self._failures += 1
            raise
        finally:
            with self._changed:
                self._seconds += time.monotonic() - began
                self._changed.notify_all()

    def _make_room(self, needed: int) -> None:
        """Let go of what is not in use until so many bytes more fit. Nothing goes where that would not be enough."""
        used = sum(entry.size for entry in self._entries.values() if entry.pins)
        if used + needed > self._limit:
            raise OutOfMemoryError(needed, self._limit - used, ["fewer adapters at once", "a larger adapter_memory"])
        for name in [name for name, entry in self._entries.items() if not entry.pins]:
            if self._bytes() + needed <= self._limit:
                return
            self._let_go(name)
            self._evictions += 1

    def _let_go(self, name: str) -> None:
        value = self._entries.pop(name).value
        if self._leaving is not None and value is not None:
            self._leaving(value)

    def _bytes(self) -> int:
        return sum(entry.size for entry in self._entries.values())
