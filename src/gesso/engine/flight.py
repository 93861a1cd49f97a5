"""What is in the air: models, admitted requests and their unfinished pictures.

Records only. Who shares a call is in ``groups``; the verbs are called in ``loop``; the choices are made in
``scheduler`` and ``standing``.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gesso.engine.accounts import Lane, Pace, whole
from gesso.engine.adapters import Held, ModelAdapters
from gesso.engine.caches import Cached, Caches
from gesso.engine.job import Job
from gesso.engine.places import Places
from gesso.engine.readings import Readings
from gesso.engine.scheduler import OVERDRAFT, SHARE, Rank, lets_others_begin, may_join
from gesso.engine.standing import ORDINARY, Claim, Standing
from gesso.events import Rejected, Result
from gesso.pipelines.contract import Output, Pipeline, Plan


@dataclass(eq=False, kw_only=True)
class Run:
    """An admitted request: planned, later encoded, its pictures begun as room allows.

    Attributes:
        job: whom to tell.
        model: what paints it.
        plan: the request without blanks.
        held: its adapters; there once its pictures may begin.
        waiting: pictures to begin, in order.
        conditioning: what ``encode`` made, shared by all its pictures; there once ``encoded``, when the first begins.
        given: digests of the files that it names, taken when ``encode`` read them.
        begun: how often a picture of it was begun.
        results: finished pictures by index.
        rejected: likewise those that nobody is to see.
        seconds: by stage, what was spent on the request as a whole (load, encode).
        company: how many requests were encoded with this one, itself included.
        standing: whom it outranks this turn.
        used: its account within its model, in FLOPs.
    """

    job: Job
    model: Model
    plan: Plan
    waiting: deque[int]
    held: Held = field(default_factory=Held)
    conditioning: Any = None
    encoded: bool = False
    given: Mapping[str, object] = field(default_factory=dict)
    begun: int = 0
    results: dict[int, Result] = field(default_factory=dict)
    rejected: dict[int, Rejected] = field(default_factory=dict)
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
        spent: FLOPs of its own share of these, forecast ones counted like any other.
        solitary: until it is done nothing else begins, since it did not fit beside others.
        cached: its part in a step cache, where its request has one.
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
    cached: Cached | None = None

    @property
    def decision(self) -> Hashable:
        """What its step cache makes of its next step; None without one."""
        return None if self.cached is None else self.cached.decision(self.steps_done, self.state.total)

    @property
    def mixing(self) -> Hashable:
        """Pictures may step together where it is equal, whatever adapters each of them has."""
        return self.run.held.mixing

    @property
    def steps_done(self) -> int:
        return self.state.total - self.state.remaining

    def stepped(self, flops: int, seconds: float) -> int:
        """It took a step of so many FLOPs. Returns what it is charged: less for a forecast one."""
        self.spent += flops
        return flops if self.cached is None else self.cached.charged(flops, seconds)

    @property
    def left(self) -> int:
        """FLOPs that it still takes: at least those of its next step, whatever its plan says."""
        planned = whole(self.run.plan.cost.flops) - self.spent
        if self.cached is not None:
            planned = whole(planned * self.cached.outlook(self.steps_done, self.state.total))
        return max(planned, whole(self.state.cost.flops)) if self.state.remaining else max(planned, 0)


@dataclass(eq=False, kw_only=True)
class Decoding:
    """Finished pictures of one model on their way to pixels, which is left at each breath and taken up a turn later.

    Attributes:
        rows: all of them.
        waiting: those whose pixels are not there yet; the first is being decoded.
        outputs: what the pipeline yields.
        seconds: spent on the first so far.
    """

    rows: list[Row]
    waiting: deque[Row]
    outputs: Iterator[Output | None]
    seconds: float = 0.0

    @property
    def decisive(self) -> list[Row]:
        """For whom it goes on: the one that is half done, and between pictures all, since nothing is lost there."""
        return [self.waiting[0]] if self.seconds else list(self.waiting)


@dataclass(eq=False, kw_only=True)
class Model:
    """A loaded pipeline and what it has to do.

    Attributes:
        pipeline: the six verbs.
        number: which model of the engine it is.
        places: how many of its pictures step together at most.
        runs: its admitted requests, in order of arrival.
        preparing: those of them whose adapters are not there yet.
        queues: by priority, those of them with pictures left to begin, in the order in which they may.
        dated: those of them with a deadline.
        solitary: those of them whose next picture begins when nothing else is under way.
        rows: its unfinished pictures, in the order in which they were begun.
        decoding: what of them took a breath while it was decoded.
        flying: how many of them each request has, those included whose state is about to be made.
        lanes: accounts by priority.
        pace: how fast it is.
        caches: step caches on its network.
        adapters: adapters on its networks.
        readings: what it read last.
        last_turn: the loop's turn in which it last had something to do.
    """

    pipeline: Pipeline
    number: int
    places: Places
    runs: list[Run] = field(default_factory=list)
    preparing: dict[Run, None] = field(default_factory=dict)
    queues: defaultdict[int, deque[Run]] = field(default_factory=lambda: defaultdict(deque))
    dated: dict[Run, None] = field(default_factory=dict)
    solitary: dict[Run, None] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    decoding: Decoding | None = None
    flying: Counter[Run] = field(default_factory=Counter)
    lanes: defaultdict[int, Lane] = field(default_factory=lambda: defaultdict(Lane))
    pace: Pace = field(default_factory=Pace)
    readings: Readings = field(default_factory=Readings)
    caches: Caches = field(init=False)
    adapters: ModelAdapters = field(init=False)
    last_turn: int = 0

    def __post_init__(self) -> None:
        self.caches = Caches(self.pipeline)
        self.adapters = ModelAdapters(self.pipeline)

    def expect(self, run: Run) -> None:
        """Take in a request that has to wait for its adapters; ``admit`` follows when they are there."""
        self.runs.append(run)
        self.preparing[run] = None

    def admit(self, run: Run, most_used: int) -> None:
        """Take in a request. Where its priority had nothing to do, its account goes on from ``most_used``."""
        if run in self.preparing:
            del self.preparing[run]
            self.runs.remove(run)
        if not any(other.priority == run.priority for other in self.runs if other not in self.preparing):
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
        self.drop(rows)
        for row in reversed(rows):
            self.put_back(row.run, row.image)

    def drop(self, rows: Sequence[Row]) -> None:
        """Let go of the states of these pictures, and of what step caches keep for them."""
        for row in rows:
            if row.cached is not None:
                row.cached.end()
        self.rows = [row for row in self.rows if row not in rows]

    def land(self, run: Run) -> None:
        """One picture less of this request is under way."""
        self.flying[run] -= 1
        if not self.flying[run]:
            del self.flying[run]

    def forget(self, runs: set[Run]) -> None:
        """Let go of these requests and all that belongs to them; what is decoded for others is not begun anew."""
        if self.decoding is not None and self.decoding.waiting[0].run in runs:
            self.decoding = None
        self.drop([row for row in self.rows if row.run in runs])
        self.runs = [run for run in self.runs if run not in runs]
        for priority, queue in self.queues.items():
            self.queues[priority] = deque(run for run in queue if run not in runs)
        for run in runs:
            run.held.release()
            self.preparing.pop(run, None)
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
            picture = whole(whole(run.plan.cost.flops) * self.caches.outlook(run.plan))
            flops = max((row.left for row in rows), default=0) + rounds * picture
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
