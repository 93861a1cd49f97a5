"""What a model read last: one prompt with several seeds, each a request of its own, is read once.

Here: which requests read alike, and for how long it is kept. Not here: reading (`pipelines`), and requests that are
encoded together (`groups`), whose numbers differ in the last digits from those of a request alone.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gesso.engine.flight import Run

_MOST = 4  # of the largest text encoders some megabytes each


class Readings:
    """Conditionings of a model's last few requests that were encoded alone."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def find(self, run: Run) -> Any | None:
        """What a request like this one came to; None where it has to be read."""
        found = self._kept.get(key) if (key := _key(run)) else None
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def keep(self, run: Run, conditioning: Any) -> None:
        """Remember what a request came to, if another may come to the same."""
        if key := _key(run):
            self._kept[key] = conditioning
            while len(self._kept) > _MOST:
                self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget all, where memory is short."""
        self._kept.clear()


def _key(run: Run) -> str:
    """All that a request says but which picture of it is painted; "" for one that is read anew each time.

    Those are: one in company; one with files, guests or adapters, which may be others by now.
    """
    request = run.plan.request
    files = (request.init_image, request.mask, request.identity)
    if not run.alone or run.plan.guests or request.lora or any(file is not None for file in files):
        return ""
    return request.model_dump_json(exclude={"seed", "num_images"})
