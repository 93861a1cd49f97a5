"""InfiniteYou from its published folder, as FLUX's guest: read when wanted, strict, refused where it does not fit."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gesso.engine.loading import load_planner
from gesso.engine.loading.build import Build
from gesso.engine.loading.infinite_you import face_reader, guest
from gesso.engine.memory import peaks
from gesso.errors import FileError, GessoError, MissingError, WeightsError
from gesso.memory_modes import FULL, parse_mode
from gesso.models.arcface import ArcFace
from gesso.models.resampler import Resampler, ResamplerConfig, infer_config
from gesso.pipelines.infinite_you import InfiniteYou
from gesso.request import GenerationRequest
from gesso.request_parts import Identity
from gesso.weights.infinite_you import RECOGNISER, load_arcface, load_resampler
from tests.pulled_files import alter, list_files
from tests.tiny_flux import tiny_transformer, write_tiny_flux
from tests.tiny_infinite_you import PACK, PERSON, tiny_infusenet, tiny_resampler, write_tiny_infinite_you

NETWORK = dict(tiny_transformer().config)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def published(home: Path) -> Path:
    """Without a pack; the recogniser is there by name only."""
    folder = write_tiny_infinite_you(home / "weights" / "infinite-you")
    (folder / RECOGNISER).touch()
    return folder


def made(**changed: object) -> InfiniteYou:
    return guest(Build(device="cpu"), NETWORK | changed)


def test_both_variants_come_back_as_they_were_written(published: Path) -> None:
    whole = made()
    for variant in ("aes_stage2", "sim_stage1"):
        networks = whole._networks(variant)
        wanted = tiny_infusenet(variant).state_dict() | tiny_resampler().state_dict()
        found = networks.infusenet.state_dict() | networks.resampler.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    planned = guest(Build(device="meta"), NETWORK)._make_shapes("aes_stage2")
    assert {parameter.device.type for parameter in planned.parameters()} == {"meta"}


def test_a_variant_may_lie_by_itself(published: Path, home: Path) -> None:
    own = home / "weights/infinite-you-sim/infu_flux_v1.0/sim_stage1"
    own.parent.mkdir(parents=True)
    (published / "infu_flux_v1.0/sim_stage1").rename(own)
    assert made()._networks("sim_stage1").variant == "sim_stage1"
    (own / "image_proj_model.bin").unlink()
    with pytest.raises(MissingError, match=r"sim_stage1/image_proj_model\.bin .*models pull infinite-you-sim$"):
        made()._networks("sim_stage1")


@pytest.mark.parametrize("mode", ["full", "offload"])
def test_the_other_variant_makes_room(published: Path, mode: str) -> None:
    whole = guest(Build(device="cpu", memory=parse_mode(mode)), NETWORK)
    first = weakref.ref(whole._networks("aes_stage2").infusenet)
    second = whole._networks("sim_stage1").infusenet
    gc.collect()
    assert first() is None and second is not None


@pytest.mark.parametrize("mode", ["full", "offload"])
def test_a_variant_that_is_still_in_use_takes_its_place_again(published: Path, mode: str) -> None:
    build = Build(device="cpu", memory=parse_mode(mode))
    whole = guest(build, NETWORK)
    in_use = whole._networks("aes_stage2")
    part = build.placed.get("infusenet")
    other = weakref.ref(whole._networks("sim_stage1").infusenet)
    assert whole._networks("aes_stage2") is in_use
    gc.collect()
    assert other() is None
    assert build.networks["infusenet"] is in_use.infusenet and build.placed.get("infusenet") is part
    assert "infusenet" in build.footprint.plain


def test_memory_is_foreseen_with_the_person_s_networks(published: Path, home: Path) -> None:
    (home / "weights/antelopev2").mkdir()
    shutil.copy(PACK / "fake_scrfd.onnx", home / "weights/antelopev2")
    folder = str(write_tiny_flux(home / "flux"))
    planner = load_planner(folder, "cpu", "fp32")
    assert planner is not None
    plain = GenerationRequest(prompt="a red star", model=folder, width=64, height=64, seed=1)
    asked = plain.model_copy(update={"identity": Identity(image=str(PERSON))})
    alone, person = planner.plan(plain), planner.plan(asked)
    assert (alone.guests, person.guests) == ((), ("infusenet", "resampler"))
    assert person.activations["step"] > alone.activations["step"] and "picture" in person.activations
    infusenet = sum(value.nbytes for value in tiny_infusenet().parameters())
    resampler = (published / "infu_flux_v1.0/aes_stage2/image_proj_model.bin").stat().st_size
    more = {mode: size - peaks(planner, alone)[mode] for mode, size in peaks(planner, person).items()}
    assert more[FULL] >= infusenet + resampler
    assert infusenet + resampler > more[parse_mode("8bit")] > resampler
    assert planner.plan(plain) == alone and peaks(planner, alone)[FULL] < peaks(planner, person)[FULL]


def test_what_is_missing_says_how_it_is_had(home: Path) -> None:
    with pytest.raises(MissingError, match=r"InfiniteYou's aes_stage2 .*CC BY-NC 4.0.*pull infinite-you$"):
        made()._make_shapes("aes_stage2")
    with pytest.raises(MissingError, match=r"for non-commercial research, so Gesso neither ships nor fetches it"):
        face_reader().face(PERSON)
    folder = write_tiny_infinite_you(home / "weights/infinite-you")
    for ask in (lambda: made()._make_shapes("aes_stage2"), lambda: load_arcface(folder / RECOGNISER)):
        with pytest.raises(MissingError, match=r"the face recogniser .*curl -L .*recognition_arcface_ir_se50\.pth"):
            ask()


def test_a_pack_beside_the_published_weights_is_found(published: Path) -> None:
    pack = published / "supports/insightface/models/antelopev2"
    pack.mkdir(parents=True)
    (pack / "scrfd_10g_bnkps.onnx").write_bytes((PERSON.parent / "fake_scrfd.onnx").read_bytes())
    assert face_reader().face(PERSON).warnings


def test_another_flux_and_another_network_are_refused(published: Path) -> None:
    with pytest.raises(FileError, match=r"does not fit this FLUX: its in_channels is 16, not 64"):
        made(in_channels=64)._make_shapes("aes_stage2")
    with pytest.raises(FileError, match=r"its axes_dims_rope is .*4, 6, 6.*, not .*4, 4, 8"):
        made(axes_dims_rope=(4, 4, 8))._make_shapes("aes_stage2")
    config = published / "infu_flux_v1.0/aes_stage2/InfuseNetModel/config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"num_mode": 3}))
    with pytest.raises(FileError, match="is no InfuseNet: its configuration has num_mode"):
        made()._make_shapes("aes_stage2")


def test_damaged_weights_are_refused_by_name(published: Path) -> None:
    part = published / "infu_flux_v1.0/aes_stage2"
    shard = sorted((part / "InfuseNetModel").glob("*.safetensors"))[0]
    tensors = load_file(shard)
    save_file(dict(list(tensors.items())[1:]), shard)
    with pytest.raises(WeightsError, match="1 missing"):
        made()._networks("aes_stage2")
    for state in ({"latents": torch.zeros(1)}, {"proj": torch.zeros(2, 2)}):
        torch.save({"image_proj": state}, part / "image_proj_model.bin")
        with pytest.raises(WeightsError, match="not InfiniteYou's resampler"):
            load_resampler(published, "aes_stage2", torch.float32)
    narrow = Resampler(ResamplerConfig(dim=64, depth=1, heads=1, output_dim=8))
    torch.save({"image_proj": narrow.state_dict()}, part / "image_proj_model.bin")
    with pytest.raises(FileError, match="its resampler makes 8 tokens of 8 where this FLUX wants 8 of 24"):
        made()._networks("aes_stage2")
    (part / "image_proj_model.bin").write_bytes(b"no pickle")
    with pytest.raises(GessoError, match="holds more than tensors; nothing was executed"):
        load_resampler(published, "aes_stage2", torch.float32)


def test_what_was_altered_since_it_was_pulled_is_refused(published: Path) -> None:
    """Its networks are held against the manifest when they are read; another variant's stay usable."""
    list_files(published)
    made()._networks("aes_stage2")
    alter(sorted((published / "infu_flux_v1.0/aes_stage2/InfuseNetModel").glob("*.safetensors"))[0])
    with pytest.raises(WeightsError, match=r"was altered; mend it with: gesso models pull infinite-you$"):
        made()._networks("aes_stage2")
    made()._networks("sim_stage1")


def test_the_recogniser_is_strict(tmp_path: Path) -> None:
    torch.save({"input_layer.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "arcface.pth")
    with pytest.raises(WeightsError, match="missing"):
        load_arcface(tmp_path / "arcface.pth")
    with torch.device("meta"):
        assert len(ArcFace().state_dict()) > 300


def test_sizes_are_those_of_the_tensors() -> None:
    config = ResamplerConfig(dim=96, depth=3, heads=2, num_queries=5, embedding_dim=12, output_dim=7, ff_mult=1.5)
    assert infer_config(Resampler(config).state_dict()) == config
    with pytest.raises(ValueError, match="no multiple"):
        infer_config(Resampler(ResamplerConfig(dim=8, depth=1, dim_head=8, heads=1)).state_dict())
