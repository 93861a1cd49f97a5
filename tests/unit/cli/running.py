"""Running command lines in tests: in this process where that is enough, as a process of its own where it is not."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from gesso.cli.app import run

# A shell that runs tests in the background makes them, and so their children, deaf to Ctrl-C: this hears it again.
PROGRAM = (
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from gesso.cli.app import main; main()",
)


@dataclass(frozen=True)
class Outcome:
    """What a command line came to."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a refusal; fails the test where it is not one line, or comes with a traceback."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Outcome:
    """Runs a command line in this process."""
    capsys.readouterr()
    status = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return Outcome(status, captured.out, captured.err)


def spawn(*arguments: str | Path, folder: Path) -> "subprocess.Popen[str]":
    """Starts a command line as a process of its own that listens to Ctrl-C, whatever this one does."""
    return subprocess.Popen(
        [*PROGRAM, *(str(argument) for argument in arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
