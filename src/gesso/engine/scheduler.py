"""Who begins and who steps next: pure functions over descriptions. No threads, no pipelines, no clocks.

Time is counted in turns of the loop, so that a decision can be tested and repeated. Two policies are offered:

- ``oldest`` waits for nobody: the group that holds the picture begun first goes first, with whoever is level with
  it. Those that arrive meanwhile gather at their first step and then go together.
- ``laggards`` steps the group that has the largest share of its way still to go: those ahead wait, newcomers catch up
  with them, and from there on one step serves both.

Nobody starves. Under ``oldest`` a picture waits only for those begun before it. Under ``laggards`` one that
has waited ``PATIENCE`` turns goes before all that have waited less, so that with n pictures in flight none waits more
than PATIENCE + n turns, however many newcomers there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from gesso.errors import RequestError

Policy = Literal["laggards", "oldest"]

POLICIES: tuple[Policy, ...] = get_args(Policy)

PATIENCE = 32
"""Turns after which, under ``laggards``, having waited outweighs being ahead."""


SHARE = 4
"""Pictures a request begins before it lets others go first: a usual request goes whole, a larger one takes turns."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Pictures that may step together.

    Attributes:
        arrival: the smallest of its pictures' places in the order in which they were begun.
        waited: the most turns any of its pictures has gone without a step.
        behind: the largest share of a picture's way that is still to go, above 0 and at most 1.
        solo: its one picture steps alone whatever comes (a deterministic request), so nobody gains by waiting for it.
    """

    arrival: int
    waited: int
    behind: float
    solo: bool = False


def check_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        RequestError: there is none.
    """
    for policy in POLICIES:
        if policy == name:
            return policy
    raise RequestError("policy", name, f"a scheduling policy ({' or '.join(POLICIES)})")


def choose_group(groups: Sequence[Group], policy: Policy, patience: int = PATIENCE) -> int:
    """Index of the group to step now.

    Args:
        groups: at least one.
        policy: see the top of this file.
        patience: turns after which, under ``laggards``, having waited outweighs being ahead.
    """
    every = range(len(groups))
    if policy == "oldest":
        return min(every, key=lambda index: groups[index].arrival)
    longest = max(every, key=lambda index: (groups[index].waited, -groups[index].arrival))
    if groups[longest].waited >= patience:
        return longest
    # Pictures that never merge gain nothing by advancing side by side: only the first begun of them competes.
    solos = [index for index in every if groups[index].solo]
    first_solo = min(solos, key=lambda index: groups[index].arrival, default=None)
    competing = [index for index in every if not groups[index].solo or index == first_solo]
    return max(competing, key=lambda index: (groups[index].behind, -groups[index].arrival))


def lets_others_begin(begun: int) -> bool:
    """Whether a request that has begun so many pictures now goes to the end of the queue of those that begin.

    The queue is in order of arrival; a request of ten thousand pictures shares with one that arrives after it.
    """
    return begun % SHARE == 0
