"""The loop of one device: admit, group, pick a group, step, tell, decode what is done. It runs in one thread.

Everything here but ``inbox`` belongs to that thread. Callers speak to it through the inbox, and it speaks to them
through their jobs; it waits for none of them. Who goes first is decided in ``standing`` and ``scheduler``.

When memory runs out in a batch of several, nobody fails yet: what was begun is begun anew, half as many at a time. A
picture depends on its seed alone, so it comes out as it would have; a step is never repeated, since one that broke may
have moved a state on or drawn from its generator. A picture that does not fit alone fails, and only it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from gesso.engine.accounts import whole
from gesso.engine.device import default_device, release_memory, settle
from gesso.engine.failures import as_gesso_error, is_out_of_memory
from gesso.engine.flight import (
    Model,
    Row,
    Run,
    charge,
    decode_groups,
    describe_group,
    encode_groups,
    step_groups,
    stepping_rows,
)
from gesso.engine.inbox import Inbox
from gesso.engine.job import Job
from gesso.engine.results import describe_result
from gesso.engine.scheduler import Policy, choose_group
from gesso.engine.standing import Standing, standings
from gesso.errors import GessoError, RunError
from gesso.events import Cancelled, Done, Failed, Preview, Progress, Result, Stage
from gesso.pipelines.contract import Output, Pipeline

Load = Callable[[str, str, str | None], Pipeline]


class Loop:
    """State and turns of the loop.

    Args:
        load: makes a pipeline from a model's name or path, a device and a dtype (None is the model's own).
        device: where it runs; None is the best that is found when the first model is loaded.
        dtype: handed to ``load``.
        policy: who steps next.
        max_batch: the most rows in one step.
    """

    def __init__(self, load: Load, device: str | None, dtype: str | None, policy: Policy, max_batch: int) -> None:
        self.inbox = Inbox()
        self._load = load
        self._device = device
        self._dtype = dtype
        self._policy: Policy = policy
        self._max_batch = max_batch
        self._names: dict[str, Model] = {}
        self._models: list[Model] = []  # Of these, each once.
        self._arrived: deque[Job] = deque()
        self._least_used: dict[int, int] = {}  # By priority: where the account of a model begins that was idle.
        self._last_turns: dict[int, int] = {}  # By priority, while several compete: when one of it last stepped.
        self._ranked: list[Run] = []  # Those whose standing is more than their priority.
        self._turn_number = 0
        self._begun = 0
        self._memory_ran_out = False

    def run(self) -> None:
        """Turn until asked to close and nothing is left to do. Whatever breaks, every job gets its end."""
        try:
            while self._turn():
                pass
        finally:
            self.inbox.close("cancel")
            for job in self.inbox.take(wait=False).arrived:
                job.end(Failed(job=job.id, error=RunError("the engine's thread has ended")))
            self._names.clear()
            self._models.clear()
            release_memory()

    def _turn(self) -> bool:
        """One turn; whether there will be another. Sleeps first if there is nothing to do."""
        if self._memory_ran_out:  # Only now are the frames gone that held the failed batch.
            release_memory()
            self._memory_ran_out = False
        mail = self.inbox.take(wait=not self._busy)
        self._turn_number += 1
        self._arrived += mail.arrived
        try:
            self._drop(self._jobs() if mail.closing == "cancel" else mail.cancelled)
            self._admit()
            self._rank()
            self._begin()
            self._step(self._pick())
            self._decode()
        except BaseException as problem:
            if not self._busy:
                raise
            self._fail_everything(problem)
        if not self._busy:
            self._ranked = []  # Nothing of what is done is kept while there is nothing to do.
        return mail.closing is None or self._busy

    @property
    def _place(self) -> str:
        """The device; before the first model is loaded nothing has run anywhere but here."""
        return self._device or "cpu"

    @property
    def _busy(self) -> bool:
        return bool(self._arrived) or any(model.runs for model in self._models)

    @property
    def _runs(self) -> list[Run]:
        return [run for model in self._models for run in model.runs]

    def _jobs(self) -> list[Job]:
        return [*self._arrived, *(run.job for run in self._runs)]

    # Admit: load and plan at once, so that a bad request fails early; encode and begin as room allows.

    def _admit(self) -> None:
        while self._arrived:
            job = self._arrived[0]
            try:
                model, seconds = self._model_of(job)
                plan = model.pipeline.plan(job.request)
            except Exception as problem:
                job.end(Failed(job=job.id, error=self._error(problem, needed=None)))
            else:
                if not model.runs:
                    model.places = self._max_batch
                images = deque(range(plan.request.num_images))
                run = Run(job=job, model=model, plan=plan, waiting=images, seconds={"load": seconds})
                model.admit(run, self._least_used.get(job.priority, 0))
            self._arrived.popleft()

    def _model_of(self, job: Job) -> tuple[Model, float]:
        """The model that the job names, and the seconds its loading took now (0 if it was there)."""
        name = job.request.model
        if name in self._names:
            return self._names[name], 0.0
        self._tell(job, "load", 0, 0, 1)
        started = time.perf_counter()
        if self._device is None:
            self._device = default_device()
        pipeline = self._load(name, self._device, self._dtype)
        settle(self._device)
        model = next((model for model in self._models if model.pipeline is pipeline), None)
        if model is None:
            model = Model(pipeline=pipeline, number=len(self._models), places=self._max_batch)
            self._models.append(model)
        self._names[name] = model
        self._tell(job, "load", 0, 1, 1)
        return model, time.perf_counter() - started

    def _rank(self) -> None:
        """Give every request its standing for this turn. Where nothing sets them apart, it is their priority."""
        for run in self._ranked:
            run.standing = Standing(run.priority)
        runs = [run for model in self._models for run in model.contenders()]
        priorities = {run.priority for run in runs}
        if len(priorities) < 2 and not any(model.dated for model in self._models):
            self._ranked, self._last_turns = [], {}
            return
        now = time.perf_counter()
        self._last_turns = {one: self._last_turns.get(one, self._turn_number) for one in priorities}
        waited = {one: self._turn_number - turn for one, turn in self._last_turns.items()}
        self._ranked = sorted(runs, key=lambda run: run.job.submitted)
        claims = [run.model.claim(run, now, waited[run.priority]) for run in self._ranked]
        for run, standing in zip(self._ranked, standings(claims), strict=True):
            run.standing = standing

    def _begin(self) -> None:
        """Begin as many pictures as there is room for."""
        starting: list[tuple[Run, int]] = []
        for model in self._models:
            while picture := model.take_next():
                starting.append(picture)
        self._encode(dict.fromkeys(run for run, _ in starting if not run.encoded))
        for run, image in reversed(starting):
            if not run.encoded and not run.job.done():
                run.model.put_back(run, image)
        for run, image in starting:
            if run.job.done() or not run.encoded:
                continue
            try:
                state = run.pipeline.begin(run.plan, run.conditioning, image)
            except Exception as problem:
                self._fail([run], problem)
                continue
            self._begun += 1
            row = Row(run=run, image=image, state=state, arrival=self._begun, last_turn=self._turn_number)
            run.model.rows.append(row)

    def _encode(self, runs: Iterable[Run]) -> None:
        for group in encode_groups(runs):
            for run in group:
                self._tell(run.job, "encode", 0, 0, 1)
            started = time.perf_counter()
            try:
                conditionings = group[0].pipeline.encode([run.plan for run in group])
                settle(self._place)
                if len(conditionings) != len(group):
                    raise RunError(f"the model made {len(conditionings)} conditionings for {len(group)} prompts")
            except Exception as problem:
                if not self._goes_in_halves(group[0].model, problem, len(group)):
                    self._fail(group, problem)
                continue
            seconds = time.perf_counter() - started
            for run, conditioning in zip(group, conditionings, strict=True):
                run.conditioning, run.encoded = conditioning, True
                run.company = len(group)
                run.seconds["encode"] = seconds
                self._tell(run.job, "encode", 0, 1, 1)

    # Group, pick, step, tell.

    def _pick(self) -> list[Row]:
        """The rows that step now; none if nothing is in flight."""
        groups = step_groups(row for model in self._models for row in model.rows if row.state.remaining > 0)
        if not groups:
            return []
        described = [describe_group(group, self._turn_number) for group in groups]
        return stepping_rows(groups[choose_group(described, self._policy)])

    def _step(self, rows: list[Row]) -> None:
        if not rows:
            return
        model = rows[0].run.model
        due = [row.state.remaining - 1 for row in rows]
        flops = [whole(row.state.cost.flops) for row in rows]
        started = time.perf_counter()
        try:
            model.pipeline.step([row.state for row in rows])
            settle(self._place)
            if [row.state.remaining for row in rows] != due:
                raise RunError("the model's step did not advance every picture by one")
        except Exception as problem:
            if self._goes_in_halves(model, problem, len(rows)):
                model.begin_anew(rows)
            else:
                self._fail([row.run for row in rows], problem)
            return
        seconds = time.perf_counter() - started
        model.pace.saw(seconds, max(flops))
        charge(rows, flops, self._least_used)
        for row in rows:
            if not row.run.standing.hurry and row.run.priority in self._last_turns:
                self._last_turns[row.run.priority] = self._turn_number
            row.last_turn = self._turn_number
            row.company = max(row.company, len(rows))
            row.seconds += seconds
            self._tell(row.run.job, "step", row.image, row.steps_done, row.state.total)
        for row in rows:
            self._preview(row)

    def _preview(self, row: Row) -> None:
        """Show the picture if somebody asked for previews and this step is one of those; the last step needs none."""
        job = row.run.job
        if job.done() or not job.preview_every or not row.state.remaining or row.steps_done % job.preview_every:
            return
        try:
            picture = row.run.pipeline.preview(row.state)
        except Exception as problem:
            self._fail([row.run], problem)
            return
        job.tell(Preview(job=job.id, image=row.image, step=row.steps_done, picture=picture))

    # Decode what is done.

    def _decode(self) -> None:
        for rows in decode_groups(row for model in self._models for row in model.rows if row.state.remaining == 0):
            waiting = deque(rows)
            started = time.perf_counter()
            try:
                outputs = rows[0].run.pipeline.decode([row.state for row in rows])
                while waiting:
                    output = next(outputs, None)
                    settle(self._place)
                    if output is None:
                        raise RunError(f"the model decoded {len(rows) - len(waiting)} of {len(rows)} pictures")
                    row = waiting.popleft()
                    row.company = max(row.company, len(rows))
                    self._finish(row, output, time.perf_counter() - started)
                    started = time.perf_counter()
            except Exception as problem:
                if not self._goes_in_halves(rows[0].run.model, problem, len(rows)):
                    self._fail([row.run for row in waiting if not row.run.job.done()], problem)

    def _finish(self, row: Row, output: Output, seconds: float) -> None:
        """Keep a finished picture; the last one ends its job."""
        run = row.run
        metadata = describe_result(row, output, seconds, device=self._place, dtype=self._dtype)
        run.results[row.image] = Result(image=output.image, seed=output.seed, index=row.image, metadata=metadata)
        run.model.land(run)
        run.model.rows.remove(row)
        self._tell(run.job, "decode", row.image, row.state.total, row.state.total)
        if len(run.results) == run.plan.request.num_images:
            run.model.runs.remove(run)
            run.model.dated.pop(run, None)
            run.job.end(Done(job=run.job.id, results=run.finished))

    # Ends.

    def _drop(self, jobs: Iterable[Job]) -> None:
        """Cancel what of these is still outstanding: their states go, their finished pictures stay."""
        dropped = set(jobs)
        if not dropped:
            return
        for job in self._arrived:
            if job in dropped:
                job.end(Cancelled(job=job.id, results=()))
        self._arrived = deque(job for job in self._arrived if job not in dropped)
        runs = [run for run in self._runs if run.job in dropped]
        self._forget(runs)
        for run in runs:
            run.job.end(Cancelled(job=run.job.id, results=run.finished))

    def _goes_in_halves(self, model: Model, problem: BaseException, count: int) -> bool:
        """Whether what broke is for want of memory and can be done again, half as many at a time, as the model now is.

        Until it has nothing left to do; then it may try again with all its places.
        """
        if count < 2 or not is_out_of_memory(problem):
            return False
        model.places = count // 2
        self._memory_ran_out = True
        return True

    def _fail(self, runs: Iterable[Run], problem: BaseException) -> None:
        """End these requests, and only these, with what went wrong in a batch that they were in."""
        failed = list(dict.fromkeys(runs))
        error = self._error(problem, needed=max((run.plan.peak_bytes for run in failed), default=None))
        self._forget(failed)
        for run in failed:
            run.job.end(Failed(job=run.job.id, error=error))

    def _fail_everything(self, problem: BaseException) -> None:
        """The loop itself broke: nothing that is under way can be trusted."""
        error = self._error(problem, needed=None)
        for job in self._jobs():
            job.end(Failed(job=job.id, error=error))
        self._arrived.clear()
        self._forget(self._runs)

    def _error(self, problem: BaseException, *, needed: int | None) -> GessoError:
        self._memory_ran_out |= is_out_of_memory(problem)
        modes = () if needed is None else ("a smaller width and height",)
        return as_gesso_error(problem, needed=needed, device=self._place, modes=modes)

    def _forget(self, runs: Iterable[Run]) -> None:
        gone = set(runs)
        for model in {run.model for run in gone}:
            model.forget(gone)

    def _tell(self, job: Job, stage: Stage, image: int, step: int, steps: int) -> None:
        seconds = time.perf_counter() - job.submitted
        job.tell(Progress(job=job.id, image=image, step=step, steps=steps, stage=stage, seconds=seconds))
