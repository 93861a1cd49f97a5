"""What a request may cost others while models load, prompts are encoded and pictures decoded; turned by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gesso.engine.job import Job
from gesso.events import Cancelled, Done, Failed
from gesso.pipelines.contract import Output, Pipeline, Plan
from tests.unit.engine.numeric import NumericPipeline, Vector, ask
from tests.unit.engine.turns import Turns


class Loading(Turns):
    """Remembers what was loaded."""

    def __init__(self, *pipelines: Pipeline) -> None:
        super().__init__(*pipelines)
        load, self.loaded = self.loop._admission.load, list[str]()

        def remembering(name: str, device: str, dtype: str | None) -> Pipeline:
            self.loaded.append(name)
            return load(name, device, dtype)

        self.loop._admission.load = remembering


def test_one_model_is_loaded_a_turn_and_others_step_and_leave_in_between() -> None:
    pipelines = [NumericPipeline(steps=20) for _ in range(6)]
    turns = Loading(*pipelines)
    jobs = [turns.submit(ask("a star", model=f"{model}")) for model in range(6)]
    turns.turn(2)
    assert turns.loaded == ["0", "1"]
    assert len(pipelines[0].batches) == 2
    for job in jobs[2:5]:
        job.cancel()
    turns.turn()
    assert all(isinstance(job.wait(0), Cancelled) for job in jobs[2:5])
    turns.finish(*jobs)
    assert turns.loaded == ["0", "1", "5"]


def test_who_asks_for_a_loaded_model_does_not_wait_for_other_loads_and_the_higher_loads_first() -> None:
    turns = Loading(*(NumericPipeline() for _ in range(4)))
    turns.finish(turns.submit(ask("a star")))
    for model in (1, 2):
        turns.submit(ask("a star", model=f"{model}"))
    turns.submit(ask("a star", model="3"), priority=1)
    quick = turns.submit(ask("a star"), priority=2)
    assert turns.finish(quick) == 4
    assert turns.loaded == ["0", "3", "1", "2"]


def test_a_picture_to_start_from_that_is_gone_fails_nobody_else() -> None:
    class Reading(NumericPipeline):
        def encode(self, plans: Sequence[Plan]) -> list[np.ndarray]:
            if any(plan.request.init_image for plan in plans):
                raise OSError("gone")
            return super().encode(plans)

    pipeline = Reading()
    turns = Turns(pipeline)
    jobs = [turns.submit(ask("one")), turns.submit(ask("gone", init_image="gone.png")), turns.submit(ask("two"))]
    turns.finish(*jobs)
    assert [type(job.wait(0)) for job in jobs] == [Done, Failed, Done]
    assert pipeline.encoded == [["one", "two"]]


def test_one_that_fails_midway_hands_over_its_finished_pictures() -> None:
    def on_step(states: Sequence[Vector]) -> None:
        if states[0].name == ("many", 2, 1):
            raise OSError("gone")

    turns = Turns(NumericPipeline(on_step=on_step, steps=2), max_batch=1)
    many, after = turns.submit(ask("many", num_images=4)), turns.submit(ask("after"))
    turns.finish(many, after)
    last = many.wait(0)
    assert isinstance(last, Failed)
    assert [(result.index, result.seed) for result in last.results] == [(0, 7), (1, 8)]
    assert isinstance(after.wait(0), Done)


def test_a_loop_that_breaks_hands_over_what_was_finished() -> None:
    turns = Turns(NumericPipeline(steps=2), max_batch=1)
    many = turns.submit(ask("many", num_images=4))
    turns.turn(3)
    turns.loop._fleet.fail_everything(RuntimeError("broken"))
    last = many.wait(0)
    assert isinstance(last, Failed)
    assert [result.index for result in last.results] == [0]


def test_cancelling_stops_decoding_at_the_next_picture_and_others_lose_nothing() -> None:
    leaving: list[Job] = []

    class Leaving(NumericPipeline):
        painted = 0

        def decode(self, states: Sequence[Vector]) -> Iterator[Output]:
            for output in super().decode(states):
                self.painted += 1
                if self.painted == 3:
                    leaving[0].cancel()
                yield output

    pipeline = Leaving()
    turns = Turns(pipeline, max_batch=16)
    leaving.append(turns.submit(ask("leaves", num_images=12)))
    stays = turns.submit(ask("stays", num_images=4))
    turns.turn(4)
    assert pipeline.painted == 3
    turns.finish(*leaving, stays)
    last = leaving[0].wait(0)
    assert isinstance(last, Cancelled)
    assert [result.index for result in last.results] == [0, 1, 2]
    assert isinstance(stays.wait(0), Done)
    assert pipeline.painted == 3 + 4


def test_closing_stops_decoding_too() -> None:
    class Closing(NumericPipeline):
        def decode(self, states: Sequence[Vector]) -> Iterator[Output]:
            for output in super().decode(states):
                turns.loop.inbox.close("cancel")
                yield output

    turns = Turns(Closing(), max_batch=8)
    job = turns.submit(ask("a star", num_images=8))
    turns.finish(job)
    last = job.wait(0)
    assert isinstance(last, Cancelled)
    assert len(last.results) == 1
