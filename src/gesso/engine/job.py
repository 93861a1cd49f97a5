"""One submitted request as its owner sees it: its events, its results, its end. The work is done in ``loop``.

A job is a mailbox between two threads. The loop puts events in and never waits; readers take them out at their own
pace. What a slow reader leaves lying is thinned: of each picture only the latest preview is kept, and beyond a few
thousand events the oldest progress goes, then, where there is none left, the oldest preview. The last event (Done,
Failed or Cancelled) is never dropped.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from gesso.errors import CancelledError, RunError
from gesso.events import Cancelled, Done, Event, Failed, Preview, Progress, Result, Stage
from gesso.request import GenerationRequest

LastEvent = Done | Failed | Cancelled

MOST_UNREAD = 4096


class Job:
    """A request that was handed to an engine. Every method may be called from any thread.

    Attributes:
        id: a short name, unique in practice; every event of this job carries it.
        request: what was asked, its seed already drawn.
        preview_every: a preview after every so many steps; 0 for none.
        priority: -10 to 10; higher goes first.
        deadline: seconds after ``submitted`` by which it should be done; None for no hurry.
        submitted: ``time.perf_counter()`` when it was made.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        preview_every: int,
        when_cancelled: Callable[[Job], None],
        priority: int = 0,
        deadline: float | None = None,
    ) -> None:
        self.id = secrets.token_hex(6)
        self.request = request
        self.preview_every = preview_every
        self.priority = priority
        self.deadline = deadline
        self.submitted = time.perf_counter()
        self._when_cancelled = when_cancelled
        self._lock = threading.Lock()  # Entered itself, so that Ctrl-C cannot leave it taken (`Inbox`).
        self._changed = threading.Condition(self._lock)
        self._ended = threading.Condition(self._lock)  # Apart: who waits for the end is not woken by every step.
        self._unread: OrderedDict[int, Progress | Preview] = OrderedDict()  # Numbered: one may go from the middle.
        self._numbers = itertools.count()
        self._progress: deque[int] = deque()  # Those of them that are progress.
        self._latest_previews: dict[int, int] = {}
        self._last: LastEvent | None = None

    def __repr__(self) -> str:
        return f"Job({self.id}, {type(self._last).__name__ if self._last else 'running'})"

    def cancel(self) -> None:
        """Ask to stop before the next step. Pictures already finished are kept. Harmless after the end."""
        if not self.done():
            self._when_cancelled(self)

    def done(self) -> bool:
        """Whether the job has come to its end, whichever it was."""
        return self._last is not None

    def wait(self, timeout: float | None = None) -> LastEvent:
        """Wait for the end and return it, raising nothing for a failure or a cancellation.

        Raises:
            TimeoutError: it did not end within ``timeout`` seconds; the job runs on.
        """
        with self._lock:
            self._ended.wait_for(self.done, timeout)
            if self._last is None:
                raise TimeoutError(f"job {self.id} did not end within {timeout} s; it runs on")
            return self._last

    def result(self, timeout: float | None = None) -> list[Result]:
        """Wait for the end and return the pictures in order, without those that the safety checker rejected.

        Raises:
            TimeoutError: it did not end within ``timeout`` seconds; the job runs on.
            CancelledError: it was cancelled; the Cancelled event (``wait``) holds the pictures that were finished.
            GessoError: whatever made it fail; the Failed event (``wait``) holds the pictures that were finished.
        """
        last = self.wait(timeout)
        if isinstance(last, Done):
            return list(last.results)
        if isinstance(last, Cancelled):
            count = len(last.results)
            raise CancelledError(f"cancelled after {count} of {self.request.num_images} pictures")
        raise last.error.with_traceback(None)

    def events(self) -> Iterator[Event]:
        """Events as they come, up to and with the last one. Leaving the iteration early does not stop the job.

        Each progress and preview is handed out once, so that a second iteration goes on where the first stopped; the
        last event ends every iteration.
        """
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._unread or self.done())
                event = self._take_oldest() if self._unread else self._last
            if event is None:
                raise RunError(f"job {self.id} has neither events nor an end")
            yield event
            if isinstance(event, LastEvent):
                return

    def tell(self, event: Progress | Preview) -> None:
        """Put in an event (the loop's side). Does nothing after the end."""
        with self._lock:
            if self._last is not None:
                return
            number = next(self._numbers)
            if isinstance(event, Preview):
                self._unread.pop(self._latest_previews.get(event.image, -1), None)
                self._latest_previews[event.image] = number
            else:
                self._progress.append(number)
            self._unread[number] = event
            if len(self._unread) > MOST_UNREAD:
                if self._progress:
                    del self._unread[self._progress.popleft()]
                else:
                    self._take_oldest()
            self._changed.notify_all()

    def progress(self, stage: Stage, image: int, step: int, steps: int) -> None:
        """Tell how far it is (the loop's side)."""
        seconds = time.perf_counter() - self.submitted
        self.tell(Progress(job=self.id, image=image, step=step, steps=steps, stage=stage, seconds=seconds))

    def _take_oldest(self) -> Progress | Preview:
        number, event = self._unread.popitem(last=False)
        if self._progress and self._progress[0] == number:
            self._progress.popleft()
        return event

    def end(self, event: LastEvent) -> None:
        """Put in the last event (the loop's side). The first one counts."""
        with self._lock:
            if self._last is None:
                self._last = event
                self._changed.notify_all()
                self._ended.notify_all()
