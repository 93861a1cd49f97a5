"""One command line paints by a folder of every family, as published, and makes the same again from the picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gesso.metadata import read_record
from tests.tiny_flux import write_tiny_flux
from tests.tiny_hunyuan_video import write_tiny_hunyuan_video
from tests.tiny_infinity import write_tiny_infinity
from tests.tiny_qwen_image import write_tiny_qwen_image
from tests.tiny_sdxl import write_tiny_sdxl
from tests.tiny_z_image import write_published
from tests.unit.cli.running import call

FOLDERS: dict[str, Callable[[Path], Path]] = {
    "flux": write_tiny_flux,
    "hunyuan-video": write_tiny_hunyuan_video,
    "infinity": write_tiny_infinity,
    "qwen-image": write_tiny_qwen_image,
    "sdxl": write_tiny_sdxl,
    "z-image": write_published,
}
SMALL = ("--dtype", "float32", "--seed", "7")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("GESSO_OUTPUT", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("family", FOLDERS)
def test_every_family_is_painted_and_made_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, family: str
) -> None:
    model = FOLDERS[family](tmp_path / "model")
    steps = () if family == "infinity" else ("--steps", "2", "--width", "64", "--height", "64")
    length = ("--frames", "5") if family == "hunyuan-video" else ()
    ended = call(capsys, "generate", "a red star", "--model", model, *SMALL, *steps, *length)
    assert ended.status == 0, ended.err
    (path,) = (Path(line) for line in ended.out.splitlines())
    assert read_record(path).seed == 7
    assert call(capsys, "rerun", path).out == "equal\n"
