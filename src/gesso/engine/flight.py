"""What is in the air: admitted requests and their unfinished pictures, and how these are described to the scheduler.

Records and grouping only. The verbs are called in ``loop``; the choices are made in ``scheduler``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from gesso.engine.job import Job
from gesso.engine.scheduler import Group
from gesso.events import Result
from gesso.pipelines.contract import Pipeline, Plan


@dataclass(eq=False, kw_only=True)
class Run:
    """An admitted request: planned, later encoded, its pictures begun as room allows.

    Attributes:
        job: whom to tell.
        pipeline: the model that paints it.
        plan: the request without blanks.
        conditioning: what ``encode`` made, shared by all its pictures; there once ``encoded``, when the first begins.
        begun: pictures begun so far.
        in_flight: pictures begun and not finished.
        results: finished pictures by index.
        seconds: by stage, what was spent on the request as a whole (load, encode).
        company: how many requests were encoded with this one, itself included.
    """

    job: Job
    pipeline: Pipeline
    plan: Plan
    conditioning: Any = None
    encoded: bool = False
    begun: int = 0
    in_flight: int = 0
    results: dict[int, Result] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    company: int = 1

    @property
    def alone(self) -> bool:
        """Whether each of its pictures is stepped, encoded and decoded in a batch of its own."""
        return self.plan.request.deterministic

    @property
    def may_begin(self) -> bool:
        """Whether one more picture may begin. Pictures that step alone gain nothing by being in flight together."""
        return self.left_to_begin > 0 and not (self.alone and self.in_flight)

    @property
    def finished(self) -> tuple[Result, ...]:
        """The pictures made so far, in order."""
        return tuple(self.results[image] for image in sorted(self.results))

    @property
    def left_to_begin(self) -> int:
        return self.plan.request.num_images - self.begun


@dataclass(eq=False, kw_only=True)
class Row:
    """An unfinished picture: one row of a batch.

    Attributes:
        run: the request it belongs to.
        image: its index there.
        state: the pipeline's.
        arrival: its place in the order in which pictures were begun.
        last_turn: the loop's turn in which it last stepped, or was begun.
        company: the most rows that shared a batch with it, itself included.
        seconds: spent in the steps it took part in.
    """

    run: Run
    image: int
    state: Any
    arrival: int
    last_turn: int
    company: int = 1
    seconds: float = 0.0

    @property
    def steps_done(self) -> int:
        return self.state.total - self.state.remaining


def step_groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that may step together: same model and equal batch keys; a row that runs alone is a group of its own."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        own = row.arrival if row.run.alone else None
        groups.setdefault((id(row.run.pipeline), row.state.batch_key, own), []).append(row)
    return list(groups.values())


def decode_groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Finished rows that are decoded together: same model and size; a row that runs alone is decoded alone."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        request = row.run.plan.request
        own = row.arrival if row.run.alone else None
        groups.setdefault((id(row.run.pipeline), request.width, request.height, own), []).append(row)
    return list(groups.values())


def encode_groups(runs: Iterable[Run]) -> list[list[Run]]:
    """Requests that are encoded together: same model; one that runs alone is encoded alone."""
    groups: dict[Hashable, list[Run]] = {}
    for run in runs:
        groups.setdefault((id(run.pipeline), id(run) if run.alone else None), []).append(run)
    return list(groups.values())


def describe_group(rows: list[Row], turn: int) -> Group:
    """What the scheduler may know of a group at that turn."""
    return Group(
        arrival=min(row.arrival for row in rows),
        waited=max(turn - row.last_turn for row in rows),
        behind=max(row.state.remaining / row.state.total for row in rows),
        solo=rows[0].run.alone,
    )
