"""A picture on its way as a row of tokens that a scheduler of diffusers moves: what FLUX and Qwen-Image have in common.

Not here: what a network is told beside the tokens (each family's own state), schedulers (`sampling/schedulers`).
Shapes: L tokens, D their width, N evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gesso.pipelines.contract import Cost
from gesso.request import GenerationRequest
from gesso.sampling.schedulers import Scheduler


@dataclass(eq=False, kw_only=True)
class TokenState:
    """One picture: its tokens, its own scheduler, and where its last step pointed.

    `size` is in latent cells.
    """

    request: GenerationRequest
    seed: int
    size: tuple[int, int]
    scheduler: Scheduler
    timesteps_N: Tensor
    costs: tuple[Cost, ...]
    tokens_1LD: Tensor
    clean_1LD: Tensor | None = None
    index: int = 0

    @property
    def total(self) -> int:
        return len(self.timesteps_N)

    @property
    def remaining(self) -> int:
        return self.total - self.index

    @property
    def cost(self) -> Cost:
        return self.costs[self.index]

    def clean_tokens(self) -> Tensor:
        """About what the picture becomes, `[1,L,D]`: where the last step pointed."""
        return self.tokens_1LD if self.clean_1LD is None else self.clean_1LD

    def advance(self, velocity_1LD: Tensor) -> None:
        """Take the scheduler's step along this velocity."""
        timestep = self.timesteps_N[self.index]
        self.clean_1LD = self.tokens_1LD - (timestep / 1000).to(self.tokens_1LD.dtype) * velocity_1LD
        (self.tokens_1LD,) = self.scheduler.step(velocity_1LD, timestep, self.tokens_1LD, return_dict=False)
        self.index += 1


def join(rows: Sequence[Tensor]) -> Tensor:
    """Rows as one batch, without a copy where there is only one."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))
