"""Qwen-Image from folders in diffusers' layout: whole ones, sharded ones, and every way in which one can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gesso.engine.loading import load_pipeline, load_planner
from gesso.engine.loading.build import Build
from gesso.engine.loading.qwen_image import load_published
from gesso.errors import FileError, GessoError, WeightsError
from gesso.pipelines.qwen_image import QwenImagePipeline
from gesso.pipelines.qwen_image_state import QwenImageDefaults
from gesso.request import GenerationRequest
from gesso.weights import catalogue
from tests.oracle import run_plainly
from tests.tiny_qwen_image import tiny_encoder, tiny_pipeline, tiny_transformer, write_tiny_qwen_image

REQUEST = GenerationRequest(prompt="a red star", seed=3, width=32, height=32, steps=2)
WEIGHTS = "diffusion_pytorch_model.safetensors"
PARTS = ("transformer", "vae", "text_encoder")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model; read it, never write to it."""
    return write_tiny_qwen_image(tmp_path_factory.mktemp("models") / "tiny-qwen-image")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> QwenImagePipeline:
    return load_published(catalogue.find(str(folder)), Build(device=device, dtype=dtype))


def refused(kind: type[GessoError], folder: Path, device: str = "cpu") -> str:
    with pytest.raises(GessoError) as caught:
        load(folder, device=device)
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
    pipeline = load_pipeline(str(whole), "cpu", "float32")
    assert isinstance(pipeline, QwenImagePipeline)
    assert run_plainly(pipeline, REQUEST)[0].image.tobytes() == run_plainly(tiny_pipeline(), REQUEST)[0].image.tobytes()
    assert (pipeline.name, pipeline.dtype, len(pipeline.digest)) == (str(whole), torch.float32, 64)
    assert pipeline.defaults == QwenImageDefaults(width=1328, height=1328, steps=50, guidance=4.0)
    assert pipeline.scheduler["shift_terminal"] == 0.02


def test_only_the_language_model_is_kept(whole: Path) -> None:
    names = [name for name, _ in load(whole).text.network.named_parameters()]
    assert "layers.0.self_attn.q_proj.weight" in names
    assert not any("visual" in name or "lm_head" in name for name in names)


def test_the_first_published_configurations_are_read(model: Path) -> None:
    """They have a field that diffusers' class has dropped."""
    change_json(model / "transformer" / "config.json", lambda config: config.update(pooled_projection_dim=768))
    change_json(model / "model_index.json", lambda index: index.update(_class_name="QwenImageImg2ImgPipeline"))
    assert load(model).plan(REQUEST).steps == 2


def test_shards_are_read_by_their_index(model: Path) -> None:
    expected = run_plainly(load(model), REQUEST)[0].image.tobytes()
    for part, network in (("transformer", tiny_transformer()), ("text_encoder", tiny_encoder())):
        for path in (model / part).glob("*.safetensors"):
            path.unlink()
        network.save_pretrained(model / part, max_shard_size="40KB")
        assert len(list((model / part).glob("*.safetensors"))) > 1
    assert run_plainly(load(model), REQUEST)[0].image.tobytes() == expected


def test_all_parts_take_the_dtype(whole: Path) -> None:
    pipeline = load(whole, torch.bfloat16)
    for part in (pipeline.transformer, pipeline.autoencoder, pipeline.text.network):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}
    assert run_plainly(pipeline, REQUEST)[0].image.size == (32, 32)


def test_a_planner_reads_no_weights_and_plans_the_same(model: Path) -> None:
    expected = load(model).plan(REQUEST)
    for path in model.rglob("*.safetensors"):
        path.write_bytes(b"")
    planner = load_planner(str(model), "cpu", "float32")
    assert planner is not None
    assert planner.plan(REQUEST) == expected


# ---- something else -------------------------------------------------------------------------------------------------


def test_another_family_is_named(model: Path) -> None:
    entry = catalogue.find(str(model))
    change_json(model / "model_index.json", lambda index: index.update(_class_name="QwenImageEditPipeline"))
    with pytest.raises(FileError, match="holds diffusers' QwenImageEditPipeline, not a Qwen-Image"):
        load_published(entry, Build(device="cpu", dtype=torch.float32))
    assert "QwenImageEditPipeline" in refused(FileError, model)


@pytest.mark.parametrize(
    ("part", "name", "called"),
    [
        ("transformer", "config.json", "FluxTransformer2DModel"),
        ("vae", "config.json", "AutoencoderKLWan"),
        ("scheduler", "scheduler_config.json", "DDIMScheduler"),
    ],
)
def test_a_part_of_something_else_is_named(model: Path, part: str, name: str, called: str) -> None:
    change_json(model / part / name, lambda config: config.update(_class_name=called))
    assert f"holds diffusers' {called}" in refused(FileError, model)


def test_a_text_encoder_of_something_else_is_named(model: Path) -> None:
    change_json(model / "text_encoder" / "config.json", lambda config: config.update(architectures=["Qwen3Model"]))
    assert "holds Qwen3Model, not Qwen2_5_VLForConditionalGeneration" in refused(FileError, model)


@pytest.mark.parametrize("part", [*PARTS, "tokenizer", "scheduler"])
def test_a_part_that_is_not_there(model: Path, part: str) -> None:
    shutil.rmtree(model / part)
    with pytest.raises(FileError, match=f"lacks {part}"):
        load_pipeline(str(model), "cpu", "float32")


@pytest.mark.parametrize(
    ("part", "values", "problem"),
    [
        ("transformer", {"joint_attention_dim": 32}, "text features are 24 wide where the transformer reads 32"),
        ("transformer", {"in_channels": 32}, "reads 32 channels where the autoencoder makes 16"),
        ("transformer", {"out_channels": 16}, "makes 16 channels where the autoencoder has 4"),
        ("transformer", {"attention_head_dim": "wide"}, "makes no QwenImageTransformer2DModel"),
        ("transformer", {"axes_dims_rope": [4, 6, 8]}, r"axes_dims_rope \[4, 6, 8\] are not 16 in all"),
        ("transformer", {"guidance_embeds": True}, "guidance_embeds True is not False; no other is supported"),
        ("transformer", {"zero_cond_t": True}, "zero_cond_t True is not False"),
        ("transformer", {"patch_size": 1}, "patch_size 1 is not 2"),
        ("transformer", {"colour": 3}, "unknown fields: colour"),
        ("vae", {"colour": 3}, "colour"),
        ("vae", {"dim_mult": [1, "wide"]}, "makes no AutoencoderKLQwenImage"),
        ("vae", {"latents_mean": [0.0]}, "latents_mean are not 4 finite numbers"),
        ("vae", {"latents_std": [1.0, 1.0, 0.0, 1.0]}, "latents_std are not 4 finite numbers above 0"),
        ("vae", {"temperal_downsample": [False] * 4}, "temperal_downsample does not have one value"),
        ("text_encoder", {"text_config": {"hidden_size": "wide"}}, "text_encoder: cannot be used"),
    ],
)
def test_a_configuration_that_does_not_fit(model: Path, part: str, values: dict, problem: str) -> None:
    change_json(model / part / "config.json", lambda config: config.update(values))
    with pytest.raises(FileError, match=problem) as caught:
        load(model, device="meta")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, 0.9, "x", True])
def test_a_schedule_that_ends_nowhere(model: Path, value: object) -> None:
    path = model / "scheduler" / "scheduler_config.json"
    change_json(path, lambda config: config.update(shift_terminal=value))
    assert "is not null or a number from 0.0001 to 0.5" in refused(FileError, model)


def test_the_tokenizer_must_make_the_template_of_the_tokens_that_are_dropped(model: Path) -> None:
    path = model / "tokenizer" / "tokenizer.json"
    change_json(path, lambda values: values["model"].update(merges=values["model"]["merges"][:20]))
    assert "a tokenizer of another model (the template before a prompt has" in refused(FileError, model)
    path.unlink()
    assert "holds no tokenizer" in refused(FileError, model)


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer", "proj_out.weight"),
        ("vae", "decoder.conv_in.weight"),
        ("text_encoder", "model.norm.weight"),
    ],
)
def test_missing_and_unexpected_weights_are_named(model: Path, part: str, name: str) -> None:
    (path,) = (model / part).glob("*.safetensors")
    change_tensors(path, lambda state: state.update({"nobody.weight": state[name].clone()}))
    assert "1 unexpected (nobody.weight)" in refused(WeightsError, model)
    change_tensors(path, lambda state: (state.pop("nobody.weight"), state.pop(name)))
    assert "1 missing (" in refused(WeightsError, model)


@pytest.mark.parametrize(("part", "name"), [("transformer", "img_in.bias"), ("vae", "quant_conv.bias")])
def test_weights_of_another_shape_are_named(model: Path, part: str, name: str) -> None:
    (path,) = (model / part).glob("*.safetensors")
    change_tensors(path, lambda state: state.update({name: state[name][:-1].clone()}))
    assert f"1 wrong shape ({name}" in refused(WeightsError, model)


@pytest.mark.parametrize("part", PARTS)
def test_truncated_weights_and_pickles(model: Path, part: str) -> None:
    (path,) = (model / part).glob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    refused(WeightsError, model)
    path.write_bytes(content)
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    assert "other formats are not read" in refused(FileError, model)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_shard_that_is_absent_or_corrupted(model: Path, part: str) -> None:
    network = tiny_transformer() if part == "transformer" else tiny_encoder()
    for path in (model / part).glob("*.safetensors"):
        path.unlink()
    network.save_pretrained(model / part, max_shard_size="40KB")
    shard = sorted((model / part).glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    refused(WeightsError, model)
    shard.unlink()
    assert "no such file" in refused(FileError, model)
