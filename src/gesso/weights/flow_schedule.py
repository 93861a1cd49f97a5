"""How a published flow model's schedule bends: the strict reading of its `scheduler_config.json`.

What would change the arithmetic and is not supported is refused, also where diffusers would take it. Not here: the
arithmetic (`sampling/flow`, `sampling/schedulers`), the schedule of nano models (`flow_nano`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from gesso.errors import FileError
from gesso.sampling.flow import FlowSchedule, shift_of_tokens
from gesso.weights.configuration import read_config

NAME = "scheduler_config.json"

_CLASS = "FlowMatchEulerDiscreteScheduler"
_MENDED = "fetch it again"
_LONGEST_SHOWN = 40  # characters of a value
_MOST_TOKENS = 65536  # of a picture 4096 pixels wide and high
_MOST_BEND = 64.0  # its exponential is still a float32


class _Range(NamedTuple):
    """Numbers from `low` to `high`, whole ones if `whole`."""

    low: float
    high: float
    whole: bool = False

    def holds(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a {'whole ' if self.whole else ''}number from {self.low:g} to {self.high:g}"


_RANGES = {
    "shift": _Range(0.001, 1000),  # much less and 1 + (shift - 1) is 0 in float32
    "base_shift": _Range(-10, 10),
    "max_shift": _Range(-10, 10),
    "base_image_seq_len": _Range(1, 1_000_000, whole=True),
    "max_image_seq_len": _Range(1, 1_000_000, whole=True),
}
_TERMINAL = _Range(0.0001, 0.5)
# Fields of diffusers' class that may have one value each, which is what it takes where the field is absent.
_FIXED: dict[str, object] = {
    "num_train_timesteps": 1000,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}


@dataclass(frozen=True, kw_only=True)
class StretchedSchedule(FlowSchedule):
    """One whose last step begins at `shift_terminal`, where that is given: all of it is stretched to end there."""

    shift_terminal: float | None = None


Schedule = TypeVar("Schedule", bound=FlowSchedule)


def read_schedule(folder: Path, kind: type[Schedule] = FlowSchedule) -> Schedule:
    """The schedule of a model's `scheduler` folder. `kind` has the fields that its family supports.

    Raises FileError that names the file, the field and its value for what is out of bounds or not supported.
    """
    config = read_config(folder, NAME)
    if config.get("_class_name") != _CLASS:
        raise FileError(folder, f"holds diffusers' {config.get('_class_name')}, not {_CLASS}", _MENDED)
    path, values = folder / NAME, {name: value for name, value in config.items() if not name.startswith("_")}
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(values) - known - set(_FIXED)):
        raise FileError(path, f"has unknown fields: {', '.join(unknown)}", "use a newer gesso")
    for name, wanted in _FIXED.items():
        if name in known:
            continue
        value = values.get(name, wanted)
        if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            raise FileError(path, f"{name} {_shown(value)} is not {_shown(wanted)}", "no other is supported")
    for name, allowed in _RANGES.items():
        if name in values and not allowed.holds(values[name]):
            raise FileError(path, f"{name} {_shown(values[name])} is not {allowed}", _MENDED)
    if (end := values.get("shift_terminal")) is not None and not _TERMINAL.holds(end):
        raise FileError(path, f"shift_terminal {_shown(end)} is not null or {_TERMINAL}", _MENDED)
    if not isinstance(dynamic := values.get("use_dynamic_shifting", False), bool):
        raise FileError(path, f"use_dynamic_shifting {_shown(dynamic)} is not true or false", _MENDED)
    kept: dict[str, Any] = {name: value for name, value in values.items() if name in known}
    try:
        return _bounded(kind(**kept), path)
    except ValueError as error:
        raise FileError(path, str(error), _MENDED) from error


def _bounded(schedule: Schedule, path: Path) -> Schedule:
    """Whether the fields go together: the bend of the largest picture must be a number to calculate with."""
    few, many = schedule.base_image_seq_len, schedule.max_image_seq_len
    for tokens in (1, _MOST_TOKENS):
        bend = shift_of_tokens(
            tokens,
            base_tokens=few,
            most_tokens=many,
            base_shift=schedule.base_shift,
            most_shift=schedule.max_shift,
        )
        if abs(bend) > _MOST_BEND:
            steep = f"base_shift {schedule.base_shift:g} at {few} tokens and max_shift {schedule.max_shift:g} at {many}"
            raise FileError(path, f"{steep} are too steep for pictures of 1 to {_MOST_TOKENS} tokens", _MENDED)
    return schedule


def _shown(value: object) -> str:
    """As JSON writes it, where it is short."""
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
