"""What is in the air: models, admitted requests and their unfinished pictures, and how these are told to the scheduler.

Records and grouping only. The verbs are called in ``loop``; the choices are made in ``scheduler`` and ``standing``.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gesso.engine.accounts import Lane, Pace, whole
from gesso.engine.job import Job
from gesso.engine.places import Places
from gesso.engine.scheduler import OVERDRAFT, SHARE, Group, Rank, choose_rows, lets_others_begin, may_join
from gesso.engine.standing import ORDINARY, Claim, Standing
from gesso.events import Result
from gesso.pipelines.contract import Pipeline, Plan

_T = TypeVar("_T")


@dataclass(eq=False, kw_only=True)
class Run:
    """An admitted request: planned, later encoded, its pictures begun as room allows.

    Attributes:
        job: whom to tell.
        model: what paints it.
        plan: the request without blanks.
        waiting: pictures to begin, in order.
        conditioning: what ``encode`` made, shared by all its pictures; there once ``encoded``, when the first begins.
        begun: how often a picture of it was begun.
        results: finished pictures by index.
        seconds: by stage, what was spent on the request as a whole (load, encode).
        company: how many requests were encoded with this one, itself included.
        standing: whom it outranks this turn.
        used: its account within its model, in FLOPs.
    """

    job: Job
    model: Model
    plan: Plan
    waiting: deque[int]
    conditioning: Any = None
    encoded: bool = False
    begun: int = 0
    results: dict[int, Result] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    company: int = 1
    standing: Standing = ORDINARY
    used: int = 0

    @property
    def pipeline(self) -> Pipeline:
        return self.model.pipeline

    @property
    def priority(self) -> int:
        return self.job.priority

    @property
    def lane(self) -> Lane:
        return self.model.lanes[self.priority]

    @property
    def in_flight(self) -> int:
        """Pictures begun and not finished."""
        return self.model.flying[self]

    @property
    def rank(self) -> Rank:
        """That of the next picture to begin."""
        return Rank(self.standing, -(self.in_flight // SHARE))

    @property
    def alone(self) -> bool:
        """Whether each of its pictures is stepped, encoded and decoded in a batch of its own."""
        return self.plan.request.deterministic

    @property
    def may_begin(self) -> bool:
        """Whether one more picture may begin. Pictures that step alone gain nothing by being in flight together."""
        return bool(self.waiting) and not (self.alone and self.in_flight)

    @property
    def finished(self) -> tuple[Result, ...]:
        """The pictures made so far, in order."""
        return tuple(self.results[image] for image in sorted(self.results))


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
        spent: FLOPs of its own share of these.
        solitary: until it is done nothing else begins, since it did not fit beside others.
    """

    run: Run
    image: int
    state: Any
    arrival: int
    last_turn: int
    company: int = 1
    seconds: float = 0.0
    spent: int = 0
    solitary: bool = False

    @property
    def steps_done(self) -> int:
        return self.state.total - self.state.remaining

    @property
    def left(self) -> int:
        """FLOPs that it still takes: at least those of its next step, whatever its plan says."""
        planned = whole(self.run.plan.cost.flops) - self.spent
        return max(planned, whole(self.state.cost.flops)) if self.state.remaining else max(planned, 0)


@dataclass(eq=False, kw_only=True)
class Model:
    """A loaded pipeline and what it has to do.

    Attributes:
        pipeline: the six verbs.
        number: which model of the engine it is.
        places: how many of its pictures step together at most.
        runs: its admitted requests, in order of arrival.
        queues: by priority, those of them with pictures left to begin, in the order in which they may.
        dated: those of them with a deadline.
        solitary: those of them whose next picture begins when nothing else is under way.
        rows: its unfinished pictures, in the order in which they were begun.
        flying: how many of them each request has, those included whose state is about to be made.
        lanes: accounts by priority.
        pace: how fast it is.
    """

    pipeline: Pipeline
    number: int
    places: Places
    runs: list[Run] = field(default_factory=list)
    queues: defaultdict[int, deque[Run]] = field(default_factory=lambda: defaultdict(deque))
    dated: dict[Run, None] = field(default_factory=dict)
    solitary: dict[Run, None] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    flying: Counter[Run] = field(default_factory=Counter)
    lanes: defaultdict[int, Lane] = field(default_factory=lambda: defaultdict(Lane))
    pace: Pace = field(default_factory=Pace)

    def admit(self, run: Run, most_used: int) -> None:
        """Take in a request. Where its priority had nothing to do, its account goes on from ``most_used``."""
        if not any(other.priority == run.priority for other in self.runs):
            run.lane.used = max(run.lane.used, most_used)
        run.used = run.lane.floor
        run.standing = Standing(run.priority)
        self.runs.append(run)
        self.queues[run.priority].append(run)
        if run.job.deadline is not None:
            self.dated[run] = None

    def contenders(self) -> list[Run]:
        """The requests whose standing can matter: under way, next of their priority, solitary, or with a deadline."""
        nexts = [next((run for run in queue if not run.in_flight), None) for queue in self.queues.values()]
        waiting = (run for run in nexts if run is not None)
        return list(dict.fromkeys([*self.flying, *waiting, *self.solitary, *self.dated]))

    def take_next(self, above: Standing | None = None) -> tuple[Run, int] | None:
        """The picture that begins next if one may, of a request that stands higher than ``above``."""
        run = self._next()
        return None if run is None or (above is not None and run.standing <= above) else self.take(run)

    def take(self, run: Run) -> tuple[Run, int]:
        """The next picture of that request; it counts as begun, and its request goes to the end in its turn."""
        image = run.waiting.popleft()
        run.begun += 1
        self.flying[run] += 1
        queue = self.queues[run.priority]
        if not run.waiting:
            queue.remove(run)
        elif lets_others_begin(run.begun):
            queue.remove(run)
            queue.append(run)
        return run, image

    def take_up(self, row: Row) -> None:
        """A picture is under way."""
        row.solitary = row.run in self.solitary
        self.solitary.pop(row.run, None)
        self.rows.append(row)

    def _next(self) -> Run | None:
        """The first in the queues of those that rank highest, if there is a place for it."""
        under_way, places = self.flying.total(), self.places.now
        if under_way >= OVERDRAFT * places:
            return None
        best: Run | None = None
        for run in (*(run for queue in self.queues.values() for run in _front(queue)), *self.dated):
            if run.may_begin and (best is None or run.rank > best.rank):
                best = run
        if best is None or under_way < places:
            return best
        taken = [Rank(run.standing, -(one // SHARE)) for run, count in self.flying.items() for one in range(count)]
        return best if may_join(best.rank, taken, places) else None

    def put_back(self, run: Run, image: int) -> None:
        """Let a picture that was begun begin again later, before what its request has not begun yet."""
        self.land(run)
        run.waiting.appendleft(image)
        if run not in self.queues[run.priority]:
            self.queues[run.priority].appendleft(run)

    def begin_anew(self, rows: Sequence[Row]) -> None:
        """Drop the states of these pictures, and let them begin again."""
        self.rows = [row for row in self.rows if row not in rows]
        for row in reversed(rows):
            self.put_back(row.run, row.image)

    def land(self, run: Run) -> None:
        """One picture less of this request is under way."""
        self.flying[run] -= 1
        if not self.flying[run]:
            del self.flying[run]

    def forget(self, runs: set[Run]) -> None:
        """Let go of these requests and all that belongs to them."""
        self.rows = [row for row in self.rows if row.run not in runs]
        self.runs = [run for run in self.runs if run not in runs]
        for priority, queue in self.queues.items():
            self.queues[priority] = deque(run for run in queue if run not in runs)
        for run in runs:
            self.flying.pop(run, None)
            self.dated.pop(run, None)
            self.solitary.pop(run, None)

    def claim(self, run: Run, now: float, waited: int) -> Claim:
        """What a request of this model has to say for itself.

        Args:
            run: the request.
            now: seconds on the clock that ``Job.submitted`` was read from.
            waited: turns since its priority stepped.
        """
        left = work = None
        if run.job.deadline is not None:
            left = run.job.submitted + run.job.deadline - now
            rounds = math.ceil(len(run.waiting) / (1 if run.alone else self.places.now))
            rows = [row for row in self.rows if row.run is run]
            flops = max((row.left for row in rows), default=0) + rounds * whole(run.plan.cost.flops)
            steps = max((row.state.remaining for row in rows), default=0) + rounds * run.plan.steps
            work = self.pace.of(flops, steps)
        return Claim(
            priority=run.priority,
            model=self.number,
            waited=waited,
            flying=run.in_flight > 0,
            overdue=run.standing.waited > 0 and not run.in_flight,
            left=left,
            work=work,
        )


def _front(queue: Iterable[Run]) -> Iterator[Run]:
    """Of a queue as many as there is need to look at: up to the first that may begin and ranks with the first."""
    for run in queue:
        yield run
        if run.may_begin and not run.rank.share:
            return


def step_groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that may step together: same model and equal batch keys; a row that runs alone is a group of its own."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        own = row.arrival if row.run.alone else None
        groups.setdefault((row.run.model.number, row.state.batch_key, own), []).append(row)
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
    """Requests that are encoded together: same model; one that runs alone is encoded alone.

    So is one that starts from a picture: should its file be gone or broken by now, that is nobody else's fault.
    """
    groups: dict[Hashable, list[Run]] = {}
    for run in runs:
        own = id(run) if run.alone or run.plan.request.init_image is not None else None
        groups.setdefault((run.model.number, own), []).append(run)
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
        flops: what it cost each.
        most_used: by priority, the highest account of a model that stepped: from there goes on that of a model which
            had nothing to do; moved on here.
    """
    for row, spent in zip(rows, flops, strict=True):
        row.spent += spent
        row.run.used += spent
        row.run.lane.used += spent
    for lane in {row.run.lane for row in rows}:
        lane.floor = max(lane.floor, min(row.run.used for row in rows if row.run.lane is lane))
    for row in rows:
        most_used[row.run.priority] = max(most_used.get(row.run.priority, 0), row.run.lane.used)
