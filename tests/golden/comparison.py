"""Comparing what the product computes with what was recorded, and the tolerances that side-cars state in words.

Not here: where goldens lie (`side_car`), which tensors a kind compares (`infinity_*`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_NUMBER = re.compile(r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?")


@dataclass(frozen=True)
class Finding:
    """One comparison. `error` is in the unit of `tolerance`; a shape that differs is an infinite error."""

    name: str
    error: float
    tolerance: float
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance

    @property
    def severity(self) -> float:
        """Error in tolerances; one that is not a number is the worst there is."""
        if math.isnan(self.error):
            return math.inf
        if self.tolerance > 0:
            return self.error / self.tolerance
        return math.inf if self.error else 0.0

    def __str__(self) -> str:
        return f"{self.name}: {self.detail or f'{self.error:.3g} > {self.tolerance:.3g}'}"


@dataclass
class Comparison:
    """All comparisons of one golden, gathered."""

    findings: list[Finding] = field(default_factory=list)

    def close(self, name: str, measured: Tensor | float, expected: Tensor | float, tolerance: float) -> None:
        """Largest absolute difference, in float64. Unequal shapes, NaN and empty tensors never pass."""
        measured, expected = torch.as_tensor(measured).detach().double(), torch.as_tensor(expected).detach().double()
        if self._comparable(name, measured, expected, tolerance):
            differs = measured != expected  # equal infinities differ by nothing
            error = torch.where(differs, (measured - expected).abs(), 0.0)
            self.findings.append(Finding(name, float(error.max()), tolerance))

    def relative(self, name: str, measured: Tensor | float, expected: Tensor | float, tolerance: float) -> None:
        """Length of the difference over length of what is expected; differences below 1e-7 count as none."""
        measured, expected = torch.as_tensor(measured).detach().double(), torch.as_tensor(expected).detach().double()
        if self._comparable(name, measured, expected, tolerance):
            difference = float((measured - expected).norm())
            length = float(expected.norm())
            error = difference / length if length else math.inf
            if difference <= 1e-7:
                error = 0.0
            self.findings.append(Finding(name, error, tolerance))

    def equal(self, name: str, measured: Tensor, expected: Tensor) -> None:
        """Every entry equal; the error is the share of entries that are not."""
        if self._comparable(name, measured, expected, 0.0):
            wrong = int((measured.detach() != expected.to(measured.dtype)).sum())
            detail = f"{wrong} of {expected.numel()} differ"
            self.findings.append(Finding(name, wrong / expected.numel(), 0.0, detail))

    def true(self, name: str, holds: bool, detail: str) -> None:
        """Something that is no tensor; `detail` says what is wrong where it does not hold."""
        self.findings.append(Finding(name, 0.0 if holds else math.inf, 0.0, detail))

    @property
    def worst(self) -> Finding:
        """The finding nearest to or farthest beyond its tolerance; of several exact ones, any."""
        return max(self.findings, key=lambda finding: (finding.severity, finding.tolerance))

    @property
    def failures(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.ok]

    def _comparable(self, name: str, measured: Tensor, expected: Tensor, tolerance: float) -> bool:
        problem = ""
        if measured.shape != expected.shape:
            problem = f"shape {tuple(measured.shape)} where {tuple(expected.shape)} was recorded"
        elif not expected.numel():
            problem = "nothing was recorded"
        if problem:
            self.findings.append(Finding(name, math.inf, tolerance, problem))
        return not problem


class Tolerances:
    """A side-car's `tolerance`: {"atol": …, "uint8": …}, or words such as "logits 2e-4 absolute, loss 1e-5"."""

    def __init__(self, stated: object) -> None:
        self._by_name: dict[str, float] = {}
        self._general: float | None = None
        if isinstance(stated, Mapping):
            for name, value in stated.items():
                if isinstance(value, int | float):
                    self._by_name[str(name).lower()] = float(value)
            self._general = self._by_name.get("atol")
        elif isinstance(stated, int | float):
            self._general = float(stated)
        else:
            self._read_words(str(stated or ""))

    def get(self, *names: str, default: float) -> float:
        """The tolerance stated for the first of these names that is mentioned, or the general one, or `default`."""
        for name in names:
            for stated, value in self._by_name.items():
                if name in stated:
                    return value
        return default if self._general is None else self._general

    def _read_words(self, words: str) -> None:
        for stated in re.split(r"[,;](?![^(]*\))", words):
            part = re.sub(r"\([^)]*\)", "", stated).lower().replace("u8", "uint8 ", 1)
            found = _NUMBER.search(part.replace("uint8", "", 1))
            if found is None:
                continue
            name = re.sub(r"[^a-z ]", " ", part.replace("uint8", "pixels").split(found[0])[0]).strip()
            if name in ("", "atol", "floats", "absolute"):
                self._general = float(found[0])
            else:
                self._by_name["uint8" if name == "pixels" else name] = float(found[0])
