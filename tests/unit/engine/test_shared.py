"""``generate`` and the one engine behind it."""

from __future__ import annotations

import os

import pytest

from gesso.engine import generate, shared
from gesso.errors import RequestError
from tests.unit.engine.numeric import NumericPipeline, engine_of
from tests.unit.engine.programs import run_program


def test_generate_keeps_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = NumericPipeline()
    with engine_of(pipeline) as engine:
        monkeypatch.setattr(shared, "_engine", engine)
        first = generate("a star", model="0", seed=3, num_images=2)
        second = generate("a star", model="0", seed=4)
    assert first[1].image.tobytes() == second[0].image.tobytes()
    assert len(pipeline.encoded) == 2


def test_generate_names_the_field_that_cannot_be_used() -> None:
    with pytest.raises(RequestError, match="seed -1"):
        generate("a star", seed=-1)
    with pytest.raises(RequestError, match="did you mean guidance"):
        generate("a star", guidence=3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_child_makes_its_own_engine_and_is_told_so_of_the_parents() -> None:
    program = """
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from gesso.engine import shared
from gesso.errors import RunError
from tests.unit.engine.numeric import NumericPipeline, ask, engine_of
engine = shared._engine = engine_of(NumericPipeline())
engine.run(ask("a star"))
if os.fork() == 0:
    try:
        engine.submit(ask("a star"))
    except RunError as error:
        print("refused" if "fork" in str(error) else error, shared.shared_engine() is engine, flush=True)
    os._exit(0)
os.wait()
"""
    assert run_program(program) == "refused False\n"
