"""A share of the way as a range of steps. Not here: what acts inside it."""

from __future__ import annotations


def in_window(step: int, steps: int, start: float, end: float) -> bool:
    """Whether step `step` of `steps` lies wholly in [start, end], shares of the way from 0 to 1.

    As in diffusers' control-net pipelines, in plain floats: active unless i/N < start or (i+1)/N > end.

    Example:
        >>> [in_window(step, 10, 0.1, 0.9) for step in (0, 1, 8, 9)]
        [False, True, True, False]
    """
    return not (step / steps < start or (step + 1) / steps > end)
