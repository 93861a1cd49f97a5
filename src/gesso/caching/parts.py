"""How the tensors of one call are divided among the runs that share it, and put together again.

A part is one branch of one run. What is kept of a run is the same whoever it steps with.
Not here: what is done with the pieces (`sites`), who runs (`attach`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gesso.errors import RunError


class Part(NamedTuple):
    """One branch of one run, and the step that the run takes, of how many."""

    run: Hashable
    branch: str
    step: int
    of: int


class Division(Protocol):
    """Tensors of a call to pieces, one a part in order, and back.

    `pictures` divides rows of pictures alone, in networks that lay them out apart.
    """

    @property
    def parts(self) -> tuple[Part, ...]: ...

    @property
    def pictures(self) -> Division | None: ...

    def split(self, tensor: Tensor) -> list[Tensor]: ...

    def join(self, pieces: Sequence[Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class RowDivision:
    """Samples lie along the first axis, equally many to a part: pieces `[b,...]`."""

    parts: tuple[Part, ...]
    pictures: None = None

    def split(self, tensor: Tensor) -> list[Tensor]:
        if len(self.parts) == 1:
            return [tensor]
        if len(tensor) % len(self.parts):
            raise RunError(f"a step cache met {len(tensor)} rows, which {len(self.parts)} evaluations cannot share")
        return list(tensor.split(len(tensor) // len(self.parts)))

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


@dataclass(frozen=True)
class SpanDivision:
    """Tokens of all samples lie one after another in rows `[B,n,...]`: pieces `[1,length,...]`, in order of samples."""

    parts: tuple[Part, ...]
    spans: tuple[tuple[int, int], ...]
    rows: tuple[int, int]
    pictures: SpanDivision | None = None

    @cached_property
    def place(self) -> object:
        """Equal where the same branches lie at the same places."""
        return tuple(part.branch for part in self.parts), self.spans, self.rows

    @cached_property
    def run(self) -> Hashable | None:
        """The run that has several parts here and shares the call with no other."""
        runs = {part.run for part in self.parts}
        return runs.pop() if len(self.parts) > 1 and len(runs) == 1 else None

    def fits(self, pieces: Sequence[Tensor]) -> bool:
        """Whether pieces are as long as the parts are here."""
        return [piece.shape[1] for piece in pieces] == [length for _, length in self.spans]

    def split(self, tensor: Tensor) -> list[Tensor]:
        flat = tensor.flatten(0, 1)
        return [flat[None, begin : begin + length] for begin, length in self.spans]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat([pieces[index] for index in self._order], dim=1).unflatten(1, self.rows)[0]

    @cached_property
    def _order(self) -> list[int]:
        """The samples by where they lie."""
        return sorted(range(len(self.spans)), key=lambda index: self.spans[index][0])


def packed_division(parts: tuple[Part, ...], layout: Any) -> SpanDivision:
    """Of a network that packs samples by this layout; what samples see alike belongs to the first of them.

    Raises RunError for another number of samples than parts.
    """
    if len(layout.spans) != len(parts):
        raise RunError(f"a step cache met {len(layout.spans)} samples where the pipeline names {len(parts)}")
    owners: dict[tuple[int, int], Part] = {}
    for span, part in zip(layout.picture_spans, parts, strict=True):
        owners.setdefault(span, part)
    of_pictures = SpanDivision(tuple(owners.values()), tuple(owners), tuple(layout.pictures.source_Bn.shape))
    return SpanDivision(parts, layout.spans, tuple(layout.whole.source_Bn.shape), of_pictures)


def signatures(division: Division, args: Sequence[Any], kwargs: Mapping[str, Any], *, whole: bool) -> list[object]:
    """What each part's inputs look like, without how many share the call; `whole` is the first tensor's look alone."""
    if isinstance(division, SpanDivision):
        images = len(kwargs["latents"] if "latents" in kwargs else args[0])
        return [(length, *_looks(args, kwargs, images)) for _, length in division.spans]
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    batch = len(tensors[0]) if tensors and tensors[0].ndim else 1
    if "hidden_states" in kwargs:
        batch = len(kwargs["hidden_states"])
    looks = _looks(args, kwargs, batch)
    look = (batch // len(division.parts), *(looks[:1] if whole else looks))
    return [look] * len(division.parts)


def _looks(args: Sequence[Any], kwargs: Mapping[str, Any], batch: int) -> list[object]:
    """Shapes and dtypes of tensors among arguments, the main one first; a first axis of `batch` is left out."""
    named = {str(number): value for number, value in enumerate(args)} | dict(sorted(kwargs.items()))
    main = "hidden_states" if "hidden_states" in named else "0"
    order = [main, *(name for name in named if name != main)]
    found: list[object] = []
    for name in order:
        value = named.get(name)
        if isinstance(value, Tensor):
            shape = tuple(value.shape)
            found.append((name, shape[1:] if shape[:1] == (batch,) else shape, value.dtype))
    return found
