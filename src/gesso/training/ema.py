"""Exponential moving average of parameters, kept beside them and swapped in for evaluation and export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialAverage:
    """average <- decay * average + (1 - decay) * parameter, for parameters only.

    Early on the decay is (1 + n) / (10 + n) of the number of updates n where that is smaller, so that a short run's
    average is not its random start; `warm=False` keeps it constant as published training code does.
    """

    def __init__(self, module: nn.Module, decay: float, *, warm: bool = True) -> None:
        self.decay, self.warm, self.updates = decay, warm, 0
        self.parameters = dict(module.named_parameters())
        self.averages = {name: value.detach().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warm else self.decay
        self.updates += 1
        averages = list(self.averages.values())
        torch._foreach_mul_(averages, decay)  # pyright: ignore[reportPrivateImportUsage]
        own = [self.parameters[name].detach() for name in self.averages]
        torch._foreach_add_(averages, own, alpha=1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    @torch.no_grad()
    def swapped_in(self) -> Iterator[None]:
        """Inside, the module holds the averages; afterwards its own parameters again."""
        own = {name: value.detach().clone() for name, value in self.parameters.items()}
        for name, value in self.parameters.items():
            value.copy_(self.averages[name])
        try:
            yield
        finally:
            for name, value in self.parameters.items():
                value.copy_(own[name])

    def state(self) -> dict[str, Tensor]:
        return {"updates": torch.tensor(self.updates), **{f"average.{k}": v for k, v in self.averages.items()}}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        self.updates = int(state["updates"])
        for name, value in self.averages.items():
            value.copy_(state[f"average.{name}"])
