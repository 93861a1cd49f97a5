"""How a model is put together on this machine: the device, the dtype of the large matmuls, and the memory mode.

A loader reads its parts and hands them to `Build.place`; it never moves one itself, so that how parts lie in memory is
decided here for every family. Not here: which files (`weights`), which parts (the family's file beside this one), what
modes there are (`memory_modes`) and what they do (`weights/placing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from gesso import allocator, stored
from gesso.devices import CPU, META, kind_of
from gesso.engine.acceleration import PLAIN, Acceleration
from gesso.engine.loading.accelerate import accelerate_parts
from gesso.memory_modes import FULL, MemoryMode
from gesso.models import components
from gesso.weights import digests
from gesso.weights.footprint import Footprint
from gesso.weights.placing import place
from gesso.weights.residency import Part


@dataclass(frozen=True, kw_only=True)
class Build:
    """What every loader is told.

    `device` is where the arithmetic runs; "meta" makes shapes without weights, to plan with. `memory` says which parts
    stay there, `acceleration` what networks attend by and whether they are compiled. Parts that another model has are
    used again where they are `shared`. `networks` are the parts by role,
    `footprint` is what they weigh, and `placed` those that come and go, once they are placed.

    Example:
        >>> Build(device="meta").weights
        False
    """

    device: str
    dtype: torch.dtype = torch.float32
    memory: MemoryMode = FULL
    acceleration: Acceleration = PLAIN
    shared: bool = True
    networks: dict[str, nn.Module] = field(default_factory=dict, compare=False)
    footprint: Footprint = field(default_factory=Footprint, compare=False)
    placed: dict[str, Part] = field(default_factory=dict, compare=False)

    @property
    def weights(self) -> bool:
        """Whether tensors are read at all."""
        return self.device != META

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within it parts are read: those that are here already are used again, and tensors are left in their files."""
        # Not the build itself, which knows the parts: what parts are found by must not keep them.
        placement = (self.device, self.dtype, self.memory, self.acceleration)
        held = components.held_once(placement, digests.sha256) if self.shared else nullcontext()
        with stored.deferred(), held:
            yield

    @contextmanager
    def reading_guest(self, role: str) -> Iterator[None]:
        """Within it a part of this role is read in place of the last one; of one that fails nothing stays."""
        self.forget(role)  # before the next is read: both need not fit
        try:
            # Parts that come and go change their tensors later, which those of inference mode would not let them.
            with self.reading(), torch.inference_mode(False), torch.no_grad():
                yield
        except BaseException:
            self.forget(role)
            raise

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

    def return_to(self, role: str) -> Callable[[], None]:
        """What puts the part that now has a role back into it, once another one took its place."""
        network, part = self.networks[role], self.placed.get(role)

        def again() -> None:
            self.networks[role] = network
            self.placed.pop(role, None)
            if part is not None:
                self.placed[role] = part

        return again

    def forget(self, role: str) -> None:
        """Let go of a part that another one of its role follows; it stays as long as somebody else uses it."""
        self.networks.pop(role, None)
        self.placed.pop(role, None)
        self.footprint.forget(role)
