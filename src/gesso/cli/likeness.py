"""`--min-likeness` and `--tries`: a picture that is not enough like the person is painted again, and the best is kept.

Not here: how likeness is measured (`pipelines/infinite_you`), painting (`painting`).
"""

from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

from gesso.cli.painting import paint_again, paint_placed
from gesso.cli.view import View
from gesso.errors import GessoError, RejectedError, RequestError
from gesso.events import Result
from gesso.request import LARGEST_SEED, GenerationRequest
from gesso.request_parts import Identity

if TYPE_CHECKING:
    from gesso.engine import Engine

DEFAULT_TRIES = 4
_MOST_TRIES = 100
_STRIDE = 1_000_000_007  # from the seed of one try to that of the next: far from those of other pictures


def check_likeness(least: float | None, tries: int | None, identity: Identity | None) -> None:
    """Refuse what makes no sense. Raises RequestError."""
    if least is None:
        if tries is not None:
            raise RequestError("--tries", tries, "usable alone", "say what is enough with --min-likeness")
        return
    if not -1 <= least <= 1:  # refuses NaN too
        raise RequestError("--min-likeness", least, "a number from -1 to 1")
    if tries is not None and not 1 <= tries <= _MOST_TRIES:
        raise RequestError("--tries", tries, f"a whole number from 1 to {_MOST_TRIES}")
    if identity is None:
        raise RequestError("--min-likeness", least, "usable alone", "name the photograph with --identity")


def paint_alike(
    engine: "Engine", requests: Sequence[GenerationRequest], view: View, least: float | None, tries: int | None
) -> Generator[Result | RejectedError]:
    """The picture of each request, in order, or that it is rejected: the first try that is at least so alike, else the
    best of all tries.

    A later try has another seed, which its record names. Without `least` every first try is taken. Where a later try
    fails, the best picture so far is yielded, what else is finished without a gap, and then the error is raised.
    """
    placed, expected = paint_placed(engine, requests, view), 0
    for place, best in placed:
        if place != expected:  # of those that were finished when one failed: who counts must not take it for another
            continue
        request, expected = requests[place], expected + 1
        for number in range(1, tries or DEFAULT_TRIES) if least is not None else ():
            assert least is not None and request.seed is not None
            if _likeness(best) >= least:
                break
            seed = (request.seed + number * _STRIDE) % (LARGEST_SEED + 1)
            try:
                for other in paint_again(engine, request.model_copy(update={"seed": seed}), view, place):
                    best = max(best, other, key=_likeness)
            except GessoError as problem:  # Ctrl-C, too
                if isinstance(best, RejectedError):
                    raise
                yield best
                yield from _finished(placed, problem, expected)
        if least is not None and isinstance(best, Result) and _likeness(best) < least:
            view.warn(f"likeness {_words(best)} after {tries or DEFAULT_TRIES} tries, not {least:g}; the best was kept")
        yield best


def _finished(
    placed: Generator[tuple[int, Result | RejectedError]], problem: GessoError, expected: int
) -> Iterator[Result | RejectedError]:
    """Stop the other first tries with this problem; those that are finished, without a gap. Raises it."""
    place, painted = placed.throw(problem)
    while True:
        if place == expected:
            yield painted
            expected += 1
        try:
            place, painted = next(placed)
        except StopIteration:
            raise problem from None


def _likeness(result: Result | RejectedError) -> float:
    """Of a picture without a face it is less than any, and of one that nobody is to see less still."""
    if isinstance(result, RejectedError):
        return -3.0
    value = result.metadata.get("likeness")
    return float(value) if isinstance(value, int | float) else -2.0


def _words(result: Result) -> str:
    return f"{_likeness(result):.2f}" if _likeness(result) >= -1 else "unknown (no face is seen, or too small a one)"
