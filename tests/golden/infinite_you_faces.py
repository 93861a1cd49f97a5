"""InfiniteYou goldens of faces: detection, alignment and embedding, key points, and fitting a pose picture."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from gesso.identity import alignment
from gesso.identity.detection import Detections, FaceDetector, faces_of, letterbox, network_input
from gesso.identity.key_points import draw_key_points, fit_to_size
from gesso.identity.libraries import onnxruntime
from gesso.identity.reader import blue_first
from gesso.models.arcface import ArcFace
from tests.golden.comparison import Comparison
from tests.golden.infinite_you_network import filled
from tests.golden.side_car import BrokenGoldenError, Golden, SideCar, view
from tests.golden.z_image_network import by_recipe


class DetectorCase(SideCar):
    """Tensors of case n begin with `d<n>.`."""

    case: int
    det_size: int
    n_faces: int
    chosen_index: int | None = None
    blob_stored: str = "full"


class FakeCase(SideCar):
    det_size: int
    faces: int
    chosen: int | None = None


class PointsCase(SideCar):
    size_w_h: tuple[int, int]
    points_le_re_nose_lm_rm: list[tuple[float, float]]
    nonzero_pixels: int | None = None


class PadCase(SideCar):
    src: str
    out: str
    target_w_h: tuple[int, int]


class EmbeddingSideCar(SideCar):
    seed: int | None = None
    template_112: list[tuple[float, float]] | None = None
    checks: dict[str, list[float]] = Field(default_factory=dict)
    parameters: int | None = None


def _cases(golden: Golden, kind: type[SideCar]) -> list[tuple[str, SideCar]]:
    """The side-car's cases with their names, or their numbers."""
    stated = golden.data.get("cases")
    named = list(stated.items()) if isinstance(stated, dict) else list(enumerate(stated or []))  # pyright: ignore
    if not named:
        raise BrokenGoldenError("side-car has no cases")
    return [(str(name), view(case, kind, f"cases.{name}.")) for name, case in named]


# ---- detection ------------------------------------------------------------------------------------------------------


def check_detector(golden: Golden, comparison: Comparison) -> None:
    """The network's input, exactly; boxes, scores and points of recorded outputs; the face that is chosen."""
    pixels = golden.tolerances.get("floats", default=0.5)
    for _, case in _cases(golden, DetectorCase):
        assert isinstance(case, DetectorCase)
        name = f"d{case.case}"
        canvas, scale = letterbox(golden.tensor(f"{name}.image_bgr_hwc").numpy(), case.det_size)
        given = network_input(canvas)
        if every := re.search(r"every (\d+)", case.blob_stored):
            given = given[..., :: int(every[1]), :: int(every[1])]
        comparison.close(f"{name}.blob", torch.from_numpy(given.copy()), golden.tensor(f"{name}.blob"), 1e-6)
        recorded = sorted(
            (key for key in golden.tensors if re.fullmatch(rf"{name}\.raw\d+", key)),
            key=lambda key: int(key.rpartition("raw")[2]),
        )
        found = faces_of([golden.tensor(key).numpy() for key in recorded], case.det_size, scale)
        _compare(golden, comparison, found, (f"{name}.det", f"{name}.kps"), case.n_faces, pixels)
        _compare_chosen(comparison, found, case.chosen_index, name)


def check_fake_detector(golden: Golden, comparison: Comparison) -> None:
    """A made-up network through onnxruntime, picture to faces, at every size; and the first size that has any."""
    image = _picture(golden, str(golden.data.get("image", "")).split(" ")[0])
    path = golden.path.with_suffix(".onnx")
    if not path.is_file():
        raise BrokenGoldenError(f"{path.name} is missing")
    session = onnxruntime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pixels = golden.tolerances.get("floats", default=0.5)
    first: tuple[FakeCase, Detections] | None = None
    for _, case in _cases(golden, FakeCase):
        assert isinstance(case, FakeCase)
        canvas, scale = letterbox(image, case.det_size)
        outputs = session.run(None, {session.get_inputs()[0].name: network_input(canvas)})
        found = faces_of(outputs, case.det_size, scale)
        size = case.det_size
        _compare(golden, comparison, found, (f"det{size}", f"kps{size}"), case.faces, pixels)
        _compare_chosen(comparison, found, case.chosen, f"{size}")
        if len(found) and (first is None or size > first[0].det_size) and size in (640, 320, 160):
            first = case, found
    if first is not None:
        cascade = _Detector(path).find(image)
        detail = f"{len(cascade)} faces where size {first[0].det_size} finds {len(first[1])}"
        same = len(cascade) == len(first[1]) and bool(np.allclose(cascade.boxes_N4, first[1].boxes_N4))
        comparison.true("the first size with a face", same, detail)


class _Detector(FaceDetector):
    """A detector whose file is known."""

    def require(self) -> Path:
        return self.pack


def _compare(
    golden: Golden, comparison: Comparison, found: Detections, names: tuple[str, str], count: int, pixels: float
) -> None:
    """Boxes, scores and points; where no face is wanted there is nothing to compare but that."""
    comparison.true(f"{names[0]}: faces", len(found) == count, f"{len(found)} faces, not {count}")
    if count:
        recorded = golden.tensor(names[0])
        comparison.close(names[0], torch.from_numpy(found.boxes_N4), recorded[:, :4], pixels)
        comparison.close(f"{names[0]}: scores", torch.from_numpy(found.scores_N), recorded[:, 4], 1e-4)
        comparison.close(names[1], torch.from_numpy(found.points_N52), golden.tensor(names[1]), pixels)


def _compare_chosen(comparison: Comparison, found: Detections, chosen: int | None, name: str) -> None:
    if chosen is not None and len(found):
        comparison.true(f"{name}: chosen", found.largest == chosen, f"face {found.largest}, not {chosen}")


def _picture(golden: Golden, name: str) -> NDArray[np.uint8]:
    return blue_first(_image(golden, name))


def _image(golden: Golden, name: str) -> Image.Image:
    path = golden.path.with_name(name)
    if not name or not path.is_file():
        raise BrokenGoldenError(f"{name or 'image'} is missing")
    return Image.open(path).convert("RGB")


# ---- embedding ------------------------------------------------------------------------------------------------------


def check_embedding(golden: Golden, comparison: Comparison) -> None:
    """Points to similarity, to the aligned face, to the vector: each from what was recorded before it."""
    side_car = golden.view(EmbeddingSideCar)
    stated = golden.tolerances
    if side_car.template_112 is not None:
        comparison.close("template", torch.from_numpy(alignment.TEMPLATE), torch.tensor(side_car.template_112), 1e-4)
    network = _recogniser(golden, comparison, side_car)
    for name in sorted(name for name in golden.tensors if re.fullmatch(r"landmarks\d+", name)):
        number = name.removeprefix("landmarks")
        matrix = alignment.similarity(golden.tensor(name).numpy())
        if f"matrix{number}" in golden.tensors:
            recorded = golden.tensor(f"matrix{number}")
            comparison.close(f"matrix{number}", torch.from_numpy(matrix), recorded, stated.get("matrix", default=1e-5))
            matrix = recorded.double().numpy()
        crop = golden.tensor(f"crop{number}_bgr_hwc")
        face = alignment.aligned(golden.tensor("image_bgr_hwc").numpy(), matrix)
        comparison.close(f"crop{number}", torch.from_numpy(face), crop, stated.get("crop_uint8", default=4))
        if network is not None and f"embedding{number}" in golden.tensors:
            with torch.inference_mode():
                vector = network(alignment.face_input(crop.numpy()))[0]
            recorded = golden.tensor(f"embedding{number}")
            comparison.close(f"embedding{number}", vector, recorded, stated.get("atol", default=5e-5))


def _recogniser(golden: Golden, comparison: Comparison, side_car: EmbeddingSideCar) -> ArcFace | None:
    """The recogniser with the recipe's weights, of which some are stated."""
    if side_car.seed is None:
        return None
    network = ArcFace()
    state = by_recipe(network, side_car.seed)
    for name, first in side_car.checks.items():
        values = state[name].flatten()[: len(first)] if name in state else torch.full((len(first),), torch.nan)
        comparison.close(name, values, torch.tensor(first), 1e-6)
    if side_car.parameters is not None:
        count = sum(parameter.numel() for parameter in network.parameters())
        comparison.true("parameters", count == side_car.parameters, f"{count}, not {side_car.parameters}")
    return filled(network, state, golden.path.name)


# ---- pictures -------------------------------------------------------------------------------------------------------


def check_key_points(golden: Golden, comparison: Comparison) -> None:
    """The drawn picture, to the pixel."""
    pixels = golden.tolerances.get("uint8", default=0)
    for name, case in _cases(golden, PointsCase):
        assert isinstance(case, PointsCase)
        drawn = draw_key_points(case.size_w_h, case.points_le_re_nose_lm_rm)
        _compare_pictures(comparison, name, drawn, _image(golden, f"{golden.path.stem}_{name}.png"), pixels)
        if case.nonzero_pixels is not None:
            lit = int((np.asarray(drawn) > 0).any(axis=-1).sum())
            comparison.true(f"{name}: lit", lit == case.nonzero_pixels, f"{lit}, not {case.nonzero_pixels}")


def check_fitting(golden: Golden, comparison: Comparison) -> None:
    """The fitted picture, to the pixel."""
    pixels = golden.tolerances.get("uint8", default=0)
    for _, case in _cases(golden, PadCase):
        assert isinstance(case, PadCase)
        fitted = fit_to_size(_image(golden, case.src), *case.target_w_h)
        _compare_pictures(comparison, case.out, fitted, _image(golden, case.out), pixels)


def _compare_pictures(
    comparison: Comparison, name: str, drawn: Image.Image, recorded: Image.Image, tolerance: float
) -> None:
    ours, theirs = (torch.from_numpy(np.array(image)) for image in (drawn, recorded))
    comparison.close(name, ours, theirs, tolerance)
