"""The detector is exact on drawn scenes, sure on slightly spoilt ones, and refuses what is no shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageFilter

from gesso.worlds.shapes import PALETTE, SHAPES, Detection, Scene, Thing, detect, draw, scene
from gesso.worlds.shapes.components import label_components, thickened, thinned


def is_same(drawn: Scene, read: Detection) -> bool:
    """Say whether a detection is exactly the scene, places and sizes within a small tolerance."""
    left = list(read.objects)
    for thing in drawn.objects:
        match = [
            found
            for found in left
            if (found.shape, found.colour) == (thing.shape, thing.colour)
            and abs(found.x - thing.x) < 0.02
            and abs(found.y - thing.y) < 0.02
            and abs(found.radius / thing.radius - 1) < 0.1
        ]
        if len(match) != 1:
            return False
        left.remove(match[0])
    return read.background == drawn.background and not left


@pytest.mark.parametrize(("side", "count"), [(64, 600), (128, 150), (48, 100), (256, 20)])
def test_drawn_scenes_are_read_exactly(side: int, count: int) -> None:
    scenes = [scene(seed) for seed in range(count)]
    for drawn, picture in zip(scenes, draw(scenes, side), strict=True):
        read = detect(picture)
        assert is_same(drawn, read), (drawn, read)
        assert read.stray == 0.0


@pytest.mark.parametrize(("side", "count"), [(64, 400), (128, 100)])
def test_soft_and_noisy_scenes_are_read(side: int, count: int) -> None:
    scenes = [scene(seed) for seed in range(count)]
    generator = np.random.default_rng(5)
    right = 0
    for drawn, picture in zip(scenes, draw(scenes, side), strict=True):
        soft = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.7 * side / 64))
        noisy = np.clip(np.rint(np.asarray(soft) + generator.normal(0, 4, picture.shape)), 0, 255).astype(np.uint8)
        right += is_same(drawn, detect(noisy))
    assert right / count >= 0.995


def test_jpeg_is_read_and_pil_pictures_are_taken() -> None:
    from io import BytesIO

    for seed in range(50):
        drawn, buffer = scene(seed), BytesIO()
        Image.fromarray(draw([drawn], 128)[0]).save(buffer, "JPEG", quality=85)
        assert is_same(drawn, detect(Image.open(buffer)))


def single(picture: np.ndarray) -> Detection:
    read = detect(picture)
    assert len(read.objects) == 1
    return read


def lone(shape: str, colour: str = "red", background: str = "white") -> np.ndarray:
    return draw([Scene("single", background, (Thing(shape, colour, 0.3, 0.5, 0.5),))])[0]


@pytest.mark.parametrize("shape", ["triangle", "star", "heart"])
def test_shapes_upside_down_are_unknown(shape: str) -> None:
    assert single(lone(shape)[::-1].copy()).objects[0].shape == "unknown"


def test_blobs_are_unknown() -> None:
    """Wobbly outlines pass only where they come near a circle."""
    generator = np.random.default_rng(1)
    rows, columns = np.mgrid[:64, :64] + 0.5
    angle, far = np.arctan2(rows - 32, columns - 32), np.hypot(rows - 32, columns - 32)
    for _ in range(60):
        edge = 15.0 * (1 + 0.22 * np.cos(3 * angle + generator.uniform(0, 6)) + 0.22 * np.cos(5 * angle))
        cover = np.clip(edge - far + 0.5, 0, 1)[..., None]
        picture = np.rint(255 + cover * (np.array(PALETTE["red"]) - 255.0)).astype(np.uint8)
        assert [found.shape for found in detect(picture).objects] == ["unknown"]


@pytest.mark.parametrize(
    "pair", [("circle", "square"), ("star", "heart"), ("cross", "diamond"), ("square", "triangle")]
)
def test_shapes_between_two_are_unknown(pair: tuple[str, str]) -> None:
    half = np.concatenate([lone(pair[0])[:, :32], lone(pair[1])[:, 32:]], axis=1)
    assert single(half).objects[0].shape == "unknown"


def test_a_filled_or_broken_ring_is_no_ring() -> None:
    ring = lone("ring")
    filled, broken, stuffed = ring.copy(), ring.copy(), ring.copy()
    filled[24:40, 24:40] = PALETTE["red"]
    broken[:, 26:38] = PALETTE["white"]
    stuffed[24:40, 24:40] = PALETTE["blue"]
    assert single(filled).objects[0].shape != "ring"
    assert all(found.shape == "unknown" for found in detect(broken).objects)
    assert (single(stuffed).objects[0].shape, single(stuffed).objects[0].colour) != ("ring", "red")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_of_two_colours_has_none(shape: str) -> None:
    mixed = np.concatenate([lone(shape, "red")[:, :32], lone(shape, "blue")[:, 32:]], axis=1)
    assert single(mixed).objects[0].colour == "unknown"


def test_a_faded_colour_has_no_name() -> None:
    picture = lone("circle", "red", "black") // 2
    assert single(picture).objects[0].colour == "unknown"


def test_backgrounds_that_are_not_plain_are_unknown() -> None:
    picture = lone("circle")
    picture[:, :20] = PALETTE["blue"]
    assert detect(picture).background == "unknown"
    assert detect(np.full((64, 64, 3), 128, dtype=np.uint8)).background == "unknown"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert detect(noise) == Detection("unknown", (), 0.0)


def test_specks_are_stray_and_touching_objects_are_one() -> None:
    picture = lone("circle")
    picture[2:4, 2:5] = PALETTE["black"]
    read = single(picture)
    assert read.stray == 6 / 64**2
    touching = tuple(Thing("circle", "red", 0.2, x, 0.5) for x in (0.3, 0.66))
    assert single(draw([Scene("count", "white", touching)])[0]).objects[0].shape == "unknown"


def test_an_empty_picture_has_no_objects() -> None:
    assert detect(np.full((64, 64, 3), 255, dtype=np.uint8)) == Detection("white", (), 0.0)


@settings(max_examples=40)
@given(arrays.arrays(np.uint8, st.sampled_from([(16, 16, 3), (33, 33, 3)])))
def test_any_picture_can_be_read(picture: np.ndarray) -> None:
    assert 0.0 <= detect(picture).stray <= 1.0


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 32, 3), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((64, 64, 3), np.float32),
    ],
)
def test_other_arrays_are_refused(picture: np.ndarray) -> None:
    with pytest.raises(ValueError, match="it must be uint8"):
        detect(picture)


@pytest.mark.parametrize("shape", SHAPES)
def test_place_and_size_need_no_lattice(shape: str) -> None:
    thing = Thing(shape, "blue", 0.23, 0.437, 0.561)
    drawn = Scene("single", "yellow", (thing,))
    assert is_same(drawn, detect(draw([drawn])[0]))
    assert not is_same(replace(drawn, objects=(replace(thing, x=0.5),)), detect(draw([drawn])[0]))


@given(arrays.arrays(np.bool_, arrays.array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_components_agree_with_flood_filling(mask: np.ndarray) -> None:
    labels, count = label_components(mask)
    expected, number = np.zeros(mask.shape, dtype=np.int32), 0
    for row, column in np.argwhere(mask):
        if expected[row, column]:
            continue
        number += 1
        front = [(row, column)]
        while front:
            y, x = front.pop()
            inside = 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]
            if inside and mask[y, x] and not expected[y, x]:
                expected[y, x] = number
                front.extend((y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
    assert count == number
    assert np.array_equal(labels, expected)


def test_thinning_and_thickening() -> None:
    mask = np.zeros((5, 5), dtype=bool)
    mask[1:4, 1:4] = True
    assert np.argwhere(thinned(mask)).tolist() == [[2, 2]]
    assert thickened(thinned(mask)).sum() == 5
    assert thinned(np.ones((3, 3), dtype=bool)).sum() == 1
