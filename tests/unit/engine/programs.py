"""Small programs in an interpreter of their own: for what happens at its exit, and in its children."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run_program(text: str) -> str:
    """What a fresh interpreter prints when it runs this; it has to end well and silently."""
    root = Path(__file__).parents[3]
    ended = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=30, check=False, cwd=root
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout
