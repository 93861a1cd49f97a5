"""What a model read last: one prompt with several seeds, each a request of its own, is read once.

Here: which requests read alike. Not here: reading (`pipelines`), and requests that are
encoded together (`groups`), whose numbers differ in the last digits from those of a request alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gesso.engine.flight import Run


class Readings:
    """The conditioning of a model's last request that was encoded alone: no more is held than its pictures need."""

    def __init__(self) -> None:
        self._key, self._kept = "", None

    def find(self, run: Run) -> Any | None:
        """What a request like this one came to; None where it has to be read."""
        return self._kept if self._key and self._key == _key(run) else None

    def keep(self, run: Run, conditioning: Any) -> None:
        """Remember what a request came to, if another may come to the same."""
        key = _key(run)
        self._key, self._kept = key, conditioning if key else None

    def clear(self) -> bool:
        """Forget it, where memory is short; whether there was something."""
        held = bool(self._key)
        self._key, self._kept = "", None
        return held


def _key(run: Run) -> str:
    """All that a request says but which picture of it is painted; "" for one that is read anew each time.

    Those are: one in company; one with files, guests or adapters, which may be others by now.
    """
    request = run.plan.request
    files = (request.init_image, request.mask, request.identity)
    if not run.alone or run.plan.guests or request.lora or any(file is not None for file in files):
        return ""
    return request.model_dump_json(exclude={"seed", "num_images"})
