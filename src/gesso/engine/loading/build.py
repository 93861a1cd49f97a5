"""How a model is put together on this machine: the device, the dtype of the large matmuls, and the way to the device.

A loader reads its parts and hands them to `Build.place`; it never moves one itself, so that how parts lie in memory is
decided here for every family. Not here: which files (`weights`), which parts (the family's file beside this one).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Build:
    """What every loader is told.

    `device` is where the arithmetic runs; "meta" makes shapes without weights, to plan with.

    Example:
        >>> Build(device="meta").weights
        False
    """

    device: str
    dtype: torch.dtype = torch.float32

    @property
    def weights(self) -> bool:
        """Whether tensors are read at all."""
        return self.device != "meta"

    def place(self, parts: Mapping[str, nn.Module]) -> None:
        """Bring the named parts of one model to where they belong, in place; dtypes stay as they are."""
        for part in parts.values():
            nn.Module.to(part, self.device)  # diffusers' own `to` has remarks to make
