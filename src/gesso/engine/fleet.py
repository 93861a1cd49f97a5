"""All that the engine has on one device: how each request comes to its end, and what is done where memory runs out.

Jobs that arrived, loaded models, and what these have to do (``flight``). Nothing here calls a verb or decides who steps
next: that is ``loop``'s, in whose thread everything here runs.

Where memory runs out, a batch goes in halves. One picture that does not fit beside others is *solitary*: begun anew
when nothing else is under way, of whatever model, and until it is done nothing else begins. While it waits, only
requests that stand higher begin, so that the device empties.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Sequence

from gesso.engine.device import release_memory
from gesso.engine.failures import as_gesso_error, is_out_of_memory
from gesso.engine.flight import Model, Row, Run
from gesso.engine.job import Job
from gesso.errors import GessoError
from gesso.events import Cancelled, Done, Failed, Result


class Fleet:
    """The models of one device and their requests.

    Attributes:
        device: where they run; None until the first model is loaded, unless it was said.
        arrived: jobs that are not admitted yet, in order.
        names: models by the names they were asked for.
        models: of these, each once.
        memory_ran_out: whether memory is to be given back before the next turn.
    """

    def __init__(self, device: str | None) -> None:
        self.device = device
        self.arrived: deque[Job] = deque()
        self.names: dict[str, Model] = {}
        self.models: list[Model] = []
        self.memory_ran_out = False

    @property
    def place(self) -> str:
        """The device; before the first model is loaded nothing has run anywhere but here."""
        return self.device or "cpu"

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.arrived) or any(model.runs for model in self.models)

    @property
    def rows(self) -> list[Row]:
        """The pictures under way, of all models."""
        return [row for model in self.models for row in model.rows]

    @property
    def runs(self) -> list[Run]:
        """The admitted requests of all models."""
        return [run for model in self.models for run in model.runs]

    def jobs(self) -> list[Job]:
        """Those that have no end yet."""
        return [*self.arrived, *(run.job for run in self.runs)]

    # Ends.

    def finish(self, row: Row, result: Result) -> None:
        """Keep a finished picture; ``end_if_done`` ends its job if that was the last."""
        run = row.run
        run.results[row.image] = result
        run.model.land(run)
        run.model.rows.remove(row)

    def end_if_done(self, run: Run) -> None:
        """End the job that has all its pictures."""
        if len(run.results) == run.plan.request.num_images:
            run.model.runs.remove(run)
            run.model.dated.pop(run, None)
            run.job.end(Done(job=run.job.id, results=run.finished))

    def drop(self, jobs: Iterable[Job]) -> None:
        """Cancel what of these is still outstanding: their states go, their finished pictures stay."""
        dropped = set(jobs)
        if not dropped:
            return
        for job in self.arrived:
            if job in dropped:
                job.end(Cancelled(job=job.id, results=()))
        self.arrived = deque(job for job in self.arrived if job not in dropped)
        runs = [run for run in self.runs if run.job in dropped]
        self._forget(runs)
        for run in runs:
            run.job.end(Cancelled(job=run.job.id, results=run.finished))

    def refuse(self, job: Job, problem: BaseException) -> None:
        """End a job that cannot be admitted."""
        job.end(Failed(job=job.id, error=self._error(problem, needed=None)))

    def fail(self, runs: Iterable[Run], problem: BaseException) -> None:
        """End these requests, and only these, with what went wrong in a batch that they were in."""
        failed = list(dict.fromkeys(runs))
        error = self._error(problem, needed=max((run.plan.peak_bytes for run in failed), default=None))
        self._forget(failed)
        for run in failed:
            run.job.end(Failed(job=run.job.id, error=error))

    def fail_everything(self, problem: BaseException) -> None:
        """The loop itself broke: nothing that is under way can be trusted."""
        error = self._error(problem, needed=None)
        for job in self.jobs():
            job.end(Failed(job=job.id, error=error))
        self.arrived.clear()
        self._forget(self.runs)

    def abandon(self) -> None:
        """Let go of the models, when the loop has ended and so has every job."""
        self.arrived.clear()
        self.names.clear()
        self.models.clear()
        with contextlib.suppress(Exception):  # A device that is broken for good has nobody left to be told.
            release_memory()

    def _error(self, problem: BaseException, *, needed: int | None) -> GessoError:
        self.memory_ran_out |= is_out_of_memory(problem)
        modes = () if needed is None else ("a smaller width and height",)
        return as_gesso_error(problem, needed=needed, device=self.place, modes=modes)

    def _forget(self, runs: Iterable[Run]) -> None:
        gone = set(runs)
        for model in {run.model for run in gone}:
            model.forget(gone)

    # Memory.

    def take_starting(self) -> list[tuple[Run, int]]:
        """The pictures that begin now: as many as there is room for, by request and index."""
        if any(row.solitary for row in self.rows):
            return []
        patient = (run for model in self.models for run in model.solitary)
        solitary = max(patient, key=lambda run: run.standing, default=None)
        starting: list[tuple[Run, int]] = []
        for model in self.models:
            while picture := model.take_next(None if solitary is None else solitary.standing):
                starting.append(picture)
        if solitary is not None and not starting and not self.rows:
            starting.append(solitary.model.take(solitary))
        return starting

    def put_back(self, pictures: Sequence[tuple[Run, int]]) -> None:
        """Let pictures begin later, after all, whose requests have not ended."""
        for run, image in reversed(pictures):
            if not run.job.done():
                run.model.put_back(run, image)

    def begins_later(self, run: Run, problem: BaseException) -> bool:
        """Whether a picture that could not be begun for want of memory is begun when others are done."""
        own = len(run.model.rows)
        if is_out_of_memory(problem) and 0 < own < run.model.places.now:
            self._shrink(run.model, own)
            return True
        return self._goes_alone(run, problem)

    def goes_in_halves(self, runs: Sequence[Run], problem: BaseException) -> bool:
        """Whether prompts that broke for want of memory are encoded again, half as many at a time, or one alone."""
        if len(runs) == 1:
            return self._goes_alone(runs[0], problem)
        if not is_out_of_memory(problem):
            return False
        self._shrink(runs[0].model, len(runs) // 2)
        return True

    def goes_anew(self, rows: Sequence[Row], problem: BaseException) -> bool:
        """Whether a batch that broke for want of memory is begun anew, half as many at a time, or one alone."""
        if len(rows) == 1:
            goes = self._goes_alone(rows[0].run, problem, rows[0])
        elif goes := is_out_of_memory(problem):
            self._shrink(rows[0].run.model, len(rows) // 2)
        if goes:
            rows[0].run.model.begin_anew(rows)
        return goes

    def decodes_later(self, rows: Sequence[Row], problem: BaseException) -> bool:
        """Whether pictures that could not be decoded for want of memory are, half as many at a time, or one alone."""
        if len(rows) == 1:
            return self.goes_anew(rows, problem)
        if not is_out_of_memory(problem):
            return False
        self._shrink(rows[0].run.model, len(rows) // 2)
        return True

    def _goes_alone(self, run: Run, problem: BaseException, row: Row | None = None) -> bool:
        """Whether memory ran out for one picture beside others, or before what an earlier failure held was given back.

        If so, the request's next picture is solitary; ``row`` is the picture itself, where it was begun.
        """
        others = [other for other in self.rows if other is not row]
        if not is_out_of_memory(problem) or not (others or self.memory_ran_out):
            return False
        self._shrink(run.model, sum(other.run.model is run.model for other in others))
        run.model.solitary[run] = None
        return True

    def _shrink(self, model: Model, count: int) -> None:
        model.places.shrink(count)
        self.memory_ran_out = True

    def release_if_short(self) -> None:
        """Give back what nobody uses if memory ran out; not before the frames are gone that held the failed batch.

        A device that cannot even do that, after an error that stays, fails what is under way.
        """
        if not self.memory_ran_out:
            return
        self.memory_ran_out = False
        try:
            release_memory()
        except Exception as problem:
            self.fail_everything(problem)
            self.memory_ran_out = False
