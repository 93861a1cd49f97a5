"""The goldens in `data/` through the runner, each a test of its own, and what a seed draws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gesso.sampling.bits import exponential_noise
from tests.golden.runner import run
from tests.golden.side_car import read_golden

DATA = Path(__file__).with_name("data")
STEP_CACHE = DATA / "step-cache"
FOLDERS = sorted(path for path in DATA.iterdir() if any(path.glob("*.safetensors")) and path != STEP_CACHE)
LARGEST_DATA = 13 * 2**20  # of the whole project


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_goldens(folder: Path) -> None:
    rows = list(run(folder))
    assert len(rows) == len(list(folder.glob("*.json")))
    assert {row.file: row.note for row in rows if row.outcome != "yes"} == {}


def test_step_cache_goldens() -> None:
    """In a process of its own, where MKL can still be told to compute as it did where these were recorded."""
    command = [sys.executable, "-m", "tests.golden", str(STEP_CACHE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    count = len(list(STEP_CACHE.glob("*.json")))
    assert done.stdout.splitlines()[-1:] == [f"{count} goldens: {count} ok, 0 failed, 0 not yet"], done.stdout


def test_every_kind_of_this_stage_is_among_them() -> None:
    kinds = {row.kind.split(":")[0] for row in run(DATA / "infinity")}
    assert kinds == {f"infinity {letter}" for letter in "abcdefghj"}


def test_every_kind_of_z_image_is_among_them() -> None:
    goldens = [read_golden(path) for path in (DATA / "z-image").glob("*.json")]
    kinds = {f"{golden.family} {golden.kind}".removeprefix("z-image ") for golden in goldens if golden is not None}
    networks = {f"{part}_{what}" for part in ("tiny_transformer", "tiny_vae") for what in ("weights", "io")}
    parts = {"attention", "embeddings", "scheduler", "text_features", "loops"}
    names = {"names ZImageTransformer2DModel", "names AutoencoderKL"}
    assert kinds == networks | parts | names | {"manifest-cases", "wide_transformer_io", "omni_transformer_io"}


def test_every_kind_of_infinite_you_is_among_them() -> None:
    goldens = [read_golden(path) for path in (DATA / "infiniteyou").glob("*.json")]
    kinds = {golden.kind for golden in goldens if golden is not None}
    faces = {"face_embedding", "fake_scrfd", "keypoints", "pad"}
    networks = {"resampler", "injection", "loops", "schedules", "quantization"}
    weights = {f"tiny_{part}_weights" for part in ("flux", "infusenet", "vae")}
    names = {"FluxControlNetModel", "image_proj_model.bin", "recognition_arcface_ir_se50.pth"}
    assert kinds == faces | networks | weights | names  # outputs of a detector alone are too large


def test_a_seed_draws_what_the_reference_drew() -> None:
    """The recorded noise of every scale from the recorded seed, by the product's own generator."""
    golden = read_golden(DATA / "infinity/e_ar_d16_h1.000_sampled_default.json")
    assert golden is not None
    generator = torch.Generator().manual_seed(int(str(golden.data["g_seed"])))
    recorded = [golden.tensors[name] for name in sorted(golden.tensors) if name.endswith(".exp_noise")]
    assert len(recorded) == 7
    for noise_1nV in recorded:
        _, tokens, width = noise_1nV.shape
        torch.testing.assert_close(exponential_noise(tokens, width // 2, generator)[None], noise_1nV)


def test_data_stay_small() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < LARGEST_DATA
