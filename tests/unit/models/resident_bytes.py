"""The most memory that an action takes beyond what was there before: measured, in a process of its own.

Freed memory goes back at once there, as it does in memory modes that foresee their peak. Linux alone says what it was.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

import pytest
import torch

from benchmarks.memory_modes import peak_of, start_counting
from gesso import allocator
from gesso.devices import CPU

P = ParamSpec("P")
T = TypeVar("T")

measured = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /proc to read the peak from")


def in_fresh_process(function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """What a function of a module returns, called in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **named).result(timeout=300)


def most_resident_bytes(action: Callable[[], object], before: Callable[[], object]) -> int:
    """Of this process, while the action runs; `before` runs first, so that what libraries load does not count."""
    torch.set_num_threads(1)  # each has memory of its own
    allocator.keep_nothing()
    with torch.inference_mode():
        before()
        there = start_counting(CPU)
        action()
    return peak_of(CPU) - there
