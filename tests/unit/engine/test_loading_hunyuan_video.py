"""HunyuanVideo from folders in diffusers' layout: whole ones, and every way in which one can be wrong."""

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
from gesso.engine.loading.hunyuan_video import load_published
from gesso.errors import FileError, GessoError, WeightsError
from gesso.pipelines.hunyuan_video import HunyuanVideoPipeline
from gesso.pipelines.hunyuan_video_state import HunyuanVideoDefaults
from gesso.request import GenerationRequest
from gesso.weights import catalogue
from tests.oracle import run_plainly
from tests.tiny_hunyuan_video import tiny_pipeline, write_tiny_hunyuan_video

REQUEST = GenerationRequest(prompt="a red star", seed=3, width=32, height=32, frames=5, steps=2)
PARTS = ["transformer", "vae", "text_encoder", "text_encoder_2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model; read it, never write to it."""
    return write_tiny_hunyuan_video(tmp_path_factory.mktemp("models") / "tiny-hunyuan-video")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> HunyuanVideoPipeline:
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
    pipeline, parts = load(whole), tiny_pipeline()
    (video,), (wanted,) = run_plainly(pipeline, REQUEST), run_plainly(parts, REQUEST)
    assert [frame.tobytes() for frame in video.frames] == [frame.tobytes() for frame in wanted.frames]
    assert (pipeline.name, pipeline.dtype, len(pipeline.digest)) == (str(whole), torch.float32, 64)
    assert pipeline.defaults == HunyuanVideoDefaults()
    assert pipeline.scheduler["shift"] == 7.0


def test_the_engine_loads_it_by_its_path(whole: Path) -> None:
    pipeline = load_pipeline(str(whole), "cpu", "float32")
    assert run_plainly(pipeline, REQUEST)[0].fps == 24.0


@pytest.mark.parametrize("memory", ["offload", "group-offload", "tiling"])
def test_where_parts_lie_changes_no_bit(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path))
    (video,) = run_plainly(load_pipeline(str(whole), "cpu", "float32", memory=memory), REQUEST)
    (wanted,) = run_plainly(load_pipeline(str(whole), "cpu", "float32", memory="full"), REQUEST)
    assert [frame.tobytes() for frame in video.frames] == [frame.tobytes() for frame in wanted.frames]


def test_all_parts_take_the_dtype(whole: Path) -> None:
    pipeline = load(whole, torch.bfloat16)
    for part in (pipeline.transformer, pipeline.autoencoder, pipeline.text.llama, pipeline.text.clip):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}
    assert len(run_plainly(pipeline, REQUEST)[0].frames) == 5


def test_a_planner_reads_no_weights_and_plans_alike(model: Path) -> None:
    expected = load(model).plan(REQUEST)
    for path in model.rglob("*.safetensors"):
        path.unlink()
    planner = load_planner(str(model), "cpu", "float32")
    assert planner is not None
    assert planner.plan(REQUEST) == expected


def test_the_catalogue_knows_it() -> None:
    entry = catalogue.find("hunyuan-video")
    assert (entry.family, entry.licence) == ("hunyuan-video", "Tencent Hunyuan Community")
    assert catalogue.makes_videos(entry) and not catalogue.makes_videos(catalogue.find("flux-nano"))
    assert HunyuanVideoDefaults(**entry.defaults) == HunyuanVideoDefaults()  # pyright: ignore[reportArgumentType]


# ---- configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("transformer", {"image_condition_type": "latent_concat"}, "image_condition_type latent_concat is not None"),
        ("transformer", {"surprise": 1}, "unknown fields: surprise"),
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "holds diffusers' FluxTransformer2DModel"),
        ("transformer", {"num_attention_heads": "two"}, "cannot be used"),
        ("vae", {"scaling_factor": 0}, "scaling_factor 0 is not a finite number above 0"),
        ("vae", {"temporal_compression_ratio": 3}, "cannot be used"),
    ],
)
def test_configurations_that_are_refused(model: Path, part: str, changes: dict[str, object], words: str) -> None:
    change_json(model / part / "config.json", lambda values: values.update(changes))
    assert words in refused(FileError, model)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", ["patch_size", "patch_size_t"])
def test_patches_of_nothing_are_refused(model: Path, name: str) -> None:
    """Planning divides by them, and does not look at the weights, which would not fit."""
    change_json(model / "transformer" / "config.json", lambda values: values.update({name: 0}))
    with pytest.raises(FileError, match=f"{name} 0 is not a whole number above 0"):
        load_planner(str(model), "cpu", "float32")


def test_another_pipeline_is_refused(model: Path) -> None:
    entry = catalogue.find(str(model))
    change_json(model / "model_index.json", lambda values: values.update(_class_name="HunyuanVideoFramepackPipeline"))
    with pytest.raises(FileError, match="HunyuanVideoFramepackPipeline, not a HunyuanVideo"):
        load_published(entry, Build(device="cpu"))
    with pytest.raises(FileError, match="holds diffusers' HunyuanVideoFramepackPipeline"):
        catalogue.find(str(model))


def test_a_schedule_that_bends_by_size_is_refused(model: Path) -> None:
    path = model / "scheduler" / "scheduler_config.json"
    change_json(path, lambda values: values.update(use_dynamic_shifting=True))
    assert "use_dynamic_shifting true is not false" in refused(FileError, model)


def test_parts_that_do_not_fit(model: Path, tmp_path: Path) -> None:
    for part, width in (("text_embed_dim", 24), ("pooled_projection_dim", 24)):
        other = tiny_pipeline()
        changed = type(other.transformer)(**{**_sizes(other), part: width})
        shutil.rmtree(model / "transformer")
        changed.save_pretrained(model / "transformer")
        assert f"16 wide where the transformer reads {width}" in refused(FileError, model)


def _sizes(pipeline: HunyuanVideoPipeline) -> dict[str, object]:
    return {name: value for name, value in dict(pipeline.transformer.config).items() if not name.startswith("_")}


def test_a_tokenizer_of_another_model(model: Path) -> None:
    path = model / "tokenizer" / "tokenizer.json"

    def forget(values: dict) -> None:
        values["model"]["vocab"].pop("Ġaspects")

    change_json(path, forget)
    assert "the template before a prompt has" in refused(FileError, model)
    path.write_text("{")
    assert "no tokenizer that can be read" in refused(FileError, model)
    path.unlink()
    assert "holds no tokenizer" in refused(FileError, model)


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer", "proj_out.weight"),
        ("vae", "decoder.conv_in.conv.weight"),
        ("text_encoder", "layers.0.mlp.up_proj.weight"),
    ],
)
def test_missing_and_unexpected_weights_are_named(model: Path, part: str, name: str) -> None:
    (path,) = (model / part).glob("*.safetensors")
    change_tensors(path, lambda state: state.update({"nobody.weight": state[name].clone()}))
    assert "1 unexpected (nobody.weight)" in refused(WeightsError, model)
    change_tensors(path, lambda state: (state.pop("nobody.weight"), state.pop(name)))
    assert f"1 missing ({name})" in refused(WeightsError, model)


@pytest.mark.parametrize("part", PARTS)
def test_truncated_weights_and_pickles(model: Path, part: str) -> None:
    (path,) = (model / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    refused(WeightsError, model)
    torch.save({}, path.with_suffix(".bin"))
    path.unlink()
    assert "other formats are not read" in refused(FileError, model)
