"""Standard streams that are closed, full or endless: one line or none, the right status, no traceback."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gesso.cli import prompts
from gesso.cli.view import View
from gesso.errors import FileError
from tests.unit.cli.running import PROGRAM, Outcome

FULL = Path("/dev/full")


def redirected(redirection: str, *arguments: str, folder: Path) -> Outcome:
    """What a command line comes to whose streams a shell has changed so."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", *PROGRAM, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CONFIG_HOME": str(folder / "config")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_endless_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "LARGEST_FILE", 9)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\nthree"))
    assert prompts.read_prompts(["-"]) == ["one", "three"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\nthree\n"))
    with pytest.raises(FileError, match="standard input: is longer than 9 characters"):
        prompts.read_prompts(["-"])


def test_closed_standard_input_is_one_line(tmp_path: Path) -> None:
    outcome = redirected("<&-", "generate", "-", folder=tmp_path)
    assert outcome.status == 2
    assert outcome.error == "standard input: is closed; type prompts in quotes, or name a file with @FILE"


def test_closed_standard_error_is_no_matter(tmp_path: Path) -> None:
    made = redirected("2>&-", "generate", "a red star", "--seed", "7", "-o", "out", folder=tmp_path)
    assert (made.status, made.err) == (0, "")
    assert made.out == f"{Path('out') / '0001-a-red-star-7.png'}\n"
    assert redirected("2>&-", "generate", "", folder=tmp_path).status == 2


def test_closed_standard_output_is_no_matter(tmp_path: Path) -> None:
    made = redirected(">&-", "generate", "a red star", "--seed", "7", "-o", "out", folder=tmp_path)
    assert made.status == 0, made.err
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_a_view_without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with View() as view:
        view.line("loading")
        view.begin_bar("painting", 2)
        view.move_bar(1)
        view.result("a.png")


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_standard_output_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbuffered: str) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    for arguments in (("config",), ("--help",), ("--version",), ("show", "--help")):
        outcome = redirected(f">{FULL}", *arguments, folder=tmp_path)
        assert outcome.status == 1
        assert outcome.error == "standard output: no space left on device"
    outcome = redirected(f">{FULL}", "generate", "a red star", "-o", "out", "--quiet", folder=tmp_path)
    assert (outcome.status, outcome.error) == (1, "standard output: no space left on device")
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_a_reader_that_goes_away_is_no_matter(tmp_path: Path) -> None:
    outcome = redirected("| true", "config", folder=tmp_path)
    assert outcome.err == ""
