"""What other threads ask of the loop: new jobs, cancellations, and to close. The loop reads it once a turn.

Those that prepare something for it beside its work wake it here, too.

The only place where callers and the loop share a lock; nothing that takes time happens under it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from gesso.engine.job import Job
from gesso.errors import RunError

Closing = Literal["finish", "cancel"]


@dataclass(kw_only=True)
class Mail:
    """What came since the last look: jobs in order of arrival, jobs to be dropped, and whether to close, and how."""

    arrived: list[Job] = field(default_factory=list)
    cancelled: list[Job] = field(default_factory=list)
    closing: Closing | None = None


class Inbox:
    """A thread-safe mailbox with one reader.

    The lock itself is entered, and not the condition: that is entered in Python, where Ctrl-C can come between taking
    the lock and the block that would give it back.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # A stream that is let go of in there cancels its job.
        self._changed = threading.Condition(self._lock)
        self._mail = Mail()
        self._news = False

    @property
    def closing(self) -> Closing | None:
        """Whether, and how, the loop was asked to close."""
        return self._mail.closing

    def submit(self, job: Job) -> None:
        """Hand in a job.

        Raises:
            RunError: the engine was closed.
        """
        with self._lock:
            if self._mail.closing is not None:
                raise RunError("the engine is closed and takes no more requests; make a new Engine")
            self._mail.arrived.append(job)
            self._tell()

    def cancel(self, job: Job) -> None:
        """Ask for a job to be dropped. Harmless if it is not there any more."""
        with self._lock:
            self._mail.cancelled.append(job)
            self._tell()

    def drops(self, jobs: Iterable[Job]) -> bool:
        """Whether the next look will drop one of these jobs; for whoever takes long between two looks."""
        with self._lock:
            mail = self._mail
            return mail.closing == "cancel" or any(job in mail.cancelled for job in jobs)

    def close(self, how: Closing) -> None:
        """Take no more jobs; ``finish`` those that are there or ``cancel`` them. Cancelling overrides finishing."""
        with self._lock:
            if self._mail.closing != "cancel":
                self._mail.closing = how
            self._tell()

    def wake(self) -> None:
        """Something that was prepared for the loop is ready."""
        with self._lock:
            self._tell()

    def take(self, *, wait: bool, timeout: float | None = None) -> Mail:
        """All that came since the last look; with ``wait``, sleep until there is something, it is asked to close or was
        woken, or so many seconds have passed.
        """
        with self._lock:
            if wait:
                self._changed.wait_for(lambda: self._news, timeout)
            self._news = False
            mail = self._mail
            self._mail = Mail(closing=mail.closing)
            return mail

    def _tell(self) -> None:
        self._news = True
        self._changed.notify()
