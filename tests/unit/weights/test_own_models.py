"""Models as `gesso train` exports them: catalogue, configuration, manifest, loading, and what can be wrong there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gesso.engine import Engine
from gesso.engine.loading import load_pipeline, load_planner
from gesso.errors import FileError, GessoError, RequestError, WeightsError
from gesso.pipelines.infinity import InfinityPipeline
from gesso.request import GenerationRequest
from gesso.weights import catalogue, manifest
from tests.tiny_infinity import DEFAULTS, NETWORK, SCHEDULES, TEXT, TOKENIZER, tiny_config, tiny_transformer

Change = Callable[[dict[str, object]], dict[str, object]]


@pytest.fixture
def model(tiny_infinity: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_infinity, tmp_path / "model"))


def _rewrite(folder: Path, config: object) -> None:
    """Change `config.json` as its owner would: the manifest agrees with it."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / manifest.NAME).write_text(json.dumps(manifest.make(folder)))


def _error(folder: Path) -> GessoError:
    with pytest.raises(GessoError) as caught:
        load_pipeline(str(folder), "cpu")
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_folder_is_a_model(tiny_infinity: Path) -> None:
    entry = catalogue.find(str(tiny_infinity))
    assert (entry.family, entry.layout, entry.missing_files()) == ("infinity", "gesso", [])
    assert entry.size == sum(path.stat().st_size for path in tiny_infinity.iterdir())
    pipeline = load_pipeline(str(tiny_infinity), "cpu")
    assert isinstance(pipeline, InfinityPipeline)
    assert (pipeline.config, pipeline.autoencoder.config) == (NETWORK, TOKENIZER)
    assert (pipeline.schedules, pipeline.defaults) == (SCHEDULES, DEFAULTS)
    assert pipeline.text.max_tokens == TEXT.length
    assert pipeline.dtype == torch.float32


def test_weights_come_back_as_they_were_in_bfloat16(tiny_infinity: Path) -> None:
    pipeline = load_pipeline(str(tiny_infinity), "cpu")
    assert isinstance(pipeline, InfinityPipeline)
    for name, value in tiny_transformer().state_dict().items():
        loaded = pipeline.transformer.get_parameter(name)
        assert torch.equal(loaded, value.bfloat16().float()), name
        assert not loaded.requires_grad


def test_the_digest_goes_by_the_weights(tiny_infinity: Path, model: Path) -> None:
    before = load_pipeline(str(tiny_infinity), "cpu")
    same = load_pipeline(str(model), "cpu")
    assert isinstance(before, InfinityPipeline) and isinstance(same, InfinityPipeline)
    assert same.digest == before.digest
    weights = load_file(model / "text.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, model / "text.safetensors")
    _rewrite(model, tiny_config())
    other = load_pipeline(str(model), "cpu")
    assert isinstance(other, InfinityPipeline)
    assert other.digest != before.digest


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "float32", "fp32"])
def test_the_engine_paints_with_it_in_any_dtype(tiny_infinity: Path, dtype: str) -> None:
    request = GenerationRequest(prompt="a red star", model=str(tiny_infinity), seed=1)
    with Engine(device="cpu", dtype=dtype) as engine:
        result = engine.run(request)[0]
    assert result.image.size == (32, 32)
    expected = "bfloat16" if dtype.startswith("b") else "float32"
    assert result.metadata["dtype"] == expected


def test_unknown_dtype(tiny_infinity: Path) -> None:
    with pytest.raises(RequestError) as caught:
        load_pipeline(str(tiny_infinity), "cpu", "float8")
    assert caught.value.field == "dtype"
    assert "bfloat16" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "near"), [("infinity-nan", "infinity-nano"), ("infinity2b", "infinity-2b"), ("Infinity-8B-512", "8b-512")]
)
def test_unknown_names_offer_the_nearest(name: str, near: str) -> None:
    with pytest.raises(RequestError) as caught:
        catalogue.find(name)
    assert caught.value.field == "model"
    assert near in caught.value.hint


def test_a_name_like_nothing_points_to_the_list() -> None:
    with pytest.raises(RequestError, match="gesso models lists") as caught:
        catalogue.find("qwertyuiop")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("path", ["./absent", "/absent/model", "~/absent-model", "~nobody-of-this-name/model", "a\\b"])
def test_a_path_that_is_not_there(path: str) -> None:
    with pytest.raises(FileError, match="no such folder"):
        catalogue.find(path)


def test_a_file_is_no_model(tiny_infinity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileError, match=f"name the whole model: {tiny_infinity}"):
        catalogue.find(str(tiny_infinity / "transformer.safetensors"))
    monkeypatch.chdir(tmp_path)
    Path("model.pth").write_bytes(b"")
    with pytest.raises(FileError, match=r"get the model as \.safetensors"):
        catalogue.find("model.pth")


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no config\.json"):
        catalogue.find(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_configuration_that_is_not_json(model: Path, content: bytes) -> None:
    (model / "config.json").write_bytes(content)
    assert "config.json: is not JSON" in str(_error(model))


def test_a_configuration_of_something_else(model: Path) -> None:
    for config in ([], 3, "text"):
        _rewrite(model, config)
        assert "is not a configuration" in str(_error(model))
    _rewrite(model, {"family": "cubism"})
    assert "family cubism" in str(_error(model))


def _network(**values: object) -> Change:
    return lambda config: config | {"network": {**dict(config["network"]), **values}}  # type: ignore[call-overload]


def _generation(**values: object) -> Change:
    return lambda config: config | {"generation": {**dict(config["generation"]), **values}}  # type: ignore[call-overload]


def _without(name: str) -> Change:
    return lambda config: {key: value for key, value in config.items() if key != name}


BROKEN: list[tuple[Change, str]] = [
    (_network(colour=3), "unknown fields: colour"),
    (_network(width="wide"), "width"),
    (_network(width=None), "width"),
    (_network(heads=0), "unusable"),
    (_network(heads=3), "does not divide"),
    (_network(rotary="round"), "rotary"),
    (_network(width=64), "weights do not fit"),
    (_network(depth=3), "19 missing"),
    (_network(depth=1), "19 unexpected"),
    (_without("network"), "no values for InfinityConfig"),
    (_without("text"), "no values for WordEncoderConfig"),
    (_without("schedules"), "lacks schedules"),
    (lambda config: config | {"tokenizer": {**tiny_config()["tokenizer"], "groups": 3}}, "make no network"),  # type: ignore[dict-item]
    (lambda config: config | {"tokenizer": {**tiny_config()["tokenizer"], "stride": 3}}, "power of two"),  # type: ignore[dict-item]
    (lambda config: config | {"schedules": {}}, "default size has no schedule"),
    (lambda config: config | {"schedules": {"wide": {}}}, "wide is no size"),
    (lambda config: config | {"schedules": {"32x32": {"grids": []}}}, "rotary_grid"),
    (lambda config: config | {"schedules": {"32x32": {"grids": [[0, 1]], "rotary_grid": [1, 1]}}}, "at least one cell"),
    (lambda config: config | {"schedules": {"32x32": {"grids": [[1, 1]], "rotary_grid": [1, 1]}}}, "not its size"),
    (lambda config: config | {"schedules": {"8x8": {"grids": [[1, 1]] * 16, "rotary_grid": [1, 1]}}}, "more scales"),
    (_generation(temperature=0), "temperature"),
    (_generation(guidance=[1, -1]), "guidance"),
    (_generation(width=64), "default size has no schedule"),
    (_generation(hue=1), "unknown fields: hue"),
    (_generation(top_k="many"), "top_k"),
    (_without("generation"), "width"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN, ids=[words for _, words in BROKEN])
def test_a_configuration_that_cannot_be_used(model: Path, change: Change, words: str) -> None:
    _rewrite(model, change(tiny_config()))
    error = _error(model)
    assert isinstance(error, FileError | WeightsError)
    assert words in str(error)


def test_parts_that_do_not_fit_each_other(model: Path) -> None:
    config = tiny_config()
    assert isinstance(config["network"], dict)
    weights = load_file(model / "transformer.safetensors")
    weights["code_embedding.weight"] = torch.zeros(32, 10)
    weights["head.weight"], weights["head.bias"] = torch.zeros(20, 32), torch.zeros(20)
    save_file(weights, model / "transformer.safetensors")
    _rewrite(model, config | {"network": config["network"] | {"bits": 10}})
    assert "the transformer makes 10 bits where the tokenizer has 8" in str(_error(model))


def test_a_missing_file_is_named(model: Path) -> None:
    (model / "text.safetensors").unlink()
    assert "lacks text.safetensors" in str(_error(model))


def test_altered_and_short_files_are_named(model: Path) -> None:
    content = bytearray((model / "text.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "text.safetensors").write_bytes(bytes(content))
    short = (model / "tokenizer.safetensors").read_bytes()[:-10]
    (model / "tokenizer.safetensors").write_bytes(short)
    error = _error(model)
    assert isinstance(error, WeightsError)
    assert "text.safetensors was altered" in error.detail
    assert f"tokenizer.safetensors has {len(short)} bytes, not {len(short) + 10}" in error.detail


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config.json": {"bytes": "many", "sha256": 1}}'])
def test_a_manifest_that_is_none(model: Path, content: str) -> None:
    (model / manifest.NAME).write_text(content)
    assert "manifest.json is missing or does not list" in str(_error(model))


def test_files_that_the_manifest_does_not_list_do_not_matter(model: Path) -> None:
    (model / "README.md").write_text("added later")
    load_pipeline(str(model), "cpu")


def test_a_device_that_is_not_there_is_one_line(tiny_infinity: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has it")
    request = GenerationRequest(prompt="a red star", model=str(tiny_infinity))
    with Engine(device="cuda") as engine, pytest.raises(GessoError) as caught:
        engine.run(request)
    assert "\n" not in str(caught.value)


def test_a_planner_plans_the_same_without_reading_weights(model: Path) -> None:
    request = GenerationRequest(prompt="a red star", seed=1)
    whole = load_pipeline(str(model), "cpu").plan(request)
    for part in model.glob("*.safetensors"):
        part.write_bytes(b"")
    planner = load_planner(str(model))
    assert planner is not None
    assert planner.plan(request) == whole


def test_planner_of_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such folder"):
        load_planner(str(tmp_path / "nothing"))
