"""Parts that two pipelines have in common are held once, placed once, and go with the last of the two."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gesso.engine import Engine
from gesso.engine.budget import weights_bytes
from gesso.engine.loading import load_pipeline
from gesso.errors import FileError
from gesso.models import components
from gesso.request import GenerationRequest
from gesso.weights import digests, manifest
from tests.tiny_flux import write_tiny_flux
from tests.tiny_z_image import write_published


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two FLUX that differ in their transformers' weights, as dev and schnell do, and in what writers leave behind."""
    first = write_tiny_flux(tmp_path_factory.mktemp("models") / "dev")
    second = Path(shutil.copytree(first, first.parent / "schnell"))
    path = second / "transformer/diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    for part in ("vae", "text_encoder", "text_encoder_2"):
        config = second / part / "config.json"
        remarks = {"_name_or_path": "elsewhere"}
        remarks |= {"_diffusers_version": "0.1"} if part == "vae" else {"transformers_version": "5.0.0"}
        config.write_text(json.dumps(json.loads(config.read_text()) | remarks))
    return first, second


def load(folder: Path, dtype: str = "float32") -> Any:
    return load_pipeline(str(folder), "cpu", dtype)


def test_what_is_equal_is_held_once(pair: tuple[Path, Path]) -> None:
    one, other = (load(folder) for folder in pair)
    assert one.autoencoder is other.autoencoder
    assert one.text.clip is other.text.clip
    assert one.text.t5 is other.text.t5
    assert one.transformer is not other.transformer
    assert weights_bytes([one, other]) < 2 * weights_bytes([one])
    assert load(pair[0]).transformer is one.transformer


def test_it_goes_with_the_last_that_has_it(pair: tuple[Path, Path]) -> None:
    one, other = (load(folder) for folder in pair)
    shared, own = weakref.ref(one.autoencoder), weakref.ref(one.transformer)
    del one
    gc.collect()
    assert own() is None and shared() is other.autoencoder
    del other
    gc.collect()
    assert shared() is None


def test_what_differs_is_not_shared(pair: tuple[Path, Path]) -> None:
    one = load(pair[0])
    assert load(pair[0], "bfloat16").autoencoder is not one.autoencoder
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(load(pair[0])))
    thread.start()
    thread.join()
    assert found[0].autoencoder is not one.autoencoder
    config = pair[1] / "vae/config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"force_upcast": False}))
    try:
        assert load(pair[1]).autoencoder is not one.autoencoder
    finally:
        config.write_text(before)


def test_a_picture_is_the_same_whether_its_parts_are_shared(pair: tuple[Path, Path]) -> None:
    requests = [
        GenerationRequest(prompt="a star", model=str(path), seed=3, width=32, height=32, steps=2, deterministic=True)
        for path in pair
    ]
    apart = []
    for request in requests:
        with Engine(device="cpu") as engine:
            apart += engine.run(request)
    with Engine(device="cpu") as engine:
        together = engine.run(requests)
    assert [one.image.tobytes() for one in together] == [one.image.tobytes() for one in apart]


def test_a_part_is_offered_when_its_model_is_whole(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The text encoder of a model that could not be put together is not handed on."""
    broken = Path(shutil.copytree(pair[0], tmp_path / "broken"))
    config = broken / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latent_channels": 5}))
    with pytest.raises(Exception, match="weights do not fit"):
        load(broken)
    made: list[nn.Module] = []
    source = pair[0] / "vae/diffusion_pytorch_model.safetensors"

    def make() -> nn.Module:
        made.append(nn.Linear(2, 2))
        return made[-1]

    def unlucky() -> None:
        with components.held_once("here", digests.sha256):
            components.shared(source, "Linear", torch.float32, make)
            raise FileError(source, "does not fit")

    with pytest.raises(FileError):
        unlucky()
    with components.held_once("here", digests.sha256):
        part = components.shared(source, "Linear", torch.float32, make)
        assert not components.is_placed(part)
        assert components.shared(source, "Linear", torch.float32, make) is part
    with components.held_once("here", digests.sha256):
        assert components.is_placed(components.shared(source, "Linear", torch.float32, make))
    assert len(made) == 2
    assert components.shared(source, "Linear", torch.float32, make) is not part


def test_z_image_shares_its_reader_of_prompts(tmp_path: Path) -> None:
    one = write_published(tmp_path / "one")
    other = Path(shutil.copytree(one, tmp_path / "other"))
    first, second = load(one), load(other)
    assert first.text.network is second.text.network
    assert first.text is not second.text
    assert first.autoencoder is second.autoencoder


def test_models_of_our_own(tiny_infinity: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_infinity, tmp_path / "other"))
    weights = load_file(other / "transformer.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, other / "transformer.safetensors")
    (other / manifest.NAME).write_text(json.dumps(manifest.make(other)))
    first, second = load(tiny_infinity), load(other)
    assert first.text is second.text
    assert first.autoencoder is second.autoencoder
    assert first.transformer is not second.transformer


def test_no_file_is_hashed_twice(tiny_infinity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on one loading nor on the next, as long as it is not written to."""
    model = Path(shutil.copytree(tiny_infinity, tmp_path / "model"))
    hashed: list[int] = []
    real = hashlib.file_digest

    def counted(file: Any, kind: str) -> Any:
        hashed.append(file.fileno() and Path(file.name).stat().st_ino)
        return real(file, kind)

    monkeypatch.setattr(digests, "_TICK", 0)
    monkeypatch.setattr(hashlib, "file_digest", counted)
    load(model)
    load(model)
    assert hashed
    assert len(hashed) == len(set(hashed))
