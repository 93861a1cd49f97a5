"""The error tree: everything that Gesso raises on purpose. Nothing here is caught, printed or translated.

    GessoError                       anything a caller may want to catch           exit 1
    ├── RequestError                 a field's value cannot be used                exit 2
    ├── FileError                    a named file or folder cannot be used         exit 2
    ├── WeightsError                 a checkpoint does not fit its network         exit 2
    ├── MissingError                 something installable is missing              exit 3
    ├── RunError                     the work failed while running                 exit 1
    ├── OutOfMemoryError             the work does not fit the device              exit 1
    ├── RejectedError                the safety checker let no picture be seen     exit 1
    └── CancelledError               somebody stopped the work                     exit 130

`str(error)` is one line that names what is wrong and the way out; the command line puts "error: " before it.
`error.as_dict()` is the same for a machine (`--json`). `error.exit_status` is what the process ends with.
"""

import math
from collections.abc import Sequence


class GessoError(Exception):
    """Root of the tree. `message` becomes one line whatever it held before."""

    exit_status: int = 1

    def __init__(self, message: str) -> None:
        self.message = " ".join(message.split())
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message

    def as_dict(self) -> dict[str, object]:
        """The error as one JSON-ready object: `error` (the class), `message`, `exit_status`, then its own parts."""
        return {"error": type(self).__name__, "message": self.message, "exit_status": self.exit_status} | self._parts()

    def _parts(self) -> dict[str, object]:
        return {}


class RequestError(GessoError):
    """A field of a request, an option or an argument has a value that cannot be used; found before any work.

    Args:
        field: the field's name as the request spells it ("width").
        value: the value that was given.
        allowed: what would be accepted, so that it completes "width 1000 is not …": "a multiple of 16 for
            z-image-turbo", "between 0 and 100", "a model of the catalogue".
        hint: the way out, if `allowed` does not already say it ("nearest: 992 or 1008").
    """

    exit_status = 2

    def __init__(self, field: str, value: object, allowed: str, hint: str = "") -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        self.hint = hint
        message = f"{field} {_shown(value)} is not {allowed}"
        super().__init__(f"{message}; {hint}" if hint else message)

    def _parts(self) -> dict[str, object]:
        return {"field": self.field, "value": _plain(self.value), "allowed": self.allowed, "hint": self.hint}


class FileError(GessoError):
    """A file or folder that was named cannot be used: absent, unreadable, unwritable, or not what it should be."""

    exit_status = 2

    def __init__(self, path: object, problem: str, hint: str = "") -> None:
        self.path = str(path)
        self.problem = problem
        self.hint = hint
        super().__init__(f"{self.path}: {problem}" + (f"; {hint}" if hint else ""))

    def _parts(self) -> dict[str, object]:
        return {"path": self.path, "problem": self.problem, "hint": self.hint}


class WeightsError(GessoError):
    """A checkpoint does not fit its network: which tensors are missing, unexpected or of the wrong shape.

    Args:
        source: the file or catalogue name.
        missing: names the network needs and the file lacks.
        unexpected: names the file holds and the network does not know.
        mismatched: entries such as "blocks.0.weight: file (8, 8), network (8, 16)".
        detail: a sentence instead of, or before, the lists ("the file ends before its header").
    """

    exit_status = 2
    _NAMES_SHOWN = 3

    def __init__(
        self,
        source: object,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Sequence[str] = (),
        detail: str = "",
    ) -> None:
        self.source = str(source)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)
        self.detail = detail
        lists = (("missing", self.missing), ("unexpected", self.unexpected), ("wrong shape", self.mismatched))
        parts = [detail] if detail else []
        parts += [f"{len(names)} {word} ({self._some(names)})" for word, names in lists if names]
        fit = "" if parts == [detail] else "weights do not fit: "
        super().__init__(f"{self.source}: {fit}{'; '.join(parts) or 'unknown reason'}")

    def _some(self, names: tuple[str, ...]) -> str:
        more = len(names) - self._NAMES_SHOWN
        return ", ".join(names[: self._NAMES_SHOWN]) + (f", and {more} more" if more > 0 else "")

    def _parts(self) -> dict[str, object]:
        return {
            "source": self.source,
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "mismatched": list(self.mismatched),
            "detail": self.detail,
        }


class MissingError(GessoError):
    """Something that can be installed or fetched is missing; `command` mends it."""

    exit_status = 3

    def __init__(self, what: str, command: str) -> None:
        self.what = what
        self.command = command
        super().__init__(f"{what} is missing; get it with: {command}")

    def _parts(self) -> dict[str, object]:
        return {"what": self.what, "command": self.command}


class RunError(GessoError):
    """The work was accepted and failed while running (a full disk, a pipeline that broke)."""


class OutOfMemoryError(GessoError):
    """The work does not fit. `needed` and `free` are bytes where known; `modes` are settings that need less."""

    def __init__(self, needed: int | None, free: int | None, modes: Sequence[str] = ()) -> None:
        self.needed = needed
        self.free = free
        self.modes = tuple(modes)
        message = "out of memory"
        if needed is not None:
            message += f": needs {_gibibytes(needed)}"
        if free is not None:
            message += f"{',' if needed is not None else ':'} {_gibibytes(free)} free"
        super().__init__(message + (f"; try {' or '.join(self.modes)}" if self.modes else ""))

    def _parts(self) -> dict[str, object]:
        return {"needed": self.needed, "free": self.free, "modes": list(self.modes)}


class RejectedError(GessoError):
    """The safety checker rejected every picture of a request. `seeds` are theirs, of `count` that were asked for."""

    def __init__(self, seeds: Sequence[int], count: int) -> None:
        self.seeds = tuple(seeds)
        self.count = count
        which = f"seed{'s' if len(self.seeds) > 1 else ''} {', '.join(str(seed) for seed in self.seeds)}"
        what = "the picture" if count == 1 else f"{len(self.seeds)} of {count} pictures"
        super().__init__(f"the safety checker rejected {what} ({which}); another seed or prompt may pass")

    def _parts(self) -> dict[str, object]:
        return {"seeds": list(self.seeds), "count": self.count}


class CancelledError(GessoError):
    """Somebody stopped the work; what was done before is kept."""

    exit_status = 130

    def __init__(self, message: str = "cancelled") -> None:
        super().__init__(message)


_LONGEST_SHOWN = 80


def _shown(value: object) -> str:
    """The value as it is quoted in a message: short, on one line, strings in double quotes."""
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}… ({len(str(value))} characters)"


def _plain(value: object) -> object:
    """The value if JSON can hold it, else its text (NaN and infinity are no JSON numbers either)."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
