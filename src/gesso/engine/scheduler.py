"""Who begins and who steps next: pure functions over descriptions. No threads, no pipelines, no clocks.

Time is counted in turns of the loop and work in FLOPs, so that a decision can be tested and repeated. First comes
standing (priorities and deadlines, see ``standing``). Among groups of equal standing three policies are offered:

- ``fair`` shares by cost used, between models and then between requests of one model. The group goes first that would
  be done first, counted from what its model, then its request, has used so far. A request that arrives starts from
  what the least served of the last batches of its model had used; a model that had nothing to do, from what the most
  served of the models that stepped has. So a small request overtakes a large one at the next step, one that needs no
  less than what is under way does not interrupt it, and who was overtaken goes first once the others have used as much.
- ``oldest`` waits for nobody: the group that holds the picture begun first goes first, with whoever is level with
  it. Those that arrive meanwhile gather at their first step and then go together.
- ``laggards`` steps the group that has the largest share of its way still to go: those ahead wait, newcomers catch up
  with them, and from there on one step serves both.

Nobody starves. Under ``oldest`` a picture waits only for those begun before it. Under ``laggards`` one that
has waited ``PATIENCE`` turns goes before all that have waited less, so that with n pictures in flight none waits more
than PATIENCE + n turns, however many newcomers there are. Under ``fair`` what others use while one waits brings them
behind it: no model, and no request, gets further ahead of a waiting one than what that one has under way, and a step.

The shares are of cost and not of steps, and each picture is finished before an equal one is taken up, because turning
about at every step would make everybody late: two equal requests would both be done at the end instead of one at half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from gesso.engine.standing import ORDINARY, Standing
from gesso.errors import RequestError

Policy = Literal["fair", "laggards", "oldest"]

POLICIES: tuple[Policy, ...] = get_args(Policy)

PATIENCE = 32
"""Turns after which, under ``laggards``, having waited outweighs being ahead."""

SHARE = 4
"""Pictures a request begins before it lets others go first: a usual request goes whole, a larger one takes turns."""

OVERDRAFT = 2
"""Times its places that a model may have pictures under way, where some outrank others and need not wait for them."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Pictures that may step together.

    Attributes:
        arrival: the smallest of its pictures' places in the order in which they were begun.
        waited: the most turns any of its pictures has gone without a step.
        behind: the largest share of a picture's way that is still to go, above 0 and at most 1.
        solo: its one picture steps alone whatever comes (a deterministic request), so nobody gains by waiting for it.
        standing: the highest of its requests'.
        model: which model it is of.
        account: FLOPs that its model has used, as ``fair`` counts them.
        work: FLOPs until all its pictures are done.
        due: the smallest of its requests' FLOPs used and still to be used here.
    """

    arrival: int
    waited: int
    behind: float
    solo: bool = False
    standing: Standing = ORDINARY
    model: int = 0
    account: int = 0
    work: int = 0
    due: int = 0


class Rank(NamedTuple):
    """A picture's claim to one of its model's places; the greater goes first, and of equals the one begun first.

    Attributes:
        standing: its request's.
        share: 0 for the first ``SHARE`` pictures that its request has under way, -1 for the next, and so on.
    """

    standing: Standing
    share: int


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
    highest = max(group.standing for group in groups)
    every = [index for index, group in enumerate(groups) if group.standing == highest]
    if policy == "fair":
        return _fairest(groups, every)
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


def _fairest(groups: Sequence[Group], among: Sequence[int]) -> int:
    """Of each model the group that is due first; of those the one that is due first by its model's account."""
    firsts: dict[int, int] = {}
    for index in sorted(among, key=lambda index: (groups[index].due, groups[index].arrival)):
        firsts.setdefault(groups[index].model, index)
    return min(firsts.values(), key=lambda index: (groups[index].account + groups[index].work, groups[index].arrival))


def lets_others_begin(begun: int) -> bool:
    """Whether a request that has begun so many pictures now goes to the end of the queue of those that begin.

    The queue is in order of arrival; a request of ten thousand pictures shares with one that arrives after it.
    """
    return begun % SHARE == 0


def may_join(rank: Rank, taken: Sequence[Rank], places: int) -> bool:
    """Whether one more picture of a model may begin beside those under way.

    It takes a free place, or that of one it outranks, which then stands back: pictures under way keep what they hold
    in memory, hence the bound of ``OVERDRAFT`` times the places.

    Args:
        rank: the picture's.
        taken: those of the model's pictures under way.
        places: how many of them step together at most.
    """
    if len(taken) < places:
        return True
    return len(taken) < OVERDRAFT * places and sum(other >= rank for other in taken) < places


def choose_rows(ranks: Sequence[Rank], places: int) -> list[int]:
    """Indices, in order, of the pictures of a group that step when only so many can."""
    return sorted(sorted(range(len(ranks)), key=lambda index: ranks[index], reverse=True)[:places])
