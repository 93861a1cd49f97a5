"""Starting: help loads nothing heavy, the list of commands and options is frozen, unknown words are refused."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import typer

from gesso import __version__
from gesso.cli.app import COMMANDS, build
from gesso.request import GenerationRequest
from tests.unit.cli.running import call

# Options are a public face: scripts hang on them. A change here is a change for everybody.
GENERATE_OPTIONS = {
    *("--negative", "--model", "--width", "--height", "--num-images", "--seed", "--guidance", "--guidance-layer"),
    "--revisions",
    *("--steps", "--scheduler", "--clip-skip", "--true-guidance", "--guidance-normalization", "--guidance-truncation"),
    *("--temperature", "--top-k", "--top-p", "--init-image", "--init-strength", "--mask"),
    *(
        "--identity",
        "--identity-strength",
        "--identity-start",
        "--identity-end",
        "--identity-pose",
        "--identity-variant",
    ),
    *("--min-likeness", "--tries"),
    *("--refiner", "--refiner-start", "--refiner-strength", "--refiner-steps"),
    *("--deterministic", "--no-deterministic", "--cache", "--quality", "--lora", "--safety"),
    *("--size", "--aspect", "--megapixels", "--frames", "--fps"),
    *("--output", "-o", "--name", "--format", "--file-quality", "--metadata", "--no-metadata", "--resume"),
    *("--device", "--dtype", "--memory", "--attention", "--compile", "--no-compile"),
    *("--json", "--quiet", "--open", "--help", "-h"),
}
OTHER_OPTIONS = {
    "show": {"--json"},
    "rerun": {"--output", "-o", "--device", "--json", "--quiet"},
    "train": {"--output", "-o", "--set", "--model", "--data", "--resume", "--json"},
    "demo": {"--output", "-o", "--device", "--dtype", "--memory", "--json"},
    "doctor": {"--json"},
    "config": {"--json"},
}


def options_in(text: str) -> set[str]:
    """The options that a help text lists: what stands at the beginning of a row, before the type."""
    rows = [re.split(r"<|[A-Z]{4}", line)[0] for line in text.splitlines() if re.match(r"│ +-", line)]
    return {word for row in rows for word in re.findall(r"(?<=\s)--?[a-z][a-z-]*(?=\s)", row)}


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from gesso.cli.app import run
status = run(["--help"])
names = ("torch", "numpy", "PIL", "pydantic", "safetensors", "diffusers", "transformers", "gesso.request")
heavy = [name for name in names if name in sys.modules]
assert not heavy, heavy
assert status == 0
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_of_every_command_loads_no_model_library(command: str) -> None:
    code = f"""
import sys
from gesso.cli.app import run
assert run(["{command}", "--help"]) == 0
heavy = [name for name in ("torch", "numpy", "PIL", "diffusers", "transformers") if name in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_listed_line_is_the_commands_own(command: str) -> None:
    home, line = COMMANDS[command]
    module, name = home.split(":")
    target = getattr(importlib.import_module(module), name)
    if isinstance(target, typer.Typer):
        assert target.info.help == line
    else:
        assert (inspect.getdoc(target) or "").splitlines()[0] == line


def test_generates_options_are_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    assert options_in(call(capsys, "generate", "--help").out) == GENERATE_OPTIONS


def test_every_field_is_an_option() -> None:
    spelled = {f"--{name.replace('_', '-')}" for name in GenerationRequest.model_fields if name != "prompt"}
    assert spelled <= GENERATE_OPTIONS


@pytest.mark.parametrize(("command", "expected"), list(OTHER_OPTIONS.items()))
def test_other_options_are_frozen(capsys: pytest.CaptureFixture[str], command: str, expected: set[str]) -> None:
    assert options_in(call(capsys, command, "--help").out) == expected | {"--help", "-h"}


def test_help_shows_bounds_from_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    text = call(capsys, "generate", "--help").out
    assert "1 to 10000" in text
    assert "above 0 and at most 100" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version").out == f"gesso {__version__}\n"


def test_without_arguments_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = call(capsys)
    assert outcome.status == 0
    assert "generate" in outcome.out


def test_unknown_command_offers_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = call(capsys, "genrate", "x")
    assert outcome.status == 2
    assert "Did you mean 'generate'" in outcome.error


@pytest.mark.parametrize("arguments", [("generate", "x", "--nope"), ("show",), ("models", "nope"), ("generate",)])
def test_usage_errors_are_one_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    outcome = call(capsys, *arguments)
    assert outcome.status == 2
    assert outcome.error


def test_console_script_and_module_agree(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("gesso")
    done = subprocess.run([script, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"gesso {__version__}\n"


def test_completion_knows_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_GESSO_COMPLETE", "complete_bash")
    commands = cast("dict[str, object]", vars(build([]))["commands"])
    assert set(commands) == set(COMMANDS)
