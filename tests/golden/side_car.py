"""A golden: a JSON side-car and the tensors beside it, read with clear complaints. Not here: what is done with them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tests.golden.comparison import Tolerances

_LISTING = re.compile(r"identical_names_and_shapes_to_diffusers_[\d_]+_(\w+)")


class NotYetError(Exception):
    """The product cannot express this golden yet; the message says what is missing."""


class BrokenGoldenError(Exception):
    """The golden itself cannot be used; the message says why."""


class SideCar(BaseModel):
    """Base of the typed views of side-cars; what a view does not name is ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


View = TypeVar("View", bound=SideCar)


@dataclass(frozen=True)
class Golden:
    """One golden; `data` is the side-car as it was read."""

    path: Path
    data: dict[str, object]

    @property
    def family(self) -> str:
        return str(self.data.get("family", ""))

    @property
    def kind(self) -> str:
        """Words of the side-car, for people."""
        return str(self.data.get("kind", ""))

    @property
    def letter(self) -> str:
        """What comes before the colon."""
        return self.kind.partition(":")[0].strip()

    @cached_property
    def tolerances(self) -> Tolerances:
        return Tolerances(self.data.get("tolerance"))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """What was recorded. Raises BrokenGoldenError where the file is missing, foreign or truncated."""
        return read_tensors(self.path.with_suffix("").with_name(self.path.name.removesuffix(".json") + ".safetensors"))

    def tensor(self, name: str) -> Tensor:
        """A tensor that must be there."""
        if name not in self.tensors:
            raise BrokenGoldenError(f"tensor '{name}' is missing")
        return self.tensors[name]

    def view(self, kind: type[View]) -> View:
        """The side-car, typed. Raises BrokenGoldenError naming the first field that is wrong."""
        return view(self.data, kind)

    def state(self, role: str, prefix: str = "state.") -> dict[str, Tensor]:
        """The float32 state dict of a role ("state_in", "vae_state_in"): in this file, or in the golden beside it."""
        source = self.data.get(role)
        weights = self.data.get("weights")
        if source is None and isinstance(weights, dict):
            source = weights.get(role) or weights.get(role.removesuffix("_in"))
        own = source is None or str(source).startswith("this file")
        if own:
            tensors, place = self.tensors, self.path.stem
        else:
            place = re.sub(r"\.(safetensors|json)$", "", str(source))
            tensors = read_tensors(self.path.with_name(f"{place}.safetensors"))
        state = {name[len(prefix) :]: value.float() for name, value in tensors.items() if name.startswith(prefix)}
        if not state:
            raise BrokenGoldenError(f"{role}: no tensor of '{place}' begins with '{prefix}'")
        return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file. Raises BrokenGoldenError."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise BrokenGoldenError(f"{path.name} is missing") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise BrokenGoldenError(f"{path.name} cannot be read: {' '.join(str(error).split())}") from error


def view(data: object, kind: type[View], place: str = "") -> View:
    """Part of a side-car, typed. Raises BrokenGoldenError naming the first field that is wrong."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = place + ".".join(str(part) for part in first["loc"])
        raise BrokenGoldenError(f"side-car field '{field}': {first['msg']}") from error


def read_golden(path: Path) -> Golden | None:
    """The side-car at `path`; None where the JSON is something else. Raises BrokenGoldenError where it is no JSON."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenGoldenError(f"side-car cannot be read: {error}") from error
    if not isinstance(data, dict):
        return None
    listed = [found[1] for name in data if (found := _LISTING.fullmatch(name))]
    if listed:  # names and shapes of a published network; whose, is in a field's name
        data |= {"family": "names", "kind": listed[0]}
    elif "family" not in data and isinstance(data.get("tensors"), dict):  # likewise; whose, is in the words of a field
        words = str(data.get("class_") or data.get("file", "")).split()
        data |= {"family": "names", "kind": words[0].removesuffix(",") if words else ""}
    if not isinstance(data.get("family"), str) or not isinstance(data.get("kind"), str):
        return None
    return Golden(path, data)


def read_cases(golden: Golden, kind: type[View], leaf: str) -> list[tuple[str, View]]:
    """The side-car's `cases`, each with what its tensors begin with; the case's tensor `.leaf` is always recorded.

    A case is found by its own `name` (or key), by its number (`case3`), or, failing both, by natural order.
    """
    stated = golden.data.get("cases")
    if isinstance(stated, dict):
        stated = [{"name": name, **case} for name, case in stated.items() if isinstance(case, dict)]
    if not isinstance(stated, list) or not stated:
        raise BrokenGoldenError("side-car has no cases")
    prefixes = [name[: -len(leaf) - 1] for name in golden.tensors if name.endswith(f".{leaf}")]
    prefixes.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    if len(prefixes) != len(stated):
        raise BrokenGoldenError(f"{len(stated)} cases, but {len(prefixes)} tensors '*.{leaf}'")
    cases: list[tuple[str, View]] = []
    for index, case in enumerate(stated):
        names = (str(case.get("name")) if isinstance(case, dict) else "", f"case{index}", prefixes[index])
        prefix = next(name for name in names if name in prefixes)
        cases.append((prefix, view(case, kind, f"cases.{index}.")))
    return cases


def grids(schedule_thw: Sequence[tuple[int, int, int]]) -> tuple[tuple[int, int], ...]:
    """Heights and widths of a schedule of (frames, height, width)."""
    if any(frames != 1 for frames, _, _ in schedule_thw):
        raise NotYetError("schedules of more than one frame")
    return tuple((height, width) for _, height, width in schedule_thw)


def bits_first(recorded_B1hwK: Tensor) -> Tensor:
    """Recorded bits or flips `[B,1,h,w,K]` as the product holds them, bool `[B,K,h,w]`."""
    return recorded_B1hwK.squeeze(1).movedim(-1, 1).to(torch.bool)
