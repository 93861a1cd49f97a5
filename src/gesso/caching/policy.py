"""When to compute and when to forecast: one small contract for every policy.

Before a step a run's *course* decides; after it the course is told what was done and what was measured. A decision is
hashable, so that it can stand in a batch key: states that step together do the same. Courses of fixed schedules are
lists of decisions; those of adaptive policies count and compare.
Not here: which policy a request means (`policy_choice`), schedules (`policy_interval`), tests of change
(`policy_change`), speculation (`policy_speculation`), tokens (`policy_tokens`, `policy_clusters`), features (`store`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Action(StrEnum):
    """What a network does at the places of a cache.

    `compute` everything and keep it; `forecast` it; `reuse` it as it last was; forecast all but some `tokens`, which
    are computed; or `probe`: compute the first blocks and see (the first guidance branch decides for all).
    """

    COMPUTE = "compute"
    FORECAST = "forecast"
    REUSE = "reuse"
    TOKENS = "tokens"
    PROBE = "probe"


@dataclass(frozen=True)
class Decision:
    """What one step does. `check` computes the verified module besides its forecast and measures the error."""

    action: Action
    check: bool = False

    @property
    def full(self) -> bool:
        return self.action is Action.COMPUTE


class Course(Protocol):
    """One run's decisions, asked for once a step, in order."""

    def decide(self, step: int) -> Decision: ...

    def refuses(self, step: int, measured: float) -> bool:
        """Whether a forecast is called off in mid-step for what was measured (an error, or a change)."""
        ...

    def settle(self, step: int, computed: bool, measured: float | None) -> None:
        """What the step came to, in the end."""
        ...


@dataclass
class PlannedCourse:
    """Every decision known beforehand."""

    decisions: Sequence[Decision]

    def decide(self, step: int) -> Decision:
        return self.decisions[step]

    def refuses(self, step: int, measured: float) -> bool:
        return False

    def settle(self, step: int, computed: bool, measured: float | None) -> None:
        pass
