"""Whether a network's output is forecast in the step that is being made: nobody need prepare what it would read.

Whoever forecasts (a step cache) answers; a pipeline asks before costly work that only the network reads. Not here: when
steps are forecast, and from what (`caching`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Answer = Callable[[str], bool]
"""Whether the network's output for a guidance branch will be forecast as a whole."""

_ANSWER: ContextVar[Answer | None] = ContextVar("whole_output_is_forecast", default=None)


@contextmanager
def answering(answer: Answer) -> Iterator[None]:
    """While it lasts, this is what is asked."""
    token = _ANSWER.set(answer)
    try:
        yield
    finally:
        _ANSWER.reset(token)


def output_is_forecast(branch: str) -> bool:
    """Whether the network will read nothing but the shape of its inputs for this branch; no where nobody forecasts."""
    answer = _ANSWER.get()
    return answer is not None and answer(branch)
