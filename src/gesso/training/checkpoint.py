"""Training state on disk: written aside and renamed, read back with nothing executed.

A checkpoint is one file of tensors and plain values. The newest two are kept, so that a file damaged from outside
leaves an older one. Not here: exported models (`export`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from gesso.errors import FileError, RunError

_NAME = re.compile(r"step-(\d{8})\.pt")
KEPT = 2


def save(folder: Path, step: int, state: dict[str, object]) -> Path:
    """Write the state of a finished step; on any failure the folder is as before."""
    path = folder / f"step-{step:08d}.pt"
    aside = path.with_suffix(".partial")
    try:
        with aside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        aside.unlink(missing_ok=True)
        raise RunError(f"checkpoint {path} could not be written: {error}") from error
    for old in _paths(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def newest(folder: Path) -> tuple[Path, dict[str, object]] | None:
    """The newest readable checkpoint and its path, or None where there is none."""
    damaged: list[Path] = []
    for path in reversed(_paths(folder)):
        try:
            return path, torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, KeyError):
            damaged.append(path)
    if damaged:
        raise FileError(damaged[0], "no checkpoint here can be read", "remove the folder to begin anew")
    return None


def _paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name))
