"""Painting a list of single-picture requests with one engine, in order, so that each can be saved once it is done.

Here: how many are handed in at once, progress, and what happens to the finished ones when somebody stops the rest.
Not here: where pictures go.
"""

import signal
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gesso.cli.view import View
from gesso.errors import CancelledError, RejectedError
from gesso.events import Cancelled, Done, Failed, Progress, Result
from gesso.request import GenerationRequest

if TYPE_CHECKING:
    from gesso.engine import Engine, Job

_HANDED_IN = 64  # enough to fill any batch, few enough that ten thousand pictures are not held in memory


def paint(engine: "Engine", requests: Iterable[GenerationRequest], view: View) -> Iterator[Result]:
    """As `paint_most`, but a picture that the safety checker rejects raises its RejectedError."""
    for painted in paint_most(engine, requests, view):
        if isinstance(painted, RejectedError):
            raise painted
        yield painted


def paint_most(engine: "Engine", requests: Iterable[GenerationRequest], view: View) -> Iterator[Result | RejectedError]:
    """Yields the picture of each request, in order, or that the safety checker rejects it. Each request asks for one.

    Leaving the iteration early cancels the rest. Ctrl-C yields what is finished by then, and then raises.

    Raises:
        CancelledError: Ctrl-C.
        GessoError: whatever else made a request fail; those before it have been yielded.
    """
    waiting = iter(requests)
    jobs: deque[Job] = deque()
    done = 0
    try:
        while True:
            while len(jobs) < _HANDED_IN and (request := next(waiting, None)) is not None:
                jobs.append(engine.submit(request))
            if not jobs:
                return
            results: tuple[Result | RejectedError, ...] = _follow(jobs[0], done, view)
            jobs.popleft()
            done += len(results)
            yield from results
    except KeyboardInterrupt:
        yield from _stopped(jobs)
        raise CancelledError("interrupted") from None
    finally:
        for job in jobs:
            job.cancel()


def tell_warnings(result: Result, view: View, told: set[str]) -> None:
    """Each warning once, however many pictures it concerns."""
    warnings = result.metadata.get("warnings")
    for text in warnings if isinstance(warnings, list) else ():
        if text not in told:
            told.add(text)
            view.warn(str(text))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done, so that a finished picture is saved and counted, or neither."""
    held_back: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda caught, frame: held_back.append(caught))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python
    if held_back:
        raise KeyboardInterrupt


def _follow(job: "Job", done: int, view: View) -> tuple[Result | RejectedError, ...]:
    for event in job.events():
        match event:
            case Progress(stage="step", step=step, steps=steps):
                view.move_bar(done + min(step / steps, 0.99))
            case Done(results=results):
                return results
            case Failed(error=RejectedError() as error):
                return (error,)
            case Failed(error=error):
                raise error.with_traceback(None)
            case Cancelled():
                raise CancelledError
            case _:
                pass
    raise CancelledError


def _stopped(jobs: Iterable["Job"]) -> Iterator[Result | RejectedError]:
    """Stops every job after its running step and yields the pictures that were finished by then."""
    stopped = list(jobs)
    for job in stopped:
        job.cancel()
    for job in stopped:
        last = job.wait()
        if isinstance(last, Done | Cancelled):
            yield from last.results
        elif isinstance(last.error, RejectedError):
            yield last.error
