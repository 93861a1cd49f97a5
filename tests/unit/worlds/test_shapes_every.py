"""The whole world by number: every scene has one, and a claim allows just the scenes that it is true of."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gesso.worlds.shapes import Claim, Scene, is_held_out, scene, stated, training_scene
from gesso.worlds.shapes.every import END, allowed, number, scene_at, training_numbers
from gesso.worlds.shapes.scenes import OPPOSITE

SEEDS = st.integers(0, 2**40)
NUMBERS = st.integers(0, END - 1)


def there(seen: Scene) -> Scene:
    """A pair as it is kept here: the left or upper one first."""
    if seen.relation in ("right", "below"):
        return Scene(seen.kind, seen.background, seen.objects[::-1], relation=OPPOSITE[seen.relation])
    return seen


def holds(claim: Claim, seen: Scene) -> bool:
    """Slow and obvious: whether a claim is true of a scene, and one that a caption of its kind could make."""
    kind = "pair" if len(claim.looks) == 2 else "count" if claim.number > 1 else "single"
    if seen.kind != kind or claim.background not in (None, seen.background) or claim.size not in (None, seen.size):
        return False
    things = list(seen.objects)
    if kind != "pair":
        shape, colour = claim.looks[0]
        right = all(thing.shape == shape and colour in (None, thing.colour) for thing in things)
        return right and len(things) == claim.number
    assert seen.relation is not None
    ways = [(things, seen.relation), (things[::-1], OPPOSITE[seen.relation])]
    return any(
        claim.relation in (None, relation)
        and all(
            thing.shape == shape and colour in (None, thing.colour)
            for thing, (shape, colour) in zip(way, claim.looks, strict=True)
        )
        for way, relation in ways
    )


@given(SEEDS)
def test_every_scene_has_a_number(seed: int) -> None:
    drawn = scene(seed)
    assert scene_at(number(drawn)) == there(drawn)


@given(NUMBERS)
def test_every_number_has_one_scene_or_none(index: int) -> None:
    seen = None
    with contextlib.suppress(ValueError):  # of numbers that belong to none
        seen = scene_at(index)
    if seen is not None:
        assert number(seen) == index
        assert all(thing.colour != seen.background for thing in seen.objects)


@pytest.mark.parametrize("index", [-1, END])
def test_numbers_end(index: int) -> None:
    with pytest.raises(ValueError, match="belongs to no scene"):
        scene_at(index)


@given(SEEDS)
def test_a_caption_allows_its_scene_and_only_such_as_it_is_true_of(seed: int) -> None:
    drawn = training_scene(seed)
    claim, _ = stated(drawn, seed)
    numbers, shares = allowed(claim)
    assert number(drawn) in numbers
    assert len(set(numbers.tolist())) == len(numbers)
    assert float(shares.sum()) == pytest.approx(1) and bool((shares > 0).all())
    some = numbers[:: max(1, len(numbers) // 20)]
    assert all(holds(claim, scene_at(int(index))) for index in some)


@given(SEEDS, st.lists(SEEDS, min_size=1, max_size=20))
def test_nothing_that_a_claim_is_true_of_is_left_out(seed: int, others: list[int]) -> None:
    claim, _ = stated(training_scene(seed), seed)
    numbers, _ = allowed(claim)
    for other in map(scene, others):
        assert (number(other) in numbers) == holds(claim, other)


def test_sizes_are_equally_likely_and_so_are_their_places() -> None:
    numbers, shares = allowed(Claim((("star", "red"),), background="blue"))
    sizes = [scene_at(int(index)).size for index in numbers]
    of_size = {size: shares[[other == size for other in sizes]] for size in set(sizes)}
    assert {size: len(share) for size, share in of_size.items()} == {"small": 25, "medium": 25, "large": 9}
    assert all(np.allclose(share, 1 / 3 / len(share)) for share in of_size.values())


def test_a_claim_that_is_true_of_nothing_allows_nothing() -> None:
    numbers, shares = allowed(Claim((("star", "red"),), background="red"))
    assert len(numbers) == len(shares) == 0
    numbers, shares = allowed(Claim((("star", "red"), ("star", "blue"))))
    assert len(numbers) == len(shares) == 0


def test_words_outside_the_world_are_refused() -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        allowed(Claim((("pentagon", None),)))


def test_training_numbers_hold_nothing_that_is_held_out() -> None:
    numbers = training_numbers()
    assert bool((np.diff(numbers) > 0).all())
    drawn = [scene(seed) for seed in range(300)]
    assert np.isin([number(seen) for seen in drawn], numbers).tolist() == [not is_held_out(seen) for seen in drawn]
    assert len(numbers) == 239_718
