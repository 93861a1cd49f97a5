"""`gesso models`: every missing and altered file by name, nothing replaced, nothing removed that was not pulled."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from gesso.weights import catalogue, hub
from gesso.weights.catalogue import ZOO
from tests.pulled_files import alter, list_files
from tests.tiny_sdxl import write_single_file, write_tiny_sdxl
from tests.tiny_z_image import write_published
from tests.unit.cli.running import call


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder in diffusers' layout, as far as verifying looks."""
    folder = tmp_path / "model"
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    (folder / "vae/config.json").write_text("{}")
    (folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    return folder


def test_a_model_that_ships(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = call(capsys, "models", "verify", "infinity-nano")
    assert (outcome.status, outcome.err) == (0, "")
    assert "all whole" in outcome.out


def test_a_model_of_our_own_layout(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ZOO / "infinity-nano", tmp_path / "mine"))
    (folder / "transformer.safetensors").unlink()
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    outcome = call(capsys, "models", "verify", folder, "--json")
    assert outcome.status == 1
    line = json.loads(outcome.out)
    assert (line["missing"], line["altered"]) == (["transformer.safetensors"], ["config.json"])
    (folder / "manifest.json").unlink()
    assert "manifest.json is missing" in call(capsys, "models", "verify", folder).error


@pytest.mark.parametrize("digest", ["md5", "sha256"])
def test_a_list_is_made_and_held_against(capsys: pytest.CaptureFixture[str], tmp_path: Path, digest: str) -> None:
    """Of every file that is read of the family, also of parts that Z-Image has not."""
    folder = write_tiny_sdxl(tmp_path / "model")
    assert "make one while the model is whole" in call(capsys, "models", "verify", folder).error
    made = call(capsys, "models", "manifest", folder, "--digest", digest)
    listed = folder / "manifest.txt"
    before = listed.read_bytes()
    count = len(before.splitlines())
    assert made.out == f"{listed}: {count} files\n"
    assert f"{count} files, all whole" in call(capsys, "models", "verify", folder).out
    alter(folder / "unet/diffusion_pytorch_model.safetensors")
    (folder / "text_encoder_2/model.safetensors").unlink()
    words = min((folder / "tokenizer_2").iterdir())
    alter(words)
    outcome = call(capsys, "models", "verify", folder)
    assert outcome.status == 1
    assert outcome.out.splitlines() == [
        "missing: text_encoder_2/model.safetensors",
        f"altered: tokenizer_2/{words.name}",
        "altered: unet/diffusion_pytorch_model.safetensors",
    ]
    quick = call(capsys, "models", "verify", folder, "--quick")
    assert quick.out == "missing: text_encoder_2/model.safetensors\n"
    again = call(capsys, "models", "manifest", folder, "-o", listed)
    assert again.status == 2 and "is there already" in again.error
    assert listed.read_bytes() == before


def test_a_list_of_one_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write_single_file(tmp_path / "models")
    shutil.copyfile(file, file.with_name("other.safetensors"))
    for path in (file, file.with_name("other.safetensors")):
        assert call(capsys, "models", "manifest", path).out == f"{path}.txt: 1 files\n"
    assert "is there already" in call(capsys, "models", "manifest", file).error
    alter(file)
    assert call(capsys, "models", "verify", file).out == f"altered: {file.name}\n"
    assert "1 files, all whole" in call(capsys, "models", "verify", file.with_name("other.safetensors")).out


def test_a_list_of_a_model_by_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path))
    folder = write_tiny_sdxl(tmp_path / "model")
    (tmp_path / "models.toml").write_text('[models.mine]\npath = "model"\n')
    hint = call(capsys, "models", "verify", "mine").error.rpartition(": ")[2]
    assert hint == "gesso models manifest mine"
    assert call(capsys, *hint.split()[1:]).out.startswith(str(folder / "manifest.txt"))
    assert "all whole" in call(capsys, "models", "verify", "mine").out
    outcome = call(capsys, "models", "manifest", "x" * 300)
    assert outcome.status == 2 and "fault of gesso" not in outcome.error


def test_what_was_pulled_says_which_file_is_short(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path))
    folder = list_files(write_published(tmp_path / "weights/z-image-turbo"))
    config, index = folder / "vae/config.json", folder / "model_index.json"
    config.write_bytes(config.read_bytes()[:-1])
    index.write_bytes(index.read_bytes() + b" ")
    for quick in ((), ("--quick",)):
        outcome = call(capsys, "models", "verify", "z-image-turbo", *quick)
        assert outcome.out == "short: vae/config.json\naltered: model_index.json\n"


def test_lists_and_folders_that_cannot_be_used(capsys: pytest.CaptureFixture[str], published: Path) -> None:
    other = published.parent / "list.txt"
    other.write_text("one two three\n")
    assert "one two three" in call(capsys, "models", "verify", published, "--list", other).error
    other.write_text(f"{'0' * 32} ../../secret\n")
    assert "does not lie in it" in call(capsys, "models", "verify", published, "--list", other).error
    assert "no such list" in call(capsys, "models", "verify", published, "--list", "none.txt").error
    empty = published.parent / "empty"
    empty.mkdir()
    assert "holds no model" in call(capsys, "models", "manifest", empty).error
    assert "no such folder" in call(capsys, "models", "manifest", empty / "none").error
    assert "has its list" in call(capsys, "models", "manifest", ZOO / "infinity-nano").error
    assert list(empty.iterdir()) == []


def test_a_published_model_that_is_not_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its list ships with gesso, so its files can be named before they are fetched."""
    monkeypatch.setenv("GESSO_HOME", str(tmp_path))
    for name in ("z-image-turbo", "flux-dev"):
        outcome = call(capsys, "models", "verify", name)
        assert outcome.status == 3 and outcome.error.endswith(f"get it with: gesso models pull {name}")


def test_a_guest_says_what_it_needs_and_what_to_paint_with(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path))
    shown = call(capsys, "models", "show", "infinite-you").out
    assert "CC BY-NC 4.0" in shown and "antelopev2, for non-commercial research, from https://github.com/" in shown
    assert "supports/insightface" not in shown
    refused = call(capsys, "generate", "a man", "--model", "infinite-you", "--identity", "man.jpg")
    assert refused.error.endswith("it is a guest of FLUX: --model flux-dev --identity PHOTOGRAPH, see docs/identity.md")


def test_what_is_not_a_pulled_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Path
) -> None:
    """Nothing that ships or that is the user's own is fetched or removed."""
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    for command in ("pull", "remove"):
        assert "ships with gesso" in call(capsys, "models", command, "infinity-nano").error
        assert "local folder" in call(capsys, "models", command, published).error
        assert "did you mean" in call(capsys, "models", command, "z-image-turbos").error
    assert "no such folder" in call(capsys, "models", "remove", "z-image-turbo", "--yes").error
    assert (published / "vae/config.json").is_file()
    shown = call(capsys, "models", "show", "infinity-2b").out
    assert "gesso models pull infinity-2b" in shown
    assert "*.safetensors of google/flan-t5-xl" in shown


def test_a_client_that_is_not_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GESSO_OFFLINE", raising=False)
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    outcome = call(capsys, "models", "pull", "z-image-turbo", "--from", "modelscope")
    assert (outcome.status, "gesso[modelscope]" in outcome.error) == (3, True)


def test_tokens_are_never_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("GESSO_HF_TOKEN", "hf_secret")
    for options in ((), ("--json",)):
        assert "hf_secret" not in call(capsys, "config", *options).out
    place = tmp_path / "gesso/config.toml"
    place.parent.mkdir(parents=True)
    place.write_text("modelscope_token = 7654321\n")
    assert "7654321" not in call(capsys, "config").error


def test_which_revision_is_here_is_shown_whatever_hub_it_is_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path))
    (source,) = catalogue.find("sdxl").sources
    assert source.modelscope != source.repository
    folder = tmp_path / "weights/sdxl"
    folder.mkdir(parents=True)
    for name, shown in ((source.repository, "; here: abc"), (source.modelscope, f"; here: abc of {source.modelscope}")):
        (folder / hub.REVISIONS).write_text(json.dumps({name: "abc"}))
        (line,) = [
            line for line in call(capsys, "models", "show", "sdxl").out.splitlines() if line.startswith("pulled")
        ]
        assert line.endswith(shown)
