"""FLUX.1 from folders in diffusers' layout: whole ones, sharded ones, and every way in which one can be wrong."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gesso.engine.loading.build import Build
from gesso.engine.loading.flux import load_published
from gesso.errors import FileError, GessoError, WeightsError
from gesso.pipelines.flux import FluxPipeline
from gesso.pipelines.flux_state import FluxDefaults
from gesso.request import GenerationRequest
from gesso.weights import catalogue
from tests.oracle import run_plainly
from tests.tiny_flux import STATIC, tiny_pipeline, tiny_text, tiny_transformer, write_tiny_flux

REQUEST = GenerationRequest(prompt="a red star", seed=3, width=32, height=32, steps=2)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model of dev's kind; read it, never write to it."""
    return write_tiny_flux(tmp_path_factory.mktemp("models") / "tiny-flux")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> FluxPipeline:
    return load_published(catalogue.find(str(folder)), Build(device="cpu", dtype=dtype))


def refused(kind: type[GessoError], folder: Path) -> str:
    with pytest.raises(GessoError) as caught:
        load(folder)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


# ---- whole ----------------------------------------------------------------------------------------------------------


def test_what_is_loaded_paints_as_its_parts_do(whole: Path) -> None:
    pipeline = load(whole)
    parts = tiny_pipeline(text=tiny_text(512))
    assert run_plainly(pipeline, REQUEST)[0].image.tobytes() == run_plainly(parts, REQUEST)[0].image.tobytes()
    assert (pipeline.name, pipeline.dtype, len(pipeline.digest)) == (str(whole), torch.float32, 64)
    assert pipeline.defaults == FluxDefaults(width=1024, height=1024, steps=28, guidance=3.5)


def test_one_without_guidance_embedding_is_schnell(tmp_path: Path) -> None:
    parts = tiny_pipeline(guidance_embeds=False, scheduler=STATIC)
    pipeline = load(write_tiny_flux(tmp_path / "schnell", parts))
    assert pipeline.text.max_tokens == 256
    assert pipeline.scheduler["use_dynamic_shifting"] is False
    plan = pipeline.plan(GenerationRequest(prompt="a star"))
    assert (plan.steps, plan.request.guidance, plan.warnings) == (4, 0.0, ())


def test_shards_are_read_by_their_index(model: Path) -> None:
    expected = run_plainly(load(model), REQUEST)[0].image.tobytes()
    shutil.rmtree(model / "transformer")
    tiny_transformer().save_pretrained(model / "transformer", max_shard_size="40KB")
    assert len(list((model / "transformer").glob("*.safetensors"))) > 2
    assert run_plainly(load(model), REQUEST)[0].image.tobytes() == expected


def test_all_parts_take_the_dtype(whole: Path) -> None:
    pipeline = load(whole, torch.bfloat16)
    assert isinstance(pipeline.text, torch.nn.Module)
    for part in (pipeline.transformer, pipeline.autoencoder, pipeline.text):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}
    assert run_plainly(pipeline, REQUEST)[0].image.size == (32, 32)


def test_a_planner_reads_no_weights(model: Path) -> None:
    expected = load(model).plan(REQUEST)
    for path in model.rglob("*.safetensors"):
        path.unlink()
    planned = load_published(catalogue.find(str(model)), Build(device="meta")).plan(REQUEST)
    assert (planned.request, planned.steps, planned.cost.flops) == (
        expected.request,
        expected.steps,
        expected.cost.flops,
    )
    assert 0.4 * expected.peak_bytes < planned.peak_bytes <= expected.peak_bytes


def test_loading_touches_no_network(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("loading asked a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load(whole)


def test_the_digest_follows_the_files(model: Path) -> None:
    before = load(model).digest
    change_tensors(model / "vae" / WEIGHTS, lambda state: state["decoder.conv_in.bias"].add_(1))
    assert load(model).digest != before


# ---- something else -------------------------------------------------------------------------------------------------


def test_another_family_is_named(model: Path) -> None:
    change_json(model / "model_index.json", lambda index: index.update(_class_name="StableDiffusionPipeline"))
    assert "StableDiffusionPipeline" in refused(FileError, model)
    entry = catalogue.find(str(whole_entry(model)))
    change_json(model / "model_index.json", lambda index: index.update(_class_name="ZImagePipeline"))
    with pytest.raises(FileError, match=r"ZImagePipeline, not a FLUX\.1"):
        load_published(entry, Build(device="cpu", dtype=torch.float32))


def whole_entry(folder: Path) -> Path:
    """The folder, made a FLUX again."""
    change_json(folder / "model_index.json", lambda index: index.update(_class_name="FluxPipeline"))
    return folder


@pytest.mark.parametrize(
    ("part", "name", "called"),
    [
        ("transformer", "config.json", "SD3Transformer2DModel"),
        ("vae", "config.json", "AutoencoderTiny"),
        ("scheduler", "scheduler_config.json", "DDIMScheduler"),
    ],
)
def test_a_part_of_something_else_is_named(model: Path, part: str, name: str, called: str) -> None:
    change_json(model / part / name, lambda config: config.update(_class_name=called))
    assert f"holds diffusers' {called}" in refused(FileError, model)


def test_a_text_encoder_of_something_else_is_named(model: Path) -> None:
    shutil.rmtree(model / "text_encoder")
    shutil.copytree(model / "text_encoder_2", model / "text_encoder")
    assert "text_encoder" in str(refused(FileError, model))


@pytest.mark.parametrize(
    ("part", "values", "problem"),
    [
        ("transformer", {"joint_attention_dim": 32}, "text features are 24 wide"),
        ("transformer", {"pooled_projection_dim": 8}, "the pooled text is 16 wide"),
        ("transformer", {"in_channels": 32}, "reads 32 channels"),
        ("transformer", {"attention_head_dim": "wide"}, "makes no FluxTransformer2DModel"),
        ("vae", {"block_out_channels": [8, 9]}, "makes no AutoencoderKL"),
    ],
)
def test_a_configuration_that_does_not_fit(model: Path, part: str, values: dict, problem: str) -> None:
    change_json(model / part / "config.json", lambda config: config.update(values))
    with pytest.raises(FileError, match=problem):
        load_published(catalogue.find(str(model)), Build(device="meta"))


@pytest.mark.parametrize(
    ("part", "values", "problem"),
    [
        ("transformer/config.json", {"colour": 3}, "unknown fields: colour"),
        ("vae/config.json", {"colour": 3}, "unknown fields: colour"),
        ("vae/config.json", {"scaling_factor": None}, "scaling_factor null is not a finite number above 0"),
        ("vae/config.json", {"scaling_factor": float("inf")}, "scaling_factor Infinity"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor 0"),
        ("vae/config.json", {"shift_factor": float("nan")}, "shift_factor NaN is not a finite number"),
        ("scheduler/scheduler_config.json", {"shift": "x"}, 'shift "x" is not a number from'),
        ("text_encoder/config.json", {"hidden_size": -4}, "text_encoder: cannot be used"),
        ("text_encoder_2/config.json", {"d_ff": -4}, "text_encoder_2: cannot be used"),
        ("text_encoder_2/config.json", {"d_model": "wide"}, "text_encoder_2: cannot be used"),
    ],
)
def test_a_value_that_cannot_be_used(model: Path, part: str, values: dict, problem: str) -> None:
    change_json(model / part, lambda config: config.update(values))
    with pytest.raises(FileError, match=problem) as caught:
        load_published(catalogue.find(str(model)), Build(device="meta"))
    assert "\n" not in str(caught.value)
    refused(FileError, model)


def test_tokenizers_must_fit_their_encoders(model: Path) -> None:
    config = model / "tokenizer" / "tokenizer_config.json"
    text = config.read_text()
    config.unlink()
    assert "does not fit its encoder (it has no pad_token)" in refused(FileError, model)
    config.write_text(text)
    change_json(config, lambda values: values.update(model_max_length=0))
    assert "model_max_length 0 is no number of tokens" in refused(FileError, model)
    config.write_text(text)
    shutil.rmtree(model / "tokenizer_2")
    shutil.copytree(model / "tokenizer", model / "tokenizer_2")
    assert "does not fit its encoder (its tokens go up to 68 where the encoder knows 37" in refused(FileError, model)


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer", "proj_out.weight"),
        ("vae", "decoder.conv_in.weight"),
        ("text_encoder_2", "encoder.final_layer_norm.weight"),
    ],
)
def test_missing_and_unexpected_weights_are_named(model: Path, part: str, name: str) -> None:
    (path,) = (model / part).glob("*.safetensors")
    change_tensors(path, lambda state: state.update({"nobody.weight": state[name].clone()}))
    assert "1 unexpected (nobody.weight)" in refused(WeightsError, model)
    change_tensors(path, lambda state: (state.pop("nobody.weight"), state.pop(name)))
    assert f"1 missing ({name})" in refused(WeightsError, model)


@pytest.mark.parametrize(("part", "name"), [("transformer", "x_embedder.bias"), ("text_encoder_2", "shared.weight")])
def test_weights_of_another_shape_are_named(model: Path, part: str, name: str) -> None:
    (path,) = (model / part).glob("*.safetensors")
    change_tensors(path, lambda state: state.update({name: state[name][:-1].clone()}))
    assert f"1 wrong shape ({name}" in refused(WeightsError, model)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_truncated_weights(model: Path, part: str) -> None:
    (path,) = (model / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    refused(WeightsError, model)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_pickles_are_not_read(model: Path, part: str) -> None:
    (path,) = (model / part).glob("*.safetensors")
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    assert "other formats are not read" in refused(FileError, model)


def test_shards_that_are_absent_or_elsewhere(model: Path) -> None:
    shutil.rmtree(model / "transformer")
    tiny_transformer().save_pretrained(model / "transformer", max_shard_size="40KB")
    index = model / "transformer" / f"{WEIGHTS}.index.json"
    shard = sorted((model / "transformer").glob("*.safetensors"))[0]
    shard.rename(model / shard.name)
    assert "no such file" in refused(FileError, model)
    change_json(index, lambda found: found["weight_map"].update({"proj_out.bias": f"../{shard.name}"}))
    assert "beside it" in refused(FileError, model)
    index.write_text("{")
    assert "not an index of shards" in refused(FileError, model)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_folder_without_a_tokenizer(model: Path, part: str) -> None:
    for path in (model / part).iterdir():
        path.unlink()
    assert "holds no tokenizer" in refused(FileError, model)


def test_a_part_without_its_configuration(model: Path) -> None:
    for part in ("text_encoder", "transformer"):
        (model / part / "config.json").unlink()
        assert "config.json" in refused(FileError, model)
