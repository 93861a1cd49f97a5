"""The catalogue as data, the user's own entries, and what a path is said to hold: models, parts, and neither."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gesso.errors import FileError, GessoError, MissingError, RequestError
from gesso.models.infinity.autoencoder import Autoencoder
from gesso.models.infinity.sizes import tokenizer_size, transformer_size
from gesso.models.infinity.transformer import InfinityTransformer
from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.transformer import S3DiT
from gesso.weights import catalogue
from gesso.weights.catalogue import tables
from tests.tiny_flux import write_tiny_flux
from tests.unit.cli.running import call


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def add(home: Path, text: str) -> None:
    (home / "models.toml").write_text(text, encoding="utf-8")


def refusal(name: object) -> str:
    with pytest.raises(GessoError) as caught:
        catalogue.find(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.zeros(2, 3) for name in names}, path)
    return path


# What gesso knows by itself.


def test_every_entry_says_what_has_to_be_known() -> None:
    names = catalogue.names()
    assert len(names) == len(set(names))
    for name in names:
        entry = catalogue.find(name)
        assert entry.family in tables.families() and entry.description and entry.licence and entry.files
        assert sum(entry.memory().values()) > 0
        assert bool(entry.sources) == bool(entry.fetch) == (entry.layout != "gesso")
    assert catalogue.find("flux-dev").gated.startswith("accept the licence on https://")
    assert {entry.layout for entry in map(catalogue.find, names[:2])} == {"gesso"}, "what ships comes first"


def test_parameters_are_those_of_the_networks() -> None:
    def count(network: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    with torch.device("meta"):
        assert catalogue.find("z-image").parameters["transformer"] == count(S3DiT(S3DiTConfig()))
        for name, size, tokenizer in (("infinity-2b", "2B", (32, False)), ("infinity-8b", "8B", (14, True))):
            said = catalogue.find(name).parameters
            assert said["transformer"] == count(InfinityTransformer(transformer_size(size)))
            assert said["autoencoder"] == count(Autoencoder(tokenizer_size(*tokenizer)))


# The user's own.


def test_a_folder_of_the_users_by_name(home: Path, tiny_infinity: Path) -> None:
    add(home, f'[models.mine]\npath = "{tiny_infinity}"\nlicence = "CC0"\ndefaults = {{ temperature = 0.7 }}\n')
    entry, by_path = catalogue.find("mine"), catalogue.find(str(tiny_infinity))
    assert "mine" in catalogue.names()
    assert (entry.family, entry.folder, entry.files) == (by_path.family, tiny_infinity, by_path.files)
    assert (entry.licence, entry.defaults) == ("CC0", by_path.defaults | {"temperature": 0.7})
    assert entry.memory() == by_path.memory() != {}


def test_a_path_is_told_from_the_file_it_stands_in(home: Path, tiny_infinity: Path) -> None:
    shutil.copytree(tiny_infinity, home / "here")
    add(home, '[models.mine]\npath = "here"\n')
    assert catalogue.find("mine").folder == home / "here"


def test_a_model_of_the_users_to_pull(home: Path) -> None:
    add(
        home,
        '[models.tuned]\nfamily = "flux"\nlayout = "diffusers"\n'
        '[[models.tuned.sources]]\nrepository = "me/tuned"\nrevision = "v2"\n',
    )
    entry = catalogue.find("tuned")
    assert entry.folder == home / "weights/tuned"
    assert entry.files == catalogue.find("flux-dev").files
    assert entry.sources[0].patterns == catalogue.find("flux-dev").sources[0].patterns
    assert entry.sources[0].revision == "v2"
    with pytest.raises(MissingError, match="gesso models pull tuned"):
        entry.require_files()


def test_a_pulled_model_under_another_name(home: Path) -> None:
    """It stays the one that was pulled, with what the entry says instead."""
    (home / "weights/flux-dev").mkdir(parents=True)
    add(home, '[models.mine]\npath = "weights/flux-dev"\nlicence = "mine"\ndefaults = { steps = 9 }\n')
    entry, plain = catalogue.find("mine"), catalogue.find("flux-dev")
    assert (entry.sources, entry.fetch, entry.gated) == (plain.sources, "gesso models pull flux-dev", plain.gated)
    assert (entry.name, entry.licence, entry.defaults["steps"]) == ("mine", "mine", 9)


_SOURCE = 'family = "flux"\nlayout = "diffusers"\nsources = [{ repository = "a/b", folder = "%s" }]'
BAD = [
    ('layout = "diffusers"', "models.bad says neither path and sources"),
    ('path = "x"\ncolour = 3', "models.bad.colour is no field"),
    ("path = 3", "models.bad.path: input should be a valid string"),
    ('path = "x"\nlayout = "round"', "models.bad.layout: input should be"),
    ('path = "x"\nfamily = "cubism"', 'models.bad.family "cubism" is not one of: flux'),
    ('path = "x"\ndefaults = { prompt = "a" }', 'models.bad.defaults "prompt" is not a field'),
    ('path = "x"\ndefaults = { steps = -1 }', "models.bad.defaults.steps -1 is not"),
    ('family = "flux"\nlayout = "file"\nsources = [{ repository = "a/b" }]', "one that flux is read from"),
    ('family = "flux"\nlayout = "infinity"\nsources = [{ repository = "a/b" }]', "one that flux is read from"),
    ('family = "flux"\nlayout = "diffusers"\nsources = [{ repository = "ab" }]', "models.bad.sources.0.repository"),
    ('family = "infinity"\nlayout = "infinity"\nsources = [{ repository = "a/b" }]', "models.bad.files"),
    ('path = "x"\nlayout = "infinity"', "models.bad.files [] is not a list of the transformer, the tokenizer and"),
    ('path = "x"\nfamily = "flux"\nlayout = "infinity"', "one that flux is read from"),
    ('layout = "diffusers"\nsources = [{ repository = "a/b" }]', "models.bad.family"),
    ('family = "flux"\nsources = [{ repository = "a/b" }]', "models.bad.layout"),
    (_SOURCE % "/etc", 'models.bad.sources.0.folder "/etc" is not a folder below'),
    (_SOURCE % "vae/../../x", 'models.bad.sources.0.folder "vae/../../x" is not a folder below'),
    (f'path = "{"x" * 300}"', f'models.bad.path "{"x" * 80}…" cannot be read (file name too long)'),
    (f'path = "{"x" * 300}"\nlayout = "infinity"\nfiles = ["a", "b", "c"]', "cannot be read (file name too long)"),
]


@pytest.mark.parametrize(("text", "words"), BAD, ids=[words for _, words in BAD])
def test_an_entry_that_cannot_be_used(
    home: Path, tiny_infinity: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    """It is one line that names file, entry and field; the entries beside it and all else go on."""
    add(home, f'[models.bad]\n{text}\n[models.good]\npath = "{tiny_infinity}"\n')
    assert words in refusal("bad")
    assert f"{home / 'models.toml'}: models.bad" in refusal("bad")
    assert catalogue.find("good").family == "infinity"
    outcome = call(capsys, "models")
    assert outcome.status == 0
    assert f"not usable: {refusal('bad')}" in outcome.out
    assert "\ngood" in outcome.out
    lines = [json.loads(line) for line in call(capsys, "models", "list", "--json").out.splitlines()]
    assert words in lines[-1]["message"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("[models", "is no TOML"), ("models = 3", "models is no table"), ("[family]", "unknown tables: family")],
)
def test_a_file_that_cannot_be_used(home: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    add(home, text)
    assert catalogue.find("flux-nano").family == "flux"
    assert words in refusal("mine")
    assert words in call(capsys, "models").out
    (home / "models.toml").write_bytes(b"\xff\xfe")
    assert "is no TOML" in refusal("mine")


def test_names_and_paths_of_the_users(home: Path, tiny_infinity: Path) -> None:
    add(home, f'[models."a/b"]\npath = "{tiny_infinity}"\n[models.flux-dev]\npath = "{tiny_infinity}"\n')
    assert {str(problem).partition(": ")[2].partition(" is ")[0] for problem in catalogue.problems()} == {
        'models.a/b "a/b"', 'models.flux-dev "flux-dev"',
    }  # fmt: skip
    assert catalogue.find("flux-dev").sources
    add(home, f'[models.mine]\nfamily = "flux"\npath = "{tiny_infinity}"\n[models.gone]\npath = "nowhere"\n')
    assert 'models.mine.family "flux" is not what lies there: infinity' in refusal("mine")
    assert "no such folder" in refusal("gone")


# What lies at a path.

SDXL = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "first_stage_model.decoder.conv_in.weight",
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
    "conditioner.embedders.1.model.ln_final.weight",
)
FILES = [
    (("a.lora_A.weight", "a.lora_B.weight"), "a LoRA"),
    (("lora_unet_down.lora_down.weight",), "a LoRA"),
    (("encoder.down_blocks.0.weight", "decoder.up_blocks.0.weight"), "an autoencoder alone"),
    (("encoder.down.0.block.0.weight", "decoder.up.0.weight"), "an autoencoder alone"),
    (("text_model.encoder.layers.0.mlp.fc1.weight",), "a text encoder alone"),
    (("encoder.block.0.layer.0.SelfAttention.q.weight",), "a text encoder alone"),
    (("model.layers.0.self_attn.q_proj.weight",), "a text encoder alone"),
    (("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"), "a FLUX transformer alone"),
    (("transformer_blocks.0.a", "single_transformer_blocks.0.a", "x_embedder.weight"), "a FLUX transformer alone"),
    ((SDXL[0],), "a U-Net alone"),
    (("down_blocks.0.a", "mid_block.a", "time_embedding.a"), "a U-Net alone"),
    ((SDXL[0], SDXL[1], "cond_stage_model.a"), "a checkpoint of Stable Diffusion 1 or 2"),
    (("colour",), "tensors of no model that is known"),
    ((), "no tensors"),
]


@pytest.mark.parametrize(("names", "what"), FILES, ids=[what for _, what in FILES])
def test_a_file_that_is_no_model(tmp_path: Path, names: tuple[str, ...], what: str) -> None:
    path = weights(tmp_path / "folder/model.safetensors", *names)
    assert f"{path}: holds {what}; " in refusal(path)
    assert f"holds {what}; " in refusal(path.parent)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of git-lfs"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"PK\x03\x04archive/data.pkl", "is a pickle"),
        (b"\x80\x02}q\x00.", "is a pickle"),
        (b"GGUF\x03\0\0\0", "is GGUF"),
        (b'{"error": "Repository not found"}', "is JSON"),
        (b"", "truncated, or not safetensors (0 bytes)"),
        (b"hello, is this a model?", "truncated, or not safetensors"),
        (b"\x40\0\0\0\0\0\0\0" + b'{"a": 3}' + 56 * b" ", "its header is damaged"),
    ],
)
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes, words: str) -> None:
    """By the file, by its folder, and as the weights of a whole model (where it is read for the first time)."""
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder/model.safetensors"
    path.write_bytes(content)
    assert words in refusal(path)
    assert words in refusal(path.parent)
    if words.startswith("is a"):
        checkpoint = tmp_path / "model.ckpt"
        checkpoint.write_bytes(content)
        assert words in refusal(checkpoint)


def test_folders_that_are_no_model(tmp_path: Path, tiny_infinity: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "is empty: it holds no model" in refusal(folder)
    (folder / "model.bin").write_bytes(b"x")
    assert "holds pickles (model.bin)" in refusal(folder)
    weights(folder / "one.safetensors", "a")
    weights(folder / "two.safetensors", "b")
    assert "holds no model (no model_index.json" in refusal(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "holds a LoRA" in refusal(folder)
    for config, words in (
        ({"_class_name": "AutoencoderKL"}, "holds diffusers' AutoencoderKL alone"),
        ({"architectures": ["T5EncoderModel"]}, "holds transformers' T5EncoderModel alone"),
        ({"model_type": "qwen3"}, "holds transformers' qwen3 alone"),
        ({"family": "cubism"}, "the family cubism"),
    ):
        (folder / "config.json").write_text(json.dumps(config))
        assert words in refusal(folder)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    assert "holds diffusers' StableDiffusion3Pipeline" in refusal(folder)
    part = tiny_infinity / "transformer.safetensors"
    assert f"name the whole model: {tiny_infinity}" in refusal(part)
    with pytest.raises(FileError, match="no such folder"):
        catalogue.find(str(tmp_path / "nothing.safetensors"))
    with pytest.raises(RequestError, match="did you mean flux-dev"):
        catalogue.find("flux-dve")


def test_a_checkpoint_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a family that is read so: named itself, or as the only one of a folder."""
    shutil.copytree(tables.FAMILIES, tmp_path / "families")
    (tmp_path / "families/sdxl.toml").write_text("[family]\none_file = true\n")
    monkeypatch.setattr(tables, "FAMILIES", tmp_path / "families")
    path = weights(tmp_path / "folder/illustrious.safetensors", *SDXL)
    for named in (path, path.parent):
        entry = catalogue.find(str(named))
        assert (entry.family, entry.layout, entry.folder / entry.files[0]) == ("sdxl", "file", path)
        assert entry.memory() == {"illustrious": 2 * 4 * 6}
        assert entry.missing_files() == []


def test_memory_is_counted_in_what_lies_there(tmp_path: Path) -> None:
    """Shards and all, variants aside."""
    folder = write_tiny_flux(tmp_path / "model")
    before = catalogue.find(str(folder)).memory()
    assert set(before) == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    plain = folder / "vae/diffusion_pytorch_model.safetensors"
    shutil.copy(plain, folder / "vae/diffusion_pytorch_model.fp16.safetensors")
    assert catalogue.find(str(folder)).memory() == before
