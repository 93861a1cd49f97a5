"""LPIPS: the paper's equation in a plain form, files as they are published, and what is not there or something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gesso.errors import WeightsError
from gesso.evaluation.caches import Bench
from gesso.evaluation.lpips import FEATURES, LAYERS, load_lpips, lpips
from gesso.request import GenerationRequest
from tests.tiny_flux import tiny_pipeline

SHAPES = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights by the names and shapes of the published ones."""
    generator = torch.Generator().manual_seed(0)
    features: dict[str, Tensor] = {"classifier.1.weight": torch.zeros(2, 2)}
    layers: dict[str, Tensor] = {}
    for number, (place, shape) in enumerate(SHAPES.items()):
        features[f"features.{place}.weight"] = torch.randn(shape, generator=generator) * shape[1] ** -0.5 / shape[2]
        features[f"features.{place}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
        layers[f"lin{number}.model.1.weight"] = torch.rand(1, shape[0], 1, 1, generator=generator)
    home = tmp_path_factory.mktemp("home")
    folder = home / "weights/lpips"
    folder.mkdir(parents=True)
    torch.save(features, folder / FEATURES)
    torch.save(layers, folder / LAYERS)
    return home


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    data = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed)).byte()
    return Image.fromarray(data.numpy())


def plain(home: Path, one: Image.Image, other: Image.Image) -> float:
    """Layer by layer and cell by cell, in float64."""
    features, layers = (torch.load(home / "weights/lpips" / name, weights_only=True) for name in (FEATURES, LAYERS))
    total, both = 0.0, []
    for image in (one, other):
        values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).double()
        x = values.view(image.height, image.width, 3).permute(2, 0, 1)[None] / 127.5 - 1
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        both.append((x - shift.double().view(1, 3, 1, 1)) / scale.double().view(1, 3, 1, 1))
    for number, place in enumerate(SHAPES):
        if place in (3, 6):
            both = [F.max_pool2d(x, 3, 2) for x in both]
        weight, bias = (features[f"features.{place}.{name}"].double() for name in ("weight", "bias"))
        stride, padding = (4, 2) if place == 0 else (1, weight.shape[-1] // 2)
        both = [F.conv2d(x, weight, bias, stride, padding).clamp(min=0) for x in both]
        cells = [x[0].flatten(1).T for x in both]
        learned = layers[f"lin{number}.model.1.weight"].double().flatten()
        distances = [
            float((learned * (a / a.norm() - b / b.norm()).square()).sum()) for a, b in zip(*cells, strict=True)
        ]
        total += sum(distances) / len(distances)
    return total


def test_it_is_the_papers_equation(home: Path) -> None:
    """Against the authors' own package too, by hand: equal to seven digits with its published layers."""
    network = load_lpips(home)
    assert network is not None
    for size in ((64, 48), (35, 90)):
        one, other = picture(1, size), picture(2, size)
        assert lpips(network, one, other) == pytest.approx(plain(home, one, other), rel=1e-4)
    assert lpips(network, picture(1), picture(1)) == 0
    assert lpips(network, picture(1, (8, 64)), picture(2, (8, 64))) > 0  # too small for its last layer as they are


def test_without_weights_there_is_none_and_broken_ones_are_named(home: Path, tmp_path: Path) -> None:
    assert load_lpips(tmp_path) is None
    folder = tmp_path / "weights/lpips"
    folder.mkdir(parents=True)
    (folder / FEATURES).write_bytes((home / "weights/lpips" / FEATURES).read_bytes())
    assert load_lpips(tmp_path) is None
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, folder / LAYERS)
    with pytest.raises(WeightsError, match=r"weights\.1\.weight"):
        load_lpips(tmp_path)


def test_a_bench_measures_it_where_it_is_there(home: Path) -> None:
    bench = Bench(pipeline=tiny_pipeline(), requests=[GenerationRequest(prompt="a red star", steps=4, seed=1)])
    known = {"digest": "none", "device": "cpu", "dtype": "float32", "hardware": "any"}
    assert bench.point(bench.plain, "", **known).lpips is None
    bench.lpips = load_lpips(home)
    assert bench.point(bench.plain, "", **known).lpips == 0
    assert (bench.point(bench.paint_all(steps=2), "", **known).lpips or 0) > 0
