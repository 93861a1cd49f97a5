"""Infinity goldens of kind g: top-k and top-p filtering.

Two classes are checked through the product's thresholds (`sampling/bits`), with draws that force either value; any
number of classes through the sorting oracle, which the product's thresholds are tested against (`tests/unit/sampling`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gesso.sampling.bits import choose_bits
from tests.golden.comparison import Comparison
from tests.golden.side_car import Golden, SideCar, read_cases
from tests.oracles import filtered_logits

_CERTAIN = 1e30  # an Exp(1) draw so large that its class is taken only if it is the only one left


class FilteringCase(SideCar):
    top_k: int
    top_p: float


def check_filtering(golden: Golden, comparison: Comparison) -> None:
    """Kind g: which logits are left, and the probabilities that follow."""
    atol = golden.tolerances.get("floats", default=1e-6)
    for prefix, case in read_cases(golden, FilteringCase, "logits"):
        logits, expected = golden.tensor(f"{prefix}.logits"), golden.tensor(f"{prefix}.filtered_logits")
        ways = {"sorted": filtered_logits(logits, case.top_k, case.top_p)}
        if logits.shape[-1] == 2:
            ways["thresholds"] = _by_thresholds(logits, case.top_k, case.top_p)
        for way, filtered in ways.items():
            comparison.equal(f"{prefix}.kept ({way})", filtered.isfinite(), expected.isfinite())
            comparison.close(f"{prefix}.filtered_logits ({way})", filtered, expected, atol)
            if (probabilities := golden.tensors.get(f"{prefix}.probs")) is not None:
                comparison.close(f"{prefix}.probs ({way})", filtered.softmax(-1), probabilities, atol)


def _by_thresholds(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits `[…,2]` with what the product can never draw at minus infinity."""
    flat_1nV = logits.reshape(1, -1, 2)
    kept: list[Tensor] = []
    for value in (0, 1):
        noise = torch.ones_like(flat_1nV)
        noise[..., 1 - value] = _CERTAIN
        kept.append(choose_bits(flat_1nV, noise, top_k, top_p)[..., 0] == bool(value))
    return logits.masked_fill(~torch.stack(kept, dim=-1).view(logits.shape), -torch.inf)
