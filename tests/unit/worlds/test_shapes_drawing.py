"""Pixels of the shapes world. Not in here: reading them back."""

from __future__ import annotations

import subprocess
import sys
from hashlib import sha256
from itertools import combinations as choose
from math import dist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.worlds.shapes import PALETTE, SHAPES, Scene, Thing, batch, draw, scene, training_scene
from gesso.worlds.shapes.drawing import coverage, distance


def test_pictures_never_change() -> None:
    pictures = draw([scene(seed) for seed in range(32)])
    assert sha256(pictures.tobytes()).hexdigest() == "4b90a841d61efacfb2cb4beef29f5a610aca961d27674e2652989a838fdbb360"


def test_colours_are_far_apart() -> None:
    assert min(dist(one, other) for one, other in choose(PALETTE.values(), 2)) >= 100


@settings(max_examples=40)
@given(st.integers(0, 2**63 - 1), st.sampled_from([32, 50, 64, 128]))
def test_objects_are_of_their_colour_on_their_background(seed: int, side: int) -> None:
    drawn = scene(seed)
    (picture,) = draw([drawn], side)
    assert picture.shape == (side, side, 3)
    assert picture.dtype == np.uint8
    frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (frame == PALETTE[drawn.background]).all()
    for thing in drawn.objects:
        # The left end of a ring's band, the middle of all others.
        x = thing.x - 0.7 * thing.radius if thing.shape == "ring" else thing.x
        assert tuple(picture[int(thing.y * side), int(x * side)]) == PALETTE[thing.colour]
        if thing.shape == "ring":
            assert tuple(picture[int(thing.y * side), int(thing.x * side)]) == PALETTE[drawn.background]


def test_objects_cut_by_the_border_and_overlapping_ones_are_drawn() -> None:
    middle = Thing("star", "red", 0.2, 0.5, 0.5)
    whole, cut, two = draw(
        [
            Scene("single", "white", (middle,)),
            Scene("single", "white", (Thing("star", "red", 0.2, 0.0, 0.5),)),
            Scene("pair", "white", (Thing("circle", "blue", 0.3, 0.5, 0.5), middle)),
        ]
    )
    assert np.array_equal(whole[:, 32:], cut[:, :32])
    inside = (whole == PALETTE["red"]).all(axis=-1)
    assert (two[inside] == PALETTE["red"]).all()
    assert ((two == PALETTE["blue"]).all(axis=-1)).sum() > 200
    outside = Scene("single", "white", (Thing("star", "red", 0.1, 5.0, -3.0),))
    assert (draw([outside]) == 255).all()


def test_repeated_drawing_gives_fresh_pictures() -> None:
    drawn = scene(1)
    first = draw([drawn])
    kept = first.copy()
    first[...] = 7
    assert np.array_equal(draw([drawn]), kept)


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_are_unlike_each_other_and_even(shape: str) -> None:
    places = np.linspace(-1.1, 1.1, 111)
    field = distance(shape, places[None, :], places[:, None])
    assert np.allclose(field, field[:, ::-1])
    assert (field[[0, -1]] > 0).all()
    assert (field[:, [0, -1]] > 0).all()
    # A signed distance changes by no more than the way gone.
    assert np.abs(np.diff(field, axis=0)).max() <= 0.02 + 1e-9
    for other in SHAPES:
        if other != shape:
            one, two = field < 0, distance(other, places[None, :], places[:, None]) < 0
            assert (one & two).sum() / (one | two).sum() < 0.85


def test_coverage_is_the_share_of_a_straight_edge() -> None:
    columns = np.array([[-5.5, -4.5, -4.2, -3.5, 0.0]])
    half = 0.84 * 5
    assert np.allclose(coverage("square", 5.0, columns, np.zeros((1, 1))), np.clip(half + columns + 0.5, 0, 1))


def test_a_batch_is_pictures_captions_and_scenes_of_its_seeds() -> None:
    pictures, captions, scenes = batch(100, 6, 32)
    assert pictures.shape == (6, 32, 32, 3)
    assert scenes == [training_scene(seed) for seed in range(100, 106)]
    tail_pictures, tail_captions, _ = batch(103, 3, 32)
    assert np.array_equal(tail_pictures, pictures[3:])
    assert tail_captions == captions[3:]
    assert batch(0, 6, 32, training=False)[2] == [scene(seed) for seed in range(6)]
    assert batch(0, 0)[0].shape == (0, 64, 64, 3)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="side is 4"):
        draw([scene(0)], 4)
    with pytest.raises(KeyError, match="blob"):
        draw([Scene("single", "white", (Thing("blob", "red", 0.2, 0.5, 0.5),))])


def test_the_world_needs_no_heavy_library() -> None:
    program = "import sys, gesso.worlds.shapes; print({'torch', 'PIL', 'scipy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
