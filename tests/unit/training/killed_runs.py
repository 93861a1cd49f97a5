"""A program: trains the tiny tokenizer into a folder again and again, and every time kills itself with SIGKILL.

    python killed_runs.py FOLDER UNDISTURBED

Each run is a forked child that resumes; it dies at a chosen place, or the parent kills it after a random while; the
last one is left alone, and so is one in the second folder. Prints how many runs there were, and how many died so.

All runs are children of one process: what else a process has done can decide which kernels it may use (oneDNN's
matrix tiles are refused where another library's thread has a small signal stack), and so the last bit of a sum.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.unit.training.tiny_recipes import tokenizer_recipe, train

_save = torch.save


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _half_written(state: object, file: BinaryIO) -> None:
    """What is there when a machine dies while a checkpoint is written."""
    _save(state, file)
    file.flush()
    file.truncate(file.tell() // 2)
    _die()


def _not_renamed(descriptor: int) -> None:
    _die()


def _in_a_log_line(step: int, steps: int, figures: object) -> None:
    """After the second line that this run logs, half of a third."""
    _in_a_log_line.calls += 1  # type: ignore[attr-defined]
    if _in_a_log_line.calls == 2:  # type: ignore[attr-defined]
        with (FOLDER / "log.jsonl").open("a") as file:
            file.write('{"step": 3, "loss"')
        _die()


_in_a_log_line.calls = 0  # type: ignore[attr-defined]
FOLDER, UNDISTURBED = map(Path, sys.argv[1:])


def _run() -> None:
    train(tokenizer_recipe(checkpoint_every=1), FOLDER, resume=True)


def _run_half_written() -> None:
    with patch("gesso.training.checkpoint.torch.save", _half_written):
        _run()


def _run_not_renamed() -> None:
    with patch("gesso.training.checkpoint.os.fsync", _not_renamed):
        _run()


def _run_in_a_log_line() -> None:
    train(tokenizer_recipe(checkpoint_every=1), FOLDER, resume=True, report=_in_a_log_line)


def _run_undisturbed() -> None:
    train(tokenizer_recipe(), UNDISTURBED)


def _fork(work: Callable[[], None], seconds: float | None) -> bool:
    """Whether the child died of SIGKILL; with `seconds`, it is sent after so long."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def main() -> None:
    draw = random.Random(0)
    chosen = [_run_half_written, _run_in_a_log_line, _run_not_renamed, _run_half_written]
    surely = [_fork(work, None) for work in chosen]
    for _ in range(4):  # these may also be done before they are killed
        _fork(_run, draw.uniform(0.01, 0.2))
    for work in (_run, _run_undisturbed):
        _fork(work, None)
    print(json.dumps({"runs": len(surely), "killed": sum(surely)}))  # noqa: T201


if __name__ == "__main__":
    main()
