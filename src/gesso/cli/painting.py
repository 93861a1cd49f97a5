"""Painting a list of single-picture requests with one engine, in order, so that each can be saved once it is done.

Here: how many are handed in at once, progress, and what happens to the finished ones when somebody stops the rest, or
one of them fails. Not here: where pictures go.
"""

import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gesso.cli.view import View
from gesso.errors import CancelledError, GessoError, RejectedError
from gesso.events import Cancelled, Done, Failed, Progress, Result
from gesso.request import GenerationRequest

if TYPE_CHECKING:
    from gesso.engine import Engine, Job

_HANDED_IN = 64  # enough to fill any batch, few enough that ten thousand pictures are not held in memory

_BEFORE_OTHERS = 1  # a priority; 0 is everybody's


def paint(engine: "Engine", requests: Iterable[GenerationRequest], view: View) -> Iterator[Result]:
    """Yields the picture of each request, in order. Each asks for one.

    As `paint_placed`, but one that comes after a gap is left out: who counts these must not take it for another. A
    picture that the safety checker rejects raises its RejectedError.
    """
    expected = 0
    for place, painted in paint_placed(engine, requests, view):
        if place != expected:
            continue
        if isinstance(painted, RejectedError):
            raise painted
        expected += 1
        yield painted


def paint_again(
    engine: "Engine", request: GenerationRequest, view: View, place: int
) -> Iterator[Result | RejectedError]:
    """Yields another picture of the request at this place, painted before those that wait: it is saved before them."""
    for _, painted in paint_placed(engine, [request], view, first=place, priority=_BEFORE_OTHERS):
        yield painted


def paint_placed(
    engine: "Engine", requests: Iterable[GenerationRequest], view: View, *, first: int = 0, priority: int = 0
) -> Generator[tuple[int, Result | RejectedError]]:
    """Yields the place of each request, from `first`, and its picture, or that the safety checker rejects it.

    Leaving the iteration early cancels the rest. Ctrl-C, or a request that fails, stops the rest, yields what is
    finished by then, which may leave places out, and then raises.

    Raises:
        CancelledError: Ctrl-C.
        GessoError: whatever else made a request fail.
    """
    waiting = enumerate(requests, first)
    jobs: deque[tuple[int, Job]] = deque()
    try:
        while True:
            while len(jobs) < _HANDED_IN and (following := next(waiting, None)) is not None:
                jobs.append((following[0], engine.submit(following[1], priority=priority)))
            if not jobs:
                return
            place, job = jobs[0]
            results: tuple[Result | RejectedError, ...] = _follow(job, place, view)
            jobs.popleft()
            yield from ((place, result) for result in results)
    except KeyboardInterrupt:
        yield from _stopped(jobs)
        raise CancelledError("interrupted") from None
    except GessoError:
        yield from _stopped(jobs)
        raise
    finally:
        for _, job in jobs:
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


def _stopped(jobs: Iterable[tuple[int, "Job"]]) -> Iterator[tuple[int, Result | RejectedError]]:
    """Stops every job after its running step and yields the pictures that were finished by then."""
    stopped = list(jobs)
    for _, job in stopped:
        job.cancel()
    for place, job in stopped:
        last = job.wait()
        yield from ((place, result) for result in last.results)
        if isinstance(last, Failed) and isinstance(last.error, RejectedError):
            yield place, last.error
