"""A model's files that are altered, missing or of something else: one line that names the file, and nothing painted.

Files of our own layout are in `weights/test_own_models`, single files in `weights/test_catalogue`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gesso.engine.loading import load_pipeline
from gesso.errors import GessoError, WeightsError
from gesso.weights import manifest
from tests.pulled_files import alter, assert_checked, list_files
from tests.tiny_z_image import write_published

NAME = "z-image-turbo"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Z-Image in shards, as a pull leaves it."""
    return list_files(write_published(tmp_path_factory.mktemp("weights") / NAME, shards=2))


@pytest.fixture
def model(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy where pulled models lie, to spoil."""
    monkeypatch.setenv("GESSO_HOME", str(tmp_path))
    return Path(shutil.copytree(whole, tmp_path / "weights" / NAME))


def shards(model: Path) -> list[Path]:
    return sorted((model / "transformer").glob("*.safetensors"))


def become(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def test_whole_ones_load(model: Path) -> None:
    assert len(shards(model)) == 2
    assert load_pipeline(NAME, "cpu", "float32")
    assert load_pipeline(str(model), "cpu", "float32")


ROWS: list[tuple[Callable[[Path], object], str]] = [
    (alter, "was altered; mend it with: gesso models pull z-image-turbo"),
    (Path.unlink, "no such file"),
    (shorten, "truncated"),
    (become(b""), "truncated"),
    (become(b"version https://git-lfs.github.com/spec/v1\n"), "is a pointer of git-lfs"),
    (become(b"<!DOCTYPE html>"), "is a web page"),
    (become(b"PK\x03\x04" + 99 * b"x"), "is a pickle, which may hold code; nothing was executed"),
]


@pytest.mark.parametrize(("spoil", "words"), ROWS, ids=[words for _, words in ROWS])
@pytest.mark.parametrize("named", ["by name", "by path"])
def test_a_spoilt_shard(model: Path, spoil: Callable[[Path], object], words: str, named: str) -> None:
    path = shards(model)[1]
    spoil(path)
    with pytest.raises(GessoError) as caught:
        load_pipeline(NAME if named == "by name" else str(model), "cpu", "float32")
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    assert words in str(caught.value)


def test_pickles_instead(model: Path) -> None:
    for path in (model / "transformer").glob("*.safetensors*"):
        path.unlink()
    (model / "transformer/diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(GessoError, match=r"holds no weights in \.safetensors"):
        load_pipeline(NAME, "cpu", "float32")


def test_a_list_that_is_damaged(model: Path) -> None:
    (model / manifest.NAME).write_text("[")
    with pytest.raises(GessoError, match=r"manifest\.json is missing or damaged"):
        load_pipeline(NAME, "cpu", "float32")


WAYS = ["name", "absolute", "relative", "inside", "linked home", "link", "alias"]


def written(way: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the user calls the pulled model."""
    home = model.parents[1]
    monkeypatch.chdir(model if way == "inside" else home)
    (home / "link").symlink_to(model)
    (home.parent / f"{home.name}-link").symlink_to(home)
    ways = {
        "name": model.name,
        "absolute": str(model),
        "relative": f"./weights/../weights/{model.name}",
        "inside": ".",
        "linked home": str(home.parent / f"{home.name}-link/weights" / model.name),
        "link": "link",
        "alias": "alias",
    }
    return ways[way]


@pytest.mark.parametrize("way", WAYS)
def test_a_pulled_model_is_checked_however_it_is_called(model: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (model.parents[1] / "models.toml").write_text(f'[models.alias]\npath = "weights/{NAME}"\n')
    called = written(way, model, monkeypatch)
    assert_checked(called, model, shards(model)[0])


@pytest.mark.parametrize("way", ["name", "absolute", "relative"])
def test_so_is_one_that_the_user_has_listed(model: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = '[models.tuned]\nfamily = "z-image"\nlayout = "diffusers"\nsources = [{ repository = "me/tuned" }]\n'
    (model.parents[1] / "models.toml").write_text(entry)
    called = written(way, model.rename(model.with_name("tuned")), monkeypatch)
    alter(shards(model.with_name("tuned"))[0])
    with pytest.raises(WeightsError, match=r"was altered; mend it with: gesso models pull tuned$"):
        load_pipeline(called, "cpu", "float32")
