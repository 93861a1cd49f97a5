"""A request that fails among others: what else is finished is kept, under its own name, and the status is a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image

from gesso.cli.painting import paint, paint_placed
from gesso.cli.view import View
from gesso.engine import Engine
from gesso.engine.job import Job
from gesso.errors import RejectedError, RunError
from gesso.events import Cancelled, Done, Failed, Result
from gesso.request import GenerationRequest
from tests.unit.cli.running import call


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("GESSO_OUTPUT", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def failed(request: GenerationRequest) -> Job:
    job = Job(request, preview_every=0, when_cancelled=lambda job: None)
    job.end(Failed(job=job.id, error=RunError("it broke")))
    return job


class Ended:
    """An engine whose jobs are over at once: seed 1 failed, 3 was rejected, 4 runs until it is cancelled."""

    def submit(self, request: GenerationRequest, *, priority: int) -> Job:
        if request.seed == 1:
            return failed(request)
        job = Job(request, preview_every=0, when_cancelled=lambda job: job.end(Cancelled(job=job.id, results=())))
        if request.seed == 3:
            job.end(Failed(job=job.id, error=RejectedError([3], 1)))
        elif request.seed != 4:
            result = Result(image=Image.new("RGB", (8, 8)), seed=request.seed or 0, index=0)
            job.end(Done(job=job.id, results=(result,)))
        return job


def painted(paint: Any) -> list[Any]:
    """What comes of six requests, with seeds 0 to 5, before the failure of the second is raised."""
    requests = [GenerationRequest(prompt="a star", seed=seed) for seed in range(6)]
    found: list[Any] = []
    with View(silent=True) as view, pytest.raises(RunError, match="it broke"):
        found.extend(paint(cast("Engine", Ended()), requests, view))
    return found


def test_what_is_finished_beside_a_failure_keeps_its_place() -> None:
    found = painted(paint_placed)
    assert [place for place, _ in found] == [0, 2, 3, 5]
    assert [result.seeds[0] if place == 3 else result.seed for place, result in found] == [0, 2, 3, 5]


def test_who_counts_pictures_gets_none_after_a_gap() -> None:
    assert [result.seed for result in painted(paint)] == [0]


@pytest.mark.parametrize("quiet", [False, True])
def test_the_command_line_saves_what_is_finished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, own_folder: Path, quiet: bool
) -> None:
    submit = Engine.submit

    def submitted(engine: Engine, request: GenerationRequest, *, priority: int) -> Job:
        if request.seed == 8:
            return failed(request)
        job = submit(engine, request, priority=priority)
        job.wait(60)
        return job

    monkeypatch.setattr(Engine, "submit", submitted)
    command = ("generate", "a red star", "--num-images", "3", "--seed", "7")
    outcome = call(capsys, *command, *(["--quiet"] if quiet else []))
    assert outcome.status == 1
    told = ["kept 2 of 3 pictures; the same command with --resume makes the rest"]
    assert outcome.err.splitlines()[-2:] == [*([] if quiet else told), "error: it broke"]
    assert [Path(line).name for line in outcome.out.splitlines()] == [
        f"000{at}-a-red-star-{6 + at}.png" for at in (1, 3)
    ]
    assert len(list((own_folder / "gesso-output").iterdir())) == 2
    monkeypatch.undo()
    monkeypatch.chdir(own_folder)
    rest = call(capsys, *command, "--resume", "--quiet")
    assert [Path(line).name for line in rest.out.splitlines()] == ["0002-a-red-star-8.png"]
