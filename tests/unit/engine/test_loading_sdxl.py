"""Stable Diffusion XL from folders and from single files: whole ones, and every way in which one can be wrong."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gesso.engine.loading import load_pipeline, load_planner
from gesso.engine.loading.build import Build
from gesso.engine.loading.sdxl import load_file as load_single_file
from gesso.engine.loading.sdxl import load_published
from gesso.errors import FileError, GessoError, MissingError, WeightsError
from gesso.pipelines.sdxl import SdxlPipeline
from gesso.pipelines.sdxl_state import SdxlDefaults
from gesso.request import GenerationRequest
from gesso.weights import catalogue
from tests.oracle import run_plainly
from tests.pulled_files import assert_checked, list_files
from tests.tiny_sdxl import tiny_pipeline, write_single_file, write_tiny_sdxl

REQUEST = GenerationRequest(prompt="a red star", negative="a ring", seed=3, steps=2, guidance=2.0)
WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_PROJECTION = "conditioner.embedders.1.model.text_projection"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model in diffusers' layout; read it, never write to it."""
    return write_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl")


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in one file; read it, never write to it."""
    return write_single_file(tmp_path_factory.mktemp("models") / "checkpoints")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A folder to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def file(whole_file: Path, tmp_path: Path) -> Path:
    """A file to spoil."""
    return Path(shutil.copytree(whole_file.parent, tmp_path / "checkpoints")) / whole_file.name


@pytest.fixture(autouse=True)
def _nobody_else_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))


def load(path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> SdxlPipeline:
    entry, build = catalogue.find(str(path)), Build(device=device, dtype=dtype)
    assert entry.family == "sdxl"
    return load_single_file(entry, build) if entry.layout == "file" else load_published(entry, build)


def refused(kind: type[GessoError], path: Path, device: str = "cpu") -> str:
    with pytest.raises(GessoError) as caught:
        load(path, device)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def picture(pipeline: SdxlPipeline) -> bytes:
    return run_plainly(pipeline, REQUEST)[0].image.tobytes()


# ---- whole ----------------------------------------------------------------------------------------------------------


def test_what_is_loaded_paints_as_its_parts_do(whole: Path, whole_file: Path) -> None:
    expected = picture(tiny_pipeline())
    for path in (whole, whole_file):
        pipeline = load(path)
        assert picture(pipeline) == expected
        assert (pipeline.name, pipeline.dtype, len(pipeline.digest)) == (str(path), torch.float32, 64)
        assert pipeline.defaults == SdxlDefaults(width=64, height=64, scheduler="euler")


def test_by_the_engines_own_way(whole_file: Path) -> None:
    pipeline = load_pipeline(str(whole_file), "cpu", "float32", memory="group-offload")
    assert isinstance(pipeline, SdxlPipeline)
    assert picture(pipeline) == picture(tiny_pipeline())


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_planner_plans_the_same_and_reads_no_weights(kind: str, whole: Path, file: Path) -> None:
    path = whole if kind == "folder" else file
    expected = load(path).plan(REQUEST)
    if kind == "file":  # only its header may be looked at
        length = int.from_bytes(file.read_bytes()[:8], "little")
        content = bytearray(file.read_bytes())
        content[8 + length :] = bytes(len(content) - 8 - length)
        file.write_bytes(content)
    planner = load_planner(str(path), "cpu", "float32")
    assert planner is not None
    assert planner.plan(REQUEST) == expected


@pytest.mark.parametrize("way", ["name", "folder", "absolute", "relative"])
def test_one_that_was_pulled_is_checked_by_its_file_too(
    way: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path(shutil.copytree(file.parent, tmp_path / "home/weights/sdxl"))
    own = (home / file.name).rename(home / "sd_xl_base_1.0.safetensors")
    list_files(home)
    monkeypatch.chdir(home.parent)
    called = {"name": "sdxl", "folder": str(home), "absolute": str(own), "relative": f"sdxl/{own.name}"}[way]
    assert_checked(called, home, own)


def test_the_autoencoder_stays_in_float32(whole: Path, whole_file: Path) -> None:
    for path in (whole, whole_file):
        pipeline = load(path, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.bfloat16}
        assert {parameter.dtype for parameter in pipeline.autoencoder.parameters()} == {torch.float32}
        assert run_plainly(pipeline, REQUEST)[0].image.size == (64, 64)


def test_loading_touches_no_network(whole_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("loading asked a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load(whole_file)


def test_a_file_for_inpainting_is_known_by_its_first_layer(tmp_path: Path) -> None:
    parts = tiny_pipeline(in_channels=9)
    path = write_single_file(tmp_path / "painting", parts)
    change_json(path.parent / "unet" / "config.json", lambda config: config.update(in_channels=4))
    pipeline = load(path)
    assert pipeline.planner.sees_mask
    assert torch.equal(pipeline.unet.conv_in.weight, parts.unet.conv_in.weight)


def test_marks_say_what_the_network_predicts(file: Path) -> None:
    mark = torch.zeros(0)
    change_tensors(file, lambda state: state.update(v_pred=mark))
    assert load(file).scheduler["prediction_type"] == "v_prediction"
    change_tensors(file, lambda state: state.update(ztsnr=mark))
    scheduler = load(file).scheduler
    assert (scheduler["rescale_betas_zero_snr"], scheduler["timestep_spacing"]) == (True, "trailing")


def test_the_models_own_scheduler_is_its_default(model: Path) -> None:
    path = model / "scheduler" / "scheduler_config.json"
    settings = {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}
    change_json(path, lambda config: config.update(settings))
    assert load(model).defaults.scheduler == "dpm++2m-karras"
    change_json(path, lambda config: config.update(_class_name="SomeOther"))
    assert load(model).defaults.scheduler == "euler"


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def test_tokenizers_come_from_another_model_that_is_here(file: Path, tmp_path: Path) -> None:
    expected = picture(load(file))
    other = tmp_path / "home" / "weights" / "sdxl"
    for part in ("tokenizer", "tokenizer_2"):
        shutil.move(file.parent / part, other / part)
    assert picture(load(file)) == expected


def test_without_tokenizers_the_command_is_named(file: Path, tmp_path: Path) -> None:
    shutil.rmtree(file.parent / "tokenizer_2")
    text = refused(MissingError, file)
    assert f"--include 'tokenizer*/*' --local-dir {file.parent}" in text
    spaced = file.parent.rename(tmp_path / "my models")
    assert f"--local-dir '{spaced}'" in refused(MissingError, spaced / file.name)


def test_entries_that_cannot_be_used_stand_in_no_files_way(file: Path, tmp_path: Path) -> None:
    expected = picture(load(file))
    other = tmp_path / "home" / "weights" / "sdxl"
    other.mkdir(parents=True)
    gone = f'path = "{tmp_path}/unplugged/x"\n'
    (tmp_path / "home" / "models.toml").write_text(f"[models.gone]\n{gone}[models.bad]\npath = 3\n")
    assert picture(load(file)) == expected
    for part in ("tokenizer", "tokenizer_2"):
        shutil.move(file.parent / part, other / part)
    assert picture(load(file)) == expected
    shutil.rmtree(other)
    assert "hf download" in refused(MissingError, file)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_python_that_a_folder_brings_is_never_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    sprung = tmp_path / "sprung"
    (model / "tokenizer" / "evil.py").write_text(
        "from transformers import CLIPTokenizer\n"
        f"open({str(sprung)!r}, 'w').close()\n"
        "class Evil(CLIPTokenizer):\n    pass\n"
    )
    brings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    change_json(model / "tokenizer" / "tokenizer_config.json", lambda values: values.update(brings))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    assert "Python code of its own, which is never run" in refused(FileError, model, device)
    assert not sprung.exists()


# ---- something else -------------------------------------------------------------------------------------------------


def test_files_of_something_else(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": {}}))
    with pytest.raises(FileError, match=r"is a pickle.*nothing was executed.*\.safetensors"):
        catalogue.find(str(path))
    with pytest.raises(FileError, match="a U-Net alone"):
        catalogue.find(str(whole / "unet" / WEIGHTS))
    (tmp_path / "text.safetensors").write_text("no weights at all")
    with pytest.raises(GessoError, match=r"text\.safetensors"):
        catalogue.find(str(tmp_path / "text.safetensors"))


def test_another_family_is_named(model: Path) -> None:
    change_json(model / "model_index.json", lambda index: index.update(_class_name="FluxPipeline"))
    entry = catalogue.find(str(model))
    with pytest.raises(FileError, match="FluxPipeline, not a Stable Diffusion XL"):
        load_published(entry, Build(device="cpu"))


@pytest.mark.parametrize(
    ("part", "values", "problem"),
    [
        ("unet", {"cross_attention_dim": 32}, "text features are 40 wide"),
        ("unet", {"projection_class_embeddings_input_dim": 60}, "the pooled text is 20 wide"),
        ("unet", {"in_channels": 5}, "reads 5 channels"),
        ("unet", {"time_cond_proj_dim": 8}, "something else than a text"),
        ("unet", {"block_out_channels": "wide"}, "makes no UNet2DConditionModel"),
        ("unet", {"colour": 3}, "unknown fields: colour"),
        ("unet", {"sample_size": {}}, "sample_size {} is not a whole number above 0"),
        ("unet", {"addition_time_embed_dim": None}, "addition_time_embed_dim"),
        ("vae", {"latents_mean": [0, 0, 0, 0]}, "latents_mean"),
        ("vae", {"scaling_factor": 0}, "scaling_factor 0"),
        ("text_encoder", {"hidden_size": -4}, "text_encoder: cannot be used"),
        ("text_encoder", {"architectures": 5}, "holds 5, not CLIPTextModel"),
    ],
)
def test_configurations_that_do_not_fit(model: Path, part: str, values: dict, problem: str) -> None:
    change_json(model / part / "config.json", lambda config: config.update(values))
    assert problem in refused(FileError, model, "meta")


def test_a_network_that_says_no_size_paints_at_that_of_training(model: Path) -> None:
    change_json(model / "unet" / "config.json", lambda config: config.update(sample_size=None))
    assert load(model, "meta").defaults.width == 128 * 8


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"beta_end": 0.0001}, "beta_end 0.0001 is not above beta_start 0.00085"),
        ({"beta_start": 2}, "beta_start"),
        ({"prediction_type": "sample"}, "prediction_type"),
        ({"clip_sample": True}, "clip_sample true is not false"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"steps_offset": 7}, "steps_offset"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps"),
    ],
)
def test_schedules_that_are_not_supported(model: Path, values: dict, problem: str) -> None:
    change_json(model / "scheduler" / "scheduler_config.json", lambda config: config.update(values))
    assert problem in refused(FileError, model, "meta")


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_k.weight",
        "first_stage_model.decoder.mid.attn_1.q.weight",
        "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight",
        TEXT_PROJECTION,
    ],
)
def test_missing_unexpected_and_misshaped_tensors_of_a_file_are_named(file: Path, name: str) -> None:
    change_tensors(file, lambda state: state.update({f"{name}.scale": torch.ones(1)}))
    for device in ("cpu", "meta"):
        assert f"1 unexpected ({name}.scale)" in refused(WeightsError, file, device)
    change_tensors(file, lambda state: (state.pop(f"{name}.scale"), state.update({name: state[name][:-1].clone()})))
    assert f"1 wrong shape ({name}: " in refused(WeightsError, file)
    change_tensors(file, lambda state: state.pop(name))
    assert f"1 missing ({name})" in refused(WeightsError, file)


def test_a_file_without_a_part_is_none(file: Path) -> None:
    def without_text(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.startswith("conditioner.")]:
            del state[name]

    change_tensors(file, without_text)
    with pytest.raises(FileError, match="a U-Net alone"):
        catalogue.find(str(file))


def test_truncated_files(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="truncated"):
        catalogue.find(str(file))


@pytest.mark.parametrize("names", ["shards", "a variant", "shards of a variant"])
def test_text_encoders_in_files_of_other_names(whole: Path, model: Path, names: str) -> None:
    """Without an index, or as a variant alone; deferred as the engine reads them, and not."""
    path = model / "text_encoder" / "model.safetensors"
    state = load_file(path)
    path.unlink()
    variant = ".fp16" if "variant" in names else ""
    count = 2 if "shards" in names else 1
    for shard in range(count):
        name = f"model-{shard + 1:05}-of-{count:05}" if count > 1 else "model"
        part = dict(list(state.items())[shard::count])
        save_file(part, path.with_name(f"{name}{variant}.safetensors"), metadata={"format": "pt"})
    expected = picture(load(whole))
    assert picture(load(model)) == expected
    engines = load_pipeline(str(model), "cpu", "float32")
    assert isinstance(engines, SdxlPipeline)
    assert picture(engines) == expected


@pytest.mark.parametrize("part", ["unet", "text_encoder_2"])
def test_pickles_are_not_read(model: Path, part: str) -> None:
    (path,) = (model / part).glob("*.safetensors")
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    assert "other formats are not read" in refused(FileError, model)


def test_missing_and_unexpected_weights_of_a_folder_are_named(model: Path) -> None:
    path, name = model / "unet" / WEIGHTS, "conv_out.bias"
    change_tensors(path, lambda state: state.update({"nobody.weight": state[name].clone()}))
    with pytest.raises(WeightsError, match=r"1 unexpected \(nobody\.weight\)"):
        load(model)
    change_tensors(path, lambda state: (state.pop("nobody.weight"), state.pop(name)))
    with pytest.raises(WeightsError, match=r"1 missing \(conv_out\.bias\)"):
        load(model)
