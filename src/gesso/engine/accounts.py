"""What was used, and how long it takes: the records by which ``fair`` shares and deadlines are foreseen.

Arithmetic only. Work is in whole FLOPs, so that sums are exact and a tie is a tie; who goes first is decided in
``scheduler`` and ``standing``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_KEPT = 0.9  # of what was measured before, at each new step: the last ten or so count, and a slow first one fades


@dataclass(eq=False, kw_only=True)
class Lane:
    """The account of one model's requests of one priority, in FLOPs.

    Priorities have accounts of their own, since what a lower one does without it is not owed later.

    Attributes:
        used: by all its requests together.
        floor: where the account of a new request starts: what the least served of a batch had used, the most that was.
    """

    used: int = 0
    floor: int = 0


@dataclass(eq=False, kw_only=True)
class Pace:
    """Seconds a FLOP of one picture takes, in the company that the model's pictures had lately.

    Where a model does not count its FLOPs: seconds a step takes.
    """

    seconds: float = 0.0
    flops: float = 0.0
    steps: float = 0.0

    def saw(self, seconds: float, flops: int) -> None:
        """Count in a step, whose most expensive picture took so many FLOPs, 0 if they are not counted."""
        self.seconds = _KEPT * self.seconds + seconds
        self.flops = _KEPT * self.flops + flops
        self.steps = _KEPT * self.steps + 1

    def of(self, flops: int, steps: int) -> float | None:
        """Seconds that so many FLOPs of a picture take, or so many steps if they are 0; None before the first step."""
        if flops > 0 and self.flops > 0:
            return flops * self.seconds / self.flops
        return steps * self.seconds / self.steps if self.steps > 0 else None


def whole(flops: float) -> int:
    """FLOPs as a whole number; 0 for what cannot be counted."""
    return int(flops) if math.isfinite(flops) and flops > 0 else 0
