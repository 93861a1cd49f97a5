"""What a recipe is: a task's settings and a loop's. Not here: any particular one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from gesso.training.loop import LoopSettings, Task


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole configuration. `make` builds the task from (settings, batch, seed)."""

    name: str
    make: Callable[..., Task]
    settings: object
    loop: LoopSettings

    def task(self) -> Task:
        return self.make(self.settings, self.loop.batch, self.loop.seed)

    def as_dict(self) -> dict[str, object]:
        """All settings as plain values, for the record beside a trained model."""
        return {
            "recipe": self.name,
            "settings": dataclasses.asdict(self.settings),  # type: ignore[call-overload]
            "loop": dataclasses.asdict(self.loop),
        }
