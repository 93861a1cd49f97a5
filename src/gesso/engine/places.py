"""How many pictures of a model step together: fewer after memory ran out, and by and by more again. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass, field

PROBATION = 32
"""Steps in a row with all places taken, after which twice as many are tried."""

_LONGEST = 64 * PROBATION  # each try that fails costs pictures begun anew, hence twice as long before the next


@dataclass(eq=False, kw_only=True)
class Places:
    """The places of one model.

    Attributes:
        most: as many as there may ever be, at least 1.
        now: as many as there are, from 1 to ``most``.
    """

    most: int
    now: int = field(init=False)
    _steps: int = field(init=False, default=0)
    _probation: int = field(init=False, default=PROBATION)
    _on_trial: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """All of them: the model has nothing to do, and what it will have to do may be smaller."""
        self.now, self._steps, self._probation, self._on_trial = self.most, 0, PROBATION, False

    def shrink(self, count: int) -> None:
        """Memory ran out: no more than so many, and at least 1."""
        if self._on_trial:
            self._probation = min(2 * self._probation, _LONGEST)
        self.now, self._steps, self._on_trial = max(min(self.now, count), 1), 0, False

    def stepped(self, width: int) -> None:
        """A step of so many pictures went well."""
        if self.now == self.most or width < self.now:
            return
        self._steps += 1
        if self._steps >= self._probation:
            self.now, self._steps, self._on_trial = min(2 * self.now, self.most), 0, True
