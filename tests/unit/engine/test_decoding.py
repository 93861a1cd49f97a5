"""Decoding that takes breaths: all else goes on in between, and what is cancelled stops there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from PIL import Image

from gesso.errors import OutOfMemoryError, RunError
from gesso.events import Cancelled, Done, Preview
from gesso.metadata import frames_digest
from gesso.pipelines.contract import Output
from tests.unit.engine.numeric import NumericPipeline, Vector, ask
from tests.unit.engine.turns import Turns

TILES = 5


@dataclass(eq=False, kw_only=True)
class Filming(NumericPipeline):
    """Makes a video of three frames of each state, in five tiles."""

    tiles: list[str] = field(default_factory=list)
    breaks_at: int = 0
    problem: Exception | None = None

    def preview(self, state: Vector) -> list[Image.Image]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return [super().preview(state)] * 2

    def decode(self, states: Sequence[Vector]) -> Iterator[Output | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for state, output in zip(list(states), super().decode(states), strict=True):
            for _ in range(TILES):
                self.tiles.append(state.plan.request.prompt)
                if len(self.tiles) == self.breaks_at and self.problem is not None:
                    raise self.problem
                yield None
            yield Output(image=output.image, seed=output.seed, frames=(output.image,) * 3, fps=8.0)


def test_frames_reach_the_result_and_the_previews() -> None:
    turns = Turns(Filming())
    job = turns.submit(ask("a", num_images=2), preview_every=2)
    turns.finish(job)
    seen = [event for event in job.events() if isinstance(event, Preview)]
    assert all(event.frames == (event.picture,) * 2 for event in seen) and seen
    for result in job.result(0):
        assert (len(result.frames), result.fps, result.image) == (3, 8.0, result.frames[0])
        assert result.metadata["pixels"] == frames_digest(result.frames)


def test_others_step_and_pictures_are_finished_between_tiles() -> None:
    films, paints = Filming(), NumericPipeline()
    turns = Turns(films, paints)
    first = turns.submit(ask("first"))
    turns.turn(films.steps)
    assert films.tiles == ["first"]
    late, picture = turns.submit(ask("late")), turns.submit(ask("picture", model="1"))
    turns.turn(2 * paints.steps)
    assert len(films.tiles) >= TILES
    turns.finish(first, late, picture)
    assert films.decoded == [[("first", 0)], [("late", 0)]]  # each begun once, the second when the first was done
    assert films.tiles == ["first"] * TILES + ["late"] * TILES
    assert isinstance(picture.wait(0), Done)


def test_a_breath_is_a_turn_long() -> None:
    films, paints = Filming(), NumericPipeline(steps=100)
    turns = Turns(films, paints)
    film, picture = turns.submit(ask("film"), priority=1), turns.submit(ask("picture", model="1"))
    turns.finish(film)
    assert 0 < TILES - 1 <= len(paints.batches) <= TILES + 2
    turns.finish(picture)


def test_cancelled_within_a_tile() -> None:
    films = Filming()
    turns = Turns(films)
    job = turns.submit(ask("a", num_images=2))
    turns.turn(films.steps + TILES + 2)
    job.cancel()
    before = len(films.tiles)
    assert TILES < before < 2 * TILES
    turns.finish(job, within=2)
    last = job.wait(0)
    assert isinstance(last, Cancelled)
    assert [len(result.frames) for result in last.results] == [3]
    assert len(films.tiles) == before


def test_cancelling_another_loses_no_tile() -> None:
    films = Filming()
    turns = Turns(films)
    stays, goes, waits = (turns.submit(ask(name)) for name in ("stays", "goes", "waits"))
    turns.turn(films.steps + 2)
    assert films.decoded == [[("stays", 0), ("goes", 0), ("waits", 0)]]
    goes.cancel()
    turns.finish(stays, goes, waits)
    assert isinstance(goes.wait(0), Cancelled)
    assert (films.tiles.count("stays"), films.tiles.count("waits"), films.tiles.count("goes")) == (TILES, TILES, 0)


def test_closing_stops_between_tiles() -> None:
    films = Filming()
    turns = Turns(films)
    job = turns.submit(ask("a"))
    turns.turn(films.steps + 1)
    turns.loop.inbox.close("cancel")
    turns.finish(job, within=2)
    assert isinstance(job.wait(0), Cancelled)
    assert len(films.tiles) < TILES


@pytest.mark.parametrize("problem", [ValueError("torn"), MemoryError()])
def test_what_breaks_after_a_breath_fails_alone(problem: Exception) -> None:
    films = Filming(breaks_at=3, problem=problem)
    turns = Turns(films)
    job = turns.submit(ask("bad"))
    turns.finish(job)
    with pytest.raises(OutOfMemoryError if isinstance(problem, MemoryError) else RunError):
        job.result(0)
    after = turns.submit(ask("good"))
    turns.finish(after)
    assert isinstance(after.wait(0), Done)


def test_memory_that_runs_out_beside_others_begins_the_video_anew() -> None:
    films, paints = Filming(breaks_at=3, problem=MemoryError()), NumericPipeline(steps=20)
    turns = Turns(films, paints)
    film, picture = turns.submit(ask("film")), turns.submit(ask("picture", model="1"))
    turns.finish(film, picture)
    assert isinstance(film.wait(0), Done)
    assert len(films.tiles) == 3 + TILES
