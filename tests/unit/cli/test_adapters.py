"""LoRAs of requests on the command line: one file for an Infinity, from its options to the record and back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gesso.metadata import read_record
from tests.unit.cli.running import call


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GESSO_OFFLINE", "1")
    for name in ("GESSO_OUTPUT", "GESSO_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, model: Path, value: float) -> str:
    """A LoRA of the first layers of that name in a model's folder."""
    from gesso.adapters.formats.places import shapes_of
    from gesso.engine.loading import load_planner

    pipeline = load_planner(str(model), "cpu")
    tensors = {}
    for name, shape in shapes_of(getattr(pipeline, "transformer", None)).items():  # type: ignore[arg-type]
        if "self_attention" in name:
            tensors[f"transformer.{name}.lora_A.weight"] = torch.full((2, shape.weight[1]), value)
            tensors[f"transformer.{name}.lora_B.weight"] = torch.full((shape.weight[0], 2), value)
    save_file(tensors, path)
    return str(path)


def test_a_lora_goes_into_the_record_and_a_changed_file_is_told(
    capsys: pytest.CaptureFixture[str], own_folder: Path, tiny_infinity: Path
) -> None:
    path = write(own_folder / "style.safetensors", tiny_infinity, 0.2)
    common = ("generate", "a star", "--model", tiny_infinity, "--seed", "7", "--json")
    made = json.loads(call(capsys, *common, "--lora", f"{path}::0.5").out)
    record = read_record(Path(made["file"]))
    assert record.request.lora[0].scale == 0.5
    assert record.data["lora"][0]["source"] == path  # type: ignore[index]
    assert f"{path}::0.5" in call(capsys, "show", made["file"]).out
    again = call(capsys, "rerun", made["file"])
    assert (again.out, again.status) == ("equal\n", 0)
    write(Path(path), tiny_infinity, 0.4)
    assert f"the adapter {path} changed: sha256:" in call(capsys, "rerun", made["file"]).err


def test_another_configuration_beside_a_file_is_told(
    capsys: pytest.CaptureFixture[str], own_folder: Path, tiny_infinity: Path
) -> None:
    path = Path(write(own_folder / "style.safetensors", tiny_infinity, 0.2))
    renamed = {f"base_model.model.{name.partition('.')[2]}": tensor for name, tensor in load_file(path).items()}
    save_file(renamed, path)
    beside = path.with_name("adapter_config.json")
    beside.write_text('{"r": 2, "lora_alpha": 2}')
    common = ("generate", "a star", "--model", tiny_infinity, "--seed", "7", "--json")
    made = json.loads(call(capsys, *common, "--lora", path).out)
    assert call(capsys, "rerun", made["file"]).out == "equal\n"
    beside.write_text('{"r": 2, "lora_alpha": 9}')
    said = f"the adapter {path} has another adapter_config.json beside it now than then"
    assert said in call(capsys, "rerun", made["file"]).err


def test_a_plan_counts_what_is_here(capsys: pytest.CaptureFixture[str], own_folder: Path, tiny_infinity: Path) -> None:
    path = write(own_folder / "style.safetensors", tiny_infinity, 0.2)
    arguments = ("plan", "a star", "--model", tiny_infinity, "--device", "cpu")
    bare, both = (
        json.loads(call(capsys, *arguments, *more, "--json").out)
        for more in ((), ("--lora", path, "--lora", "owner/style::0.5"))
    )
    assert both["adapters"]["owner/style"] is None and not bare["adapters"]
    assert both["peak_bytes"] - bare["peak_bytes"] == both["adapters"][path] > 0
    shown = call(capsys, *arguments, "--lora", path, "--lora", "owner/style::0.5").out
    assert "owner/style at 0.5, not here yet" in shown and "download  owner/style" in shown


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ("two words", "lora .* is not a source"),
        ("./style.safetensors::21", "lora.scale .* is not between -20 and 20"),
        ("./none.safetensors", "no such file"),
        ("owner/style", "offline"),
    ],
)
def test_what_cannot_be_had_is_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], tiny_infinity: Path, lora: str, words: str
) -> None:
    outcome = call(capsys, "generate", "a star", "--model", tiny_infinity, "--lora", lora, "--json")
    assert outcome.status == 2
    error = json.loads(outcome.err)
    assert re.search(words, error["message"]), error
