"""Models as Infinity's authors publish them: strict by name and shape in every kind of file; then a whole one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gesso.engine import Engine
from gesso.engine.loading import load_pipeline
from gesso.errors import FileError, MissingError, RequestError, WeightsError
from gesso.models.flan_t5 import FlanT5
from gesso.pipelines.infinity import InfinityPipeline
from gesso.request import GenerationRequest
from gesso.weights.infinity import load_published_tokenizer, load_published_transformer
from tests.oracle import run_plainly
from tests.tiny_infinity import tiny_tokenizer, tiny_transformer
from tests.unit.weights.published import (
    TEXT_WIDTH,
    TOKENIZER,
    TRANSFORMER,
    published_tokenizer,
    published_transformer,
    write_published,
    write_text_encoder,
)

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with a whole tiny "infinity-2b"; read it, never write to it."""
    home = tmp_path_factory.mktemp("home")
    write_published(home / "weights/infinity-2b")
    return home


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("t5"))


def _write(state: dict[str, Tensor], path: Path, kind: str) -> Path:
    if kind == "safetensors":
        save_file(state, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    if kind.startswith("pth"):
        torch.save({"gpt_fsdp": state, "epoch": 1} if kind == "pth in a key" else state, path.with_suffix(".pth"))
        return path.with_suffix(".pth")
    path.mkdir()
    weight_map: dict[str, str] = {}
    for shard in range(3):
        part = dict(list(state.items())[shard::3])
        name = f"model-{shard}.safetensors"
        save_file(part, path / name)
        weight_map |= dict.fromkeys(part, name)
    if kind == "shards by index":
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize("kind", ["safetensors", "pth", "pth in a key", "shards by index", "shards"])
@pytest.mark.parametrize("blocks_per_chunk", [2, 4, None])
def test_a_transformer_loads_from_every_kind_of_file(tmp_path: Path, kind: str, blocks_per_chunk: int | None) -> None:
    path = _write(published_transformer(blocks_per_chunk), tmp_path / "model", kind)
    network = load_published_transformer(path)
    assert network.config == TRANSFORMER
    for name, value in tiny_transformer(TRANSFORMER).state_dict().items():
        assert torch.equal(network.get_parameter(name), value), name


def test_a_transformer_of_half_precision_becomes_float32(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in published_transformer().items()}
    network = load_published_transformer(_write(state, tmp_path / "model", "pth"))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("key", ["vae", "ema", None])
def test_a_tokenizer_loads(tmp_path: Path, key: str | None) -> None:
    torch.save({key: published_tokenizer()} if key else published_tokenizer(), tmp_path / "model.pth")
    tokenizer = load_published_tokenizer(tmp_path / "model.pth")
    assert tokenizer.config == TOKENIZER
    for name, value in tiny_tokenizer(TOKENIZER).state_dict().items():
        assert torch.equal(tokenizer.get_parameter(name), value), name


def test_what_is_missing_unexpected_or_misshapen_is_named(tmp_path: Path) -> None:
    state = published_transformer()
    del state["block_chunks.1.module.0.ffn.fc2.bias"]
    state["block_chunks.0.module.0.sa.colour"] = torch.zeros(1)
    state["head.bias"] = torch.zeros(3)
    with pytest.raises(WeightsError) as caught:
        load_published_transformer(_write(state, tmp_path / "model", "pth"))
    error = caught.value
    assert error.missing == ("blocks.2.feed_forward.fc2.bias",)
    assert error.unexpected == ("blocks.0.sa.colour",)
    assert error.mismatched == ("head.bias: (3,) where (16,) is wanted",)
    tokenizer = published_tokenizer()
    tokenizer["decoder.mid.attn_1.q.weight"] = torch.zeros(1)
    torch.save(tokenizer, tmp_path / "vae.pth")
    with pytest.raises(WeightsError, match="1 unexpected"):
        load_published_tokenizer(tmp_path / "vae.pth")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("pos_start", None, "no start"),
        ("word_embed.weight", torch.zeros(4), "not an Infinity transformer"),
        ("cfg_uncond", torch.zeros(4), "not an Infinity transformer"),
        ("pos_start", torch.zeros(1, 1, 33), "does not divide"),
    ],
)
def test_a_transformer_whose_sizes_cannot_be_told(tmp_path: Path, name: str, value: Tensor | None, words: str) -> None:
    state = published_transformer()
    if value is None:
        del state[name]
    else:
        state[name] = value
    with pytest.raises(WeightsError, match=words):
        load_published_transformer(_write(state, tmp_path / "model", "pth"))


def test_the_wrong_kind_of_model(tmp_path: Path) -> None:
    path = _write(published_transformer(), tmp_path / "model", "pth")
    with pytest.raises(WeightsError, match="not an Infinity tokenizer"):
        load_published_tokenizer(path)
    torch.save(published_tokenizer(), path)
    with pytest.raises(WeightsError, match="not an Infinity transformer"):
        load_published_transformer(path)


def test_a_tokenizer_of_a_width_that_its_groups_do_not_divide(tmp_path: Path) -> None:
    state = {name: value.repeat_interleave(2, 0)[:20] for name, value in published_tokenizer().items()}
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(WeightsError):
        load_published_tokenizer(tmp_path / "model.pth")


def test_an_absent_model_names_the_command_that_fetches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "my models"))
    for name in ("infinity-2b", "infinity-8b", "infinity-8b-512"):
        with pytest.raises(MissingError) as caught:
            load_pipeline(name, "cpu")
        assert "flan-t5-xl" in caught.value.what
        assert str(tmp_path / "my models/weights" / name) in caught.value.what
        assert caught.value.command == f"gesso models pull {name}"


def test_a_part_that_is_absent_is_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(home, tmp_path / "home")
    (tmp_path / "home/weights/infinity-2b/infinity_vae_d32_reg.pth").unlink()
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    with pytest.raises(MissingError, match=r"infinity-2b \(infinity_vae_d32_reg\.pth in "):
        load_pipeline("infinity-2b", "cpu")


def test_the_whole_model_paints(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files to pixels, through the engine, equal to the plain loop; negative prompts of another length included."""
    monkeypatch.setenv("GESSO_HOME", str(home))
    pipeline = load_pipeline("infinity-2b", "cpu", "float32")
    assert isinstance(pipeline, InfinityPipeline)
    request = GenerationRequest(
        prompt="a red star on a white background",
        negative="blue",
        model="infinity-2b",
        width=256,
        height=256,
        seed=3,
        deterministic=True,
    )
    plan = pipeline.plan(request)
    assert (plan.steps, plan.request.guidance, plan.request.temperature) == (7, 3.0, 0.5)
    with Engine(device="cpu", dtype="float32") as engine:
        result = engine.run(request)[0]
    expected = run_plainly(pipeline, request)[0].image
    assert result.image.size == (256, 256)
    assert result.image.tobytes() == expected.tobytes()
    assert pipeline.plan(GenerationRequest(prompt="a star")).request.width == 1024


def test_sizes_are_the_published_ones(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GESSO_HOME", str(home))
    pipeline = load_pipeline("infinity-2b", "cpu", "float32")
    with pytest.raises(RequestError, match="nearest: 1024x1024"):
        pipeline.plan(GenerationRequest(prompt="a star", width=1000, height=1000))
    with pytest.raises(RequestError, match="at most 512 tokens"):
        pipeline.plan(GenerationRequest(prompt="q" * 600))


def test_parts_that_do_not_fit_each_other(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    path = tmp_path / "home/weights/infinity-2b/infinity_vae_d32_reg.pth"
    state = published_tokenizer()
    state["encoder.conv_out.conv.weight"] = torch.zeros(12, 32, 3, 3)
    state["encoder.conv_out.conv.bias"] = torch.zeros(12)
    state["decoder.conv_in.conv.weight"] = torch.zeros(32, 12, 3, 3)
    torch.save({"vae": state}, path)
    with pytest.raises(FileError, match="makes 8 bits where the tokenizer has 12"):
        load_pipeline("infinity-2b", "cpu")


def test_text_features_drop_padding(text_encoder: Path) -> None:
    encoder = FlanT5(text_encoder, dtype=torch.float32)
    assert encoder.width == TEXT_WIDTH
    assert encoder.count("a red star") == 4
    assert encoder.features([]) == []  # of the negatives, where there are none
    assert encoder.count("red " * 1000) == 1001
    together = encoder.features(["a red star", "a red star on a white background", "blue"])
    assert [tuple(features.shape) for features in together] == [(4, 16), (8, 16), (2, 16)]
    alone = encoder.features(["a red star"])[0]
    torch.testing.assert_close(together[0], alone, atol=1e-5, rtol=0)
    assert len(encoder.features(["red " * 1000])[0]) == encoder.max_tokens


def _drop(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["encoder.final_layer_norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _bend(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["encoder.final_layer_norm.weight"] = torch.ones(7)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_drop, r"1 missing \(encoder.final_layer_norm.weight\)"),
        (_bend, r"\(7,\) where \(16,\) is wanted"),
        (_cut, "holds no T5 encoder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no T5 encoder"),
        (lambda folder: (folder / "config.json").write_text("{"), "holds no T5 encoder"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "holds no T5 encoder"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer"),
    ],
    ids=["missing", "shape", "cut", "no weights", "no config", "bad tokenizer", "no tokenizer"],
)
def test_a_text_encoder_that_cannot_be_used(
    text_encoder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], spoil: object, words: str
) -> None:
    """transformers would fill what is missing with random numbers, and say so on stderr only."""
    folder = Path(shutil.copytree(text_encoder, tmp_path / "t5"))
    assert callable(spoil)
    spoil(folder)
    with pytest.raises((FileError, WeightsError), match=words) as caught:
        FlanT5(folder, dtype=torch.float32)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
