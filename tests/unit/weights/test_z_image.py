"""Z-Image as its authors publish it: strict by name and shape in every kind of file; then a whole one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gesso.engine.loading.build import Build
from gesso.engine.loading.z_image import load_published
from gesso.errors import FileError, GessoError, WeightsError
from gesso.models.qwen_text import QwenText
from gesso.request import GenerationRequest
from gesso.weights import catalogue
from gesso.weights.z_image import load_autoencoder, load_pictures, load_text, load_transformer
from tests.oracle import run_plainly
from tests.tiny_z_image import (
    NETWORK,
    TEXT_WIDTH,
    editing_network,
    full_text_network,
    tiny_autoencoder,
    tiny_text,
    tiny_transformer,
    write_published,
    write_shards,
)

INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
FIRST = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
TEXT = "text_encoder/model.safetensors"
MLP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny Turbo; read it, never write to it."""
    return write_published(tmp_path_factory.mktemp("models") / "z-image")


@pytest.fixture
def copied(published: Path, tmp_path: Path) -> Path:
    """One to spoil."""
    return Path(shutil.copytree(published, tmp_path / "z-image"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


def set_config(path: Path, **fields: object) -> None:
    config = json.loads(path.read_text("utf-8")) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}), "utf-8")


@pytest.mark.parametrize(("shards", "index"), [(1, False), (1, True), (3, True), (3, False)])
def test_a_transformer_loads_from_every_kind_of_folder(copied: Path, shards: int, index: bool) -> None:
    for path in (copied / "transformer").glob("diffusion*"):
        path.unlink()
    expected = tiny_transformer().state_dict()
    write_shards(expected, copied / "transformer", shards, index=index)
    network = load_transformer(copied, torch.float32)
    assert network.config == NETWORK
    assert not network.training
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


def test_dtypes(published: Path) -> None:
    assert {value.dtype for value in load_transformer(published, torch.bfloat16).state_dict().values()} == {
        torch.bfloat16
    }
    text = load_text(published, torch.bfloat16)
    assert {value.dtype for value in text.network.state_dict().values()} == {torch.bfloat16}
    assert text.network.rotary_emb.inv_freq.dtype == torch.float32
    assert load_autoencoder(published).dtype == torch.float32


def test_without_weights_there_are_shapes(published: Path, copied: Path) -> None:
    for path in (*copied.rglob("*.safetensors"), copied / INDEX):
        path.unlink()
    entry = catalogue.find(str(copied))
    planned = load_published(entry, Build(device="meta")).plan(
        GenerationRequest(prompt="a red star", width=64, height=64, seed=1)
    )
    real = load_published(catalogue.find(str(published)), Build(device="cpu", dtype=torch.float32))
    assert planned.request == real.plan(planned.request).request
    assert planned.cost.flops == real.plan(planned.request).cost.flops


SPOILT: list[tuple[str, Callable[[Path], object], type[GessoError], str]] = [
    ("a missing name", lambda at: rewrite(at / FIRST, lambda state: state.pop("x_pad_token")), WeightsError,
     r"1 missing \(x_pad_token\)"),
    ("a foreign name", lambda at: rewrite(at / FIRST, lambda state: state.update(extra=torch.zeros(1))), WeightsError,
     r"1 unexpected \(extra\)"),
    ("a wrong shape", lambda at: rewrite(at / FIRST, lambda state: state.update(x_pad_token=torch.zeros(1, 31))),
     WeightsError, r"x_pad_token: \(1, 31\) where \(1, 32\) is wanted"),
    ("a missing shard", lambda at: (at / FIRST).unlink(), FileError, r"00001-of-00002.safetensors: no such file"),
    ("a truncated shard", lambda at: (at / FIRST).write_bytes((at / FIRST).read_bytes()[:-50]), WeightsError,
     "truncated"),
    ("a broken index", lambda at: (at / INDEX).write_text("{"), FileError, "not an index"),
    ("no weights", lambda at: [path.unlink() for path in (at / "transformer").glob("diff*")], FileError,
     "holds no weights"),
    ("no transformer", lambda at: shutil.rmtree(at / "transformer"), FileError, "transformer: no such folder"),
    ("another network", lambda at: set_config(at / "transformer/config.json", _class_name="FluxTransformer2DModel"),
     FileError, "holds diffusers' FluxTransformer2DModel, not ZImageTransformer2DModel"),
    ("an unknown field", lambda at: set_config(at / "transformer/config.json", colour=3), FileError, "colour"),
    ("heads that do not fit", lambda at: set_config(at / "transformer/config.json", n_kv_heads=1), FileError,
     "n_kv_heads 1 is not n_heads, 2"),
    ("words for numbers", lambda at: set_config(at / "transformer/config.json", dim="wide"), FileError, "dim"),
    ("a configuration cut short", lambda at: (at / "transformer/config.json").write_text('{"dim": '), FileError,
     "is not JSON"),
    ("another autoencoder", lambda at: set_config(at / "vae/config.json", _class_name="AutoencoderDC"), FileError,
     "holds diffusers' AutoencoderDC"),
    ("an autoencoder's unknown field", lambda at: set_config(at / "vae/config.json", colour=3), FileError, "colour"),
    ("an autoencoder of no size", lambda at: set_config(at / "vae/config.json", norm_num_groups=3), FileError,
     "cannot be used"),
    ("an autoencoder's missing name", lambda at: rewrite(at / "vae/diffusion_pytorch_model.safetensors",
     lambda state: state.pop("decoder.conv_in.bias")), WeightsError, r"1 missing \(decoder.conv_in.bias\)"),
    ("another language model", lambda at: set_config(at / "text_encoder/config.json", model_type="qwen2"), FileError,
     "holds a qwen2, not a qwen3"),
    ("text that lacks a name", lambda at: rewrite(at / TEXT, lambda state: state.pop(MLP)), WeightsError,
     r"1 missing \(layers.0.mlp.up_proj.weight\)"),
    ("text with a name too many", lambda at: rewrite(at / TEXT, lambda state: state.update(extra=torch.zeros(1))),
     WeightsError, r"1 unexpected \(extra\)"),
    ("no tokenizer", lambda at: shutil.rmtree(at / "tokenizer"), FileError, "holds no tokenizer"),
    ("a broken tokenizer", lambda at: (at / "tokenizer/tokenizer.json").write_text("{"), FileError, "tokenizer"),
    ("no template", lambda at: (at / "tokenizer/chat_template.jinja").unlink(), FileError, "without a chat template"),
    ("a schedule of another length", lambda at: set_config(at / "scheduler/scheduler_config.json",
     num_train_timesteps=50), FileError, "num_train_timesteps"),
    ("another scheduler", lambda at: set_config(at / "scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
     FileError, "holds diffusers' DDIMScheduler"),
    ("a shift of nothing", lambda at: set_config(at / "scheduler/scheduler_config.json", shift=0), FileError, "shift"),
    ("a schedule that is inverted", lambda at: set_config(at / "scheduler/scheduler_config.json", invert_sigmas=True),
     FileError, "invert_sigmas true is not false"),
    ("a scale of nothing", lambda at: set_config(at / "vae/config.json", scaling_factor=None), FileError,
     "scaling_factor null is not a finite number above 0"),
    ("a shift without end", lambda at: set_config(at / "vae/config.json", shift_factor=float("inf")), FileError,
     "shift_factor Infinity"),
    ("text of no size", lambda at: set_config(at / "text_encoder/config.json", hidden_size=-4), FileError,
     "text_encoder: cannot be used"),
    ("words for the text's size", lambda at: set_config(at / "text_encoder/config.json", hidden_size="wide"),
     FileError, "text_encoder: cannot be used"),
    ("a pickle", lambda at: [torch.save({}, (at / TEXT).with_suffix(".bin")), (at / TEXT).unlink()], FileError,
     "other formats are not read"),
    ("a shorter vocabulary", lambda at: set_config(at / "text_encoder/config.json", vocab_size=20), FileError,
     "does not fit its encoder"),
    ("features of pictures without SigLIP", lambda at: set_config(at / "transformer/config.json", siglip_feat_dim=10),
     FileError, "lacks siglip, siglip_processor"),
    ("another pipeline", lambda at: set_config(at / "model_index.json", _class_name="FluxPipeline"), FileError,
     "not a Z-Image"),
    ("features that do not fit", lambda at: [set_config(at / "transformer/config.json", cap_feat_dim=25),
     rewrite(at / "transformer/diffusion_pytorch_model-00001-of-00002.safetensors", _widen),
     rewrite(at / "transformer/diffusion_pytorch_model-00002-of-00002.safetensors", _widen)], FileError,
     "text features are 24 wide where the transformer reads 25"),
    ("too few positions", lambda at: set_config(at / "transformer/config.json", axes_lens=[512, 16, 16]), FileError,
     "512 tokens is beyond the transformer's 512 positions"),
]  # fmt: skip


def _widen(state: dict[str, torch.Tensor]) -> None:
    for name in ("cap_embedder.0.weight", "cap_embedder.1.weight"):
        if name in state:
            state[name] = torch.zeros(*state[name].shape[:-1], 25)


@pytest.mark.parametrize(("spoil", "error", "words"), [case[1:] for case in SPOILT], ids=[case[0] for case in SPOILT])
def test_what_does_not_fit_is_named(
    copied: Path,
    capfd: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    error: type[GessoError],
    words: str,
) -> None:
    entry = catalogue.find(str(copied))
    spoil(copied)
    with pytest.raises(error, match=words) as caught:
        load_published(entry, Build(device="cpu", dtype=torch.float32))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


# ---- text -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_features_are_what_enters_the_last_layer(published: Path) -> None:
    """Of prompts together and alone, against the whole network with padding and a mask."""
    text = load_text(published, torch.float32)
    assert text.width == TEXT_WIDTH
    prompts = ["a red star", "", "two blue rings on white"]
    tokens = [text.count(prompt) for prompt in prompts]
    whole = full_text_network()
    for prompt, features, count in zip(prompts, text.features(prompts), tokens, strict=True):
        assert tuple(features.shape) == (count, TEXT_WIDTH)
        ids = torch.tensor([text._ids(text.templated(prompt))])
        padded_ids = torch.nn.functional.pad(ids, (0, 9))
        mask = torch.arange(count + 9)[None] < count
        expected = whole(padded_ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(features, expected[0, :count], atol=1e-5, rtol=0)
    assert text.features([]) == []


def test_the_template() -> None:
    text = tiny_text()
    assert text.templated("a star") == "<|im_start|>user\na star<|im_end|>\n<|im_start|>assistant\n"
    assert text.count("") == text.count("a star") - len("a star")
    assert text.unknown("zebra") == []


def test_long_prompts_are_cut_where_the_network_stops() -> None:
    text = tiny_text(length=20)
    mark_and_name = 1 + len("user\n")
    fits = "a" * (20 - mark_and_name)
    assert text.cut(fits) == ""
    assert text.cut(f"{fits} star") == " star"
    assert text.cut("") == ""
    assert [len(features) for features in text.features([fits, f"{fits} star"])] == [20, 20]
    torch.testing.assert_close(*text.features([fits, f"{fits} star"]), atol=1e-5, rtol=0)


def test_long_prompts_about_a_picture_are_cut_where_their_piece_is() -> None:
    marks = 1 + 1 + len("\n") + 1 + len("assistant\n") + 1
    for length in range(marks + 8, marks + 12):  # about one that just fits
        text, prompt = tiny_text(length=length), "a red star"
        _, asked, _ = text.pieces(prompt, 1)
        assert (len(asked), text.count(prompt, 1)) == (min(marks + 10, length), marks + 10)
    text = tiny_text(length=8)
    assert text.cut("a red star", 1) == "tar"
    torch.testing.assert_close(text.pieces("a red star", 1)[1], text.pieces("a red sky", 1)[1], atol=1e-5, rtol=0)
    assert text.cut("a red star", 1) != text.cut("a red star")


def test_pieces_about_pictures() -> None:
    text = tiny_text()
    assert [len(text.pieces("a star", pictures)) for pictures in (0, 1, 2)] == [1, 3, 4]
    (whole,) = text.pieces("a star", 0)
    torch.testing.assert_close(whole, text.features(["a star"])[0])
    before, asked, after = text.pieces("a star", 1)
    marks = [1 + len("user\n") + 1, 1 + len("a star") + 1 + len("\n") + 1 + len("assistant\n") + 1, 2]
    assert [len(before), len(asked), len(after)] == marks


# ---- the whole ------------------------------------------------------------------------------------------------------


def test_the_whole_model_paints(published: Path) -> None:
    """Files to pixels, equal to what is put together by hand."""
    pipeline = load_published(catalogue.find(str(published)), Build(device="cpu", dtype=torch.float32))
    assert len(pipeline.digest) == 64
    plan = pipeline.plan(GenerationRequest(prompt="a red star", width=64, height=64, seed=1))
    assert (plan.steps, plan.request.guidance) == (8, 0.0)
    assert isinstance(pipeline.text, QwenText)
    expected = tiny_autoencoder().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in pipeline.autoencoder.state_dict().items())
    request = plan.request.model_copy(update={"guidance": 2.0, "negative": "blue", "steps": 2})
    one, two = (run_plainly(pipeline, request)[0].image for _ in range(2))
    assert one.size == (64, 64)
    assert one.tobytes() == two.tobytes()


def test_what_it_is_goes_by_its_files(copied: Path, tmp_path: Path) -> None:
    set_config(copied / "scheduler/scheduler_config.json", shift=6.0)
    plan = load_published(catalogue.find(str(copied)), Build(device="cpu", dtype=torch.float32)).plan(
        GenerationRequest(prompt="a", width=64, height=64)
    )
    assert (plan.steps, plan.request.guidance) == (50, 5.0)


@pytest.fixture(scope="module")
def editing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that edits, with a SigLIP 2."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    folder = write_published(tmp_path_factory.mktemp("models") / "edit", shift=6.0, network=editing_network())
    set_config(folder / "model_index.json", _class_name="ZImageOmniPipeline")
    torch.manual_seed(5)
    config = Siglip2VisionConfig(
        hidden_size=10, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_patches=16, patch_size=4
    )
    Siglip2VisionModel(config).eval().save_pretrained(folder / "siglip")
    processor = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 4, "max_num_patches": 12}
    (folder / "siglip_processor").mkdir()
    (folder / "siglip_processor/preprocessor_config.json").write_text(json.dumps(processor), "utf-8")
    return folder


def test_a_model_that_edits(editing: Path, tmp_path: Path) -> None:
    pipeline = load_published(catalogue.find(str(editing)), Build(device="cpu", dtype=torch.float32))
    Image.linear_gradient("L").convert("RGB").resize((48, 32)).save(tmp_path / "given.png")
    request = GenerationRequest(prompt="a red star", init_image=str(tmp_path / "given.png"), steps=2, seed=1)
    plan = pipeline.plan(request)
    assert (plan.request.width, plan.request.height, plan.request.guidance) == (48, 32, 5.0)
    (conditioning,) = pipeline.encode([plan])
    shape = conditioning.prompt.shape
    assert shape.features[0][0] * shape.features[0][1] <= 12
    assert shape.conditions == ((1, 4, 6),)
    assert run_plainly(pipeline, request)[0].image.size == (48, 32)


def test_an_editing_models_pictures_are_strict_too(editing: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(editing, tmp_path / "edit"))
    pictures = load_pictures(copied, torch.float32)
    assert pictures is not None
    assert (pictures.width, pictures.max_tokens) == (10, 12)
    whole = load_published(catalogue.find(str(copied)), Build(device="cpu", dtype=torch.float32)).digest
    config, path = copied / "siglip/config.json", copied / "siglip/model.safetensors"
    text, content = config.read_text("utf-8"), path.read_bytes()
    for size in (-4, "wide"):
        set_config(config, hidden_size=size)
        with pytest.raises(FileError, match="siglip: cannot be used"):
            load_pictures(copied, torch.float32)
    config.write_text(text, "utf-8")
    path.write_bytes(content[:-50])
    with pytest.raises(WeightsError, match="truncated"):
        load_pictures(copied, torch.float32)
    path.write_bytes(content)
    rewrite(path, lambda state: state.update(extra=torch.zeros(1)))
    with pytest.raises(WeightsError, match=r"1 unexpected \(extra\)"):
        load_pictures(copied, torch.float32)
    path.write_bytes(content)
    rewrite(path, lambda state: next(iter(state.values())).add_(1))
    assert load_published(catalogue.find(str(copied)), Build(device="cpu", dtype=torch.float32)).digest != whole
    rewrite(path, _drop_norm)
    with pytest.raises(WeightsError, match="1 missing"):
        load_pictures(copied, torch.float32)
    shutil.rmtree(copied / "siglip")
    assert load_pictures(copied, torch.float32) is None


def _drop_norm(state: dict[str, torch.Tensor]) -> None:
    del state[next(name for name in state if name.endswith("post_layernorm.bias"))]
