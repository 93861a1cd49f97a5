"""Scenes by seed and the held-out rule. Not in here: pixels, captions, judging."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from itertools import combinations as choose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gesso.worlds.shapes import (
    CATEGORIES,
    COLOURS,
    SHAPES,
    SIZES,
    Dice,
    Scene,
    combinations,
    held_out_scene,
    is_held_out,
    scene,
    training_scene,
)
from gesso.worlds.shapes.scenes import OPPOSITE, RADII

SEEDS = st.integers(0, 2**63 - 1)


@given(SEEDS)
def test_a_scene_is_whole_and_within_the_picture(seed: int) -> None:
    drawn = scene(seed)
    assert drawn == scene(seed)
    assert drawn.background in COLOURS
    for thing in drawn.objects:
        assert thing.shape in SHAPES
        assert thing.colour in COLOURS
        assert thing.colour != drawn.background
        assert (thing.x * 16).is_integer()
        assert (thing.y * 16).is_integer()
        assert thing.radius * 1.06 < min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
    for one, other in choose(drawn.objects, 2):
        assert max(abs(one.x - other.x), abs(one.y - other.y)) > one.radius + other.radius


@given(SEEDS)
def test_each_kind_keeps_its_promises(seed: int) -> None:
    drawn = scene(seed)
    first = drawn.objects[0]
    if drawn.kind == "single":
        assert len(drawn.objects) == 1
        assert drawn.size is not None
        assert first.radius == RADII[drawn.size]
        assert drawn.relation is None
    elif drawn.kind == "count":
        assert 2 <= len(drawn.objects) <= 4
        assert {(thing.shape, thing.colour, thing.radius) for thing in drawn.objects} == {
            (first.shape, first.colour, first.radius)
        }
        assert (drawn.size, drawn.relation) == (None, None)
    else:
        first, second = drawn.objects
        assert first.shape != second.shape
        along = {
            "left": second.x - first.x,
            "right": first.x - second.x,
            "above": second.y - first.y,
            "below": first.y - second.y,
        }
        assert drawn.relation is not None
        assert along[drawn.relation] >= 0.4
        assert abs(along["left"]) <= 1 / 16 or abs(along["above"]) <= 1 / 16


def test_scenes_never_change() -> None:
    # A changed digest means that old models were trained on another world: then raise their version, and say so.
    text = repr([scene(seed) for seed in range(200)] + [training_scene(seed) for seed in range(200)])
    assert sha256(text.encode()).hexdigest() == "7d5d95d26c4bee8e776a78b3dc8a102a58ec67fc5e7b0083b0ab3f4fc246c9e2"


def test_training_never_holds_a_held_out_combination() -> None:
    drawn = [training_scene(seed) for seed in range(20_000)]
    assert not any(is_held_out(one) for one in drawn)
    kinds = [one.kind for one in drawn]
    assert [round(kinds.count(kind) / len(kinds), 1) for kind in ("single", "pair", "count")] == [0.4, 0.5, 0.1]


def test_training_rejects_few_scenes() -> None:
    assert 0.10 < sum(is_held_out(scene(seed)) for seed in range(5_000)) / 5_000 < 0.25


def test_held_out_scenes_hold_one_of_each_category() -> None:
    held = [held_out_scene(seed) for seed in range(500)]
    assert all(is_held_out(one) for one in held)
    assert {key.partition(":")[0] for one in held for key in combinations(one)} == set(CATEGORIES)


def test_training_shows_every_word_in_every_kind() -> None:
    drawn = [training_scene(seed) for seed in range(5_000)]
    for kind in ("single", "pair", "count"):
        looks = {(thing.shape, thing.colour) for one in drawn if one.kind == kind for thing in one.objects}
        assert len(looks) == len(SHAPES) * len(COLOURS)
    assert {one.size for one in drawn} == {*SIZES, None}


@given(SEEDS)
def test_keys_do_not_depend_on_which_object_comes_first(seed: int) -> None:
    drawn = scene(seed)
    relation = OPPOSITE[drawn.relation] if drawn.relation else None
    turned = replace(drawn, objects=drawn.objects[::-1], relation=relation)
    assert combinations(turned) == combinations(drawn)


def test_keys_name_what_they_hold() -> None:
    drawn = next(one for one in map(scene, range(100)) if one.kind == "pair" and one.relation == "right")
    first, second = drawn.objects
    assert f"position: {second.shape} left {first.shape} on {drawn.background}" in combinations(drawn)


@pytest.mark.parametrize("shape", SHAPES)
def test_dice_differ_by_seed_and_are_even(shape: str) -> None:
    dice = Dice(7, SHAPES.index(shape))
    drawn = [dice.pick(SHAPES) for _ in range(4_000)]
    assert abs(drawn.count(shape) / len(drawn) - 1 / 8) < 0.02
    assert Dice(1).unit() != Dice(2).unit() != Dice(2, 1).unit()


def test_scenes_are_hashable_and_frozen() -> None:
    assert isinstance(scene(0), Scene)
    assert len({scene(seed) for seed in range(100)} | {scene(seed) for seed in range(100)}) <= 100
    with pytest.raises(AttributeError):
        scene(0).background = "red"  # pyright: ignore[reportAttributeAccessIssue]
