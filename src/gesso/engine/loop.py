"""The loop of one device: admit, group, pick a group, step, tell, decode what is done. It runs in one thread.

Everything here but ``inbox`` belongs to that thread. Callers speak to it through the inbox, and it speaks to them
through their jobs; it waits for none of them. Who goes first is decided in ``standing`` and ``scheduler``; how a job
becomes a request under way is ``admission``'s.

When memory runs out while others hold some of it, nobody fails yet: what was begun is begun anew, half as many at a
time, and at last alone (``fleet``). A picture depends on its seed alone, so it comes out as it would have; a step is
never repeated, since one that broke may have moved a state on or drawn from its generator. A preview that does not fit
is left out. A picture that does not fit alone fails, and only it.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gesso.engine.accounts import whole
from gesso.engine.admission import Admission, Load, Measure
from gesso.engine.budget import Budget
from gesso.engine.caches import calling
from gesso.engine.device import settle
from gesso.engine.failures import is_out_of_memory
from gesso.engine.fetching import Fetching
from gesso.engine.fleet import Fleet
from gesso.engine.flight import Decoding, Model, Row, Run
from gesso.engine.groups import charge, decode_groups, describe_group, encode_groups, step_groups, stepping_rows
from gesso.engine.inbox import Inbox
from gesso.engine.results import judged_result
from gesso.engine.safety import Guard
from gesso.engine.scheduler import Policy, choose_group
from gesso.engine.standing import Standing, standings
from gesso.errors import RunError
from gesso.events import Failed, Preview
from gesso.metadata import digests_of_given
from gesso.pipelines.contract import Output
from gesso.settings import load_settings

_LOOK_AGAIN = 0.05  # seconds, while jobs wait for room beside requests whose adapters are on their way


class Loop:
    """State and turns of the loop.

    Args:
        load: makes a pipeline from a model's name or path, a device and a dtype (None is the model's own).
        device: where it runs; None is the best that is found when the first model is loaded.
        dtype: handed to ``load``.
        policy: who steps next.
        max_batch: the most rows in one step.
        how: what else pictures say of the arithmetic that they were made by.
        budget: bytes that the weights of all loaded models may take.
        measure: about how many of them a model will take, told as ``load`` is; None where nobody knows before.
        adapter_memory: bytes that adapters may take, those of all models together.
        guard: what is done about safety; None is as the settings say.
    """

    def __init__(
        self,
        load: Load,
        device: str | None,
        dtype: str | None,
        policy: Policy,
        max_batch: int,
        how: Mapping[str, object] | None = None,
        budget: Budget = None,
        measure: Measure | None = None,
        adapter_memory: int = sys.maxsize,
        guard: Guard | None = None,
    ) -> None:
        self.inbox = Inbox()
        self._dtype = dtype
        self._policy: Policy = policy
        self._how = how or {}
        self._fleet = Fleet(device, budget)
        self._guard = guard or Guard(load_settings())
        self.fetching = Fetching(adapter_memory, self.inbox.wake)
        self._admission = Admission(
            self._fleet,
            self.fetching,
            self._guard,
            load,
            measure,
            dtype=dtype,
            max_batch=max_batch,
            attention=str(self._how.get("attention", "")),
            forget_ended=self._forget_ended,
        )
        self._most_used: dict[int, int] = {}  # By priority: the highest account of a model that stepped.
        self._last_turns: dict[int, int] = {}  # By priority, while several compete: when one of it last stepped.
        self._ranked: list[Run] = []  # Those whose standing is more than their priority.
        self._turn_number = 0
        self._begun = 0

    def run(self) -> None:
        """Turn until asked to close and nothing is left to do. Whatever breaks, every job gets its end."""
        try:
            while self._turn():
                pass
        finally:
            self.inbox.close("cancel")
            for job in [*self._fleet.jobs(), *self.inbox.take(wait=False).arrived]:
                job.end(Failed(job=job.id, error=RunError("the engine's thread has ended")))
            self._fleet.abandon()
            self.fetching.close()

    def _turn(self) -> bool:
        """One turn; whether there will be another. Sleeps first if there is nothing to do."""
        if self._fleet.memory_ran_out:
            self.fetching.let_go()
        self._fleet.release_if_short()
        mail = self.inbox.take(wait=self._fleet.resting, timeout=_LOOK_AGAIN if self._fleet.arrived else None)
        self._turn_number += 1
        self._fleet.arrived += mail.arrived
        try:
            self._fleet.drop(self._fleet.jobs() if mail.closing == "cancel" else mail.cancelled)
            self._admission.admit(self._turn_number, self._most_used)
            self._rank()
            self._begin()
            self._step(self._pick())
            self._decode()
        except BaseException as problem:
            if not self._fleet.busy:
                raise
            self._fleet.fail_everything(problem)
        if not self._fleet.busy:
            self._ranked = []  # Nothing of what is done is kept while there is nothing to do.
        return mail.closing is None or self._fleet.busy

    def _forget_ended(self) -> None:
        """Hold no request that has ended, so that models that are let go of leave memory."""
        self._ranked = [run for run in self._ranked if run in run.model.runs]

    def _rank(self) -> None:
        """Give every request its standing for this turn. Where nothing sets them apart, it is their priority."""
        models, before = self._fleet.models, self._ranked
        runs = sorted((run for model in models for run in model.contenders()), key=lambda run: run.job.submitted)
        priorities = {run.priority for run in runs}
        found: list[Standing] = []
        if len(priorities) < 2 and not any(model.dated for model in models):
            self._ranked, self._last_turns = [], {}
        else:
            now = time.perf_counter()
            self._last_turns = {one: self._last_turns.get(one, self._turn_number) for one in priorities}
            waited = {one: self._turn_number - turn for one, turn in self._last_turns.items()}
            self._ranked = runs
            found = standings([run.model.claim(run, now, waited[run.priority]) for run in runs])
        for run in before:  # Not earlier: a claim says how its request stood a turn ago.
            run.standing = Standing(run.priority)
        for run, standing in zip(self._ranked, found, strict=True):
            run.standing = standing

    def _begin(self) -> None:
        """Begin as many pictures as there is room for."""
        starting = self._fleet.take_starting()
        self._encode(dict.fromkeys(run for run, _ in starting if not run.encoded))
        self._fleet.put_back([(run, image) for run, image in starting if not run.encoded])
        starting = [(run, image) for run, image in starting if run.encoded]
        for position, (run, image) in enumerate(starting):
            if run.job.done():
                continue
            try:
                with run.model.adapters.using([run.held]):
                    state = run.pipeline.begin(run.plan, run.conditioning, image)
                cached = run.model.caches.begin(run.plan)
            except Exception as problem:
                if self._fleet.begins_later(run, problem):
                    self._fleet.put_back(starting[position:])
                    return
                self._fleet.fail([run], problem)
                continue
            self._begun += 1
            now = self._turn_number
            row = Row(run=run, image=image, state=state, arrival=self._begun, last_turn=now, cached=cached)
            run.model.take_up(row)

    def _encode(self, runs: Iterable[Run]) -> None:
        for group in encode_groups(runs):
            for run in group:
                run.job.progress("encode", 0, 0, 1)
            started = time.perf_counter()
            try:
                given = [digests_of_given(run.plan.request) for run in group]
                conditionings = self._read(group)
                settle(self._fleet.place)
                if len(conditionings) != len(group):
                    raise RunError(f"the model made {len(conditionings)} conditionings for {len(group)} prompts")
            except Exception as problem:
                if not self._fleet.goes_in_halves(group, problem):
                    self._fleet.fail(group, problem)
                continue
            seconds = time.perf_counter() - started
            for run, conditioning, digests in zip(group, conditionings, given, strict=True):
                run.conditioning, run.encoded, run.given = conditioning, True, digests
                run.company = len(group)
                run.seconds["encode"] = seconds
                run.job.progress("encode", 0, 1, 1)
            if any(run.plan.guests for run in group):  # which may have been read just now
                self._fleet.keep_to_budget(group[0].model)

    def _read(self, group: Sequence[Run]) -> Sequence[Any]:
        """The conditionings of requests that are encoded together, or of one whose like was read already."""
        model = group[0].model
        if (kept := model.readings.find(group[0])) is not None:
            return [kept]
        with model.adapters.reading([run.held for run in group]):
            conditionings = model.pipeline.encode([run.plan for run in group])
        if len(group) == len(conditionings) == 1:
            model.readings.keep(group[0], conditionings[0])
        return conditionings

    # Group, pick, step, tell.

    def _pick(self) -> list[Row]:
        """The rows that step now; none if nothing is in flight."""
        groups = step_groups(row for row in self._fleet.rows if row.state.remaining > 0)
        if not groups:
            return []
        described = [describe_group(group, self._turn_number) for group in groups]
        return stepping_rows(groups[choose_group(described, self._policy)])

    def _step(self, rows: list[Row]) -> None:
        if not rows:
            return
        model = rows[0].run.model
        due = [row.state.remaining - 1 for row in rows]
        planned = [whole(row.state.cost.flops) for row in rows]
        started = time.perf_counter()
        try:
            held = [row.run.held for row in rows]
            with calling([row.cached for row in rows]), model.adapters.using(held):
                model.pipeline.step([row.state for row in rows])
            settle(self._fleet.place)
            if [row.state.remaining for row in rows] != due:
                raise RunError("the model's step did not advance every picture by one")
        except Exception as problem:
            if not self._fleet.goes_anew(rows, problem):
                self._fleet.fail([row.run for row in rows], problem)
            return
        seconds = time.perf_counter() - started
        flops = [row.stepped(own, seconds) for row, own in zip(rows, planned, strict=True)]
        model.pace.saw(seconds, max(flops))
        model.places.stepped(len(rows))
        charge(rows, flops, self._most_used)
        for row in rows:
            if not row.run.standing.hurry and row.run.priority in self._last_turns:
                self._last_turns[row.run.priority] = self._turn_number
            row.last_turn = self._turn_number
            row.company = max(row.company, len(rows))
            row.seconds += seconds
            row.run.job.progress("step", row.image, row.steps_done, row.state.total)
        for row in rows:
            if row.cached is not None and not row.state.remaining:
                row.cached.end()
            self._preview(row)

    def _preview(self, row: Row) -> None:
        """Show the picture if somebody asked for previews and this step is one of those; the last step needs none."""
        job = row.run.job
        if job.done() or not job.preview_every or not row.state.remaining or row.steps_done % job.preview_every:
            return
        try:
            seen = row.run.pipeline.preview(row.state)
        except Exception as problem:
            if is_out_of_memory(problem):  # Nobody's picture depends on it.
                self._fleet.memory_ran_out = True
            else:
                self._fleet.fail([row.run], problem)
            return
        shown = self._guard.shown(row.run.plan, seen if isinstance(seen, Sequence) else [seen])
        frames = tuple(shown) if isinstance(seen, Sequence) else ()
        job.tell(Preview(job=job.id, image=row.image, step=row.steps_done, picture=shown[0], frames=frames))

    # Decode what is done.

    def _decode(self) -> None:
        """Decode what is done, of each model until it takes a breath: so all else goes on between a video's tiles."""
        for model in self._fleet.models:
            for decoding in self._decodings(model):
                if not self._decode_on(model, decoding):
                    return
                if model.decoding is not None:
                    break

    def _decodings(self, model: Model) -> Iterator[Decoding]:
        """What is to be decoded: that which took a breath, then what was finished since."""
        if model.decoding is not None:
            yield model.decoding
        for group in decode_groups(row for row in model.rows if row.state.remaining == 0):
            # An earlier group may have ended the job; if it was cancelled, it is dropped in the next turn.
            rows = [row for row in group if not row.run.job.done() and not self.inbox.drops([row.run.job])]
            if rows:
                yield Decoding(rows=rows, waiting=deque(rows), outputs=_outputs(rows))

    def _decode_on(self, model: Model, decoding: Decoding) -> bool:
        """Decode until there is a breath, or somebody's end ends it, the rest then anew; whether memory sufficed."""
        model.decoding, rows, waiting = None, decoding.rows, decoding.waiting
        if self._ended(decoding):
            return True
        started = time.perf_counter()
        try:
            for output in decoding.outputs:
                settle(self._fleet.place)
                decoding.seconds += time.perf_counter() - started
                started = time.perf_counter()
                if output is None:
                    model.decoding = decoding
                    break
                waiting[0].company = max(waiting[0].company, len(rows))
                self._finish(waiting[0], output, decoding.seconds)
                waiting.popleft()
                decoding.seconds = 0.0
                if not waiting or self._ended(decoding):
                    break
            else:
                raise RunError(f"the model decoded {len(rows) - len(waiting)} of {len(rows)} pictures")
        except Exception as problem:
            if self._fleet.decodes_later(rows, problem):
                return False
            self._fleet.fail([row.run for row in waiting if not row.run.job.done()], problem)
        return True

    def _ended(self, decoding: Decoding) -> bool:
        """Whether one of those is cancelled, or about to be, for whom it would go on."""
        jobs = [row.run.job for row in decoding.decisive]
        return any(job.done() for job in jobs) or self.inbox.drops(jobs)

    def _finish(self, row: Row, output: Output, seconds: float) -> None:
        """Keep a finished picture, as far as it may be seen; the last one ends its job. One that breaks fails alone."""
        place, dtype = self._fleet.place, self._dtype
        try:
            result = judged_result(row, output, seconds, self._guard, device=place, dtype=dtype, how=self._how)
        except Exception as problem:
            if is_out_of_memory(problem):
                raise
            self._fleet.fail([row.run], problem)
            return
        self._fleet.finish(row, result)
        row.run.job.progress("decode", row.image, row.state.total, row.state.total)
        self._fleet.end_if_done(row.run)


def _outputs(rows: Sequence[Row]) -> Iterator[Output | None]:
    """What decoding them yields; asking for the first calls the verb."""
    yield from rows[0].run.pipeline.decode([row.state for row in rows])
