"""SDXL's refiner from folders and single files: read when a request has one, in every memory mode; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from gesso.engine.budget import weights_bytes
from gesso.engine.engine import Engine
from gesso.engine.loading import load_pipeline, load_planner
from gesso.engine.memory import peaks
from gesso.errors import FileError, GessoError, MissingError, RequestError, WeightsError
from gesso.pipelines.sdxl import SdxlPipeline
from gesso.request import GenerationRequest
from gesso.request_parts import Refiner
from gesso.weights import catalogue
from tests.oracle import run_plainly
from tests.pulled_files import alter, list_files
from tests.tiny_sdxl import (
    tiny_guest,
    tiny_pipeline,
    tiny_refiner,
    write_refiner_file,
    write_sdxl_lora,
    write_tiny_refiner,
    write_tiny_sdxl,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refiner in diffusers' layout; read it, never write to it."""
    return write_tiny_refiner(tmp_path_factory.mktemp("models") / "tiny-refiner")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refiner in one file; read it, never write to it."""
    return write_refiner_file(tmp_path_factory.mktemp("models") / "checkpoints")


@pytest.fixture(autouse=True)
def _nothing_was_pulled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))


def request(refiner: object = None, **values: Any) -> GenerationRequest:
    fields = {"prompt": "a red star", "seed": 3, "steps": 5, "guidance": 2.0, "refiner": refiner}
    return GenerationRequest.model_validate({**fields, **values})


def change_one_number(folder: Path) -> None:
    (path,) = (folder / "unet").glob("*.safetensors")
    alter(path)


def picture(pipeline: SdxlPipeline, refiner: object) -> bytes:
    return run_plainly(pipeline, request(refiner))[0].image.tobytes()


def load(model: str, memory: str = "full") -> SdxlPipeline:
    pipeline = load_pipeline(model, "cpu", "float32", memory=memory)
    assert isinstance(pipeline, SdxlPipeline)
    return pipeline


def refused(kind: type[GessoError], model: str, refiner: str) -> str:
    with pytest.raises(GessoError) as caught:
        load(model).encode([load(model).plan(request(refiner))])
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- whole ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["full", "offload", "group-offload"])
def test_what_is_loaded_paints_as_its_parts_do(model: str, folder: Path, file: Path, memory: str) -> None:
    pipeline, parts = load(model, memory), tiny_pipeline(refiner=tiny_guest())
    expected = picture(parts, "any")
    assert expected != picture(parts, None)
    for path in (folder, file):
        assert picture(pipeline, str(path)) == expected
    assert picture(pipeline, None) == picture(parts, None)


def test_it_is_read_when_one_is_wanted_and_counted_before(model: str, folder: Path) -> None:
    planner, pipeline = load_planner(model, "cpu", "float32"), load(model)
    assert planner is not None
    plain, plan = (planner.plan(request(refiner)) for refiner in (None, str(folder)))
    weights = sum(value.nbytes for value in tiny_refiner().unet.parameters())
    added = {str(mode): peak - peaks(planner, plain)[mode] for mode, peak in peaks(planner, plan).items()}
    assert added["full"] >= weights and added["offload"] >= weights
    assert added["model-offload"] < weights  # one of both is there at a time
    run_plainly(pipeline, request())
    build: Any = pipeline.build  # pyright: ignore[reportAttributeAccessIssue]
    assert "refiner" not in build.networks
    run_plainly(pipeline, request(str(folder)))
    assert "refiner" in build.networks


def test_two_models_have_one_refiner_and_the_last_one_stays(model: str, folder: Path, tmp_path: Path) -> None:
    other = write_tiny_sdxl(tmp_path / "other", tiny_pipeline(prediction_type="v_prediction"))
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    change_one_number(copy)
    networks = []
    for pipeline in (load(model), load(str(other))):
        assert pipeline.refiner is not None
        (first, second, again) = (
            pipeline.refiner.network(Refiner(model=str(path))).unet for path in (folder, copy, folder)
        )
        assert first is not second
        networks.append(again)
        assert pipeline.build.networks["refiner"] is again  # pyright: ignore[reportAttributeAccessIssue]
    assert networks[0] is networks[1]


def test_an_adapter_of_the_model_is_not_the_refiners(model: str, folder: Path, tmp_path: Path) -> None:
    """Rows of the refiner's evaluations are nobody's, whoever they are in the model's."""
    lora, deterministic = (str(write_sdxl_lora(tmp_path / "style.safetensors")),), {"deterministic": True}
    asked = [request(str(folder), lora=lora), request(str(folder)), request(str(folder), lora=lora, steps=8)]
    with Engine(device="cpu", dtype="float32") as engine:
        jobs = [engine.submit(each.model_copy(update={"model": model})) for each in asked]
        together = [job.result()[0] for job in jobs]
        jobs = [engine.submit(each.model_copy(update={"model": model, **deterministic})) for each in asked]
        alone = [job.result()[0].image for job in jobs]
    assert max(cast("int", result.metadata["company"]) for result in together) > 1
    for result, picture_alone in zip(together, alone, strict=True):
        difference = np.asarray(result.image).astype(int) - np.asarray(picture_alone)
        assert np.abs(difference).max() <= 1
    assert alone[1].tobytes() == picture(load(model), str(folder)) != alone[0].tobytes()


def test_the_budget_of_models_counts_it(model: str, folder: Path, tmp_path: Path) -> None:
    """It comes when a request has one: what is idle goes then, and not before."""
    other = str(write_tiny_sdxl(tmp_path / "other", tiny_pipeline(prediction_type="v_prediction")))
    with Engine(device="cpu", dtype="float32") as engine:
        fleet = engine._loop._fleet
        engine.run(request(model=model))
        engine.run(request(model=other))
        fleet.budget = weights_bytes(each.pipeline for each in fleet.models)
        engine.run(request(model=other))
        assert len(fleet.models) == 2
        engine.run(request(str(folder), model=other))
        assert list(fleet.names) == [other]


def test_its_files_are_in_the_record(model: str, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    found = []
    for refiner in (None, str(copy), str(copy)):
        with Engine(device="cpu", dtype="float32") as engine:
            found.append(engine.run(request(refiner, model=model))[0].metadata.get("refiner"))
        change_one_number(copy)
    assert found[0] is None and found[1] != found[2]
    assert all(isinstance(digest, str) and len(digest) == 64 for digest in found[1:])


# ---- refused --------------------------------------------------------------------------------------------------------


def test_one_that_was_not_pulled_has_its_command(model: str) -> None:
    assert refused(MissingError, model, "sdxl-refiner").endswith("gesso models pull sdxl-refiner")


def test_names_of_something_else(model: str) -> None:
    assert 'refiner.model "sdxl" is not a refiner; such as sdxl-refiner' in refused(RequestError, model, "sdxl")
    assert 'refiner.model "no-such" is not a known refiner' in refused(RequestError, model, "no-such")
    assert "is not a refiner" in refused(RequestError, model, model)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_refiner_paints_nothing_alone(folder: Path, file: Path, kind: str) -> None:
    path = folder if kind == "folder" else file
    with pytest.raises(RequestError, match="is not a model that paints; it finishes what an SDXL began"):
        catalogue.find_painter(str(path))


def test_one_that_does_not_fit(model: str, folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    values = json.loads((other / "unet/config.json").read_text())
    for field, value, words in (
        ("in_channels", 9, "it reads 9 channels and makes 4 where the model's autoencoder has 4"),
        ("cross_attention_dim", 40, "it reads features 40 wide where the model's are 24"),
        ("projection_class_embeddings_input_dim", 68, "does not read a pooled text 20 wide and five numbers"),
        ("time_cond_proj_dim", 8, "it reads something else than a text"),
    ):
        (other / "unet/config.json").write_text(json.dumps(values | {field: value}))
        assert words in refused(FileError, model, str(other))


def test_tensors_that_are_missing_or_too_many(model: str, file: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(file.parent, tmp_path / "other")) / file.name
    state = load_file(other)
    state["model.diffusion_model.extra"] = state.pop("model.diffusion_model.out.0.weight")
    save_file(state, other)
    text = refused(WeightsError, model, str(other))
    assert "model.diffusion_model.out.0.weight" in text and "model.diffusion_model.extra" in text


def test_one_that_was_altered_since_it_was_pulled(model: str, folder: Path, tmp_path: Path) -> None:
    """Planning does not see it; loading does, and nothing of it stays."""
    home = Path(shutil.copytree(folder, tmp_path / "home/weights/sdxl-refiner"))
    (weights,) = (home / "unet").glob("*.safetensors")
    weights.rename(home / "unet/diffusion_pytorch_model.fp16.safetensors")
    list_files(home)
    assert picture(load(model), "sdxl-refiner") == picture(load(model), str(folder))
    change_one_number(home)
    pipeline = load(model)
    plan = pipeline.plan(request("sdxl-refiner"))
    with pytest.raises(WeightsError, match=r"fp16\.safetensors was altered; mend it with: gesso models pull sdxl-ref"):
        pipeline.encode([plan])
    assert "refiner" not in pipeline.build.networks  # pyright: ignore[reportAttributeAccessIssue]


def test_one_that_is_broken_by_now_is_nobody_elses_fault(model: str, folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    for path in (broken / "unet").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-10])
    with Engine(device="cpu", dtype="float32") as engine:
        jobs = [engine.submit(request(refiner, model=model)) for refiner in (None, str(broken), None)]
        with pytest.raises(WeightsError, match="truncated"):
            jobs[1].result()
        assert len({jobs[at].result()[0].image.tobytes() for at in (0, 2)}) == 1
