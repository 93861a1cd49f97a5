"""Pixels and key points of the faces world."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.worlds import faces
from gesso.worlds.faces import Portrait
from gesso.worlds.faces.drawing import PALETTE, SHIRT_COLOURS
from gesso.worlds.faces.identities import BEARDS, GLASSES, HAIR_COLOURS, HAIRSTYLES, SKINS


def _plain(seed: int, **fields: object) -> Portrait:
    """Ahead, calm, upright, so that one thing alone differs."""
    values: dict[str, object] = {"facing": "ahead", "expression": "calm", "tilt": 0, "x": 0.5, "y": 0.5, "size": 0.3}
    return replace(faces.portrait(seed), **(values | fields))  # type: ignore[arg-type]


def test_pictures_never_change() -> None:
    pictures = faces.draw([faces.portrait(seed) for seed in range(32)])
    assert sha256(pictures.tobytes()).hexdigest() == "06af1bf3cf4038ddba3c0a87240556ee1556c696e8bd608ab007ea15dd3ec747"


@settings(max_examples=25)
@given(st.integers(0, 2**63 - 1), st.sampled_from([32, 64, 96]))
def test_a_portrait_is_on_its_ground_in_its_shirt(seed: int, side: int) -> None:
    drawn = _plain(seed)
    (picture,) = faces.draw([drawn], side)
    assert picture.shape == (side, side, 3) and picture.dtype == np.uint8
    assert tuple(picture[0, 0]) == PALETTE[drawn.background]
    assert tuple(picture[-1, side // 4]) == SHIRT_COLOURS[drawn.shirt]


def test_every_parameter_of_a_person_is_seen() -> None:
    """Short lists in colours and outlines; the steps of lengths too, where nothing covers them."""
    base = replace(
        _plain(3),
        person=replace(faces.identity(3), glasses="none", beard="none", hair="short", freckled=False, rosy=False),
    )
    (before,) = faces.draw([base]).astype(int)
    changes: dict[str, tuple[object, ...]] = {
        "skin": SKINS,
        "hair": HAIRSTYLES,
        "hair_colour": HAIR_COLOURS,
        "beard": tuple(dict.fromkeys(BEARDS)),
        "glasses": tuple(dict.fromkeys(GLASSES)),
        "freckled": (False, True),
        "rosy": (False, True),
        "head_width": (0.74, 0.86, 0.98),
        "jaw": (0.0, 0.5, 1.0),
        "eye_size": (0.17, 0.26),
        "eye_spacing": (0.33, 0.43),
        "brow_weight": (0.035, 0.08),
        "brow_slope": (-0.08, 0.08),
        "nose_width": (0.09, 0.19),
        "nose_length": (0.20, 0.36),
        "mouth_width": (0.26, 0.40),
        "lip": (0.03, 0.06),
        "ear": (0.14, 0.24),
    }
    for field, values in changes.items():
        people = [replace(base.person, **{field: value}) for value in values]  # type: ignore[arg-type]
        pictures = faces.draw([replace(base, person=person) for person in people]).astype(int)
        digests = {picture.tobytes() for picture in pictures}
        assert len(digests) == len(values), field
        assert np.abs(pictures - before).max() > 20, field


def test_key_points_lie_on_what_they_name() -> None:
    """Pupils are dark where glasses hide nothing, and a mirrored face has mirrored points."""
    seen = 0
    for seed in range(60):
        drawn = faces.portrait(seed)
        points_52 = faces.key_points(drawn)
        assert points_52.shape == (5, 2) and (points_52 > 0).all() and (points_52 < 1).all()
        left, right, nose, mouth_left, mouth_right = points_52
        assert left[0] < right[0] and mouth_left[0] < mouth_right[0]
        assert max(left[1], right[1]) < nose[1] < max(mouth_left[1], mouth_right[1])
        if drawn.person.glasses == "none" and drawn.facing == "ahead" and drawn.expression != "laughing":
            side = 256
            (picture,) = faces.draw([drawn], side)
            assert all(picture[int(y * side), int(x * side)].max() < 80 for x, y in (left, right))
            seen += 1
    assert seen > 5
    one = _plain(1, facing="left", tilt=5)
    mirrored = faces.key_points(replace(one, facing="right", tilt=-5))
    mirrored[:, 0] = 1 - mirrored[:, 0]
    np.testing.assert_allclose(mirrored[[1, 0, 2, 4, 3]], faces.key_points(one), atol=1e-9)


def test_heads_partly_outside_are_drawn() -> None:
    away = replace(_plain(1), x=3.0, y=-2.0)
    (picture,) = faces.draw([away])
    assert (picture == PALETTE[away.background]).all()
    (cut, whole) = faces.draw([_plain(1, x=0.0), _plain(1)])
    assert np.array_equal(cut[:, :32], whole[:, 32:])


def test_bad_sides_are_named() -> None:
    with pytest.raises(ValueError, match="side is 8"):
        faces.draw([faces.portrait(0)], 8)


def test_the_world_needs_no_heavy_library() -> None:
    program = "import sys, gesso.worlds.faces; print({'torch', 'PIL', 'scipy', 'cv2'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
