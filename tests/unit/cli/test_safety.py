"""The command line with a safety checker: what is written, said and made again, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gesso.metadata import read_record
from gesso.pictures import read_pixels
from gesso.safety.hiding import hidden
from tests.tiny_safety import write_checker
from tests.unit.cli.running import call


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_a_plan_counts_the_checker(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, own_folder: Path, tiny_infinity: Path
) -> None:
    command = ("plan", "a red star", "--model", tiny_infinity, "--device", "cpu")
    assert "safety" not in call(capsys, *command).out
    assert "safety    blur, by a checker: it is not here yet\n" in call(capsys, *command, "--safety", "blur").out
    checker = write_checker(own_folder / "checker")
    monkeypatch.setenv("GESSO_SAFETY_MODEL", str(checker))
    planned = json.loads(call(capsys, *command, "--safety", "reject", "--json").out)["safety"]
    weights = load_file(checker / "model.safetensors")
    assert planned == {"mode": "reject", "bytes": 4 * sum(tensor.numel() for tensor in weights.values())}
    monkeypatch.setenv("GESSO_SAFETY_MODEL", "no/such/checker")
    assert "is no safety checker" in call(capsys, *command, "--safety", "blur").err
    monkeypatch.setenv("GESSO_SAFETY_MODEL", str(checker))
    assert "MiB on top of the memory below" in call(capsys, *command, "--safety", "blur").out


def test_flagged_pictures_from_the_command_to_the_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, own_folder: Path, tiny_infinity: Path
) -> None:
    command = ("generate", "a red star", "--model", tiny_infinity, "--seed", "7", "--num-images", "2")
    unlooked = call(capsys, *command, "--safety", "blur")
    assert unlooked.status == 3 and "gesso models pull stable-diffusion-safety-checker" in unlooked.err
    assert not list(own_folder.rglob("*.png"))

    plain = [read_pixels(Path(line)) for line in call(capsys, *command, "-o", "plain").out.splitlines()]
    monkeypatch.setenv("GESSO_SAFETY_MODEL", str(write_checker(own_folder / "checker", plain[1:], plain[:1])))
    blurring = call(capsys, *command, "--safety", "blur", "-o", "blurred")
    first, second = (Path(line) for line in blurring.out.splitlines())
    assert blurring.status == 0 and f"{second}: blurred, because" in blurring.err
    assert read_pixels(first).tobytes() == plain[0].tobytes()
    assert read_pixels(second).tobytes() == hidden(plain[1]).tobytes()
    assert "blurred (concept 0)" in call(capsys, "show", second).out
    assert call(capsys, "rerun", second).out == "equal\n"

    rejecting = call(capsys, *command, "--safety", "reject", "-o", "rejected")
    assert rejecting.status == 1
    assert "rejected 1 of 2 pictures (seed 8); another seed or prompt may pass" in rejecting.err
    [kept] = [Path(line) for line in rejecting.out.splitlines()]
    assert list(Path("rejected").iterdir()) == [kept] and read_record(kept).seed == 7
    lines = [json.loads(line) for line in call(capsys, *command, "--safety", "reject", "--json").out.splitlines()]
    assert [(line["seed"], line["safety"], line["file"] is None) for line in lines] == [
        *((7, "passed", False), (8, "rejected", True))
    ]

    monkeypatch.setenv("GESSO_SAFETY", "reject")
    monkeypatch.setenv("GESSO_SAFETY_REQUIRED", "1")
    again = call(capsys, "rerun", second)
    assert again.status == 1 and "rejected the picture (seed 8)" in again.err
