"""Getting one file from an address onto the disk: several ranges at once, resumed, bounded, checked.

A file grows under a name of its own with a record beside it of the bytes that it has, so that the next try, or the next
process, goes on from there, if the host still has the same file. Not here: which address (`sources_sites`), where a
whole file goes (`store`), what may be asked (`network`), archives (`sources_archive`).
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from gesso.adapters.sources_record import First, Record, beside
from gesso.adapters.sources_sites import TRIES, Remote, pause_after, persistent
from gesso.errors import CancelledError, RunError
from gesso.network import Answer, Network, NetworkError
from gesso.weights import headers
from gesso.weights.hub import amount, free_bytes
from gesso.weights.hub_clients import AGAIN
from gesso.weights.hub_transfer import disk_error

PARALLEL = 4  # ranges at once
_TICK = 0.05  # seconds between looks at what the threads have done
_GRACE = 2.0  # seconds in which stopped threads may end
_STALLED = 120.0  # seconds without a byte after which a host is given up
_PROGRESS = 1 << 16  # bytes without which a connection that is cut counts as a failure
_FIRST = 512  # bytes that tell what a file is
_ELSEWHERE = (401, 403, 404, 410)  # what a signed address answers once it is too old
_LONGEST_HEADER = 100_000_000
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")

Tell = Callable[[int | None, int], None]
"""Told how many bytes the file has, None where nobody knows, and how many are here."""


@dataclass(frozen=True, kw_only=True)
class Downloaded:
    """A whole file: its SHA-256, and how many bytes of it came over the network this time."""

    sha256: str
    size: int
    fetched: int


def download(
    remote: Remote, part: Path, network: Network, *, limit: int, tell: Tell, first: First | None = None
) -> Downloaded:
    """Have the file whole at `part`, going on from what is there.

    Args:
        remote: what is to be fetched.
        part: where it grows; one process at a time.
        network: to ask by; stopped when this ends in any way but well.
        limit: bytes that it may have.
        tell: called from this thread.
        first: what `probe` has told already.

    Raises:
        RunError: larger than the limit, no room, other bytes than stated, no weights, or the host failed for good.
        RequestError: an address that may not be asked.
        CancelledError: the network was stopped. What has come is kept, here and where the host failed.
    """
    _check_limit(remote, max(remote.size or 0, remote.about), limit)
    with _worded(remote), _disk(part):
        first = first or probe(remote, network)
        if remote.size is not None and first.size not in (None, remote.size):
            raise RunError(f"{remote.name} has {first.size} bytes where its site states {remote.size}")
        _check_limit(remote, first.size or 0, limit)
        with _opened(part) as file:
            crew = _Crew(remote, network, file, part, Record.read(part, first, remote.sha256), limit)
            _make_sure_of_room(remote, part, (first.size or 0) - crew.record.here)
            tell(first.size, crew.record.here)
            try:
                _watched(crew, first, tell)
            finally:
                crew.save()
        return _checked(remote, part, crew.received)


def probe(remote: Remote, network: Network) -> First:
    """Ask for the first byte: whether it is given, how large the file is, what marks it. Raises as `download`."""
    with _worded(remote):
        return persistent(lambda: network.interruptible(lambda: _probe(remote, network)), network.stop)


def small(remote: Remote, network: Network, *, limit: int) -> bytes:
    """All of a file that is small, of the size that its site states. Raises as `download`."""
    too_large = RunError(f"{remote.name} has more than {limit} bytes, the most that such a file may have")

    def read() -> bytes:
        body = bytearray()
        with network.open(remote.url, token=remote.token) as answer:
            for piece in answer.pieces:
                body += piece
                if len(body) > limit:
                    raise too_large
        return bytes(body)

    if (remote.size or 0) > limit:
        raise too_large
    with _worded(remote):
        content = persistent(lambda: network.interruptible(read), network.stop)
    if remote.size is not None and len(content) != remote.size:
        raise RunError(f"{remote.name} came with {len(content)} bytes where its site states {remote.size}")
    return content


def _probe(remote: Remote, network: Network) -> First:
    """Ask for the first byte."""
    with network.open(remote.url, headers={"Range": "bytes=0-0"}, token=remote.token) as answer:
        _check_type(remote, answer)
        found = _RANGE.fullmatch(answer.headers.get("content-range", ""))
        if answer.status == 206 and found is not None:
            return First(int(found[3]), _mark(answer), True, answer.url)
        length = answer.headers.get("content-length", "")
        size = int(length) if length.isascii() and length.isdigit() and len(length) < 19 else None
        return First(size, _mark(answer), False, answer.url)


def _mark(answer: Answer) -> str:
    """What changes when the file does, "" where the host tells nothing that is sure to."""
    mark = answer.headers.get("etag", "")
    return mark if mark.startswith('"') else ""


def _check_type(remote: Remote, answer: Answer) -> None:
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml"):
        raise _foreign(remote, "is a web page, as a download that wants a login leaves it, not weights")


def _foreign(remote: Remote, problem: str) -> RunError:
    return RunError(f"{remote.name} {problem}" + (f"; {remote.login}" if remote.login else ""))


class _Crew:
    """What the threads share."""

    def __init__(self, remote: Remote, network: Network, file: FileIO, part: Path, record: Record, limit: int) -> None:
        self.remote = remote
        self.network = network
        self.record = record
        self.failures: list[BaseException] = []
        self.received = 0
        self._file = file
        self._part = part
        self._limit = limit
        self._direct = ""  # where a redirect led
        self._segments: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()

    def run(self, first: First) -> list[threading.Thread]:
        """Begin; returns the threads."""
        if not first.ranges:
            work, count = self._whole, 1
        else:
            self._direct = first.url
            self._file.truncate(first.size)
            segments = self.record.segments()
            for segment in segments:
                self._segments.put(segment)
            work, count = self._ranges, min(PARALLEL, len(segments))
        threads = [threading.Thread(target=self._guarded, args=(work,), daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        return threads

    def save(self) -> None:
        """Keep what has come for the next try."""
        os.fsync(self._file.fileno())
        self.record.save(self._part)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except queue.Empty:
            return
        except BaseException as error:
            self.failures.append(error)
            self.network.stop.set()

    def _ranges(self) -> None:
        """One range after the other, each until all of it is here."""
        while True:
            begin, end = self._segments.get_nowait()
            failed = 0
            while begin < end:
                problem = self._try(begin, end)
                before, begin = begin, self.record.next(begin, end)
                if begin < end:
                    failed = 0 if begin - before >= _PROGRESS else failed + 1
                    if failed >= TRIES:
                        raise problem
                    pause_after(problem, max(failed - 1, 0), self.network.stop)
            self.save()

    def _try(self, begin: int, end: int) -> NetworkError:
        """One connection's worth of a range. Returns what cut it, if anything did."""
        direct = self._direct
        try:
            self._range(direct or self.remote.url, begin, end)
        except NetworkError as error:
            if direct and error.status in _ELSEWHERE:  # the signed address is too old: ask for another
                self._direct = ""
            elif not error.passing:
                raise
            return error
        return NetworkError(f"{self.remote.name} was cut short", passing=True)

    def _range(self, url: str, begin: int, end: int) -> None:
        sent = {"Range": f"bytes={begin}-{end - 1}"}
        if self.record.mark.startswith('"'):
            sent["If-Range"] = self.record.mark
        with self.network.open(url, headers=sent, token=self.remote.token) as answer:
            _check_type(self.remote, answer)
            found = _RANGE.fullmatch(answer.headers.get("content-range", ""))
            fits = found is not None and tuple(map(int, found.groups())) == (begin, end - 1, self.record.size)
            if answer.status != 206 or not fits or _mark(answer) not in ("", self.record.mark):
                raise RunError(f"{self.remote.name} changed at its host while it came, or its ranges do not fit")
            for piece in answer.pieces:
                if begin + len(piece) > end:
                    raise RunError(f"the host of {self.remote.name} sends more than was asked for")
                self._write(piece, begin)
                self.record.come(begin, begin + len(piece))
                begin += len(piece)

    def _whole(self) -> None:
        """All of it in one connection, from its beginning each time: the host knows no ranges."""

        def read() -> None:
            self._file.truncate(0)
            here = 0
            with self.network.open(self.remote.url, token=self.remote.token) as answer:
                _check_type(self.remote, answer)
                for piece in answer.pieces:
                    if here + len(piece) > self._limit:
                        raise _too_large(self.remote, here + len(piece), self._limit, "at least ")
                    self._write(piece, here)
                    here += len(piece)

        persistent(read, self.network.stop)

    def _write(self, piece: bytes, offset: int) -> None:
        if self.network.stop.is_set():
            raise CancelledError
        if offset == 0 and len(piece) >= _FIRST:
            _look(self.remote, piece[:_FIRST])
        done = 0
        while done < len(piece):
            done += os.pwrite(self._file.fileno(), piece[done:], offset + done)
        self.received += len(piece)


def _watched(crew: _Crew, first: First, tell: Tell) -> None:
    """Let the threads work and tell how far they are. Raises the first failure."""
    threads, stop = crew.run(first), crew.network.stop
    moved, seen = time.monotonic(), -1
    try:
        while any(thread.is_alive() for thread in threads) and not crew.failures:
            for thread in threads:
                thread.join(_TICK / len(threads))
            if stop.is_set() and not crew.failures:
                raise CancelledError
            if crew.received != seen:
                moved, seen = time.monotonic(), crew.received
                tell(first.size, crew.record.here or seen)
            elif time.monotonic() - moved > _STALLED:
                raise NetworkError(f"{crew.remote.name} stands still", passing=True)
    finally:  # also on Ctrl-C; a thread that waits for the network ends with the process, and writes nothing more
        if crew.failures or any(thread.is_alive() for thread in threads):
            stop.set()
        for thread in threads:
            thread.join(_GRACE / len(threads))
    if crew.failures:
        raise crew.failures[0]


def _look(remote: Remote, first: bytes) -> None:
    """Raise RunError for what cannot be weights, or an archive of them, by how it begins."""
    if found := headers.foreign(first):
        raise _foreign(remote, found[0])
    weights = 2 <= int.from_bytes(first[:8], "little") <= _LONGEST_HEADER and first[8:9] == b"{"
    if not (weights or first.startswith(b"\x1f\x8b") or first[257:262] == b"ustar"):
        raise RunError(f"{remote.name} is neither safetensors nor an archive (tar) of such a file")


def _checked(remote: Remote, part: Path, received: int) -> Downloaded:
    """Size and SHA-256, held against what the site states; what differs is removed."""
    with part.open("rb") as file:
        sha256, size = hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size
    problem = ""
    if remote.size is not None and size != remote.size:
        problem = f"{size} bytes, not {remote.size}"
    elif remote.sha256 and sha256 != remote.sha256:
        problem = f"SHA-256 {sha256[:16]}…, not {remote.sha256[:16]}…"
    if problem:
        drop(part)
        raise RunError(f"{remote.name} came with other bytes than its site states ({problem}), and was removed")
    return Downloaded(sha256=sha256, size=size, fetched=received)


def drop(part: Path) -> None:
    """Remove what has come of a file."""
    part.unlink(missing_ok=True)
    beside(part).unlink(missing_ok=True)


def _too_large(remote: Remote, size: int, limit: int, about: str = "") -> RunError:
    return RunError(
        f"{remote.name} has {about}{amount(size)}, more than the limit of {amount(limit)}; "
        "raise it by --limit or the setting largest_adapter if it is what you want"
    )


def _check_limit(remote: Remote, size: int, limit: int) -> None:
    if size > limit:
        raise _too_large(remote, size, limit)


def _make_sure_of_room(remote: Remote, part: Path, needed: int) -> None:
    if needed > (free := free_bytes(part.parent)):
        raise RunError(
            f"{remote.name} needs {amount(needed)} and {part.parent} has {amount(free)} free; "
            "make room there, or set GESSO_HOME to another disk"
        )


@contextmanager
def _opened(part: Path) -> Iterator[FileIO]:
    """The file to write into, with what is in it."""
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    with FileIO(descriptor, "r+") as file:
        yield file


@contextmanager
def _disk(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(part, error) from error


_STATUSES: Mapping[int, str] = {404: "is not there (HTTP 404)", 410: "is no longer there (HTTP 410)"}


@contextmanager
def _worded(remote: Remote) -> Iterator[None]:
    """Say what was refused, and what to do about it."""
    try:
        yield
    except NetworkError as error:
        if error.status in (401, 403):
            way_out = f"; {remote.login}" if remote.login else ""
            raise RunError(f"{remote.name} is refused (HTTP {error.status}){way_out}") from error
        if error.status:
            said = _STATUSES.get(error.status, f"cannot be had: {error.message}")
            raise RunError(f"{remote.name} {said}") from error
        raise RunError(f"{remote.name} did not come: {error.message}; {AGAIN}") from error
