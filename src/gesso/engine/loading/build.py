"""How a model is put together on this machine: the device, the dtype of the large matmuls, and the memory mode.

A loader reads its parts and hands them to `Build.place`; it never moves one itself, so that how parts lie in memory is
decided here for every family. Not here: which files (`weights`), which parts (the family's file beside this one), what
modes there are (`memory_modes`) and what they do (`weights/placing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from gesso import allocator
from gesso.devices import CPU, META, kind_of
from gesso.engine.acceleration import PLAIN, Acceleration
from gesso.engine.loading.accelerate import accelerate_parts
from gesso.memory_modes import FULL, MemoryMode
from gesso.models import components
from gesso.weights.footprint import Footprint
from gesso.weights.placing import place
from gesso.weights.residency import Part


@dataclass(frozen=True, kw_only=True)
class Build:
    """What every loader is told.

    `device` is where the arithmetic runs; "meta" makes shapes without weights, to plan with. `memory` says which parts
    stay there, `acceleration` what networks attend by and whether they are compiled. `networks` are the parts by role,
    `footprint` is what they weigh, and `placed` those that come and go, once they are placed.

    Example:
        >>> Build(device="meta").weights
        False
    """

    device: str
    dtype: torch.dtype = torch.float32
    memory: MemoryMode = FULL
    acceleration: Acceleration = PLAIN
    networks: dict[str, nn.Module] = field(default_factory=dict, compare=False)
    footprint: Footprint = field(default_factory=Footprint, compare=False)
    placed: dict[str, Part] = field(default_factory=dict, compare=False)

    @property
    def weights(self) -> bool:
        """Whether tensors are read at all."""
        return self.device != META

    def place(self, parts: Mapping[str, nn.Module]) -> None:
        """Bring the named parts of one model to where they belong, in place; dtypes stay as they are.

        The tensors of parts that loaders left in their files (`gesso.stored`) are read here, or when they are used.
        Raises RequestError for a memory mode that the parts cannot have, WeightsError, MissingError, RunError.
        """
        for role, part in parts.items():
            self.footprint.add(role, part)
        self.networks.update(parts)
        if self.weights:
            if self.memory != FULL and kind_of(self.device) == CPU:
                allocator.keep_nothing()
            self.placed.update(place(parts, self.memory, self.device, there=components.is_placed, beside=self.placed))
            accelerate_parts(parts, self.acceleration)

    def forget(self, role: str) -> None:
        """Let go of a part that another one of its role follows; it stays as long as somebody else uses it."""
        self.networks.pop(role, None)
        self.placed.pop(role, None)
