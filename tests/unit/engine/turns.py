"""The engine's loop without its thread, turned by the test: who steps in which turn can be said exactly."""

from __future__ import annotations

from gesso.engine.job import Job
from gesso.engine.loop import Loop
from gesso.engine.scheduler import check_policy
from gesso.pipelines.contract import Pipeline
from gesso.request import GenerationRequest


class Turns:
    """A loop that knows these pipelines as models ``0``, ``1``, …"""

    def __init__(self, *pipelines: Pipeline, policy: str = "fair", max_batch: int = 4) -> None:
        def load(name: str, device: str, dtype: str | None) -> Pipeline:
            return pipelines[int(name)]

        self.loop = Loop(load, "cpu", None, check_policy(policy), max_batch)

    def submit(
        self, request: GenerationRequest, *, priority: int = 0, deadline: float | None = None, preview_every: int = 0
    ) -> Job:
        job = Job(
            request,
            preview_every=preview_every,
            when_cancelled=self.loop.inbox.cancel,
            priority=priority,
            deadline=deadline,
        )
        self.loop.inbox.submit(job)
        return job

    def turn(self, count: int = 1) -> None:
        """So many turns, fewer if there is nothing left to do."""
        for _ in range(count):
            if not (self.loop._fleet.busy or self.loop.inbox._mail.arrived):
                return
            self.loop._turn()

    def finish(self, *jobs: Job, within: int = 100_000) -> int:
        """Turn until these jobs have ended; how many turns it took."""
        for turns in range(within):
            if all(job.done() for job in jobs):
                return turns
            self.turn()
        raise AssertionError(f"not done within {within} turns")
