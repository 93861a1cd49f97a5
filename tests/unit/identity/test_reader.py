"""Faces of photographs: which one counts, what is refused or warned of, what is remembered; and damaged packs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from gesso.errors import FileError, GessoError, MissingError
from gesso.identity import reader as reading
from gesso.identity.alignment import TEMPLATE, aligned, enlargement, similarity
from gesso.identity.detection import Detections, FaceDetector, faces_of
from gesso.identity.key_points import draw_key_points, fit_to_size
from gesso.identity.reader import FaceReader, likeness
from tests.tiny_infinite_you import PACK, PERSON, TinyRecogniser, tiny_faces


class Placed(FaceDetector):
    """Says of every picture that its faces are of these widths, side by side, upright."""

    def __init__(self, *widths: int) -> None:
        super().__init__(PACK)
        self.widths, self.looked = widths, 0

    def find(self, image_HW3: np.ndarray) -> Detections:
        self.looked += 1
        lefts = np.cumsum([0, *self.widths])[:-1]
        boxes = [[left, 0, left + width, width] for left, width in zip(lefts, self.widths, strict=True)]
        points = [TEMPLATE * width / 112 + [left, 0] for left, width in zip(lefts, self.widths, strict=True)]
        scores = np.linspace(0.9, 0.6, len(boxes), dtype=np.float32)
        return Detections(np.array(boxes, np.float32), scores, np.array(points, np.float32))


@pytest.fixture
def sharp(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "sharp.png")
    return tmp_path / "sharp.png"


def warned(detector: FaceDetector, path: Path) -> str:
    return " ".join(FaceReader(detector, TinyRecogniser).face(path).warnings)


def test_the_largest_face_is_used_and_said_so(sharp: Path) -> None:
    found = FaceReader(Placed(100, 150, 120), TinyRecogniser).face(sharp)
    assert found.points_52[0, 0] == pytest.approx(100 + TEMPLATE[0, 0] * 150 / 112)
    assert found.warnings == (f"{sharp}: shows 3 faces; the largest is used, crop the picture to choose another",)
    assert warned(Placed(150), sharp) == ""


def test_of_several_faces_in_a_pose_the_largest_counts_and_that_is_said(sharp: Path) -> None:
    detector = Placed(20, 60, 40)
    faces = FaceReader(detector, TinyRecogniser)
    for _ in range(2):
        picture, warnings = faces.pose(sharp, 400, 200)
        assert warnings == (f"{sharp}: shows 3 faces; the largest is used, crop the picture to choose another",)
        largest = draw_key_points((400, 200), (TEMPLATE * 60 / 112 + [20, 0]).astype(np.float32))
        assert np.array_equal(np.asarray(picture), np.asarray(largest))
    assert detector.looked == 1
    assert FaceReader(Placed(60), TinyRecogniser).pose(sharp, 400, 200).warnings == ()


def test_small_and_blurred_faces(sharp: Path, tmp_path: Path) -> None:
    assert "only 60 pixels wide, which costs likeness; use a photograph that shows one face" in warned(
        Placed(60), sharp
    )
    with pytest.raises(FileError, match=r"sharp\.png: its face is only 20 pixels wide, too few to know it by; use a "):
        FaceReader(Placed(20), TinyRecogniser).face(sharp)
    Image.open(sharp).filter(ImageFilter.GaussianBlur(9)).save(tmp_path / "blurred.png")
    assert "blurred.png: its face looks blurred, which costs likeness; use a " in warned(
        Placed(150), tmp_path / "blurred.png"
    )


def test_no_face_no_picture_too_large_a_picture(tmp_path: Path) -> None:
    faces = tiny_faces()
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    (tmp_path / "list.jpg").write_text("eggs, milk")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    Image.new("RGB", (900, 9)).save(tmp_path / "thread.png")
    for name, message in {
        "black.png": "shows no face that can be found; use a photograph that shows one face from the front",
        "list.jpg": "is no picture that can be read; use a png, webp or jpeg",
        "huge.png": "has more than 67 megapixels; make it smaller",
        "absent.png": "no such file",
    }.items():
        with pytest.raises(FileError, match=message):
            faces.face(tmp_path / name)
    with pytest.raises(FileError, match=r"shows no face .* or leave the pose out"):
        faces.pose(tmp_path / "black.png", 64, 64)
    with pytest.raises(FileError, match="is 900x9, too narrow for a pose; crop it"):
        faces.pose(tmp_path / "thread.png", 64, 64)


def test_what_a_camera_turned_is_turned_back(sharp: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    with Image.open(sharp) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    faces = FaceReader(Placed(150), TinyRecogniser)
    np.testing.assert_array_equal(faces.face(tmp_path / "turned.png").aligned_EE3, faces.face(sharp).aligned_EE3)


def test_faces_are_remembered_by_content_and_not_without_end(
    sharp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "KEPT", 2)
    detector = Placed(150)
    faces = FaceReader(detector, TinyRecogniser)
    shutil.copy(sharp, tmp_path / "copy.png")
    assert torch.equal(faces.vector(sharp), faces.vector(tmp_path / "copy.png")) and detector.looked == 1
    for shade in range(3):
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / f"{shade}.png")
        faces.vector(tmp_path / f"{shade}.png")
    assert len(faces._vectors) == 2
    faces.vector(sharp)
    assert detector.looked == 5
    assert likeness(faces.vector(sharp), faces.vector(sharp)) == pytest.approx(1)


def test_packs_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"for non-commercial research.*neither ships nor fetches.*antelopev2.zip"):
        FaceReader(FaceDetector(tmp_path / "antelopev2"), TinyRecogniser).face(PERSON)
    nested = tmp_path / "antelopev2" / "antelopev2"  # as the published archive unpacks
    nested.mkdir(parents=True)
    whole = (PACK / "fake_scrfd.onnx").read_bytes()
    for content in (b"", b"not a network", whole[:5000]):
        (nested / "scrfd_10g_bnkps.onnx").write_bytes(content)
        with pytest.raises(FileError, match=r"is damaged, or no SCRFD face detector .*; unpack") as caught:
            FaceReader(FaceDetector(tmp_path / "antelopev2"), TinyRecogniser).face(PERSON)
        assert isinstance(caught.value, GessoError) and "\n" not in str(caught.value)
    (nested / "scrfd_10g_bnkps.onnx").write_bytes(whole)
    assert FaceReader(FaceDetector(tmp_path / "antelopev2"), TinyRecogniser).face(PERSON).warnings


def test_outputs_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match="not three for every stride"):
        faces_of([np.zeros((8, 1))] * 2, 32, 1.0)
    with pytest.raises(ValueError, match="do not have one row an anchor"):
        faces_of([np.zeros((7, 1)), np.zeros((8, 4)), np.zeros((8, 10))], 16, 1.0)
    none = faces_of([np.zeros((8, 1)), np.zeros((8, 4)), np.zeros((8, 10))], 16, 1.0)
    assert len(none) == 0


def test_alignment_undoes_a_turn_and_refuses_a_point() -> None:
    angle, scale = np.deg2rad(30), 0.5
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = (TEMPLATE - [10, 20]) @ np.linalg.inv(turn).T
    matrix = similarity(moved.astype(np.float32))
    np.testing.assert_allclose(matrix, np.column_stack((turn, [10, 20])), atol=1e-4)
    assert enlargement(matrix) == pytest.approx(scale, abs=1e-5)
    with pytest.raises(ValueError, match="are one"):
        similarity(np.ones((5, 2), np.float32))
    assert aligned(np.full((4, 4, 3), 9, np.uint8), np.eye(2, 3))[:3, :3].tolist() == [[[9] * 3] * 3] * 3


def test_key_points_beyond_numbers_are_refused_and_narrow_pictures_fit() -> None:
    with pytest.raises(ValueError, match="not finite"):
        draw_key_points((8, 8), [[float("nan"), 0.0]] * 5)
    assert fit_to_size(Image.new("RGB", (1, 900)), 64, 32).size == (64, 32)
