"""Getting files from a hub onto the disk: several at once, each resumed where it was cut, checked, then named.

A file grows under `manifest.UNFINISHED` by a name that its place and content decide, so that another revision never
continues it; it gets its own name by a rename once its size and digest are what the hub states.
Not here: which files (`hub`), how a hub is asked (`hub_clients`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from gesso.errors import CancelledError, FileError, GessoError, RunError
from gesso.weights import manifest
from gesso.weights.hub_clients import AGAIN, Hub, HubFile, Listing, TransientError

PARALLEL = 4  # files at once
_TRIES = 5  # without a single byte between them
_PAUSE = 1.0  # seconds before the second try; twice as many before each other
_TICK = 0.1  # seconds between looks at what the threads have done
_GRACE = 2.0  # seconds in which stopped threads may end
_BLOCK = 1 << 20

Tell = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A file to have: what the hub states of it, where it goes, and where it grows meanwhile."""

    listing: Listing
    file: HubFile
    path: Path
    part: Path

    def have(self) -> int:
        """Bytes that are here already, by the files' sizes alone."""
        if self.path.is_file() and self.path.stat().st_size == self.file.size:
            return self.file.size
        begun = self.part.stat().st_size if self.part.is_file() else 0
        return begun if begun <= self.file.size else 0


def fetch_all(hub: Hub, wanted: Sequence[Wanted], tell: Tell) -> tuple[dict[Path, str], int]:
    """Have all of these files whole under their names; those that are stay untouched.

    `tell` is called with the bytes that are here, from the calling thread. Returns SHA-256 by path, and the bytes that
    came over the network. Raises the first failure; what is whole, and what each cut file has, stays.
    """
    crew = _Crew(hub, wanted)
    threads = [threading.Thread(target=crew.work, daemon=True) for _ in range(min(PARALLEL, len(wanted)))]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads) and not crew.failures:
            for thread in threads:
                thread.join(_TICK / len(threads))
            tell(crew.here)
    finally:  # also on Ctrl-C; a thread that waits for the network ends with the process
        crew.stop.set()
        for thread in threads:
            thread.join(_GRACE / len(threads))
    if crew.failures:
        raise crew.failures[0]
    tell(crew.here)
    return crew.digests, crew.received


class _Crew:
    """What the threads share."""

    def __init__(self, hub: Hub, wanted: Sequence[Wanted]) -> None:
        self.stop = threading.Event()
        self.failures: list[BaseException] = []
        self.digests: dict[Path, str] = {}
        self.here = 0
        self.received = 0
        self._hub = hub
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[Wanted] = queue.SimpleQueue()
        for task in sorted(wanted, key=lambda task: -task.file.size):
            self._tasks.put(task)

    def work(self) -> None:
        try:
            while not self.stop.is_set():
                task = self._tasks.get_nowait()
                self.digests[task.path] = self._have(task)
        except queue.Empty:
            return
        except BaseException as error:
            self.failures.append(error)
            self.stop.set()

    def count(self, here: int, *, received: int = 0) -> None:
        with self._lock:
            self.here += here
            self.received += received

    def _have(self, task: Wanted) -> str:
        """The file whole under its name; returns its SHA-256."""
        if task.path.is_file() and task.path.stat().st_size == task.file.size:
            sha256, problem = _check(task.path, task.file)
            if not problem:
                self.count(task.file.size)
                return sha256
        try:
            task.part.parent.mkdir(parents=True, exist_ok=True)
            self._grow(task)
            sha256, problem = _check(task.part, task.file)
            if problem:
                task.part.unlink()
                raise RunError(
                    f"{task.listing.repository}: {task.file.name} came with other bytes than {self._hub.host} states "
                    f"({problem}), and was removed; the same command fetches it again"
                )
            task.path.parent.mkdir(parents=True, exist_ok=True)
            task.part.replace(task.path)
        except OSError as error:
            raise disk_error(task.path, error) from error
        return sha256

    def _grow(self, task: Wanted) -> None:
        """Read until all bytes are there, beginning anew only where the connection is lost over and over."""
        failed = 0
        with task.part.open("ab", buffering=0) as file:  # a process that is killed loses nothing that had come
            size = _fitting(file, task.file.size)
            self.count(size)
            while size < task.file.size:
                before = size
                try:
                    size = self._read(task, file, size)
                    problem = TransientError(f"{self._hub.host} cut {task.file.name} short; {AGAIN}")
                except TransientError as error:
                    size, problem = _end(file), error
                if size >= task.file.size:
                    break
                failed = 0 if size > before else failed + 1
                if failed >= _TRIES:
                    raise problem
                if self.stop.wait(_PAUSE * 2 ** max(failed - 1, 0)):
                    raise CancelledError
            os.fsync(file.fileno())

    def _read(self, task: Wanted, file: FileIO, size: int) -> int:
        """One connection's worth of bytes; returns how many there are then."""
        with self._hub.open(task.listing, task.file.name, size) as answer:
            if answer.start != size:  # it begins elsewhere, as a hub may
                if answer.start > size:
                    raise RunError(f"{self._hub.host} skips bytes of {task.file.name}; {AGAIN}")
                file.truncate(answer.start)
                self.count(answer.start - size)
                size = answer.start
            for piece in answer.pieces:
                if self.stop.is_set():
                    raise CancelledError
                if size + len(piece) > task.file.size:
                    file.truncate(0)
                    raise RunError(f"{self._hub.host} sends more of {task.file.name} than it states; {AGAIN}")
                _write(task, file, piece)
                size += len(piece)
                self.count(len(piece), received=len(piece))
        return size


def _write(task: Wanted, file: FileIO, piece: bytes) -> None:
    rest = memoryview(piece)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise disk_error(task.path, error) from error


def _fitting(file: FileIO, size: int) -> int:
    """Bytes that the begun file has; one that is too long is no beginning."""
    begun = _end(file)
    if begun > size:
        file.truncate(0)
        return 0
    return begun


def _end(file: FileIO) -> int:
    return os.fstat(file.fileno()).st_size


def _check(path: Path, stated: HubFile) -> tuple[str, str]:
    """SHA-256 of the file, and what differs from what the hub states, "" if nothing does."""
    size = path.stat().st_size
    if size != stated.size:
        return "", f"{size} bytes, not {stated.size}"
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
            if stated.git_sha1:
                git.update(block)
    if stated.sha256 and sha256.hexdigest() != stated.sha256.lower():
        return "", f"SHA-256 {sha256.hexdigest()[:16]}…, not {stated.sha256[:16]}…"
    if stated.git_sha1 and git.hexdigest() != stated.git_sha1.lower():
        return "", f"git SHA-1 {git.hexdigest()[:16]}…, not {stated.git_sha1[:16]}…"
    return sha256.hexdigest(), ""


def part_of(folder: Path, path: Path, listing: Listing, file: HubFile) -> Path:
    """Where a file grows: by its place, and by its content or, where the hub states none, its revision."""
    content = file.sha256 or file.git_sha1 or listing.revision
    key = f"{path.relative_to(folder).as_posix()}\0{content}\0{file.size}"
    return folder / manifest.UNFINISHED / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.part"


def disk_error(path: Path, error: OSError) -> GessoError:
    """A full or failing disk is the run's affair, a folder that may not be written to the caller's."""
    reason = (error.strerror or str(error)).lower()
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
        return RunError(f"{path}: {reason}; make room, {AGAIN}")
    return FileError(path, f"cannot be written ({reason})", "set GESSO_HOME to a folder that can be")
