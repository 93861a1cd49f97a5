"""The page about the command line (`docs/command-line.md`): every command, every option and every setting is on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gesso.cli.app import COMMANDS, build
from gesso.settings import Settings

PAGE = (Path(__file__).parents[3] / "docs" / "command-line.md").read_text(encoding="utf-8")


def options(command: Any) -> Iterator[str]:
    """All spellings of all options of a command and of those below it."""
    for parameter in command.params:
        yield from (word for word in (*parameter.opts, *parameter.secondary_opts) if word.startswith("-"))
    for below in getattr(command, "commands", {}).values():
        yield from options(below)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_it_has_every_command_and_option(name: str) -> None:
    command: Any = build([name])
    command = command.commands[name]
    written = set(re.findall(r"--?[a-z][a-z-]*", PAGE))
    assert not set(options(command)) - written
    assert re.search(rf"`{name}\b", PAGE)
    for below in getattr(command, "commands", {}):
        assert re.search(rf"{name}\b[^|\n]*\b{below}\b", PAGE), below


def test_it_has_every_setting() -> None:
    for name in Settings.model_fields:
        assert f"| `{name}` | `GESSO_{name.upper()}` |" in PAGE, name
