"""Who outranks whom this turn: priorities, deadlines that run out, and a turn now and then for those below.

Pure functions over what each request claims; no clocks, seconds come in as numbers. Among requests of equal standing
the policy decides (``scheduler``).

- A higher priority goes first, strictly, whatever it costs those below.
- A request whose deadline would be missed if it waited longer goes before every priority, the earliest deadline first;
  those that can hardly be met any more come after those that can. A deadline counts for nothing once it has passed,
  nor while the work takes more than ``HOPELESS`` times the seconds that are left.
- Nobody starves: requests of a priority, n levels below the highest that is there, get a turn at the latest
  n x ``AGEING`` turns after their last one, and among them the policy chooses. It is counted by priority and not by
  request, so that a long queue of unimportant work costs important work a turn in ``AGEING``, and one more for each
  request that begins. That is one at a time, of a model that has none of that priority under way; it stays due until
  it finds a place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

LOWEST, HIGHEST = -10, 10

URGENT = HIGHEST + 1
"""The level of a request whose deadline is about to be missed."""

AGEING = 64
"""Turns that a priority waits for each level it is below the highest."""

MARGIN = 0.25
"""Share by which work may take longer than was estimated before a deadline is missed."""


HOPELESS = 2.0
"""Times the seconds left that work may take, as far as is known, for its deadline still to count."""


class Standing(NamedTuple):
    """Where a request stands this turn; the greater goes first.

    Attributes:
        level: its priority, ``URGENT``, or, when its priority is due a turn, the highest there is.
        waited: turns that its priority has gone without a step, if it is due a turn; else 0.
        hurry: for urgent ones -1, -2, … in the order in which they go; else 0.
    """

    level: int = 0
    waited: int = 0
    hurry: int = 0


ORDINARY = Standing()
"""Of a request with priority 0 and no hurry."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a request has to say for itself.

    Attributes:
        priority: from ``LOWEST`` to ``HIGHEST``.
        model: which model it is for.
        waited: turns since a request of this priority stepped without being urgent.
        flying: whether a picture of it is under way.
        overdue: whether it was due a turn before, and found no place to begin.
        left: seconds to its deadline; None if it has none.
        work: seconds that it still takes as far as is known; None if nothing is known.
    """

    priority: int
    model: int = 0
    waited: int = 0
    flying: bool = False
    overdue: bool = False
    left: float | None = None
    work: float | None = None


def standings(claims: Sequence[Claim]) -> list[Standing]:
    """The standing of each request.

    Args:
        claims: all admitted requests, in order of arrival.
    """
    found = [Standing(claim.priority) for claim in claims]
    for position, index in enumerate(urgent(claims), start=1):
        found[index] = Standing(URGENT, 0, -position)
    top = max((standing.level for standing in found), default=0)
    for priority in {claim.priority for claim in claims if claim.priority < top}:
        ordinary = [index for index, standing in enumerate(found) if standing == Standing(priority)]
        bound = AGEING * (top - priority)
        for index in _due(claims, ordinary, bound):
            found[index] = Standing(top, max(claims[index].waited, bound))
    return found


def _due(claims: Sequence[Claim], ordinary: Sequence[int], bound: int) -> list[int]:
    """Indices of those of one priority that are due a turn: all that are under way, and one that begins."""
    due = [index for index in ordinary if claims[index].waited >= bound]
    flying = [index for index in due if claims[index].flying]
    served = {claims[index].model for index in ordinary if claims[index].flying}
    # Where one of its own model is under way, a place will be free for the next; and one begins, not the whole queue.
    idle = [index for index in ordinary if not claims[index].flying and claims[index].model not in served]
    overdue = [index for index in idle if claims[index].overdue]
    return flying + (overdue or [index for index in idle if index in due])[:1]


def urgent(claims: Sequence[Claim]) -> list[int]:
    """Indices of the requests that go now lest a deadline be missed, in the order in which they go.

    In order of deadlines, each needs the time of all before it and its own. Where that runs out, it and those before
    it are urgent. One whose work is unknown is urgent at once: its first steps bring the measurement. One that would
    take up to ``HOPELESS`` times its seconds hurries after all these; beyond that it hurries for nothing.
    """
    due = [(claim.left, index) for index, claim in enumerate(claims) if claim.left is not None and claim.left > 0]
    meetable, hopeless = [], []
    for left, index in sorted(due):
        work = claims[index].work or 0.0
        if work <= HOPELESS * left:
            (meetable if work <= left else hopeless).append((left, index))
    needed, tight = 0.0, 0
    for count, (left, index) in enumerate(meetable, start=1):
        needed += (1 + MARGIN) * (claims[index].work or 0.0)
        if needed >= left:
            tight = count
    going = [index for count, (_, index) in enumerate(meetable, 1) if count <= tight or claims[index].work is None]
    return going + [index for _, index in hopeless]
