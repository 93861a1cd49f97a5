"""Recipes by name, and their values set from text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gesso.errors import MissingError, RequestError
from gesso.models.infinity.transformer import InfinityConfig
from gesso.training import recipes, run
from gesso.training.infinity import InfinitySettings, InfinityTask
from gesso.training.recipes.recipe import Recipe
from tests.unit.training.tiny_recipes import infinity_recipe


@pytest.fixture(scope="module")
def nano() -> Recipe:
    return recipes.load("infinity-nano")


def _settings(recipe: Recipe) -> InfinitySettings:
    assert isinstance(recipe.settings, InfinitySettings)
    return recipe.settings


def test_every_recipe_loads_and_is_plain_data() -> None:
    for name in recipes.names():
        recipe = recipes.load(name, **({"model": "flux-nano", "data": "somewhere"} if name == recipes.LORA else {}))
        assert recipe.name == name
        assert json.loads(json.dumps(recipe.as_dict()))["loop"]["steps"] == recipe.loop.steps


def test_unknown_recipes_offer_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean infinity-nano"):
        recipes.load("infinity-nanno")
    with pytest.raises(RequestError, match="recipes: shapes-tokenizer, infinity-nano"):
        recipes.load("qqq")


def test_values_are_set_by_name_or_path(nano: Recipe) -> None:
    changed = recipes.override(
        nano,
        {
            "steps": "10",
            "loop.learning_rate": "1",
            "betas": "[0.5, 0.6]",
            "threads": "2",
            "compile": "false",
            "precision": "fp32",
            "settings.network.depth": "3",
            "tokenizer": "somewhere/else",
            "grids": "[[1, 1], [2, 2]]",
            "rotary_grid": "[2, 2]",
            "generation": '[["guidance", 2.0]]',
            "rotary": "grid",
        },
    )
    assert (changed.loop.steps, changed.loop.learning_rate, changed.loop.betas) == (10, 1.0, (0.5, 0.6))
    assert isinstance(changed.loop.learning_rate, float)
    assert (changed.loop.threads, changed.loop.compile, changed.loop.precision) == (2, False, "fp32")
    settings = _settings(changed)
    assert (settings.network.depth, settings.network.rotary, settings.tokenizer) == (3, "grid", "somewhere/else")
    assert settings.schedule.grids == ((1, 1), (2, 2))
    assert settings.generation == (("guidance", 2.0),)
    assert recipes.override(changed, {"threads": "null", "rotary": "null"}).loop.threads is None
    assert nano == recipes.load("infinity-nano")
    assert recipes.override(nano, {"network.depth": "3"}) == recipes.override(nano, {"settings.network.depth": "3"})
    assert recipes.override(nano, {}) == nano


def test_values_that_depend_on_each_other_change_together(nano: Recipe) -> None:
    for order in (1, -1):
        values = {"settings.network.width": "96", "settings.network.heads": "3", "settings.network.pool_heads": "3"}
        changed = recipes.override(nano, dict(list(values.items())[::order]))
        network: InfinityConfig = _settings(changed).network
        assert (network.width, network.heads, network.pool_heads) == (96, 3, 3)


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"steps": "ten"}, "steps", "a whole number"),
        ({"steps": "1.5"}, "steps", "a whole number"),
        ({"steps": "true"}, "steps", "a whole number"),
        ({"steps": "0"}, "steps", "from 1 to"),
        ({"steps": "9" * 400}, "steps", "from 1 to"),
        ({"held_out": "1000000000000"}, "held_out", "from 1 to"),
        ({"learning_rate": "fast"}, "learning_rate", "a number"),
        ({"learning_rate": "NaN"}, "learning_rate", "above 0"),
        ({"compile": "maybe"}, "compile", "true or false"),
        ({"threads": "abc"}, "threads", "int"),
        ({"grids": "[[1, 1], [2]]"}, "grids", "tuple"),
        ({"grids": "[[1, 0]]"}, "set", "at least one cell"),
        ({"rotary": "round"}, "rotary", "normalized"),
        ({"settings.network.heads": "7"}, "set", "does not divide"),
        ({"settings.network.heads": "0"}, "set", "zero"),
        ({"attention": '["FAST"]'}, "attention", "MATH"),
        ({"stpes": "1"}, "set", "loop.steps"),
        ({"width": "96"}, "set", "settings.network.width, settings.text.width"),
        ({"qqqqq": "1"}, "set", "loop.steps"),
        ({"name": "mine"}, "set", "one field of the recipe"),
        ({"make": "mine"}, "set", "one field of the recipe"),
        ({"settings": "{}"}, "set", "one field of the recipe"),
        ({"steps": "1", "loop.steps": "2"}, "set", "set already"),
    ],
    ids=str,
)
def test_values_that_cannot_be_used(nano: Recipe, values: dict[str, str], field: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        recipes.override(nano, values)
    assert caught.value.field == field
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_is_made_for_a_recipe_that_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError, match="get it with: gesso train shapes-tokenizer"):
        run("infinity-nano", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "field"),
    [({"bits": "12"}, "tokenizer"), ({"side": "64"}, "side"), ({"grids": "[[1, 1], [8, 8]]"}, "side")],
)
def test_a_tokenizer_that_does_not_fit(tokenizer_run: Path, values: dict[str, str], field: str) -> None:
    recipe = recipes.override(infinity_recipe(tokenizer_run / "export"), values)
    with pytest.raises(RequestError) as caught:
        recipe.task()
    assert caught.value.field == field


def test_a_seed_is_a_start(tokenizer_run: Path) -> None:
    """The same seed makes the same network, whatever was drawn before; another makes another."""
    recipe = infinity_recipe(tokenizer_run / "export")
    tasks = [recipe.task(), recipe.task(), recipes.override(recipe, {"seed": "1"}).task()]
    starts = [task.network.get_parameter("transformer.start") for task in tasks if isinstance(task, InfinityTask)]
    assert starts[0].equal(starts[1])
    assert not starts[0].equal(starts[2])
