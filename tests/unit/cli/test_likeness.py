"""`--identity` with `--min-likeness`: tried again with other seeds, the best kept, said so, and not made again."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gesso.cli.likeness import check_likeness, paint_alike
from gesso.cli.painting import paint_again
from gesso.cli.view import View
from gesso.engine import Engine
from gesso.errors import CancelledError, GessoError, RejectedError, RequestError, RunError
from gesso.events import Result
from gesso.metadata import read_record
from gesso.request import GenerationRequest
from gesso.request_parts import Identity
from tests.tiny_infinite_you import PERSON, tiny_pipeline_with_guest
from tests.unit.cli.running import call

LATER = [7 + number * 1_000_000_007 for number in (1, 2, 3)]
"""Seeds of the later tries of the picture of seed 7."""
BEGUN: list[int] = []
"""Seeds of the pictures that were begun."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    pipeline = tiny_pipeline_with_guest()
    likenesses = {7: 0.1, 8: 0.6} | dict(zip(LATER, (None, 0.3, 0.2), strict=True))
    guest = pipeline.guest
    assert guest is not None
    seeds: dict[int, int] = {}
    BEGUN.clear()
    begin = pipeline.begin

    def begun(plan: Any, conditioning: Any, image: int) -> Any:
        state = begin(plan, conditioning, image)
        seeds[id(state.presence)] = state.seed
        BEGUN.append(state.seed)
        return state

    pipeline.begin = begun  # the tiny detector finds no face in what is painted, so likenesses are made up
    guest.likeness = lambda presence, picture: likenesses.get(seeds[id(presence)])
    with Engine(device="cpu", load=lambda name, device, dtype: pipeline) as made:
        yield made


def ask(seed: int) -> GenerationRequest:
    return GenerationRequest(
        prompt="a man", seed=seed, width=32, height=32, steps=1, identity=Identity(image=str(PERSON))
    )


@pytest.mark.parametrize(("least", "tries", "kept"), [(None, None, 7), (0.25, 4, 7 + 2 * 1_000_000_007), (0.9, 2, 7)])
def test_the_best_try_is_kept(engine: Engine, least: float | None, tries: int | None, kept: int) -> None:
    with View(silent=True) as view:
        first, second = paint_alike(engine, [ask(7), ask(8)], view, least, tries)
    assert not isinstance(first, RejectedError) and not isinstance(second, RejectedError)
    assert first.seed == kept and first.metadata["seed"] == kept
    assert second.seed == 8 and second.metadata["likeness"] == 0.6
    assert first.metadata["identity"] == {"image": first.metadata["identity"]["image"]}  # pyright: ignore


def test_what_is_best_is_there_before_later_pictures_are_begun(engine: Engine) -> None:
    bars: list[float] = []
    with View(silent=True) as view, pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "move_bar", bars.append)
        others = [ask(seed).model_copy(update={"steps": 200}) for seed in range(100, 160)]
        painting = paint_alike(engine, [ask(7), *others], view, 0.25, 3)
        BEGUN.clear()
        best = next(painting)
        assert isinstance(best, Result) and best.seed == LATER[1]
        assert not set(BEGUN).issuperset(range(100, 160)), "all others were painted first"
        painting.close()
    assert bars == sorted(bars)


@pytest.mark.parametrize("problem", [RunError("the model broke"), CancelledError()])
def test_the_best_is_kept_where_a_later_try_breaks(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, problem: GessoError
) -> None:
    break_later_tries(monkeypatch, problem, 2)
    painted = []
    with View(silent=True) as view, pytest.raises(type(problem)):
        painted.extend(paint_alike(engine, [ask(8), ask(7), ask(8)], view, 0.4, 4))
    assert [each.seed for each in painted if isinstance(each, Result)][:2] == [8, 7]


def test_first_tries_that_are_finished_are_kept_where_a_later_one_breaks(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a gap: what comes after one would be taken for another."""
    whole = [result for seed in (7, 8, 9) for result in engine.run(ask(seed))]

    def placed(*arguments: Any) -> Generator[tuple[int, Result | RejectedError]]:
        try:
            yield 0, whole[0]
        except RunError:
            yield from ((1, whole[1]), (3, whole[2]))
            raise

    monkeypatch.setattr("gesso.cli.likeness.paint_placed", placed)
    break_later_tries(monkeypatch, RunError("the model broke"), 1)
    painted = []
    with View(silent=True) as view, pytest.raises(RunError, match="the model broke"):
        painted.extend(paint_alike(engine, [ask(seed) for seed in (7, 8, 9, 10)], view, 1.0, 4))
    assert painted == whole[:2]


def test_of_a_rejected_picture_nothing_is_kept_where_a_later_try_breaks(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gesso.cli.likeness.paint_placed", lambda *_: ((0, each) for each in [RejectedError([7], 1)]))
    monkeypatch.setattr("gesso.cli.likeness.paint_again", lambda *_: failing(RunError("the model broke")))
    with View(silent=True) as view, pytest.raises(RunError):
        assert next(paint_alike(engine, [ask(7)], view, 0.4, 4)) is None


def test_the_command_saves_the_best_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    break_later_tries(monkeypatch, RunError("the model broke"), 1)
    Image.new("RGB", (64, 64), "tan").save(tmp_path / "portrait.png")
    given = ("--model", "infinite-you-nano", "--identity", tmp_path / "portrait.png", "--steps", "1", "--seed", "7")
    ended = call(capsys, "generate", "a face", *given, "--min-likeness", "1", "-o", tmp_path / "out")
    assert ended.status == RunError.exit_status
    assert ended.err.splitlines()[-1] == "error: the model broke"
    (file,) = (tmp_path / "out").iterdir()
    assert ended.out.splitlines() == [str(file)]
    assert read_record(file).seed == 7


def break_later_tries(monkeypatch: pytest.MonkeyPatch, problem: GessoError, number: int) -> None:
    """The try of that number after the first fails; others are painted."""
    calls = iter(range(1, 100))

    def painted(*arguments: Any) -> Iterator[Result | RejectedError]:
        return failing(problem) if next(calls) == number else paint_again(*arguments)

    monkeypatch.setattr("gesso.cli.likeness.paint_again", painted)


def failing(problem: GessoError) -> Iterator[Result | RejectedError]:
    yield from ()
    raise problem


@pytest.mark.parametrize(
    ("least", "tries", "identity", "message"),
    [
        (2.0, None, "a", "--min-likeness 2.0 is not a number from -1 to 1"),
        (float("nan"), None, "a", "--min-likeness nan is not a number from -1 to 1"),
        (0.5, 0, "a", "--tries 0 is not a whole number from 1 to 100"),
        (None, 3, "a", "--tries 3 is not usable alone; say what is enough with --min-likeness"),
        (0.5, None, None, "--min-likeness 0.5 is not usable alone; name the photograph with --identity"),
    ],
)
def test_what_makes_no_sense(least: float | None, tries: int | None, identity: str | None, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_likeness(least, tries, Identity(image=identity) if identity else None)
    assert str(caught.value) == message
    check_likeness(0.5, 4, Identity(image=str(Path("a"))))
