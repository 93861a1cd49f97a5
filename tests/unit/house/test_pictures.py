"""Pictures that people hand in: read as they are meant to be seen, or refused on one line."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gesso import pictures
from gesso.errors import FileError
from gesso.pictures import read_pixels


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (80, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_pixels(tmp_path / "turned.jpg").size == (40, 80)


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_pixels(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
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
