"""Models within a budget: the least recently used idle one goes, its memory with it, and never one that is in use."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gesso.engine import Engine
from gesso.engine.budget import parse_budget, weights_bytes
from gesso.engine.fleet import Fleet
from gesso.errors import OutOfMemoryError, RequestError
from gesso.events import Done, Failed, Progress
from gesso.pipelines.contract import Pipeline
from gesso.request import GenerationRequest
from tests.contract.worked_example import example_pipeline

SIZE = weights_bytes([example_pipeline()])


class Shelf:
    """A loader of one small pipeline a name, that keeps none of them."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.seen: dict[str, weakref.ref[Pipeline]] = {}
        self.weights: dict[str, weakref.ref[torch.Tensor]] = {}
        self.before: Callable[[str], None] = lambda name: None

    def __call__(self, name: str, device: str, dtype: str | None) -> Pipeline:
        self.before(name)
        self.loads.append(name)
        pipeline = example_pipeline()
        self.seen[name] = weakref.ref(pipeline)
        self.weights[name] = weakref.ref(pipeline.network.out.weight)  # pyright: ignore[reportAttributeAccessIssue]
        return pipeline

    def alive(self) -> set[str]:
        gc.collect()
        return {name for name, seen in self.seen.items() if seen() is not None and self.weights[name]() is not None}


def asked(model: str, **fields: object) -> GenerationRequest:
    return GenerationRequest(prompt="a star", model=model, seed=1, steps=2, **fields)  # pyright: ignore[reportArgumentType]


def test_the_least_recently_used_goes_and_its_memory_with_it() -> None:
    shelf = Shelf()
    with Engine(device="cpu", load=shelf, model_budget=2 * SIZE) as engine:
        for name in ("a", "b", "a"):
            engine.run(asked(name))
        assert shelf.alive() == {"a", "b"}
        engine.run(asked("c"))
        assert shelf.alive() == {"a", "c"}
        engine.run(asked("b"))
        assert shelf.alive() == {"b", "c"}
    assert shelf.loads == ["a", "b", "c", "b"]
    assert shelf.alive() == set()


def test_without_a_budget_all_stay() -> None:
    shelf = Shelf()
    with Engine(device="cpu", load=shelf) as engine:
        for name in "abcabc":
            engine.run(asked(name))
        assert shelf.loads == ["a", "b", "c"]


def test_one_in_use_is_waited_for_and_nobody_overtakes() -> None:
    """The first model has a long request; the second waits for it, and a later request of the first for the second."""
    shelf = Shelf()
    with Engine(device="cpu", load=shelf, model_budget=SIZE) as engine:
        engine._loop._admission.measure = lambda name, device, dtype: SIZE
        first = engine.submit(GenerationRequest(prompt="a star", model="a", seed=1, steps=500))
        next(event for event in first.events() if isinstance(event, Progress) and event.stage == "step")
        second = engine.submit(asked("b"))
        third = engine.submit(asked("a"))
        last = [job.wait() for job in (first, second, third)]
        assert all(isinstance(event, Done) for event in last)
        assert shelf.alive() == {"a"}
    assert shelf.loads == ["a", "b", "a"]


def test_a_model_larger_than_the_budget_is_loaded_alone() -> None:
    shelf = Shelf()
    with Engine(device="cpu", load=shelf, model_budget=1) as engine:
        for name in "aba":
            engine.run(asked(name))
            assert shelf.alive() == {name}


def test_where_memory_runs_out_while_loading_idle_models_go_first() -> None:
    shelf = Shelf()
    full = {"b"}

    def before(name: str) -> None:
        if name in full:
            full.discard(name)
            raise MemoryError

    shelf.before = before
    with Engine(device="cpu", load=shelf) as engine:
        engine.run(asked("a"))
        engine.run(asked("b"))
        assert shelf.alive() == {"b"}


def test_where_it_does_not_help_the_error_is_the_loaders_own() -> None:
    shelf = Shelf()

    def before(name: str) -> None:
        if name == "b":
            raise MemoryError

    shelf.before = before
    with Engine(device="cpu", load=shelf) as engine:
        engine.run(asked("a"))
        for _ in range(2):  # with an idle model, and without
            ended = engine.submit(asked("b")).wait()
            assert isinstance(ended, Failed)
            assert isinstance(ended.error, OutOfMemoryError)
        assert engine.run(asked("a"))


def test_where_memory_runs_out_while_painting_idle_models_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf()
    with Engine(device="cpu", load=shelf) as engine:
        engine.run(asked("a"))
        engine.run(asked("b"))
        pipeline = shelf.seen["b"]()
        assert pipeline is not None
        kind, real = type(pipeline), type(pipeline).step

        def step(self: Pipeline, states: list[object]) -> None:
            if shelf.seen["a"]() is not None:
                raise MemoryError
            real(self, states)

        del pipeline
        monkeypatch.setattr(kind, "step", step)
        assert engine.run(asked("b"))
        assert shelf.alive() == {"b"}


def test_what_models_share_counts_once() -> None:
    one, other = example_pipeline(), example_pipeline()
    assert weights_bytes([one, other]) == 2 * SIZE
    other.network = one.network  # pyright: ignore[reportAttributeAccessIssue]
    assert weights_bytes([one, other]) == SIZE


def test_auto_goes_by_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet("cpu", "auto")
    fleet.add("a", example_pipeline(), 1)
    monkeypatch.setattr("gesso.engine.fleet.free_bytes", lambda device: 100 if fleet.models else 1000)
    assert fleet.makes_room(50)
    assert fleet.models
    assert fleet.makes_room(500)
    assert not fleet.models


@pytest.mark.parametrize(
    ("said", "bytes_"), [(None, None), ("auto", "auto"), (12, 12), ("12", 12), ("24GB", 24 * 10**9), ("1 gib", 2**30)]
)
def test_budgets(said: int | str | None, bytes_: int | str | None) -> None:
    assert parse_budget(said) == bytes_


@pytest.mark.parametrize("said", [0, -1, "", "lots", "3 boxes", True, "0GB", f"{'9' * 400}GB"])
def test_budgets_that_are_none(said: object) -> None:
    with pytest.raises(RequestError, match="model_budget"):
        parse_budget(said)  # pyright: ignore[reportArgumentType]


def test_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GESSO_MODEL_BUDGET", "24 GB")
    with Engine(device="cpu") as engine:
        assert engine._loop._fleet.budget == 24 * 10**9
    monkeypatch.setenv("GESSO_MODEL_BUDGET", "plenty")
    with pytest.raises(RequestError, match="model_budget"):
        Engine(device="cpu")
