"""Paths of a request: recorded in full, so that `gesso rerun` works from any folder; names stay names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from gesso.cli.paths import absolute_paths
from gesso.metadata import read_record
from gesso.weights.catalogue import ZOO
from tests.unit.cli.running import call

NANO = "infinity-nano"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("GESSO_OUTPUT", "GESSO_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    for folder in ("work", "elsewhere"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_a_picture_is_made_again_from_another_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, own_folder: Path
) -> None:
    Image.new("RGB", (64, 64), "red").save(own_folder / "start.png")
    shutil.copytree(ZOO / NANO, own_folder / "mine")
    command = ("generate", "a red star", "--model", "./mine", "--init-image", "start.png", "--init-strength", "0.5")
    made = call(capsys, *command, "--seed", "7", "--name", "{model}-{seed}")
    path = Path(made.out.strip()).absolute()
    assert path.name == "mine-7.png"
    request = read_record(path).request
    assert (request.model, request.init_image) == (f"{own_folder}/mine", f"{own_folder}/start.png")
    monkeypatch.chdir(own_folder.parent / "elsewhere")
    again = call(capsys, "rerun", path)
    assert (again.status, again.out) == (0, "equal\n"), again.err
    assert "warning" not in again.err


def test_what_is_a_path_is_made_absolute_and_nothing_else(own_folder: Path) -> None:
    (own_folder / "folder").mkdir()
    (own_folder / NANO).mkdir()
    for name in ("a.png", "b.png", "style.safetensors", "folder/own.safetensors"):
        (own_folder / name).touch()
    fields: dict[str, object] = {
        "model": "folder",
        "mask": "../work/a.png",
        "init_image": "none.png",
        "identity": {"image": "a.png", "pose": "b.png", "variant": "aes_stage2", "strength": 0.5},
        "refiner": "folder",
        "lora": ("style.safetensors::0.30", "folder/own.safetensors", "owner/style::0.8", "none.safetensors", "a::b"),
        "negative": "a.png",
        "seed": 7,
    }
    assert absolute_paths(fields) == fields | {
        "model": f"{own_folder}/folder",
        "mask": f"{own_folder}/../work/a.png",
        "identity": fields["identity"] | {"image": f"{own_folder}/a.png", "pose": f"{own_folder}/b.png"},  # type: ignore[operator]
        "refiner": f"{own_folder}/folder",
        "lora": (
            f"{own_folder}/style.safetensors::0.30",
            f"{own_folder}/folder/own.safetensors",
            *("owner/style::0.8", "none.safetensors", "a::b"),
        ),
    }
    assert absolute_paths({"identity": "a.png"}) == {"identity": f"{own_folder}/a.png"}
    assert absolute_paths({"refiner": {"model": "folder"}}) == {"refiner": {"model": f"{own_folder}/folder"}}
    named: dict[str, object] = {"model": NANO, "refiner": {"model": NANO, "start": 0.7}}  # though such a folder is here
    assert absolute_paths(named) == named
    strange: dict[str, object] = {"model": "x" * 5000, "mask": "a\0b", "lora": ("~/style.safetensors",)}
    assert absolute_paths(strange) == strange


def test_resume_goes_on_whatever_the_path_is_spelled_like(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, own_folder: Path
) -> None:
    Image.new("RGB", (64, 64), "red").save(own_folder / "start.png")
    first = ("generate", "a red star", "--seed", "7", "-o", own_folder / "out", "--json", "--init-image")
    json.loads(call(capsys, *first, "start.png").out)
    monkeypatch.chdir(own_folder.parent / "elsewhere")
    assert call(capsys, *first, own_folder / "start.png", "--resume").out == ""
