"""What all benchmarks share: the machine's name, its ceilings measured in the same run, and the JSON line of a claim.

Not here: any claim. A line has the claim, the measured figure, the floor or rival it is held against, their ratio, the
hardware and the date. With `--save` a benchmark's lines are also kept in `results/<what>_<hardware>_<date>.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take; `parse` reads it."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--save", action="store_true", help="also keep the lines in benchmarks/results/")
    return parser


class Claims:
    """The lines of one benchmark, printed as they come and kept at the end if asked."""

    def __init__(self, what: str, save: bool) -> None:
        self._what, self._save = what, save
        self._lines: list[str] = []

    def report(self, claim: str, measured: float, floor_or_rival: float, ratio: float, **more: object) -> None:
        """Print one claim as a JSON line."""
        line: dict[str, object] = {
            "claim": claim,
            "measured": _short(measured),
            "floor_or_rival": _short(floor_or_rival),
            "ratio": _short(ratio),
            "hardware": hardware(),
            "date": datetime.now(UTC).date().isoformat(),
            **{key: _short(value) for key, value in more.items()},
        }
        self._lines.append(json.dumps(line))
        print(self._lines[-1], flush=True)

    def keep(self) -> None:
        """Write the lines to `results/`, if that was asked for."""
        if not self._save:
            return
        RESULTS.mkdir(exist_ok=True)
        machine = re.sub(r"[^a-z0-9]+", "-", hardware().lower()).strip("-")
        path = RESULTS / f"{self._what}_{machine}_{datetime.now(UTC).date().isoformat()}.jsonl"
        path.write_text("".join(line + "\n" for line in self._lines), encoding="utf-8")


def hardware() -> str:
    """The processor, how many threads of it, and the accelerator if PyTorch sees one."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    text = f"{name}, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name()}; {text}" if torch.cuda.is_available() else text


def seconds(action: Callable[[], object], repeats: int = 5, warm: int = 1) -> float:
    """Median seconds of an action, after warming up."""
    for _ in range(warm):
        action()
    times: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def matmul_ceiling(dtype: torch.dtype, size: int = 2048) -> float:
    """Operations a second of a large square matmul: what this machine does at best."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / seconds(lambda: a @ b, repeats=5, warm=2)


def memory_ceiling(megabytes: int = 512) -> float:
    """Bytes a second read by summing a tensor too large for the caches."""
    block = torch.ones(megabytes * 2**20 // 4)
    return block.nbytes / seconds(block.sum, repeats=5)


def _short(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value
