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

from gesso.devices import CPU
from gesso.engine.budget import Budget, weights_bytes
from gesso.engine.device import free_bytes, release_memory
from gesso.engine.failures import as_gesso_error, is_out_of_memory
from gesso.engine.flight import Model, Row, Run
from gesso.engine.job import Job
from gesso.engine.memory import needed, options
from gesso.engine.places import Places
from gesso.errors import GessoError, RejectedError
from gesso.events import Cancelled, Done, Failed, Rejected, Result
from gesso.pipelines.contract import Pipeline


class Fleet:
    """The models of one device and their requests.

    Attributes:
        device: where they run; None until the first model is loaded, unless it was said.
        arrived: jobs that are not admitted yet, in order.
        names: models by the names they were asked for.
        models: of these, each once.
        memory_ran_out: whether memory is to be given back before the next turn.
        budget: what the weights of all models may take.
    """

    def __init__(self, device: str | None, budget: Budget = None) -> None:
        self.device = device
        self.budget: Budget = budget
        self.arrived: deque[Job] = deque()
        self.names: dict[str, Model] = {}
        self.models: list[Model] = []
        self.memory_ran_out = False
        self._loaded = 0

    @property
    def place(self) -> str:
        """The device; before the first model is loaded nothing has run anywhere but here."""
        return self.device or CPU

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.arrived) or any(model.runs for model in self.models)

    @property
    def resting(self) -> bool:
        """Whether all that is left to do waits for something that is prepared elsewhere, or nothing is left."""
        preparing = sum(len(model.preparing) for model in self.models)
        return preparing == len(self.runs) and bool(preparing or not self.arrived)

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

    # Models.

    @property
    def idle(self) -> list[Model]:
        """Those that have nothing to do."""
        return [model for model in self.models if not model.runs]

    def add(self, name: str, pipeline: Pipeline, most: int) -> Model:
        """Take in the pipeline that a name was loaded as, with so many places; it may be there by another name."""
        model = next((model for model in self.models if model.pipeline is pipeline), None)
        if model is None:
            model = Model(pipeline=pipeline, number=self._loaded, places=Places(most=most))
            self._loaded += 1
            self.models.append(model)
        self.names[name] = model
        return model

    def mark_used(self, turn: int) -> None:
        """Note which models have something to do in this turn."""
        for model in self.models:
            if model.runs:
                model.last_turn = turn

    def makes_room(self, needed: int) -> bool:
        """Let go of idle models, the least recently used first, until the budget has room for a model of so many bytes.

        Whether one may be loaded now: if not, it waits until a model that is in use is idle. One that is larger than
        the budget is loaded when nothing else is there.
        """
        while self._exceeds(needed):
            if not self._drop_idle():
                return not self.models
        return True

    def keep_to_budget(self, newest: Model) -> None:
        """The same when a model is there and its size is known."""
        while self._exceeds(0) and self._drop_idle(newest):
            pass

    def drop_all_idle(self) -> bool:
        """Let go of every model that has nothing to do, and of what all read last, because memory ran out.

        Whether there was any.
        """
        forgotten = [model.readings.clear() for model in self.models]
        count = len(self.models)
        while self._drop_idle():
            pass
        return len(self.models) < count or any(forgotten)

    def _exceeds(self, needed: int) -> bool:
        """Whether the models that are there and another of so many bytes are over the budget."""
        if self.budget == "auto":
            free = free_bytes(self.place)
            return bool(needed) and free is not None and needed > free
        return self.budget is not None and weights_bytes(model.pipeline for model in self.models) + needed > self.budget

    def _drop_idle(self, but: Model | None = None) -> bool:
        """Let go of the model that has had nothing to do for longest, and of its memory; whether there was one."""
        gone = min((model for model in self.idle if model is not but), key=lambda model: model.last_turn, default=None)
        if gone is None:
            return False
        self.models.remove(gone)
        gone.caches.detach()
        gone.adapters.detach()
        self.names = {name: model for name, model in self.names.items() if model is not gone}
        del gone
        release_memory()
        return True

    # Ends.

    def finish(self, row: Row, result: Result | Rejected) -> None:
        """Keep a finished picture; ``end_if_done`` ends its job if that was the last."""
        run = row.run
        if isinstance(result, Result):
            run.results[row.image] = result
        else:
            run.rejected[row.image] = result
        run.model.land(run)
        run.model.drop([row])

    def end_if_done(self, run: Run) -> None:
        """End the job that has all its pictures."""
        count = run.plan.request.num_images
        if len(run.results) + len(run.rejected) < count:
            return
        run.model.runs.remove(run)
        run.model.dated.pop(run, None)
        run.held.release()
        rejected = tuple(run.rejected[image] for image in sorted(run.rejected))
        if run.results:
            run.job.end(Done(job=run.job.id, results=run.finished, rejected=rejected))
        else:
            error = RejectedError([each.seed for each in rejected], count)
            run.job.end(Failed(job=run.job.id, error=error))

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
        job.end(Failed(job=job.id, error=self._error(problem)))

    def fail(self, runs: Iterable[Run], problem: BaseException) -> None:
        """End these requests, and only these, with what went wrong in a batch that they were in.

        Their finished pictures stay.
        """
        failed = list(dict.fromkeys(runs))
        error = self._error(problem, max(failed, key=lambda run: needed(run.pipeline, run.plan), default=None))
        self._forget(failed)
        for run in failed:
            run.job.end(Failed(job=run.job.id, error=error, results=run.finished))

    def fail_everything(self, problem: BaseException) -> None:
        """The loop itself broke: nothing that is under way can be trusted, only what was finished before."""
        error = self._error(problem)
        for run in self.runs:
            run.job.end(Failed(job=run.job.id, error=error, results=run.finished))
        for job in self.arrived:
            job.end(Failed(job=job.id, error=error))
        self.arrived.clear()
        self._forget(self.runs)

    def abandon(self) -> None:
        """Let go of the models, when the loop has ended and so has every job."""
        self.arrived.clear()
        self.names.clear()
        for run in self.runs:
            run.held.release()
        for model in self.models:
            model.caches.detach()
            model.adapters.detach()
        self.models.clear()
        with contextlib.suppress(Exception):  # A device that is broken for good has nobody left to be told.
            release_memory()

    def _error(self, problem: BaseException, largest: Run | None = None) -> GessoError:
        """What those are told whose requests it ends; of them, `largest` is the one that needs most memory."""
        self.memory_ran_out |= is_out_of_memory(problem)
        if largest is None or not is_out_of_memory(problem):
            return as_gesso_error(problem, needed=None, device=self.place)
        size, modes = needed(largest.pipeline, largest.plan), options(largest.pipeline, largest.plan, self.place)
        return as_gesso_error(problem, needed=size, device=self.place, modes=modes)

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
        """Whether memory ran out for one picture beside others, or before what others had left was given back.

        If so, the request's next picture is solitary; ``row`` is the picture itself, where it was begun.
        """
        others = [other for other in self.rows if other is not row]
        if not is_out_of_memory(problem) or not (others or self.memory_ran_out or self.drop_all_idle()):
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
