"""Memory modes put into force: pictures of every mode, what is there while a part works, and networks left as found.

Models are tiny and random, in the official layout, or the nano model that ships.
"""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gesso.engine.engine import Engine
from gesso.engine.loading import load_pipeline
from gesso.errors import MissingError, RequestError, WeightsError
from gesso.memory_modes import EXACT, MemoryMode, parse_mode
from gesso.request import GenerationRequest
from gesso.weights.placing import place
from gesso.weights.quantize import Int8Linear
from tests import tiny_flux, tiny_z_image
from tests.oracle import run_plainly

TORCHAO = importlib.util.find_spec("torchao") is not None
PLACEMENTS = [str(mode) for mode in EXACT if mode.placement != "full"]


@pytest.fixture(autouse=True)
def _nothing_is_shared_with_another_test() -> None:
    gc.collect()  # models hold each other's parts by their hooks, in circles


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_z_image.write_published(tmp_path_factory.mktemp("z") / "image")


@pytest.fixture
def models(flux: Path, z_image: Path) -> dict[str, str]:
    return {"flux": str(flux), "z-image": str(z_image), "infinity": "infinity-nano"}


def _picture(pipeline: Any, **fields: object) -> bytes:
    asked = {"prompt": "a red star", "seed": 7, "num_images": 2, **fields}
    own = {"guidance": 2.0} if pipeline.name == "infinity-nano" else {"steps": 2, "width": 64, "height": 64}
    request = GenerationRequest.model_validate({**own, **asked})
    return b"".join(output.image.tobytes() for output in run_plainly(pipeline, request))


@pytest.mark.parametrize("name", ["flux", "z-image", "infinity"])
def test_every_placement_paints_the_same_bits(models: dict[str, str], name: str) -> None:
    whole = _picture(load_pipeline(models[name], "cpu", "float32", memory="full"))
    for mode in PLACEMENTS:
        pipeline = load_pipeline(models[name], "cpu", "float32", memory=mode)
        assert _picture(pipeline) == whole, mode
        assert _picture(pipeline) == whole, f"{mode}, again"


@pytest.mark.parametrize("name", ["flux", "z-image"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_cast_while_it_is_read_paints_the_same_bits(models: dict[str, str], name: str, dtype: str) -> None:
    whole = _picture(load_pipeline(models[name], "cpu", dtype, memory="full"))
    assert _picture(load_pipeline(models[name], "cpu", dtype, memory="group-offload")) == whole


def test_parts_are_there_only_while_they_work(flux: Path) -> None:
    pipeline: Any = load_pipeline(str(flux), "cpu", "float32", memory="model-offload")
    assert not any(_is_there(network) for network in _networks(pipeline))
    there: dict[str, list[str]] = {}
    for network in _networks(pipeline):
        name = type(network).__name__
        inner: Any = network.decoder if name == "AutoencoderKL" else network
        inner.register_forward_hook(
            lambda *_, name=name: there.__setitem__(
                name, [type(each).__name__ for each in _networks(pipeline) if _is_there(each)]
            )
        )
    _picture(pipeline, num_images=1)
    assert there == {name: [name] for name in there}
    assert set(there) == {"CLIPTextModel", "T5EncoderModel", "FluxTransformer2DModel", "AutoencoderKL"}


def test_offload_keeps_readers_and_painters_apart(flux: Path) -> None:
    pipeline: Any = load_pipeline(str(flux), "cpu", "float32", memory="offload")
    request = GenerationRequest(prompt="a red star", seed=1, steps=2, width=64, height=64)
    plan = pipeline.plan(request)
    (conditioning,) = pipeline.encode([plan])
    assert [_is_there(each) for each in _networks(pipeline)] == [True, True, False, False]
    pipeline.step([pipeline.begin(plan, conditioning, 0)])
    assert [_is_there(each) for each in _networks(pipeline)] == [False, False, True, False]


def test_one_block_is_there_at_a_time(z_image: Path) -> None:
    pipeline: Any = load_pipeline(str(z_image), "cpu", "float32", memory="group-offload")
    blocks = [*pipeline.transformer.noise_refiner, *pipeline.transformer.context_refiner, *pipeline.transformer.layers]
    most: list[int] = []
    for block in blocks:
        block.register_forward_hook(lambda *_: most.append(sum(_is_there(each) for each in blocks)))
    _picture(pipeline, num_images=1)
    assert set(most) == {1}


def test_what_is_away_looks_as_it_did_and_cannot_paint(flux: Path) -> None:
    pipeline: Any = load_pipeline(str(flux), "cpu", "bfloat16", memory="model-offload")
    whole: Any = load_pipeline(str(flux), "cpu", "bfloat16", memory="full")
    for (name, away), (_, there) in zip(
        pipeline.transformer.named_parameters(), whole.transformer.named_parameters(), strict=True
    ):
        assert (away.shape, away.dtype, away.device, away.nbytes) == (
            there.shape,
            there.dtype,
            there.device,
            there.nbytes,
        ), name
    assert pipeline.transformer.x_embedder.weight.isnan().all()
    request = GenerationRequest(prompt="a red star", seed=1, steps=2, width=64, height=64)
    assert pipeline.plan(request) == whole.plan(request)


def test_detached_the_network_is_plain(flux: Path) -> None:
    pipeline: Any = load_pipeline(str(flux), "cpu", "float32", memory="group-offload")
    whole: Any = load_pipeline(str(flux), "cpu", "float32", memory="full")
    for part in pipeline.build.placed.values():
        part.detach()
    for one, other in zip(_networks(pipeline), _networks(whole), strict=True):
        assert not any(module._forward_pre_hooks for module in one.modules())
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert _picture(pipeline) == _picture(whole)


def test_full_attaches_nothing(flux: Path) -> None:
    pipeline: Any = load_pipeline(str(flux), "cpu", "float32", memory="full")
    assert not pipeline.build.placed
    assert not any(module._forward_pre_hooks for network in _networks(pipeline) for module in network.modules())


@pytest.mark.parametrize("mode", ["8bit", "offload+8bit", "group-offload+8bit"])
def test_eight_bits_are_the_same_wherever_parts_rest(models: dict[str, str], mode: str) -> None:
    for model in models.values():
        plain = _picture(load_pipeline(model, "cpu", "float32", memory="full"))
        quantized: Any = load_pipeline(model, "cpu", "float32", memory=mode)
        picture = _picture(quantized)
        assert picture != plain
        assert picture == _picture(load_pipeline(model, "cpu", "float32", memory="model-offload+8bit"))
        layers = [layer for layer in quantized.transformer.modules() if isinstance(layer, Int8Linear)]
        assert layers and not any(type(layer) is nn.Linear for layer in quantized.transformer.modules())
        assert not any(isinstance(layer, Int8Linear) for layer in quantized.autoencoder.modules())


def test_only_large_text_encoders_are_quantized(flux: Path) -> None:
    text: Any = load_pipeline(str(flux), "cpu", "float32", memory="8bit")
    assert any(isinstance(layer, Int8Linear) for layer in text.text.t5.modules())
    assert not any(isinstance(layer, Int8Linear) for layer in text.text.clip.modules())


def test_tiles_change_a_picture_a_little_and_not_its_size(flux: Path) -> None:
    whole = load_pipeline(str(flux), "cpu", "float32", memory="full")
    tiled: Any = load_pipeline(str(flux), "cpu", "float32", memory="offload+tiling")
    assert tiled.autoencoder.use_tiling and tiled.autoencoder.tile_sample_min_size <= 512
    assert _picture(tiled) == _picture(whole)  # a picture that is smaller than a tile is one tile


def test_a_mode_that_parts_cannot_have_is_refused() -> None:
    with pytest.raises(RequestError, match="has no tiles; leave tiling out"):
        load_pipeline("infinity-nano", "cpu", memory="tiling")
    with pytest.raises(RequestError, match=r"not usable on cpu; use offload\+8bit"):
        load_pipeline("infinity-nano", "cpu", memory="offload+torchao-fp8")


def test_a_file_that_changes_while_parts_rest_in_it_is_noticed(tmp_path: Path) -> None:
    folder = tiny_flux.write_tiny_flux(tmp_path / "flux")
    (file,) = (folder / "transformer").glob("*.safetensors")
    _write_end(file, b"\0\0\0\0")  # or it would be the same as another test's, and be shared
    pipeline = load_pipeline(str(folder), "cpu", "float32", memory="model-offload")
    _write_end(file, b"abcd")
    with pytest.raises(WeightsError, match="was altered while it was in use"):
        _picture(pipeline)


def _write_end(file: Path, end: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(-len(end), 2)
        stream.write(end)


def test_what_fails_while_it_comes_leaves_nothing_half_there(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline: Any = load_pipeline(str(flux), "cpu", "float32", memory="model-offload")
    whole = _picture(load_pipeline(str(flux), "cpu", "float32", memory="full"))
    with monkeypatch.context() as patched:
        patched.setattr("gesso.weights.residency._read", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            _picture(pipeline)
    assert _picture(pipeline) == whole


def test_a_part_that_two_models_share_comes_and_goes_for_both() -> None:
    torch.manual_seed(0)
    shared, own, other = (nn.Sequential(nn.Linear(4, 4), nn.SiLU()) for _ in range(3))
    x = torch.randn(2, 4)
    plain = [network(x) for network in (shared, own, other)]
    mode = parse_mode("model-offload")
    first = place({"text_encoder": shared, "transformer": own}, mode, "cpu")
    second = place({"text_encoder": shared, "transformer": other}, mode, "cpu", there=lambda network: network is shared)
    assert first["text_encoder"] is second["text_encoder"]
    for network, wanted in zip((shared, own, other, shared, other), [*plain, plain[0], plain[2]], strict=True):
        assert torch.equal(network(x), wanted)
    assert not _is_there(shared) and not _is_there(own)


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)
    tied = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    tied[1].weight = tied[0].weight  # pyright: ignore[reportAttributeAccessIssue]
    network = nn.Sequential(*tied)
    x = torch.randn(2, 3)
    plain = network(x)
    place({"transformer": network}, MemoryMode("group-offload"), "cpu")
    assert torch.equal(network(x), plain)
    assert network[0].weight is network[1].weight


def test_memory_of_parts_that_are_away_is_given_back(flux: Path) -> None:
    pipeline = load_pipeline(str(flux), "cpu", "float32", memory="group-offload")
    _picture(pipeline)
    parameters = [parameter for network in _networks(pipeline) for parameter in network.parameters()]
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in parameters}
    assert sum(held.values()) < 0.5 * sum(parameter.nbytes for parameter in parameters)


def _networks(pipeline: Any) -> list[nn.Module]:
    return [pipeline.text.clip, pipeline.text.t5, pipeline.transformer, pipeline.autoencoder]


def _is_there(network: nn.Module) -> bool:
    """Whether the largest tensor is, which leaves a single number when it goes."""
    largest = max(network.parameters(), key=lambda parameter: parameter.numel())
    return largest.untyped_storage().nbytes() >= largest.nbytes


@pytest.mark.skipif(TORCHAO, reason="torchao is installed")
def test_torchao_is_named_where_it_is_missing(flux: Path) -> None:
    with pytest.raises(MissingError, match=r"gesso\[quantize\]"):
        load_pipeline(str(flux), "cpu", memory="torchao-int8")


@pytest.mark.skipif(not TORCHAO, reason="torchao is not installed")
@pytest.mark.parametrize("scheme", ["torchao-int8", "torchao-fp8"])
@pytest.mark.parametrize("name", ["flux", "z-image"])
@pytest.mark.filterwarnings("ignore")
def test_pictures_by_torchao_say_so_and_repeat(models: dict[str, str], name: str, scheme: str) -> None:
    fields = {"prompt": "a red star", "model": models[name], "seed": 7, "steps": 2, "width": 64, "height": 64}
    request = GenerationRequest.model_validate(fields)
    with Engine(device="cpu", dtype="float32", memory="full") as engine:
        whole = engine.run(request)[0]
    with Engine(device="cpu", dtype="float32", memory=scheme) as engine:
        one, other = engine.run(request)[0], engine.run(request)[0]
    assert one.metadata["memory"] == scheme
    assert one.image.tobytes() == other.image.tobytes() != whole.image.tobytes()
    difference = np.asarray(one.image, dtype=float) - np.asarray(whole.image, dtype=float)
    assert abs(difference).mean() < 8
