"""Training state on disk: written aside and renamed, read back with nothing executed.

A checkpoint is one file of tensors and plain values. The newest two are kept, so that a file damaged from outside
leaves an older one. Here too: that a folder is written to by one training at a time. Not here: exported models
(`export`).
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gesso.devices import CPU
from gesso.errors import FileError, RunError

_NAME = re.compile(r"step-(\d{8,})\.pt")
KEPT = 2


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Nobody else trains in this folder meanwhile; the system ends that if this process dies.

    Raises FileError where somebody does.
    """
    from filelock import FileLock, Timeout  # comes with torch

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileError(folder, "another training writes here", "wait for it, or name another folder") from None
    try:
        yield
    finally:
        lock.release()


def save(folder: Path, step: int, state: dict[str, object]) -> Path:
    """Write the state of a finished step; on any failure the folder is as before. Raises RunError."""
    path = folder / f"step-{step:08d}.pt"
    aside = path.with_suffix(".partial")
    try:
        with aside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise RunError(f"checkpoint {path} could not be written: {error}") from error
    finally:
        for left in folder.glob("step-*.partial"):  # this one, and those of runs that were killed while writing
            left.unlink(missing_ok=True)
    for old in _paths(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def newest(folder: Path) -> tuple[Path, dict[str, object]] | None:
    """The newest checkpoint that is whole, and its path; None where there is none at all.

    Raises FileError where there are checkpoints and every one is damaged.
    """
    paths = _paths(folder)
    for path in reversed(paths):
        if (state := _read(path)) is not None:
            return path, state
    if paths:
        raise FileError(paths[-1], "no checkpoint here can be read", "remove the folder to begin anew")
    return None


def _read(path: Path) -> dict[str, object] | None:
    """The state, or None for a file that is damaged. torch does not check the checksums that it writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        state = torch.load(path, map_location=CPU, weights_only=True)
    except MemoryError:
        raise
    except Exception:  # bytes of any kind make zipfile and torch raise nearly anything
        return None
    return state if isinstance(state, dict) else None


def _paths(folder: Path) -> list[Path]:
    """Checkpoints by step."""
    found = [(int(name[1]), path) for path in folder.glob("step-*.pt") if (name := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]
