"""Admitting: from a job that arrived to a request whose pictures may begin, so that a bad one fails before any work.

Here: the model that it names, loaded if need be; the plan; its adapters, which are waited for beside the loop's work.
Everything here runs in the loop's thread. Not here: encoding and beginning (`loop`), which models go (`fleet`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

from gesso.engine.caches import check_room
from gesso.engine.device import default_device, settle
from gesso.engine.failures import is_out_of_memory
from gesso.engine.fetching import Fetching
from gesso.engine.fleet import Fleet
from gesso.engine.flight import Model, Run
from gesso.engine.job import Job
from gesso.engine.memory import loading_for
from gesso.engine.planning import planned
from gesso.engine.safety import Guard
from gesso.pipelines.contract import Pipeline

Load = Callable[[str, str, str | None], Pipeline]
Measure = Callable[[str, str, str | None], int | None]


class Admission:
    """The door of one device.

    Args:
        fleet: where admitted requests go.
        fetching: gets their adapters.
        guard: has the safety checker ready.
        load: makes a pipeline from a model's name or path, a device and a dtype (None is the model's own).
        measure: about how many bytes a model will take, told as ``load`` is; None where nobody knows before.
        dtype: handed to both.
        max_batch: the most rows in one step.
        attention: the kernel in force.
        forget_ended: lets go of requests that have ended, so that models that are let go of leave memory.
    """

    def __init__(
        self,
        fleet: Fleet,
        fetching: Fetching,
        guard: Guard,
        load: Load,
        measure: Measure | None,
        *,
        dtype: str | None,
        max_batch: int,
        attention: str,
        forget_ended: Callable[[], None],
    ) -> None:
        self.load = load
        self.measure: Measure = measure or (lambda name, device, dtype: None)
        self._fleet, self._fetching, self._guard = fleet, fetching, guard
        self._dtype, self._max_batch, self._attention = dtype, max_batch, attention
        self._forget_ended = forget_ended
        self._needs: dict[str, int] = {}  # By name of a model that waits for room: what `measure` said.

    def admit(self, turn: int, most_used: Mapping[int, int]) -> None:
        """Admit those whose model is there, and one model more, so that steps and cancellations come between loads.

        Args:
            turn: of the loop.
            most_used: by priority, the highest account of a model that stepped.
        """
        fleet = self._fleet
        strangers = [job for job in fleet.arrived if job.request.model not in fleet.names]
        loading = max(strangers, key=lambda job: job.priority, default=None)
        waiting: Job | None = None
        fleet.mark_used(turn)
        for job in list(fleet.arrived):
            if job is loading and not self._has_room(job):
                waiting = job
            elif waiting is not None and job.priority <= waiting.priority:
                continue  # It would keep a model in use that the one that came before it waits for.
            elif job is loading or job.request.model in fleet.names:
                self._admit_one(job, turn, most_used)
                fleet.arrived.remove(job)
        self._admit_prepared(most_used)

    def _admit_prepared(self, most_used: Mapping[int, int]) -> None:
        """Those whose adapters have come; who cannot have theirs is told why."""
        for model in self._fleet.models:
            for run in [run for run in model.preparing if run.held.settled]:
                if run.held.problem is not None:
                    self._fleet.fail([run], run.held.problem)
                    continue
                if run.held.warnings:
                    run.plan = replace(run.plan, warnings=(*run.plan.warnings, *run.held.warnings))
                run.seconds["adapters"] = run.held.seconds
                run.job.progress("load", 0, 1, 1)
                model.admit(run, most_used.get(run.priority, 0))

    def _has_room(self, job: Job) -> bool:
        """Whether the model that the job names may be loaded now, which idle models are let go for."""
        fleet, name = self._fleet, job.request.model
        if fleet.budget is None:
            return True
        if name not in self._needs:
            try:
                self._needs[name] = self.measure(name, self._device(), self._dtype) or 0
            except Exception:  # Loading it will say what is wrong with it.
                return True
        self._forget_ended()
        return fleet.makes_room(self._needs[name])

    def _device(self) -> str:
        if self._fleet.device is None:
            self._fleet.device = default_device()
        return self._fleet.device

    def _admit_one(self, job: Job, turn: int, most_used: Mapping[int, int]) -> None:
        try:
            self._guard.ready(job.request, self._device())
            model, seconds = self._model_of(job, turn)
            plan = self._guard.settled(planned(model.pipeline, job.request, attention=self._attention))
            check_room(plan, self._fleet.place, model.caches)
        except Exception as problem:
            self._fleet.refuse(job, problem)
            return
        if not model.runs:
            model.places.reset()
        images = deque(range(plan.request.num_images))
        run = Run(job=job, model=model, plan=plan, waiting=images, seconds={"load": seconds})
        if plan.request.lora:
            job.progress("load", 0, 0, 1)
            run.held = self._fetching.want(model.adapters, plan)
            model.expect(run)
        else:
            model.admit(run, most_used.get(job.priority, 0))

    def _model_of(self, job: Job, turn: int) -> tuple[Model, float]:
        """The model that the job names, and the seconds its loading took now (0 if it was there)."""
        fleet, name = self._fleet, job.request.model
        if name in fleet.names:
            return fleet.names[name], 0.0
        job.progress("load", 0, 0, 1)
        started = time.perf_counter()
        with loading_for(job.request):
            pipeline = self._loaded(name)
        model = fleet.add(name, pipeline, self._max_batch)
        model.last_turn = turn
        self._needs.pop(name, None)
        fleet.keep_to_budget(model)
        job.progress("load", 0, 1, 1)
        return model, time.perf_counter() - started

    def _loaded(self, name: str) -> Pipeline:
        """The pipeline of that name. If memory runs out, idle models are let go of, and it is tried once more."""
        device = self._device()
        try:
            pipeline = self.load(name, device, self._dtype)
        except Exception as problem:
            if not is_out_of_memory(problem) or not self._fleet.idle:
                raise
            pipeline = None
        if pipeline is None:  # Out of reach of the error, which holds what was loaded so far.
            self._forget_ended()
            self._fleet.drop_all_idle()
            pipeline = self.load(name, device, self._dtype)
        settle(device)
        return pipeline
