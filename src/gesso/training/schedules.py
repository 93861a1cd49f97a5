"""Learning rates by step, as factors of the peak. Pure functions; nothing here knows an optimizer."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, steps: int, warmup: int, final: float) -> float:
    """Linear from 0 over `warmup` steps, then half a cosine from 1 down to `final` at `steps` (arXiv:1608.03983)."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (1 - final) * (0.5 + 0.5 * math.cos(math.pi * progress))
