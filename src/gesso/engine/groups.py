"""Who may share a call of a pipeline: pictures in groups, and how these are told to the scheduler.

Pure functions of what is under way (`flight`). The choices are made in `scheduler` and `standing`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from gesso.engine.flight import Row, Run
from gesso.engine.scheduler import SHARE, Group, Rank, choose_rows

_T = TypeVar("_T")


def step_groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that may step together: same model, equal batch keys, equal decisions of one step cache or without any, and
    adapters that may be mixed.

    A row that runs alone is a group of its own.
    """
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        own = row.arrival if row.run.alone else None
        groups.setdefault((row.run.model.number, row.state.batch_key, row.decision, row.mixing, own), []).append(row)
    return list(groups.values())


def decode_groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Finished rows that are decoded together: same model and size; a row that runs alone is decoded alone."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        request = row.run.plan.request
        own = row.arrival if row.run.alone else None
        groups.setdefault((row.run.model.number, request.width, request.height, own), []).append(row)
    return [part for group in groups.values() for part in _parts(group, group[0].run.model.places.now)]


def encode_groups(runs: Iterable[Run]) -> list[list[Run]]:
    """Requests that are encoded together: same model, and adapters by which it reads; one that runs alone is so, too.

    So is one that needs a picture, or a guest that is read now: should a file of these be gone or broken by now, that
    is nobody else's fault.
    """
    groups: dict[Hashable, list[Run]] = {}
    for run in runs:
        request = run.plan.request
        own = id(run) if run.alone or request.init_image is not None or run.plan.guests else None
        groups.setdefault((run.model.number, run.held.reading, own), []).append(run)
    return [part for group in groups.values() for part in _parts(group, group[0].model.places.now)]


def _parts(group: Sequence[_T], most: int) -> list[list[_T]]:
    return [list(group[start : start + most]) for start in range(0, len(group), most)]


def describe_group(rows: Sequence[Row], turn: int) -> Group:
    """What the scheduler may know of a group at that turn: of those in it that stand highest, the rest ride along."""
    standing = max(row.run.standing for row in rows)
    heads = [row for row in rows if row.run.standing == standing]
    left = Counter[Run]()
    for row in heads:
        left[row.run] += row.left
    return Group(
        arrival=min(row.arrival for row in heads),
        waited=max(turn - row.last_turn for row in heads),
        behind=max(row.state.remaining / row.state.total for row in heads),
        solo=heads[0].run.alone,
        standing=standing,
        model=heads[0].run.model.number,
        account=heads[0].run.lane.used,
        work=left.total(),
        due=min(run.used + left[run] for run in left),
    )


def stepping_rows(group: Sequence[Row]) -> list[Row]:
    """Those of a group that step now: all of it, or as many as its model has places."""
    places = group[0].run.model.places.now
    if len(group) <= places:
        return list(group)
    before = Counter[Run]()
    ranks = []
    for row in group:
        ranks.append(Rank(row.run.standing, -(before[row.run] // SHARE)))
        before[row.run] += 1
    return [group[index] for index in choose_rows(ranks, places)]


def charge(rows: Sequence[Row], flops: Sequence[int], most_used: dict[int, int]) -> None:
    """Put a step on the accounts of those who took part.

    Args:
        rows: who stepped.
        flops: what each is charged.
        most_used: by priority, the highest account of a model that stepped: from there goes on that of a model which
            had nothing to do; moved on here.
    """
    for row, spent in zip(rows, flops, strict=True):
        row.run.used += spent
        row.run.lane.used += spent
    for lane in {row.run.lane for row in rows}:
        lane.floor = max(lane.floor, min(row.run.used for row in rows if row.run.lane is lane))
    for row in rows:
        most_used[row.run.priority] = max(most_used.get(row.run.priority, 0), row.run.lane.used)
