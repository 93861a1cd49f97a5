"""Pictures that people hand in: read as they are meant to be seen, or refused on one line."""

from __future__ import annotations

import io
import os
import random
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from gesso import pictures
from gesso.errors import FileError
from gesso.pictures import cover_crop, read_pixels


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (80, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_pixels(tmp_path / "turned.jpg").size == (40, 80)


@pytest.mark.parametrize("orientation", range(10))
def test_all_ways_to_hold_a_camera(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = orientation  # 0 and 9 are none
    Image.fromarray(np.arange(90, dtype=np.uint8).reshape(5, 6, 3)).save(path, exif=exif)
    with Image.open(path) as opened:
        turned = ImageOps.exif_transpose(opened)
    made = read_pixels(path)
    assert (made.size, made.tobytes()) == (turned.size, turned.tobytes())


def odd_exif(*tags: tuple[int, int, bytes]) -> bytes:
    """EXIF of these tags, each with the number of its type and four bytes of value."""
    entries = b"".join(struct.pack(">HHI4s", tag, kind, 1, value) for tag, kind, value in tags)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("odd", "size"),
    [
        (odd_exif((0x0112, 3, b"\0\6"), (0x0128, 2, b"x")), (40, 80)),  # the unit of the resolution is a text
        (odd_exif((0x0112, 3, b"\0\6"), (0x011A, 2, b"x")), (40, 80)),  # so is the resolution
        (odd_exif((0x0112, 2, b"6")), (80, 40)),  # so is the orientation
        (odd_exif((0x0112, 3, b"\0\6"))[:18], (80, 40)),
        (b"Exif\0\0nothing of the kind", (80, 40)),
    ],
)
def test_exif_that_is_odd_or_damaged(tmp_path: Path, odd: bytes, size: tuple[int, int]) -> None:
    Image.new("RGB", (80, 40)).save(tmp_path / "odd.jpg", exif=odd)
    assert read_pixels(tmp_path / "odd.jpg").size == size


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif"])
def test_damage_is_refused_on_one_line_or_does_not_matter(tmp_path: Path, kind: str) -> None:
    if kind == "avif" and not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    exif = Image.Exif()
    exif.update({0x010E: "gesso:{}", 0x0112: 6, 0x011A: 72.0, 0x0128: 2})
    chance, whole, path = random.Random(7), io.BytesIO(), tmp_path / f"damaged.{kind}"
    Image.effect_mandelbrot((24, 16), (-2, -1, 1, 1), 20).convert("RGB").save(whole, kind, exif=exif)
    outcomes = set[str]()
    for number in range(120):
        damaged = bytearray(whole.getvalue())
        for _ in range(chance.randint(1, 6)):  # every other time near the beginning, where headers and EXIF lie
            damaged[chance.randrange(len(damaged) if number % 2 else 240)] = chance.randrange(256)
        path.write_bytes(damaged[: chance.randrange(len(damaged))] if number % 10 == 0 else damaged)
        for read in (read_pixels, pictures.record_text):
            try:
                read(path)
                outcomes.add("read")
            except FileError as error:
                outcomes.add("refused" if str(error).startswith(f"{path}: ") else str(error))
    assert outcomes == {"read", "refused"}


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_pixels(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert read_pixels(tmp_path / "clear.png", background="black").getpixel((0, 0)) == (0, 0, 0)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=bytes([128, 255]))
    assert read_pixels(tmp_path / "palette.png").getpixel((0, 0)) == (127, 127, 255)


def test_sixteen_bits_of_grey(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 30_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_pixels(tmp_path / "deep.png").getpixel((0, 0)) in {(116,) * 3, (117,) * 3}


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (200, 200)).save(tmp_path / "large.png")
    for most in (39_999, 20_001, 10_000):  # a warning of Pillow's, nearly its error, and its error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with warnings.catch_warnings(), pytest.raises(FileError, match=r"large\.png: cannot be read"):
            read_pixels(tmp_path / "large.png")


def test_a_hundred_megapixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    with pytest.raises(FileError, match=r"huge\.png: cannot be read: it has more than 67 megapixels; make it smaller"):
        read_pixels(tmp_path / "huge.png")


def test_what_is_no_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.png").write_text("a shopping list", encoding="utf-8")
    Image.new("RGB", (8, 8)).save(tmp_path / "page.eps")  # Pillow reads it by starting another program
    for name in ("notes.png", "page.eps"):
        with pytest.raises(FileError, match=f"{name}: is no picture that can be read; use a png, webp or jpeg"):
            read_pixels(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(FileError, match=r"pipe\.png: is no plain file"):
        read_pixels(tmp_path / "pipe.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "heavy.png")
    monkeypatch.setattr(pictures, "LARGEST_FILE", 16)
    with pytest.raises(FileError, match=r"heavy\.png: is larger than 0 MiB; make it smaller"):
        read_pixels(tmp_path / "heavy.png")


def test_a_strip_is_not_scaled_to_what_no_memory_holds() -> None:
    with pytest.raises(FileError, match=r"^image: has 60000x1 pixels, .* to cover 1024x1024; crop it first$"):
        cover_crop(Image.new("L", (60_000, 1)), 1024, 1024, "image")
    assert cover_crop(Image.new("L", (600, 10)), 64, 64).size == (64, 64)
