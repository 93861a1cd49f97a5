"""Schedules that are known before a run: which steps are full, and what the others do. Integers in, kinds out.

Sources: TaylorSeer (arXiv:2503.06923), ToCa (arXiv:2410.05317) and DuCa (arXiv:2412.18911) as published; diffusers'
`TaylorSeerCacheConfig`. Not here: adaptive policies, and what a kind of step does (`policy`).
"""

from __future__ import annotations

from enum import StrEnum

from gesso.cache_settings import CacheSettings


class Kind(StrEnum):
    """A step as the reference's goldens spell it: full, skipped, some tokens computed, all reused."""

    FULL = "F"
    SKIPPED = "T"
    TOKENS = "t"
    REUSED = "a"


def planned_steps(settings: CacheSettings, steps: int) -> list[Kind]:
    """The kinds of all steps, of settings without blanks. For adaptive policies full ones are those that must be."""
    interval, warmup = settings.interval or steps, settings.warmup or 1
    if settings.mask is not None:
        full = list(settings.mask)
    elif settings.schedule == "adaptive":
        return _with_last(adaptive_steps(steps, interval, alternate=settings.policy == "duca"), settings.last_full)
    elif settings.schedule == "diffusers":
        full = diffusers_full_steps(steps, interval, warmup)
    elif settings.interval is None:
        full = [step < warmup for step in range(steps)]
    else:
        full = full_steps(steps, interval, warmup)
    match settings.policy:
        case "toca" | "random" | "clusca":
            skipped = (Kind.TOKENS,)
        case "duca":
            skipped = (Kind.TOKENS, Kind.REUSED)
        case _:
            skipped = (Kind.SKIPPED,)
    return _with_last(alternated(full, skipped), settings.last_full if settings.mask is None else 0)


def full_steps(steps: int, interval: int, warmup: int) -> list[bool]:
    """The first `warmup`, then every `interval`-th after the last of them. The last step is nothing special."""
    return [step < warmup or (step - warmup + 1) % interval == 0 for step in range(steps)]


def diffusers_full_steps(steps: int, interval: int, warmup: int) -> list[bool]:
    """As diffusers 0.42 counts: the same distance, begun one step after the warm-up's end."""
    return [step < warmup or (step - warmup - 1) % interval == 0 for step in range(steps)]


def alternated(full: list[bool], skipped: tuple[Kind, ...]) -> list[Kind]:
    """Full steps, and between them the kinds of `skipped` in turn, from the first after each full step."""
    kinds: list[Kind] = []
    since = 0
    for is_full in full:
        kinds.append(Kind.FULL if is_full else skipped[since % len(skipped)])
        since = 0 if is_full else since + 1
    return kinds


def adaptive_steps(steps: int, interval: int, *, alternate: bool) -> list[Kind]:
    """ToCa's and DuCa's schedule for DiT: longer intervals at first, shorter ones later, two in a middle stretch.

    A step, counted down to 0, is full where its number divides by the interval in force; `alternate` reuses everything
    where the remainder is even.
    """
    return [kind for kind, _ in _adaptive(steps, interval, alternate)]


def adaptive_intervals(steps: int, interval: int) -> list[int]:
    """The interval in force after each step of `adaptive_steps`."""
    return [current for _, current in _adaptive(steps, interval, alternate=False)]


def _adaptive(steps: int, interval: int, alternate: bool) -> list[tuple[Kind, int]]:
    found: list[tuple[Kind, int]] = []
    current = interval
    for number in reversed(range(steps)):
        remainder = number % current
        if remainder == 0 or number == steps - 1:
            kind = Kind.FULL
            current = round(interval / (1.4 - 0.8 * number / steps))
            if 0.2 * steps <= number < 0.4 * steps:
                current = 2
        else:
            kind = Kind.REUSED if alternate and remainder % 2 == 0 else Kind.TOKENS
        found.append((kind, current))
    return found


def _with_last(kinds: list[Kind], last_full: int) -> list[Kind]:
    return [Kind.FULL if step >= len(kinds) - last_full else kind for step, kind in enumerate(kinds)]
