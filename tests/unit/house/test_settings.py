"""Which source of a setting wins, and that a bad one is named with its source."""

import os
from pathlib import Path

import pytest

from gesso.errors import FileError, RequestError
from gesso.settings import explain_settings, load_settings


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    given = [name for name in os.environ if name.startswith("GESSO_")]
    for name in (*given, "ZIMAGE_ATTENTION", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def write_user_file(place: Path, text: str) -> None:
    (place / "config" / "gesso").mkdir(parents=True)
    (place / "config" / "gesso" / "config.toml").write_text(text)


def test_each_source_beats_the_next(own_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().output == Path("gesso-output")
    write_user_file(own_place, 'output = "user"\ndevice = "cpu"\n')
    assert load_settings().output == Path("user")
    Path("gesso.toml").write_text('output = "project"\n')
    assert load_settings().output == Path("project")
    monkeypatch.setenv("GESSO_OUTPUT", "environment")
    assert load_settings().output == Path("environment")
    assert load_settings({"output": Path("flag"), "device": None}).output == Path("flag")
    sources = {setting.name: setting.source for setting in explain_settings({"home": Path("/h")})}
    assert sources["home"] == "flag"
    assert sources["output"] == "environment GESSO_OUTPUT"
    assert sources["device"].endswith("config.toml")
    assert sources["offline"] == "default"


def test_the_home_is_absolute(own_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert load_settings().home == own_place / "work" / "cache" / "gesso"
    monkeypatch.setenv("GESSO_HOME", "home")
    assert load_settings().home == own_place / "work" / "home"


def test_broken_files_are_named(own_place: Path) -> None:
    Path("gesso.toml").write_text("output = ")
    with pytest.raises(FileError, match=r"gesso\.toml.*no TOML"):
        load_settings()


def test_unknown_setting_offers_the_nearest() -> None:
    Path("gesso.toml").write_text('outptu = "x"\n')
    with pytest.raises(RequestError, match="did you mean output"):
        load_settings()


def test_bad_value_names_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GESSO_OFFLINE", "perhaps")
    with pytest.raises(RequestError, match="environment GESSO_OFFLINE"):
        load_settings()


def test_z_images_own_variable_names_the_kernel_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"native": "sdpa", "_native_flash": "sdpa", "_native_math": "math", "_flash_3": "flash3", "sage": "sage"}
    for theirs, ours in names.items():
        monkeypatch.setenv("ZIMAGE_ATTENTION", theirs)
        assert load_settings().attention == ours
    sources = {setting.name: setting.source for setting in explain_settings()}
    assert (sources["attention"], sources["dtype"]) == ("environment ZIMAGE_ATTENTION", "default")
    Path("gesso.toml").write_text('attention = "cudnn"\n')
    assert load_settings().attention == "sage"
    monkeypatch.setenv("GESSO_ATTENTION", "math")
    assert load_settings().attention == "math"
    assert load_settings({"attention": "sdpa"}).attention == "sdpa"
